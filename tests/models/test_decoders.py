"""Every architecture against transformers: logits, padding, caches, quantized weights, and GGUF files."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import checkpoint, tensors_of
from models.decoders import DECODERS, GOLDEN, LLAMA3, YARN, make

import jaxquant as jq
from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.models import load, logits
from jaxquant.models.config import config_of
from jaxquant.models.decoder import empty_cache, head, hidden
from jaxquant.models.load import _have_kernels
from jaxquant.models.to_gguf import _Grouped, described

SPEC = jq.OpSpec(jq.QuantSpec("int4", granularity="per_group", group_size=8))
RULES = [jq.Rule(r"embed_tokens|lm_head|\.gate\.|shared_expert_gate|norm", None), jq.Rule(r"\.weight$", SPEC)]


@functools.cache
def model(name):
    return load(GOLDEN / name)


@functools.cache
def reference(name):
    return tensors_of(GOLDEN / name / "ref.safetensors")


@functools.cache
def forward(config):
    return jax.jit(jq.quantized(functools.partial(logits, config)))


def close(found, wanted, mask, share=2e-5):
    found, wanted = (np.asarray(x, np.float32)[np.asarray(mask) == 1] for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=share * np.abs(wanted).max())


def of_reference(name, params=None, dtype=jnp.float32):
    ref, one = reference(name), model(name)
    params = one.params if params is None else params
    params = jax.tree.map(lambda x: x.astype(dtype), params) if dtype != jnp.float32 else params
    return forward(one.config)(params, ref["ids"], ref["mask"])


@pytest.mark.every
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_a_padded_batch(name):
    """In float32, within a few roundings of what transformers computes; bfloat16 weights in the file."""
    close(of_reference(name), reference(name)["logits"], reference(name)["mask"])


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_a_model_made_on_the_spot(name, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    ref = make(name, tmp_path, seed=1)
    one = load(tmp_path)
    assert one.ends == {2}
    close(forward(one.config)(one.params, ref["ids"], ref["mask"]), ref["logits"], ref["mask"])


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}


def test_dynamic_frequencies_on_the_spot(tmp_path, monkeypatch):
    """They are not scaled up to the length that the model is made for."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    monkeypatch.setitem(DECODERS, "dynamic", ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}))
    ref, one = make("dynamic", tmp_path), load(tmp_path)
    close(forward(one.config)(one.params, ref["ids"], ref["mask"]), ref["logits"], ref["mask"])


def test_dynamic_frequencies_of_longer_sequences_are_refused():
    one = model("llama")
    stated = json.loads((GOLDEN / "llama" / "config.json").read_text())
    configs = [config_of(stated | {"rope_parameters": p}) for p in (DYNAMIC, {"rope_theta": 100.0})]
    tokens = np.arange(64)[None] % 40
    found, wanted = (jax.jit(functools.partial(logits, config))(one.params, tokens) for config in configs)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(
        QuantError, match=r"^logits: the rotary embedding is dynamic; got tokens=\(1, 65\)\. Give at most 64"
    ):
        logits(configs[0], one.params, jnp.ones((1, 65), int))


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16(name):
    """Off by its roundings, of which each layer has a dozen, and by no more."""
    found = of_reference(name, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    if DECODERS[name][0].endswith(("Moe", "Mixtral")):  # a rounding can send a token to another expert
        return
    close(found, reference(name)["logits"], reference(name)["mask"], share=0.1)


@pytest.mark.parametrize("name", DECODERS)
def test_quantized_weights(name, tmp_path):
    """Codes in a file, experts too, give what the float model gives on their values."""
    jq.io.quantize_hf(GOLDEN / name, tmp_path / "q", RULES)
    one, ref = load(tmp_path / "q"), reference(name)
    assert one.config == model(name).config.with_mixtures(sorted=True)
    count = sum(isinstance(leaf, QTensor) for leaf in one.params.values())
    assert count == sum("_proj.weight" in key for key in one.config.shapes())
    found = forward(one.config)(one.params, ref["ids"], ref["mask"])
    values = jq.dequantize_params(one.params)
    close(found, of_reference(name, values), ref["mask"], share=2e-4)
    assert not np.allclose(found, ref["logits"], atol=1e-2)  # it is the quantized model that ran


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_padding_on_the_right(name):
    """The same tokens, moved to the other side."""
    ref, one = reference(name), model(name)
    pads = (ref["mask"] == 0).sum(1)
    turned = {key: np.stack([np.roll(x, -n, 0) for x, n in zip(ref[key], pads, strict=True)]) for key in ref}
    close(forward(one.config)(one.params, turned["ids"], turned["mask"]), turned["logits"], turned["mask"])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", ["gemma3", "mistral", "qwen2_moe"])
def test_with_a_cache(name, dtype):
    """The first tokens at once, the others one at a time: what the whole sequence gives; nearly, in int8."""
    ref, one = reference(name), model(name)
    config, first = one.config, 7
    batch, length = ref["ids"].shape
    cache = empty_cache(config, batch, length, dtype)
    valid = ref["mask"] == 1

    @jax.jit
    def run(params, tokens, cache, start):
        x, cache = hidden(config, params, tokens, valid, cache, start)
        return head(config, params, x), cache

    out, cache = run(one.params, ref["ids"][:, :first], cache, 0)
    found = [out]
    for at in range(first, valid.shape[1]):
        out, cache = run(one.params, ref["ids"][:, at : at + 1], cache, at)
        found.append(out)
    assert cache[0]["k"].dtype == dtype
    found = jnp.concatenate(found, 1)
    close(found, ref["logits"], ref["mask"], share=2e-5 if dtype == "float32" else 0.05)
    assert (dtype == "int8") == (float(jnp.abs(found - ref["logits"])[valid].max()) > 1e-3)


# -- names -------------------------------------------------------------------------------------------------------------


def rewritten(name, path, change, **config):
    """The checkpoint with other names, shapes and fields; ``change`` gets all tensors and returns them."""
    stated = json.loads((GOLDEN / name / "config.json").read_text())
    return checkpoint(path / "model", change(tensors_of(GOLDEN / name / "model.safetensors")), {**stated, **config})


@pytest.mark.every
@pytest.mark.parametrize(
    "head, layers", [("language_model.lm_head.", "language_model.model."), ("lm_head.", "model.language_model.")]
)
def test_the_text_model_of_a_larger_one(head, layers, tmp_path):
    stated = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    tensors = tensors_of(GOLDEN / "gemma3" / "model.safetensors")
    renamed = {name.replace("model.", layers, 1): array for name, array in tensors.items()}
    renamed |= {"vision_tower.embed.weight": np.ones(3, np.float32), f"{head}weight": np.ones((40, 32), np.float32)}
    config = {"model_type": "gemma3", "text_config": stated, "vision_config": {"hidden_size": 3}}
    one = load(checkpoint(tmp_path / "model", renamed, config))
    assert one.notes == ("1 tensors of the encoder of images are left out",)
    assert one.config == dataclasses.replace(model("gemma3").config, tied=False)  # the head that is in the file counts
    assert one.params.keys() == {*model("gemma3").params, "lm_head.weight"}


def test_experts_in_one_tensor(tmp_path):
    """Gates and what they gate as one, as transformers has them in memory."""

    def fuse(tensors):
        parts = {}
        for name in [name for name in tensors if ".experts." in name]:
            before, _, after = name.partition(".experts.")
            number, part, _ = after.split(".")
            parts.setdefault((before, {"w1": "gate", "w2": "down", "w3": "up"}[part]), {})[int(number)] = tensors.pop(
                name
            )
        stacks = {key: np.stack([experts[i] for i in sorted(experts)]) for key, experts in parts.items()}
        for before in {before for before, _ in stacks}:
            both = np.concatenate([stacks[before, "gate"], stacks[before, "up"]], 1)
            whole = before.replace("block_sparse_moe", "mlp")
            tensors |= {f"{whole}.experts.gate_up_proj": both, f"{whole}.experts.down_proj": stacks[before, "down"]}
        return tensors

    one = load(rewritten("mixtral", tmp_path, fuse))
    ref = reference("mixtral")
    assert one.params["model.layers.0.mlp.experts.gate_up_proj.weight"].shape == (4, 96, 32)
    for config in (one.config, one.config.with_mixtures(sorted=True)):
        close(forward(config)(one.params, ref["ids"], ref["mask"]), ref["logits"], ref["mask"])


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_sorted_tokens_go_through_the_same_experts(name):
    ref, one = reference(name), model(name)
    assert not any(layer.mixture.sorted for layer in one.config.layers if layer.mixture)  # float experts
    config = one.config.with_mixtures(sorted=True)
    close(forward(config)(one.params, ref["ids"], ref["mask"]), ref["logits"], ref["mask"])


def test_experts_that_no_kernel_takes_are_not_sorted(tmp_path):
    """With a range of the activation for each, with scattered groups, or some in float."""
    jq.io.quantize_hf(GOLDEN / "mixtral", tmp_path / "q", RULES)
    one, name = load(tmp_path / "q"), "model.layers.0.mlp.experts.up_proj.weight"
    order = jnp.broadcast_to(jnp.arange(32, dtype=jnp.int32), (4, 1, 32))
    leaves = one.params[name].replace(permutation=order), one.params[name].dequantize()
    others = [dataclasses.replace(one, params={**one.params, name: leaf}) for leaf in leaves]
    others += [dataclasses.replace(one, state={name: {"scale": jnp.ones(n)}}) for n in (1, 4)]
    assert list(map(_have_kernels, [one, *others])) == [True, False, False, True, False]


@pytest.mark.every
def test_tensors_without_effect(tmp_path):
    """Biases of zeros, which some writers give every layer, and tables that are computed."""
    zero, one = np.zeros(32, np.float32), np.ones(32, np.float32)
    name = "model.layers.0.self_attn.o_proj.bias"
    extra = {name: zero, "model.layers.0.self_attn.rotary_emb.inv_freq": one}
    found = load(rewritten("mistral", tmp_path, lambda tensors: tensors | extra))
    assert found.params.keys() == model("mistral").params.keys()
    with pytest.raises(jq.QuantError, match=r"o_proj\.bias is not a parameter of mistral"):
        load(rewritten("mistral", tmp_path, lambda tensors: tensors | {name: one}))


@pytest.mark.every
def test_experts_that_differ_are_refused(tmp_path):
    def without_one(tensors):
        del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
        return tensors

    with pytest.raises(jq.QuantError, match=r"gate_proj\.weight: the experts of a layer must all be there"):
        load(rewritten("mixtral", tmp_path, without_one))


# -- GGUF --------------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": "llama", "llama_biased": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
}  # fmt: skip
STEMS = {
    "gate": "ffn_gate_inp", "experts.gate_proj": "ffn_gate_exps", "experts.up_proj": "ffn_up_exps",
    "experts.down_proj": "ffn_down_exps", "shared_expert_gate": "ffn_gate_inp_shexp",
    "shared_expert.gate_proj": "ffn_gate_shexp", "shared_expert.up_proj": "ffn_up_shexp",
    "shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip


def metadata_of(name):
    """What llama.cpp's converter writes about the decoder, where that can say what it computes."""
    architecture, config = ARCHITECTURES[name], model(name).config
    own = {
        "block_count": len(config.layers), "embedding_length": config.hidden_size, "context_length": config.context,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    own: dict[str, Any] = {key: np.uint32(value) for key, value in own.items()}
    own["attention.layer_norm_rms_epsilon"] = np.float32(config.rms_norm_eps)
    own["rope.freq_base"] = np.float32({"llama": 100, "qwen3": 100, "gemma3": 1000, "mixtral": 1e6}.get(name, 10000))
    if name == "qwen3":
        own |= {"rope.scaling.type": "yarn", "rope.scaling.factor": np.float32(4)}
        own["rope.scaling.original_context_length"] = np.uint32(16)
    if name == "gemma3":
        own |= {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": np.float32(8),
            "rope.freq_base_swa": np.float32(50),
        }
        own["attention.sliding_window_pattern"] = np.uint32(2)
    if name in ("gemma2", "gemma3"):
        own["attention.sliding_window"] = np.uint32(4)
    for key, cap in (("attn_logit_softcapping", config.score_cap), ("final_logit_softcapping", config.logit_cap)):
        own |= {key: np.float32(cap)} if cap else {}
    mixture = next((layer.mixture for layer in config.layers if layer.mixture), None)
    if mixture:
        own |= {"expert_count": np.uint32(mixture.experts), "expert_used_count": np.uint32(mixture.chosen)}
        if name != "mixtral":
            own["expert_feed_forward_length"] = np.uint32(mixture.intermediate_size)
        if mixture.shared:
            own["expert_shared_feed_forward_length"] = np.uint32(mixture.shared)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in own.items()}


def as_gguf(name, path):
    """The decoder as llama.cpp's converter writes it."""
    params, layer = dict(model(name).params), model(name).config.layers[0]
    if name == "llama":  # the factors of Llama 3's scaling are a tensor
        plain = 1 / np.float32(100) ** (np.arange(0, 8, 2, dtype=np.float32) / 8)
        params["rope_freqs.weight"] = plain / np.asarray(layer.rope.frequencies, np.float32)
    for key in list(params):
        part, _, stem = key.removesuffix(".weight").partition(".mlp.")
        if stem in STEMS:
            leaf = params.pop(key)
            leaf = leaf.reshape(-1) if stem == "shared_expert_gate" else leaf
            params[f"blk.{part.rpartition('.')[2]}.{STEMS[stem]}.weight"] = leaf
    metadata = {**metadata_of(name), "tokenizer.ggml.eos_token_id": np.uint32(2)}
    jq.io.save_gguf(path, params, metadata=metadata, names="hf")


def test_the_gate_of_a_shared_expert_is_float_in_gguf():
    """llama.cpp has it as a vector, and a QTensor has another shape."""
    gate = jq.quantize(jnp.ones((1, 32)), jq.QuantSpec("int8"), reduce_axes=(-1,))
    leaves = _Grouped({"model.layers.0.mlp.shared_expert_gate.weight": gate}, {}, "here")
    with pytest.raises(QuantError, match=r"here, .*shared_expert_gate.*in float; .*Rule\('shared_expert_gate', None\)"):
        leaves["blk.0.ffn_gate_inp_shexp.weight"]


@pytest.mark.every
def test_which_file_of_a_directory(tmp_path):
    """A GGUF file beside a configuration is the model, if there are no other weights; one of several must be named."""
    (tmp_path / "config.json").write_text("{}")
    as_gguf("qwen2", tmp_path / "a.gguf")
    assert load(tmp_path).path == str(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(jq.QuantError, match=r"several GGUF files; got files=\('a.gguf', 'b.gguf'\). Name one"):
        load(tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(name, tmp_path):
    """The logits of the directory; of Gemma with the scale that llama.cpp has, and without windows that it has not."""
    as_gguf(name, tmp_path / "model.gguf")
    one = load(tmp_path)
    assert one.ends == {2}
    config, mask, ids = model(name).config, *(reference(name)[key] for key in ("mask", "ids"))
    if name in ("mixtral", "qwen2"):
        config = dataclasses.replace(
            config, layers=tuple(dataclasses.replace(layer, window=None) for layer in config.layers)
        )
    if name in ("gemma2", "gemma3"):
        assert one.config.query_scale == config.head_dim**-0.5
        config = dataclasses.replace(config, query_scale=one.config.query_scale)
    assert [layer.window for layer in one.config.layers] == [layer.window for layer in config.layers]
    found = forward(one.config)(one.params, ids, mask)
    close(found, forward(config)(model(name).params, ids, mask), mask)


#: Fields with which llama.cpp computes what the decoder does.
SAID = {"gemma2": {"query_pre_attn_scalar": 8}, "gemma3": {"query_pre_attn_scalar": 8}}


def written(name, directory, **fields):
    """The directory as `jaxquant quantize --to gguf` and `convert --to gguf` describe it."""
    stated = json.loads((GOLDEN / name / "config.json").read_text()) | SAID.get(name, {}) | fields
    params = jq.io.load_hf(GOLDEN / name)[0]
    return stated, described(params, stated, directory, function="quantize")


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mistral"])
def test_written_as_gguf(name, tmp_path):
    """The same parameters and configuration when it is read, and the keys of llama.cpp's converter."""
    if name in ("qwen2_moe", "qwen3_moe"):
        with pytest.raises(jq.QuantError, match="all of its layers are mixtures of experts"):
            written(name, tmp_path)
        return
    stated, form = written(name, tmp_path)
    jq.io.save_gguf(tmp_path / "a.gguf", form.leaves, metadata=form.metadata, names="hf")
    one, wanted = load(tmp_path), config_of(stated)
    windows = name == "qwen2"  # a note says so
    layers = tuple(dataclasses.replace(layer, window=None) for layer in wanted.layers) if windows else wanted.layers
    got, want = ([layer.rope.frequencies for layer in x] for x in (one.config.layers, layers))
    np.testing.assert_allclose(got, want, 1e-6)
    assert [(x.window, x.mixture) for x in one.config.layers] == [(x.window, x.mixture) for x in layers]
    same = {"layers": wanted.layers, "rms_norm_eps": wanted.rms_norm_eps}
    assert dataclasses.replace(one.config, **same) == wanted
    for key, leaf in model(name).params.items():
        np.testing.assert_array_equal(one.params[key], leaf, err_msg=key)
    assert ("attends to all tokens" in str(form.notes)) == (name in ("qwen2", "mistral", "mixtral"))
    if name in ARCHITECTURES:
        keys = metadata_of(name)
        assert {key: form.metadata.get(key) for key in keys} == keys


@pytest.mark.every
@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("gemma2", {"query_pre_attn_scalar": 20}, r"queries are scaled by 8\*\*-0.5, here by 0.2236"),
        ("gemma2", {"attn_logit_softcapping": None}, "its caps of scores and logits are not those of the model"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "its second layers see all tokens"),
        ("qwen3", {"attention_bias": True}, r"it has no biases of self_attn.k_proj, self_attn.o_proj"),
        ("qwen3", {"rope_parameters": LLAMA3}, "it does not scale rotary embeddings as Llama 3 does"),
        ("qwen3", {"rope_parameters": YARN | {"truncate": False}}, "it rounds the bounds of yarn"),
        ("llama", {"hidden_act": "gelu"}, "its activation is not gelu"),
        ("llama", {"model_type": "olmo2"}, "rotary embeddings that are scaled, .* cannot be written"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, fields, message, tmp_path):
    with pytest.raises(jq.QuantError, match=message):
        written(name, tmp_path, **fields)

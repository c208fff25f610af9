"""What `load_hf` does besides reading: name maps, rules, dtypes, shardings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import GOLDEN, checkpoint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from narrowed import untyped

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core.qtensor import QTensor
from jaxquant.io import NameMap
from jaxquant.io.hf import BERT, GPT2, LLAMA, OPT, VIT

BASE, GPTQ = GOLDEN / "base", GOLDEN / "models" / "gptq_w4g64_actorder"
is_qtensor = lambda x: isinstance(x, QTensor)  # noqa: E731


# -- names ------------------------------------------------------------------------------------------------------------


def test_llama_map():
    flat, _ = jq.io.load_hf(GPTQ)
    tree, _ = jq.io.load_hf(GPTQ, names=LLAMA)
    assert tree.keys() == {"embed_tokens", "norm", "lm_head", "layers_0", "layers_1"}
    q = tree["layers_1"]["self_attn"]["q_proj"]["kernel"]
    stored = flat["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == stored.shape[::-1]
    np.testing.assert_array_equal(q.codes, stored.codes)  # a transpose moves no codes
    np.testing.assert_array_equal(q.dequantize(), stored.dequantize().T)
    kernel = tree["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel, flat["lm_head.weight"].T)
    again = LLAMA.apply(flat)
    assert jax.tree.structure(again) == jax.tree.structure(tree)


@pytest.mark.parametrize(
    "names, name, path",
    [
        (LLAMA, "model.layers.12.self_attn.q_proj.bias", "layers_12/self_attn/q_proj/bias"),
        (LLAMA, "model.layers.0.self_attn.k_norm.weight", "layers_0/self_attn/k_norm/scale"),
        (LLAMA, "model.layers.0.mlp.up_proj.input_scale", None),
        (OPT, "model.decoder.layers.3.fc1.weight", "layers_3/fc1/kernel"),
        (OPT, "decoder.embed_positions.weight", "embed_positions/embedding"),
        (OPT, "model.decoder.layers.0.self_attn_layer_norm.bias", "layers_0/self_attn_layer_norm/bias"),
        (GPT2, "transformer.h.11.attn.c_attn.weight", "h_11/attn/c_attn/kernel"),
        (GPT2, "wte.weight", "wte/embedding"),
        (GPT2, "h.0.attn.bias", None),
        (BERT, "bert.encoder.layer.2.attention.self.key.weight", "layer_2/attention/self/key/kernel"),
        (BERT, "embeddings.word_embeddings.weight", "embeddings/word_embeddings/embedding"),
        (BERT, "encoder.layer.2.output.LayerNorm.weight", "layer_2/output/LayerNorm/scale"),
        (BERT, "encoder.layer.2.output.dense.bias", "layer_2/output/dense/bias"),
        (VIT, "vit.embeddings.patch_embeddings.projection.weight", "embeddings/projection/kernel"),
        (VIT, "vit.encoder.layer.5.attention.attention.query.weight", "layer_5/attention/query/kernel"),
        (VIT, "vit.encoder.layer.5.layernorm_before.weight", "layer_5/layernorm_before/scale"),
    ],
)
def test_maps_that_come_along(names, name, path):
    assert names.path(name) == path


def test_transforms_turn_leaves():
    w = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    tree = VIT.apply({"vit.embeddings.patch_embeddings.projection.weight": w})
    np.testing.assert_array_equal(tree["embeddings"]["projection"]["kernel"], w.transpose(2, 3, 1, 0))


def test_all_mismatches_are_reported_at_once(tmp_path):
    tensors = {
        "model.layers.0.mlp.upp_proj.weight": np.ones((2, 2), np.float32),
        "model.norm.weight": np.ones(2, np.float32),
        "strange": np.ones(2, np.float32),
    }
    with pytest.raises(jq.QuantError) as caught:
        jq.io.load_hf(checkpoint(tmp_path, tensors), names=LLAMA)
    text = str(caught.value)
    assert "model.layers.0.mlp.upp_proj.weight: no row matches (nearest pattern: model\\.layers" in text
    assert "strange: no row matches" in text
    assert "model.norm.weight" not in text
    assert "mismatches=2" in text


def test_two_tensors_in_one_place():
    names = NameMap([(r"a|b", "x", "as it is"), (r"c", "x/y", "as it is")])
    with pytest.raises(jq.QuantError, match=r"b: goes to x, as a does(.|\n)*c: goes to x/y, inside x"):
        names.apply({"a": np.ones(1), "b": np.ones(1), "c": np.ones(1)})


@pytest.mark.parametrize(
    "row, message", [(("(", "x", "as it is"), "bad regular expression"), (("a", "x", "flip"), "unknown transform")]
)
def test_bad_maps(row, message):
    with pytest.raises(jq.QuantError, match=message):
        NameMap([row])


# -- rules ------------------------------------------------------------------------------------------------------------


def test_float_weights_are_quantized_as_they_are_read():
    rules = [jq.Rule("embed|norm|lm_head", None), jq.Rule("weight", recipes.w4a16(group_size=32))]
    params, info = jq.io.load_hf(BASE, rules=rules)
    floats, _ = jq.io.load_hf(BASE)
    spec = recipes.w4a16(group_size=32).weight
    assert spec is not None
    assert info.format == "float"
    assert len(info.modules) == sum(map(is_qtensor, params.values())) == 14
    for name, leaf in params.items():
        if is_qtensor(leaf):
            wanted = jq.quantize(floats[name], spec, reduce_axes=(-1,))
            np.testing.assert_array_equal(leaf.dequantize(), wanted.dequantize())
            assert leaf.dtype == floats[name].dtype
        else:
            np.testing.assert_array_equal(leaf, floats[name])


def test_rules_that_do_not_fit(tmp_path):
    with pytest.raises(jq.QuantError, match=r"a rule matches no weight; got pattern=.* Nearest weights: .*q_proj"):
        jq.io.load_hf(BASE, rules=[jq.Rule("layers.0.self_attn.q_prj", recipes.w8a16())])
    with pytest.raises(jq.QuantError, match="the checkpoint is quantized already, as GPTQ"):
        jq.io.load_hf(GPTQ, rules=[jq.Rule("q_proj", recipes.w8a16())])
    folder = checkpoint(tmp_path, {"a.weight": np.full((2, 2), np.nan, np.float32)})
    with pytest.raises(jq.QuantError, match=r"'a.weight': a weight must be finite"):
        jq.io.load_hf(folder, rules=[jq.Rule("a", recipes.w8a16())])


@pytest.mark.parametrize("dtype", ["int8", "nonsense", jnp.float8_e4m3fn])
def test_dtypes_must_be_floats(dtype):
    with pytest.raises(jq.QuantError, match="dtype must be a float dtype"):
        jq.io.load_hf(BASE, dtype=dtype)


def test_no_such_place(tmp_path):
    with pytest.raises((jq.QuantError, OSError)):
        jq.io.load_hf(tmp_path / "nowhere")


# -- shardings --------------------------------------------------------------------------------------------------------


def test_leaves_are_put_where_they_belong():
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    rows = NamedSharding(mesh, PartitionSpec("model", None))
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, _ = jq.io.load_hf(GPTQ)
    for sharding in ({name: rows}, lambda path: rows if path == name else None):
        params, _ = jq.io.load_hf(GPTQ, sharding=sharding)
        q = params[name]
        assert q.codes.sharding.spec == PartitionSpec("model", None)
        assert q.permutation.sharding.is_fully_replicated
        np.testing.assert_array_equal(q.dequantize(), plain[name].dequantize())
        assert len(params["model.norm.weight"].sharding.device_set) == 1
    params, _ = jq.io.load_hf(GPTQ, sharding=NamedSharding(mesh, PartitionSpec()))
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(params))


def test_columns_of_a_permuted_weight_over_devices():
    """Cut along the permuted axis: the same values, wherever their columns lie."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    columns = NamedSharding(mesh, PartitionSpec(None, "model"))
    name = "model.layers.0.self_attn.q_proj.weight"
    plain, _ = jq.io.load_hf(GPTQ)
    params, _ = jq.io.load_hf(GPTQ, sharding={name: columns})
    np.testing.assert_array_equal(params[name].dequantize(), plain[name].dequantize())
    x = jax.device_put(np.asarray(np.random.default_rng(0).normal(size=(4, 128)), jnp.float32))
    apply = lambda p, x: x @ p.T  # noqa: E731
    wanted = x @ plain[name].dequantize(jnp.float32).T
    found = jax.jit(jq.quantized(apply))(params[name].replace(dtype=jnp.float32), x)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max()))


def test_bad_shardings():
    with pytest.raises(jq.QuantError, match="not a sharding; got sharding='str'"):
        untyped.io.load_hf(BASE, sharding="model")


def test_it_can_be_saved_and_loaded(tmp_path):
    params, _ = jq.io.load_hf(GPTQ, names=LLAMA)
    jq.io.save(tmp_path / "model.safetensors", params)
    back = jq.io.load(tmp_path / "model.safetensors")
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_info_prints_one_line_per_weight():
    _, info = jq.io.load_hf(GPTQ)
    text = str(info)
    assert re.search(r"self_attn.q_proj.weight +QTensor\(int4\[128, 128\] -> float16, group 64 on axis -1", text)
    assert "act-order: columns stored by group" in text
    assert info.config["bits"] == 4
    assert info.model["hidden_size"] == 128

"""Gram matrices from a text, and quantizing with them in one command."""

import functools
import gc
import json
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models.decoders import GOLDEN
from models.test_commands import checkpoint, invoke

import jaxquant as jq
from jaxquant.io.safetensors import TensorSpec, write_safetensors
from jaxquant.io.sharded import Checkpoint
from jaxquant.models import calibration, decoder, load, logits
from jaxquant.models.calibration import calibrated
from jaxquant.models.decoder import _mixed
from jaxquant.transform.methods import method_of

assert checkpoint  # a fixture
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs! " * 4


def grams(source, tokens, names, place, **options):
    """The Gram matrices of the inputs of weights, as GPTQ asks for them."""
    specs = dict.fromkeys(names, jq.QuantSpec("int8"))
    calibrated(source, tokens, specs, place, method=method_of("test", "gptq"), **options)


def as_files(place):
    """The Gram matrices that a run has left."""
    return arrays(place / "grams")


def arrays(place):
    """All tensors of a checkpoint."""
    found = Checkpoint(place, function="test")
    return {name: found.array(name) for name in found.tensors}


def test_grams_are_those_of_the_inputs(tmp_path):
    """Of the first layer's projections the inputs are known: the normalized embeddings of the tokens."""
    model = load(GOLDEN / "llama")
    tokens = np.random.default_rng(0).integers(3, 40, 50)
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    grams(GOLDEN / "llama", tokens, [q, down], tmp_path / "run", window=16)
    found = as_files(tmp_path / "run")
    x = np.asarray(model.params["model.embed_tokens.weight"], np.float64)[tokens[:48]]
    gain = np.asarray(model.params["model.layers.0.input_layernorm.weight"], np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.rms_norm_eps) * gain
    np.testing.assert_allclose(found[q], x.T @ x, rtol=2e-2, atol=2e-2 * np.abs(x.T @ x).max())  # in bfloat16
    assert found[down].shape == (48, 48)
    for bad, rule in (((tokens, ["nothing"]), "no weights with inputs"), ((tokens[:1], [q]), "too short")):
        with pytest.raises(jq.QuantError, match=rule):
            grams(GOLDEN / "llama", *bad, tmp_path / "other")
    with pytest.raises(jq.QuantError, match="interrupted run of something else"):
        grams(GOLDEN / "llama", tokens[::-1].copy(), [q], tmp_path / "run")


def in_float32(name, tmp_path):
    """A golden decoder with weights in float32, so that both ways round alike."""
    place = tmp_path / name
    params = load(GOLDEN / name).params
    place.mkdir()
    stated = json.loads((GOLDEN / name / "config.json").read_text()) | {"dtype": "float32"}
    (place / "config.json").write_text(json.dumps(stated))
    tensors = {n: np.asarray(leaf) for n, leaf in params.items()}
    experts = [n for n in tensors if ".experts." in n]
    for n in experts:  # as files have them, one by one
        head, _, last = n.partition(".experts.")
        tensors |= {f"{head}.experts.{i}.{last}": one for i, one in enumerate(tensors.pop(n))}
    jq.io.save(place / "model.safetensors", tensors)
    return place


@pytest.mark.parametrize("name", ["gemma2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_layers_by_themselves_see_what_they_see_in_the_whole_model(name, tmp_path):
    place, tokens = in_float32(name, tmp_path), np.random.default_rng(1).integers(3, 40, 40)
    model = load(place)
    names = [n for n in model.params if n.endswith("_proj.weight")]
    grams(place, tokens, names, tmp_path / "run", window=20)
    found = as_files(tmp_path / "run")
    fn = functools.partial(logits, model.config)
    plan = jq.make_plan(fn, model.params, jnp.zeros((1, 20), int), rules=[jq.Rule("_proj.weight$", "w8a16")])
    batches = [(jnp.asarray(tokens[i : i + 20], jnp.int32)[None],) for i in (0, 20)]
    stats = jq.calibrate(fn, plan, model.params, batches, collect={"gram": jq.calibration.Gram()})
    assert set(found) == set(names)
    for n in names:
        wanted = np.asarray(stats[n]["gram"]["gram"][0])
        np.testing.assert_allclose(found[n], wanted, atol=1e-4 * np.abs(wanted).max())


def test_experts_see_the_tokens_that_have_chosen_them(tmp_path):
    place, tokens = in_float32("mixtral", tmp_path), np.random.default_rng(2).integers(3, 40, 24)
    model = load(place)
    of = "model.layers.0.mlp.experts.{}.up_proj.weight"
    grams(place, tokens, [of.format(i) for i in range(4)], tmp_path / "run", window=24)
    found, p = as_files(tmp_path / "run"), {n: np.asarray(leaf, np.float64) for n, leaf in model.params.items()}
    seen = []

    def watched(config, mixture, part, x):
        seen.append(x[0])
        return _mixed(config, mixture, part, x)

    @jax.jit
    def inputs(params, ids):
        decoder.block(model.config, 0, params, decoder.embedded(model.config, params, ids))
        return seen.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_mixed", watched)
        x = np.asarray(inputs(model.params, tokens.astype(np.int32)[None]), np.float64)
    chosen = np.argsort(-(x @ p["model.layers.0.mlp.gate.weight"].T), axis=-1)[:, :2]
    for i in range(4):
        mine = x[(chosen == i).any(-1)]
        assert len(mine) < len(x)
        np.testing.assert_allclose(found[of.format(i)], mine.T @ mine, atol=1e-4 * np.abs(x.T @ x).max())


def test_an_interrupted_run_goes_on_with_the_next_layer(tmp_path, monkeypatch):
    tokens = np.random.default_rng(0).integers(3, 40, 32)
    names = [n for n in load(GOLDEN / "gemma3").params if n.endswith("_proj.weight")]
    grams(GOLDEN / "gemma3", tokens, names, tmp_path / "whole", window=16)
    read, done = [], []
    real = calibration._Files.read

    def watched(files, whole, dtype):
        read.append(".".join(whole.split(".")[:3]))
        return real(files, whole, dtype)

    def stop(i, _):
        if i == 2 and not done:
            done.append(i)
            raise KeyboardInterrupt

    monkeypatch.setattr(calibration._Files, "read", watched)
    with pytest.raises(KeyboardInterrupt):
        grams(GOLDEN / "gemma3", tokens, names, tmp_path / "cut", window=16, progress=stop)
    assert {p.name for p in (tmp_path / "cut").rglob("*") if p.is_file()} == {
        "run.json", "layer-00000.safetensors", "layer-00001.safetensors", "states-00002.npy",
    }  # fmt: skip
    assert list(dict.fromkeys(read)) == ["model.embed_tokens.weight", "model.layers.0", "model.layers.1"]
    read.clear()
    grams(GOLDEN / "gemma3", tokens, names, tmp_path / "cut", window=16, progress=stop)
    assert set(read) == {"model.layers.2"}
    for name, gram in as_files(tmp_path / "whole").items():
        np.testing.assert_array_equal(gram, as_files(tmp_path / "cut")[name])


def moved(name, tmp_path, tokens, method, spec, pattern="_proj.weight$"):
    """A decoder's parameters, and those of its files with the tensors that a method has moved scales between."""
    place = in_float32(name, tmp_path)
    before = arrays(place)
    specs = {n: spec for n in before if re.search(pattern, n)}
    found = calibrated(place, tokens, specs, tmp_path / "run", method=method_of("test", method), window=20)
    return place, before, found


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mixtral", "qwen2_moe"))]
)
def test_moved_scales_are_those_of_the_whole_model_and_keep_its_function(name, tmp_path):
    tokens = np.random.default_rng(1).integers(3, 40, 40)
    spec = jq.QuantSpec("int4", granularity=jq.PerGroup(8))
    place, before, found = moved(name, tmp_path, tokens, "awq", spec)
    assert found.grams is None  # nothing reads them
    after = arrays(found.moved)
    changed = {n for n in after if not np.array_equal(after[n], before[n])}
    norms = {"input_layernorm", "post_attention_layernorm"}
    assert {n.split(".")[-2] for n in changed} >= norms | {"q_proj", "up_proj", "down_proj"}
    model = load(place)
    fn, ids = functools.partial(logits, model.config), jnp.asarray(tokens, jnp.int32).reshape(2, 20)
    shutil.copytree(place, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    jq.io.save(tmp_path / "other" / "model.safetensors", before | after)
    other = load(tmp_path / "other")
    wanted = jax.jit(fn)(model.params, ids)
    np.testing.assert_allclose(jax.jit(fn)(other.params, ids), wanted, atol=1e-4 * float(jnp.abs(wanted).max()))
    rules = [jq.Rule("_proj.weight$", jq.OpSpec(spec)), jq.Rule(".*", None)]
    plan = jq.make_plan(fn, model.params, ids, rules=rules)
    collect = {"gram": jq.calibration.Gram(), "mean": jq.calibration.ChannelMean()}
    stats = jq.calibrate(fn, plan, model.params, [(ids[:1],), (ids[1:],)], collect=collect)
    pairs = jq.invariances.scale_pairs(fn, plan, model.params, ids)
    whole = jq.invariances.awq(model.params, plan, pairs, stats)
    for n, leaf in other.params.items():
        np.testing.assert_allclose(leaf, whole[n], rtol=1e-3, err_msg=n)


def test_grams_are_those_of_the_moved_model(tmp_path):
    """Inputs are divided by what the weights of the layer were multiplied with."""
    tokens = np.random.default_rng(3).integers(3, 40, 40)
    q, norm = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"
    place, before, found = moved("llama", tmp_path, tokens, "awq+gptq", jq.QuantSpec("int3"), re.escape(q))
    grams(place, tokens, [q], tmp_path / "plain", window=20)
    ratio = before[norm] / arrays(found.moved)[norm]
    plain = as_files(tmp_path / "plain")[q]
    np.testing.assert_allclose(arrays(found.grams)[q] * np.outer(ratio, ratio), plain, atol=1e-4 * np.abs(plain).max())


def test_a_head_of_its_own_is_calibrated_too(tmp_path):
    tokens = np.random.default_rng(4).integers(3, 40, 40)
    _, before, found = moved("qwen2", tmp_path, tokens, "awq+gptq", jq.QuantSpec("int4"), "^lm_head")
    assert set(arrays(found.grams)) == {"lm_head.weight"}
    assert set(arrays(found.moved)) <= {"lm_head.weight", "model.norm.weight"} & set(before)


def test_methods_that_cannot_be(tmp_path, checkpoint):
    (tmp_path / "text").write_text(TEXT)
    source, text = checkpoint / "float", ("--calibrate", tmp_path / "text")
    for options, rule in (
        (("--method", "awq"), "Give --calibrate TEXT"),
        (("--method", "gptq"), "Give --calibrate TEXT, or --grams FILE"),
        (("--method", "rtn", *text), "does not look at inputs"),
        (("--method", "awg", *text), "Nearest: 'awq'"),
        (("--method", "w4a16"), "this is a recipe"),
    ):
        assert rule in invoke("quantize", source, tmp_path / "out", *options, code=1).output
    assert {path.name for path in tmp_path.iterdir()} == {"text"}


def test_a_command_from_a_text_to_codes(checkpoint, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    float_model = load(checkpoint / "float")
    tokens = np.asarray([float_model.tokenizer.encode(TEXT)[:60]])
    expected = jax.jit(functools.partial(logits, float_model.config))(float_model.params, tokens)
    lost, small = {}, ("--bits", 3, "--group-size", 16)
    text = ("--calibrate", tmp_path / "text")
    for name, options in (
        ("rtn", ()),
        ("both", (*text, "--method", "awq+gptq")),
    ):
        invoke("quantize", checkpoint / "float", tmp_path / name, *small, *options)
        assert {path.name for path in tmp_path.iterdir()} <= {"text", "rtn", "both"}  # nothing is left beside it
        model = load(tmp_path / name)
        found = jax.jit(jq.quantized(functools.partial(logits, model.config)))(model.params, tokens)
        lost[name] = float(np.linalg.norm(np.asarray(found) - np.asarray(expected)))
    assert lost["both"] < 0.9 * lost["rtn"]
    assert (
        "would be written"
        in invoke("quantize", checkpoint / "float", tmp_path / "x", *small, *text, "--dry-run").output
    )
    for more in ((), ("--dry-run",)):
        taken = invoke("quantize", checkpoint / "float", tmp_path / "rtn", *small, *text, *more, code=1).output
        assert "the destination exists" in taken
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xff")
    output = invoke(
        "quantize", checkpoint / "float", tmp_path / "x", *small, "--calibrate", tmp_path / "bad", code=1
    ).output
    assert "not UTF-8" in output


def test_routers_stay_in_float_and_misfits_are_told(tmp_path):
    """The input of a down projection is 48 wide, that of each of its experts 24."""
    source, small = GOLDEN / "qwen3_moe", ("--group-size", 32)
    refused = invoke("quantize", source, tmp_path / "out", *small, code=1).output
    assert "model.layers.1.mlp.experts.{0..3}.down_proj.weight: group_size must divide" in refused
    assert "--misfit per_channel" in refused
    told = invoke("quantize", source, tmp_path / "channels", *small, "--misfit", "per_channel").output
    assert "experts.{0..3}.down_proj.weight: weight per channel: no group of 32 divides 24" in told
    leaves = jq.io.load_hf(tmp_path / "channels")[0]
    assert not isinstance(leaves["model.layers.1.mlp.gate.weight"], jq.QTensor)
    assert leaves["model.layers.1.mlp.experts.0.down_proj.weight"].qtype == "int4"
    told = invoke("quantize", source, tmp_path / "floats", *small, "--misfit", "float", "--json").output
    assert json.loads(told)["skipped"]["model.layers.0.mlp.down_proj.weight"] == "no group of 32 divides 48"
    leaves = jq.io.load_hf(tmp_path / "floats")[0]
    assert not isinstance(leaves["model.layers.1.mlp.experts.0.down_proj.weight"], jq.QTensor)


HIDDEN, WIDE = 256, 512
SIDES = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
SIDES |= {f"mlp.{name}_proj": (WIDE, HIDDEN) for name in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, WIDE)}
#: Bytes of the Gram matrices of a layer of `_decoder`, which has seven projections.
GRAMS = 4 * (6 * HIDDEN**2 + WIDE**2)
#: Bytes of the weights of a layer, in float32.
LAYER = 4 * sum(out * size for out, size in SIDES.values())


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize(
    "method", ["gptq", pytest.param("awq", marks=pytest.mark.slow), pytest.param("awq+gptq", marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_layers(method, tmp_path, monkeypatch):
    """Where a layer is written, with its weights and Gram matrices in memory, nothing of the layers before it is."""
    _decoder(tmp_path / "float", layers=5)
    held = {}

    def written(path, *args, **options):
        gc.collect()
        held.setdefault(path.name, []).append(
            tracemalloc.get_traced_memory()[0] + sum(a.nbytes for a in jax.live_arrays())
        )
        write_safetensors(path, *args, **options)

    monkeypatch.setattr(calibration, "write_safetensors", written)
    names = [f"model.layers.{i}.{name}.weight" for i in range(5) for name in SIDES]
    specs = dict.fromkeys(names, jq.QuantSpec("int4", granularity=jq.PerGroup(64)))
    options = {"method": method_of("test", method), "window": 16}
    tracemalloc.start()
    try:
        calibrated(tmp_path / "float", np.arange(3, 35), specs, tmp_path / "run", **options)
    finally:
        tracemalloc.stop()
    peaks = [max(of_layer) for _, of_layer in sorted(held.items())][:5]
    assert len(peaks) == 5
    print(f"{method}: {[round(peak / 1e6, 2) for peak in peaks]} MB; {LAYER / 1e6:.2f} MB are one layer in float32")
    assert min(peaks) > (GRAMS if "gptq" in method else LAYER)
    assert max(peaks[2:]) < max(peaks[:2]) + GRAMS / 10


def _decoder(place, layers):
    sides = SIDES | {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in sides.items()}
    shapes |= {"model.embed_tokens.weight": (40, HIDDEN), "model.norm.weight": (HIDDEN,)}
    rng = np.random.default_rng(0)

    def read(name):
        shape = shapes[name]
        array = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape) / np.sqrt(shape[-1])
        return array.astype(ml_dtypes.bfloat16)

    place.mkdir(parents=True)
    specs = {name: TensorSpec(np.dtype(ml_dtypes.bfloat16), shape) for name, shape in shapes.items()}
    write_safetensors(place / "model.safetensors", specs, read, {})
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 40, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "hidden_act": "silu", "max_position_embeddings": 512,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))

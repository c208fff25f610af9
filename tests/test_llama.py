"""examples/llama.py on every small checkpoint, against the logits of the library that wrote it."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import GOLDEN, MODELS, tensors_of

import jaxquant as jq
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf import LLAMA


@pytest.fixture(autouse=True)
def _as_the_reader_has_it():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def llama():
    spec = importlib.util.spec_from_file_location("llama", GOLDEN.parents[1] / "examples" / "llama.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["llama"]


@pytest.fixture(scope="module")
def forward(llama):
    """The float model, compiled once for all checkpoints: they are all of one shape."""
    model = llama.load(GOLDEN / "base")[0]
    return jax.jit(
        lambda params, ids: model.apply(params, ids, 0, llama.empty_cache(model.config, *ids.shape, False))[0]
    )


DECODERS = [name for name in MODELS if name != "mxfp4_gptoss"]  # which has an architecture of its own


def reference(name):
    ref = tensors_of(GOLDEN / ("base" if name == "base" else f"models/{name}") / "ref.safetensors")
    keys = {"base": "logits_fp32", "gguf_Q4_0": "logits_native"}  # both computed in float32
    return jnp.asarray(ref["input_ids"], jnp.int32), ref[keys.get(name, "logits_fp32_dequant")]


@pytest.mark.parametrize("name", ["base", *DECODERS])
def test_logits_of_the_dequantized_weights(llama, forward, name):
    """In float32 on the very weights of the reference."""
    folder = GOLDEN / "base" if name == "base" else GOLDEN / "models" / name
    dtype = jnp.float32 if name == "bnb_int8" else None  # its reference dequantizes to float32
    params, _ = jq.io.load_hf(folder, names=LLAMA, dtype=dtype)
    params = jax.tree.map(
        lambda x: (x.dequantize() if isinstance(x, QTensor) else x).astype(jnp.float32),
        params,
        is_leaf=lambda x: isinstance(x, QTensor),
    )
    ids, wanted = reference(name)
    np.testing.assert_allclose(forward({"params": params}, ids), wanted, atol=1e-4)


def test_logits_of_a_gguf_file(llama):
    """Without any configuration beside it, and on the codes."""
    model, params, _ = llama.load(GOLDEN / "models" / "gguf_Q4_0" / "model.gguf")
    ids, wanted = reference("gguf_Q4_0")
    found = jax.jit(jq.quantized(model.apply))(params, ids, 0, llama.empty_cache(model.config, *ids.shape, False))[0]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max() + 1e-4)


FAST = ["gptq_w4g64_actorder", "bnb_nf4_dq", "ct_w4a16_g64_asym"]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]
)
def test_logits_on_the_codes(llama, name):
    """The same on the codes, whose products are not rounded to the dtype of the dequantized weights."""
    model, params, _ = llama.load(GOLDEN / "models" / name)
    ids, wanted = reference(name)
    cache = llama.empty_cache(model.config, *ids.shape, False)
    found = jax.jit(jq.quantized(model.apply))(params, ids, 0, cache)[0]
    stored = jq.io.load_hf(GOLDEN / "models" / name)[0]["model.layers.0.self_attn.q_proj.weight"].dtype
    # Each weight is off by half a unit of its dtype; errors of either sign add up like the terms of the product do.
    np.testing.assert_allclose(found, wanted, atol=4 * float(jnp.finfo(stored).eps) * np.abs(wanted).max() + 1e-4)


def test_generates_what_the_whole_forward_gives(llama):
    model, params, info = llama.load(GOLDEN / "models" / "gptq_w4g64_sym")
    assert info.format == "GPTQ"
    prompt = reference("gptq_w4g64_sym")[0][:, :4]
    found = llama.generate(model, params, prompt, 3)
    apply = jax.jit(jq.quantized(model.apply))
    whole = jnp.concatenate([prompt, found], 1)
    logits = apply(params, whole, 0, llama.empty_cache(model.config, *whole.shape, False))[0]
    np.testing.assert_array_equal(found, logits[:, 3:-1].argmax(-1))


def test_int8_cache(llama):
    """Attention to rounded keys and values: close, and far from what an untouched cache would give."""
    model, params, _ = llama.load(GOLDEN / "base")
    ids, wanted = reference("base")
    found = model.apply(params, ids, 0, llama.empty_cache(model.config, *ids.shape, True))[0]
    error = np.abs(np.asarray(found) - wanted).max()
    assert 0 < error < 0.02 * np.abs(wanted).max()


def test_is_short(llama):
    lines = (GOLDEN.parents[1] / "examples" / "llama.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200

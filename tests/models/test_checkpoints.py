"""A decoder on every small checkpoint, in all formats, against the logits of the library that wrote it."""

import functools
import json
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import GOLDEN, MODELS, tensors_of

import jaxquant as jq
from jaxquant.core.qtensor import QTensor
from jaxquant.models import generate, load, logits

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")

DECODERS = [name for name in MODELS if name != "mxfp4_gptoss"]  # which has an architecture of its own


def folder(name):
    return GOLDEN / "base" if name == "base" else GOLDEN / "models" / name


def reference(name):
    ref = tensors_of(folder(name) / "ref.safetensors")
    keys = {"base": "logits_fp32", "gguf_Q4_0": "logits_native"}  # both computed in float32
    return jnp.asarray(ref["input_ids"], jnp.int32), ref[keys.get(name, "logits_fp32_dequant")]


@functools.cache
def forward(config):
    """Compiled once for all checkpoints in float, which are of one shape."""
    return jax.jit(jq.quantized(functools.partial(logits, config)))


@pytest.mark.parametrize("name", ["base", *DECODERS])
def test_logits_of_the_dequantized_weights(name):
    """In float32 on the very weights of the reference."""
    dtype = jnp.float32 if name == "bnb_int8" else None  # its reference dequantizes to float32
    params, _ = jq.io.load_hf(folder(name), dtype=dtype)
    config = load(folder("base")).config
    params = {name: jq.dequantize_params(params[name]).astype(jnp.float32) for name in config.shapes()}
    ids, wanted = reference(name)
    np.testing.assert_allclose(forward(config)(params, ids), wanted, atol=1e-4)


def test_logits_of_a_gguf_file():
    """Without any configuration beside it, and on the codes."""
    model = load(folder("gguf_Q4_0") / "model.gguf")
    ids, wanted = reference("gguf_Q4_0")
    found = forward(model.config)(model.params, ids)
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max() + 1e-4)


FAST = ["gptq_w4g64_actorder", "bnb_nf4_dq", "ct_w4a16_g64_asym"]


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]
)
def test_logits_on_the_codes(name):
    """The same on the codes, whose products are not rounded to the dtype of the dequantized weights."""
    model = load(folder(name), activations="float")
    assert any(isinstance(leaf, QTensor) for leaf in model.params.values())
    ids, wanted = reference(name)
    found = forward(model.config)(model.params, ids)
    stored = jq.io.load_hf(folder(name))[0]["model.layers.0.self_attn.q_proj.weight"].dtype
    # Each weight is off by half a unit of its dtype; errors of either sign add up like the terms of the product do.
    # Beside float32 weights, those of LLM.int8, what counts are the products: activations in int8 digits, to 1e-4.
    unit = max(float(jnp.finfo(stored).eps), 1e-4)
    np.testing.assert_allclose(found, wanted, atol=4 * unit * np.abs(wanted).max() + 1e-4)


@pytest.mark.every
def test_what_a_model_says_of_itself():
    model = load(folder("gptq_w4g64_actorder"))
    first, *kinds = str(model).splitlines()
    assert first.endswith("gptq_w4g64_actorder: llama, 2 layers, 148,096 parameters, GPTQ")
    assert "int4, groups of 64, symmetric, act-order  12 tensors, 65.5 KiB" in str(model)
    assert sum(n for n, _ in model.kinds.values()) == len(model.params)
    assert len(kinds) == len(model.kinds)


AS_SAVED = {
    "ct_w8a8_int8": "int8 before 14 weights",
    "ct_fp8_dynamic": "float8_e4m3fn before 14 weights",
    "ct_fp8_static": "float8_e4m3fn tensor static before 14 weights",
    "fp8_block32": "float8_e4m3fn g32 before 14 weights",
    "bnb_int8": "int8 below 6 before 14 weights",
}


@pytest.mark.every
@pytest.mark.parametrize("name", AS_SAVED)
def test_what_is_said_of_quantized_activations(name):
    assert f"  activations: {AS_SAVED[name]}" in str(load(folder(name))).splitlines()
    alone = str(load(folder(name), activations="float"))
    assert "  note: the checkpoint is made for quantized activations, which stay in float32 here" in alone
    assert "activations: " not in alone


@pytest.mark.parametrize("name", ["ct_fp8_dynamic", "ct_fp8_static"])
def test_logits_with_quantized_activations(name):
    """Those of compressed-tensors, whose weights alone give others."""
    model = load(folder(name))
    ids, wanted = reference(name)[0], tensors_of(GOLDEN / "as_saved_logits.safetensors")[name]
    found = jax.jit(jq.quantized(functools.partial(logits, model.config), model))(model.params, ids)
    # Where both round alike the difference is that of float32 sums; a value within it of a tie may go to either side.
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(reference(name)[1] - wanted).max() > 0.05


@pytest.mark.every
@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight is not a parameter of llama"),
        ({"intermediate_size": 63}, r"mlp.up_proj.weight has shape \(64, 128\), and \(63, 128\) by the configuration"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"tie_word_embeddings": True}, None),  # the head that is in the file counts
    ],
)
def test_tensors_that_are_not_those_of_the_configuration(change, message, tmp_path):
    shutil.copytree(folder("base"), tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    if message is None:
        assert load(tmp_path / "model").config == load(folder("base")).config
        return
    with pytest.raises(jq.QuantError, match=message):
        load(tmp_path / "model")


def test_the_example(monkeypatch, capsys):
    path = GOLDEN.parents[1] / "examples" / "llama.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 40
    checkpoint = folder("gptq_w4g64_sym")
    monkeypatch.setattr(sys, "argv", [str(path), str(checkpoint), "--prompt", "1,2,3", "--tokens", "3"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == str(generate(load(checkpoint), [[1, 2, 3]], tokens=3)[0])

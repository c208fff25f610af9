"""Gram matrices from a text, and quantizing with them in one command."""

import jax.numpy as jnp
import numpy as np
import pytest
from models.decoders import GOLDEN
from models.test_commands import checkpoint, invoke

import jaxquant as jq
from jaxquant.models import load, logits
from jaxquant.models.calibration import grams

assert checkpoint  # a fixture
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs! " * 4


def test_grams_are_those_of_the_inputs():
    """Of the first layer's projections the inputs are known: the normalized embeddings of the tokens."""
    model = load(GOLDEN / "llama")
    tokens = np.random.default_rng(0).integers(3, 40, 50)
    q, down = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    found = grams(model, tokens, [q, down], window=16)
    x = np.asarray(model.params["model.embed_tokens.weight"], np.float64)[tokens[:48]]
    gain = np.asarray(model.params["model.layers.0.input_layernorm.weight"], np.float64)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.rms_norm_eps) * gain
    np.testing.assert_allclose(found[q], x.T @ x, rtol=1e-3, atol=1e-3 * np.abs(x.T @ x).max())
    assert found[down].shape == (48, 48)
    for bad, rule in (((tokens, ["nothing"]), "no float weights"), ((tokens[:1], [q]), "too short")):
        with pytest.raises(jq.QuantError, match=rule):
            grams(model, *bad)


def test_a_command_from_a_text_to_gptq(checkpoint, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    float_model = load(checkpoint / "float")
    tokens = jnp.asarray([float_model.tokenizer.encode(TEXT)[:60]])
    expected = logits(float_model.config, float_model.params, tokens)
    lost, small = {}, ("--bits", 3, "--group-size", 16)
    for name, options in (("rtn", ()), ("gptq", ("--calibrate", tmp_path / "text"))):
        invoke("quantize", checkpoint / "float", tmp_path / name, *small, *options)
        assert {path.name for path in tmp_path.iterdir()} <= {"text", "rtn", "gptq"}  # nothing is left beside it
        model = load(tmp_path / name)
        found = jq.quantized(lambda p, t, c=model.config: logits(c, p, t))(model.params, tokens)
        lost[name] = float(jnp.linalg.norm(found - expected))
    assert lost["gptq"] < 0.9 * lost["rtn"]
    text = ("--calibrate", tmp_path / "text")
    assert (
        "would be written"
        in invoke("quantize", checkpoint / "float", tmp_path / "x", *small, *text, "--dry-run").output
    )
    taken = invoke("quantize", checkpoint / "float", tmp_path / "rtn", *small, *text, code=1).output
    assert "the destination exists" in taken
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xff")
    output = invoke(
        "quantize", checkpoint / "float", tmp_path / "x", *small, "--calibrate", tmp_path / "bad", code=1
    ).output
    assert "not UTF-8" in output

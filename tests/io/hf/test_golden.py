"""Every small checkpoint that the original libraries wrote, against what they dequantize it to."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import GOLDEN, MODELS, digest, dtype_of, tensors_of, values

import jaxquant as jq
from jaxquant.core.qtensor import QTensor

pytestmark = [pytest.mark.every, pytest.mark.filterwarnings("ignore:.*gives its weights alone")]

FORMAT = {
    "autoround": "GPTQ",
    "awq": "AWQ",
    "bnb": "bitsandbytes",
    "ct": "compressed-tensors",
    "ct012": "compressed-tensors",
    "fp8": "fp8",
    "gptq": "GPTQ",
    "hqq": "HQQ",
    "mxfp4": "mxfp4",
    "quanto": "quanto",
    "torchao": "torchao",
}


@pytest.mark.parametrize("name", MODELS)
def test_dequantizes_to_the_reference(name):
    folder = GOLDEN / "models" / name
    params, info = jq.io.load_hf(folder)
    assert info.format == FORMAT[name.split("_")[0]]
    assert not info.problems
    assert name in str(info)
    leaf_of = lambda module: params.get(f"{module}.weight", params.get(module))  # noqa: E731
    wanted = json.loads((folder / "ref.json").read_text())["dequant_sha256"]
    assert len(info.modules) == len(wanted) == sum(isinstance(leaf, QTensor) for leaf in params.values())
    for module, ref in wanted.items():
        w = values(leaf_of(module), dtype_of(ref["dtype"]))
        assert list(w.shape) == ref["shape"]
        assert digest(w) == ref["sha256"], module
    for key, ref in tensors_of(folder / "ref.safetensors").items():
        kind, _, module = key.partition(".")
        if kind not in ("dequant", "dequant_rows16"):
            continue
        w = values(leaf_of(module), ref.dtype)
        w = w[:16] if kind == "dequant_rows16" else w
        np.testing.assert_array_equal(w, ref)


@pytest.mark.parametrize("name", MODELS)
def test_other_tensors_stay_as_they_are(name):
    folder = GOLDEN / "models" / name
    params, info = jq.io.load_hf(folder)
    stored = tensors_of(folder / "model.safetensors")
    assert {n for n, leaf in params.items() if not isinstance(leaf, QTensor)} == set(info.floats)
    for key in info.floats:
        np.testing.assert_array_equal(params[key], stored[key])
        assert params[key].dtype == stored[key].dtype
    assert "model.embed_tokens.weight" in info.floats


def test_dtype():
    params, _ = jq.io.load_hf(GOLDEN / "models" / "gptq_w4g64_sym", dtype=jnp.float32)
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}


def test_codes_take_no_more_memory_than_in_the_file():
    """Group 64: half a byte for each code, and one scale of two bytes for 64 of them."""
    params, _ = jq.io.load_hf(GOLDEN / "models" / "gptq_w4g64_sym")
    q = params["model.layers.0.self_attn.q_proj.weight"]
    assert q.nbytes == q.size // 2 + q.size // 64 * 2

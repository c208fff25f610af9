"""Layouts for which there are no files of the original libraries here: packed by their specification, in NumPy."""

import json

import ml_dtypes
import numpy as np
import pytest
from hf_cases import CASES
from hf_files import checkpoint, stream, unit, values

import jaxquant as jq

# Weights are what is read here, also of files that say how activations are quantized.
pytestmark = pytest.mark.filterwarnings("ignore:.*gives its weights alone")

RNG = np.random.default_rng(0)
BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


def load(folder, parts, config, **kwargs):
    params, info = jq.io.load_hf(checkpoint(folder, {f"m.{n}": a for n, a in parts.items()}, config, **kwargs))
    return params["m.weight"], info


PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planes(codes, bits):
    """Every 32 values as bit planes, the low one first."""
    codes, words, shift = codes.reshape(*codes.shape[:-1], -1, 32), [], 0
    for width in PLANES[bits]:
        words.append(stream((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return np.concatenate(words, -1).reshape(*codes.shape[:-2], -1)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_gptq_planes(tmp_path, bits):
    columns, out, group = 64, 32, 32
    codes = RNG.integers(0, 1 << bits, (out, columns))
    zeros = RNG.integers(0, 1 << bits, (columns // group, out))
    scales = RNG.random(zeros.shape).astype(np.float16)
    parts = {
        "qweight": planes(codes, bits).T.astype(np.uint32).view(np.int32),
        "qzeros": planes(zeros, bits).astype(np.uint32).view(np.int32),
        "scales": scales,
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq_p"}
    q, _ = load(tmp_path, {n: np.ascontiguousarray(a) for n, a in parts.items()}, {"quantization_config": config})
    wide = lambda v: np.repeat(v.T.astype(np.float32), group, 1)  # noqa: E731
    np.testing.assert_array_equal(values(q, np.float16), ((codes - wide(zeros)) * wide(scales)).astype(np.float16))


def test_autoround_stores_plain_zero_points(tmp_path):
    """Its own layout is that of version 2, whatever quant_method says."""
    tensors, _ = unit("gptq_zero_v1_v2")
    parts = {n: tensors[f"b4.{n}"] for n in ("qweight", "scales")} | {"qzeros": tensors["b4.qzeros_v2"]}
    config = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4, "group_size": 32, "sym": False}
    q, info = load(tmp_path, parts, {"quantization_config": config})
    assert info.format == "GPTQ"
    np.testing.assert_array_equal(values(q, np.float16), tensors["b4.ref_dequant"])


def test_modules_of_different_widths(tmp_path):
    """The configuration tells; where it is wrong and the shapes allow one width only, they do."""
    tensors, _ = unit("gptq_zero_v1_v2")
    named = {f"m{b}.{n}": tensors[f"b{b}.{n}"] for b in (2, 3, 4, 8) for n in ("qweight", "scales", "g_idx")}
    named |= {f"m{b}.qzeros": tensors[f"b{b}.qzeros_v1"] for b in (2, 3, 4, 8)}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"m8": {"bits": 8}}}
    params, info = jq.io.load_hf(checkpoint(tmp_path, named, {"quantization_config": config}))
    for bits in (2, 3, 4, 8):
        np.testing.assert_array_equal(values(params[f"m{bits}.weight"], np.float16), tensors[f"b{bits}.ref_dequant"])
    assert info.problems == tuple(
        f"m{bits}.weight has {bits} bits by its shapes, though the configuration says 4" for bits in (2, 3)
    )


@pytest.mark.parametrize("storage", [np.uint8, BF16, np.float32])
def test_bitsandbytes_storage(tmp_path, storage):
    """The same bytes under another dtype."""
    tensors, _ = unit("bnb_nf4_48x128_b64_bfloat16")
    parts = {n: a for n, a in tensors.items() if n.startswith("weight")}
    parts["weight"] = parts["weight"].reshape(-1).view(storage)[:, None]
    q, _ = load(tmp_path, parts, {"quantization_config": {"load_in_4bit": True}})
    np.testing.assert_array_equal(values(q, BF16), tensors["ref_dequant"])


def test_another_table_of_nested_scales(tmp_path):
    """Its scales are dequantized, and that is said."""
    tensors, _ = unit("bnb_nf4_48x128_b64_dq_bfloat16")
    parts = {n: a for n, a in tensors.items() if n.startswith("weight")}
    parts["weight.nested_quant_map"] = parts["weight.nested_quant_map"] * np.float32(0.5)
    state = json.loads(parts["weight.quant_state.bitsandbytes__nf4"].tobytes())
    q, info = load(tmp_path, parts, {"quantization_config": {"load_in_4bit": True}})
    assert "scales of an unknown table, in float32" in info.modules["m.weight"]
    scale = parts["weight.nested_quant_map"][parts["weight.absmax"]] * parts["weight.nested_absmax"]
    np.testing.assert_array_equal(q.scale.reshape(-1), scale + np.float32(state["nested_offset"]))


def ct(form, **weights):
    config = {"quant_method": "compressed-tensors", "format": form}
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"dtype": "bfloat16", "quantization_config": config}


def fp8(*shape):
    return (RNG.normal(size=shape) * 10.0 ** RNG.integers(-1, 2, (shape[0], 1))).astype(E4M3)


def test_mxfp8(tmp_path):
    parts = {"weight": fp8(8, 64), "weight_scale": RNG.integers(110, 130, (8, 2)).astype(np.uint8)}
    q, _ = load(tmp_path, parts, ct("mxfp8-quantized", num_bits=8, type="float", group_size=32))
    scale = np.repeat(2.0 ** (parts["weight_scale"].astype(np.float32) - 127), 32, 1)
    np.testing.assert_array_equal(values(q, BF16), (parts["weight"].astype(np.float32) * scale).astype(BF16))
    assert q.scale.dtype == E8M0


@pytest.mark.parametrize("structure", [[16, 32], "16x32"])
def test_blocks_of_compressed_tensors(tmp_path, structure):
    parts = {"weight": fp8(24, 80), "weight_scale": RNG.random((2, 3)).astype(np.float32)}
    q, _ = load(tmp_path, parts, ct("float-quantized", num_bits=8, strategy="block", block_structure=structure))
    scale = np.repeat(np.repeat(parts["weight_scale"], 16, 0), 32, 1)[:24, :80]
    np.testing.assert_array_equal(values(q, np.float32), parts["weight"].astype(np.float32) * scale)


@pytest.mark.parametrize("shape", [(), (1,), (12,), (12, 1), (12, 4)])
def test_scales_of_any_granularity(tmp_path, shape):
    codes = RNG.integers(-128, 128, (12, 16)).astype(np.int8)
    parts = {"weight": codes, "weight_scale": RNG.random(shape).astype(np.float32)}
    q, _ = load(tmp_path, parts, ct("int-quantized", num_bits=8, type="int"))
    full = parts["weight_scale"].reshape((1, 1) if parts["weight_scale"].size == 1 else (12, -1))
    scale = np.repeat(full, 16 // full.shape[1], 1)
    np.testing.assert_array_equal(values(q, np.float32), codes.astype(np.float32) * scale)


@pytest.mark.parametrize("dtype", [np.uint8, E8M0])
def test_fp8_with_exponents(tmp_path, dtype):
    powers = RNG.integers(115, 130, (2, 3)).astype(np.uint8)
    parts = {"weight": fp8(20, 36), "weight_scale_inv": powers.view(dtype)}
    config = {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    q, _ = load(tmp_path, parts, {"quantization_config": config})
    scale = np.repeat(np.repeat(2.0 ** (powers.astype(np.float32) - 127), 16, 0), 16, 1)[:20, :36]
    np.testing.assert_array_equal(values(q, BF16), (parts["weight"].astype(np.float32) * scale).astype(BF16))


def test_fp8_per_row_and_stacked(tmp_path):
    parts = {"weight": fp8(6, 8), "weight_scale": RNG.random((6, 1)).astype(np.float32)}
    q, _ = load(tmp_path / "a", parts, {"quantization_config": {"quant_method": "fbgemm_fp8"}})
    wanted = (parts["weight"].astype(np.float32) * parts["weight_scale"]).astype(BF16)
    np.testing.assert_array_equal(values(q, BF16), wanted)
    experts, scale = np.stack([fp8(32, 16), fp8(32, 16)]), RNG.random((2, 2, 1)).astype(np.float32)
    tensors = {"experts.up": experts, "experts.up_scale_inv": scale}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    params, _ = jq.io.load_hf(checkpoint(tmp_path / "b", tensors, config))
    wanted = (experts.astype(np.float32) * np.repeat(scale, 16, 1)).astype(BF16)
    np.testing.assert_array_equal(values(params["experts.up"], BF16), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_fp4_experts_among_fp8(tmp_path, dtype):
    packed, powers = RNG.integers(0, 256, (4, 32)).astype(np.uint8), RNG.integers(115, 130, (4, 2)).astype(np.uint8)
    parts = {"weight": packed.view(dtype), "weight_scale_inv": powers.view(E8M0)}
    q, _ = load(tmp_path, parts, {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}})
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(4, 64).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    wanted = codes * np.repeat(2.0 ** (powers.astype(np.float32) - 127), 32, 1)
    np.testing.assert_array_equal(values(q, np.float32), wanted)


def test_hqq_viewed_as_floats(tmp_path):
    tensors, config = CASES["hqq axis 0"]
    plain, _ = jq.io.load_hf(checkpoint(tmp_path / "a", tensors, config))
    viewed = tensors | {"m.W_q": tensors["m.W_q"].view(np.float32), "m.view_as_float": np.uint8(1)}
    found, _ = jq.io.load_hf(checkpoint(tmp_path / "b", viewed, config))
    np.testing.assert_array_equal(found["m.weight"].dequantize(), plain["m.weight"].dequantize())


@pytest.mark.parametrize("size", [8, 16, 48, 64])
def test_hqq_groups_and_rows(tmp_path, size):
    """Groups shorter and longer than a row, and ones that straddle rows."""
    shape, count = (12, 32), 12 * 32
    groups = count // size
    codes = RNG.integers(0, 256, (groups, size)).astype(np.uint8)
    parts = {
        "W_q": codes,
        "scale": RNG.normal(size=(groups, 1)).astype(np.float32),
        "zero": RNG.normal(size=(groups, 1)).astype(np.float32),
        "shape": np.array(shape, np.int64),
        "nbits": np.int32(8),
        "axis": np.int32(1),
        "group_size": np.int32(size),
        "compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
    }
    q, _ = load(tmp_path, parts, {"quantization_config": {"quant_method": "hqq"}})
    wanted = ((codes - parts["zero"]) * parts["scale"]).reshape(shape)
    np.testing.assert_array_equal(values(q, np.float32), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_widths(tmp_path, bits):
    """Every width is one bit stream; a module may have its own."""
    codes = RNG.integers(0, 1 << bits, (4, 64))
    scales, biases = (RNG.normal(size=(4, 2)).astype(np.float32) for _ in range(2))
    parts = {"weight": stream(codes, bits).astype(np.uint32), "scales": scales, "biases": biases}
    config = {"quantization": {"bits": 4, "group_size": 64, "m": {"bits": bits, "group_size": 32}}}
    q, _ = load(tmp_path, parts, config)
    wanted = codes.astype(np.float32) * np.repeat(scales, 32, 1) + np.repeat(biases, 32, 1)
    assert q.qtype == f"uint{bits}"
    np.testing.assert_array_equal(values(q, np.float32), wanted)


def test_bitnet_that_multiplies(tmp_path):
    tensors, _ = unit("bitnet_packed")
    parts = {n: tensors[n] for n in ("weight", "weight_scale")}
    config = {"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"}}
    q, _ = load(tmp_path, parts, config)
    np.testing.assert_array_equal(values(q, np.float32), tensors["ternary"] * tensors["weight_scale"])


def test_modelopt_fp8(tmp_path):
    parts = {"weight": fp8(6, 8), "weight_scale": np.float32(0.3), "input_scale": np.float32(0.1)}
    q, info = load(tmp_path, parts, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}})
    np.testing.assert_array_equal(values(q, np.float32), parts["weight"].astype(np.float32) * np.float32(0.3))
    assert info.floats == ("m.input_scale",)


def test_kernels_layouts_of_torchao_are_refused(tmp_path):
    tensors, config, metadata = CASES["torchao"]
    metadata = {n: t.replace("IntxUnpackedToInt8Tensor", "Int4TilePackedTo4dTensor") for n, t in metadata.items()}
    with pytest.raises(jq.QuantError, match="the layout of Int4TilePackedTo4dTensor belongs to one GPU kernel"):
        jq.io.load_hf(checkpoint(tmp_path, tensors, config, metadata=metadata))


def test_nothing_is_left_of_a_skipped_module(tmp_path):
    """Modules on a skip list have float weights, and are taken for what they are."""
    tensors, config = CASES["gptq"]
    named = tensors | {"lm_head.weight": np.ones((4, 4), np.float16), "m.bias": np.ones(64, np.float16)}
    params, info = jq.io.load_hf(checkpoint(tmp_path, named, config))
    assert set(info.floats) == {"lm_head.weight", "m.bias"}
    assert set(params) == {"m.weight", "m.bias", "lm_head.weight"}

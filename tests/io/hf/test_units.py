"""Single tensors that the original libraries packed, as checkpoints of one module."""

import jax
import ml_dtypes
import numpy as np
import pytest
from hf_files import checkpoint, unit, values

import jaxquant as jq
from jaxquant.core import views
from jaxquant.core.qtensor import QTensor, scale_values

BF16 = ml_dtypes.bfloat16

pytestmark = [pytest.mark.every, pytest.mark.filterwarnings("ignore:.*gives its weights alone")]


def load(folder, tensors, config, **kwargs):
    """The weight of module "m"."""
    names = {f"m.{name}": array for name, array in tensors.items()}
    shapes = {"m": kwargs.pop("shape")} if "shape" in kwargs else None
    params, info = jq.io.load_hf(checkpoint(folder, names, config, **kwargs), shapes=shapes)
    return params["m.weight"], info


def only(tensors, *names):
    return {name: tensors[name] for name in names}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes(tmp_path, kind, nested):
    t, _ = unit(f"bnb_{kind}_48x128_b64{'_dq' if nested else ''}_bfloat16")
    parts = {name: array for name, array in t.items() if name.startswith("weight")}
    config = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": kind}}
    q, _ = load(tmp_path, parts, config)
    assert q.qtype == kind
    assert isinstance(q.scale, type(q)) == nested
    np.testing.assert_array_equal(values(q, t["ref_dequant"].dtype), t["ref_dequant"])


def test_llm_int8(tmp_path):
    """Two products, each rounded to float32, and then the dtype that is asked for; traced or not, constants or not."""
    t, _ = unit("bnb_int8_24x40")
    config = {"dtype": "float16", "quantization_config": {"load_in_8bit": True}}
    q, _ = load(tmp_path / "a", only(t, "weight", "SCB"), config)
    one = t["weight"].astype(np.float32) * (t["SCB"] * np.float32(1 / 127))[:, None]
    assert np.mean(one != t["ref_dequant"]) > 0.2
    for w in (q.dequantize(), jax.jit(QTensor.dequantize)(q), jax.jit(lambda: q.dequantize())()):
        np.testing.assert_array_equal(w, t["ref_dequant"])
    for dtype in (np.float16, BF16):
        np.testing.assert_array_equal(q.dequantize(dtype), t[f"ref_dequant_{np.dtype(dtype).name}"])
    transposed = views.transpose(q, (1, 0))
    np.testing.assert_array_equal(transposed.dequantize(), t["ref_dequant"].T)
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    y = jq.ops.einsum("bi,oi->bo", x, q)
    np.testing.assert_array_equal(y, jq.ops.einsum("bi,oi->bo", x, q.replace(scale=scale_values(q.scale))))
    jq.io.save(tmp_path / "q.safetensors", {"w": q, "wt": transposed})
    again = jq.io.load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(again["w"].dequantize(), t["ref_dequant"])
    np.testing.assert_array_equal(again["wt"].dequantize(), t["ref_dequant"].T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_zero_points(tmp_path, bits, version):
    """Random zero points, those included that borrow from their neighbours in version 1."""
    t, meta = unit("gptq_zero_v1_v2")
    parts = {name: t[f"b{bits}.{name}"] for name in ("qweight", "scales", "g_idx")}
    parts["qzeros"] = t[f"b{bits}.qzeros_v{version}"]
    form = "gptq" if version == 1 else "gptq_v2"
    config = {"quant_method": "gptq", "bits": bits, "group_size": meta["group_size"], "checkpoint_format": form}
    q, _ = load(tmp_path, parts, {"quantization_config": config})
    np.testing.assert_array_equal(values(q, np.float16), t[f"b{bits}.ref_dequant"])


@pytest.mark.parametrize("version", ["gemm", "gemv", "gemv_fast"])
def test_awq(tmp_path, version):
    t, meta = unit(f"awq_{version}_32x128_g64")
    config = {"quant_method": "awq", "bits": 4, "group_size": meta["group_size"], "version": version}
    q, _ = load(tmp_path, only(t, "qweight", "qzeros", "scales", "bias"), {"quantization_config": config})
    if version == "gemv_fast":  # holds z * s rounded to float16
        exact = t["ref_dequant"].astype(np.float32)
        bound = np.abs(np.repeat(t["qzeros"][:2].astype(np.float32).T, 64, 1)) * 2.0**-11 + np.abs(exact) * 2.0**-11
        assert (np.abs(values(q, np.float32) - exact) <= bound + 1e-7).all()
    else:
        np.testing.assert_array_equal(values(q, np.float16), t["ref_dequant"])


def test_awq_becomes_gptq(tmp_path):
    """AutoAWQ's own conversion of the same codes, through the other reader."""
    t, meta = unit("awq_gemm_32x128_g64")
    config = {"quant_method": "gptq", "bits": 4, "group_size": meta["group_size"], "sym": False}
    parts = {"qweight": t["gptq_v1_qweight"], "qzeros": t["gptq_v1_qzeros"], "scales": t["scales"]}
    q, _ = load(tmp_path, parts, {"quantization_config": config})
    np.testing.assert_array_equal(values(q, np.float16), t["ref_dequant"])


@pytest.mark.parametrize("layout", ["dense", "padded_v012"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_compressed_tensors_words(tmp_path, layout, bits):
    """3-, 5-, 6- and 7-bit codes in dense words and in padded ones; zero points the same along the other axis."""
    t, _ = unit(f"ct_pack_int32_{layout}")
    codes, half = t[f"b{bits}.values"], 1 << (bits - 1)
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 1, "symmetric": False}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.19.0" if layout == "dense" else "0.12.2",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    ones = np.ones(codes.shape, np.float32)
    parts = {
        "weight_packed": t[f"b{bits}.d1.packed"],
        "weight_scale": ones,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    q, _ = load(tmp_path / "a", parts, {"quantization_config": config})
    assert q.qtype == f"int{bits}"
    np.testing.assert_array_equal(values(q, np.float32), codes)
    # The same words as zero points: what is left is code - zero, and the code is -half everywhere.
    parts["weight_packed"] = np.zeros_like(parts["weight_packed"])
    parts["weight_zero_point"] = t[f"b{bits}.d0.packed"]
    q, _ = load(tmp_path / "b", parts, {"quantization_config": config})
    np.testing.assert_array_equal(values(q, np.float32), -half - codes.astype(np.float32))


@pytest.mark.parametrize("name", ["w1_g32_ax1", "w2_g16_ax1", "w3_g64_ax1", "w4_g64_ax0", "w4_g64_ax1", "w8_g64_ax1"])
def test_hqq(tmp_path, name):
    t, meta = unit(f"hqq_{name}")
    parts = {name: t[name] for name in ("W_q", "scale", "zero")} | {
        "shape": np.array(meta["shape"], np.int64),
        "packing": np.frombuffer(meta["packing"].encode(), np.uint8),
        "compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
    }
    config = {"nbits": meta["nbits"], "group_size": meta["group_size"], "axis": meta["axis"]}
    config = {"quantization_config": {"quant_method": "hqq", "quant_config": {"weight_quant_params": config}}}
    q, _ = load(tmp_path, parts, config)
    assert (q.permutation is not None) == (meta["axis"] == 0)
    np.testing.assert_array_equal(values(q, np.float32), t["ref_dequant"])


@pytest.mark.parametrize("shape", [(96, 32), (64, 64), (12, 64)])
def test_hqq_along_rows(tmp_path, shape):
    """Groups along axis 0 whose period is whole rows: the codes of a column belong together."""
    rng, size = np.random.default_rng(0), 4
    groups = shape[0] * shape[1] // size
    codes = rng.integers(0, 16, (size, groups)).astype(np.uint8)
    scale, zero = (rng.normal(size=(1, groups)).astype(np.float32) for _ in range(2))
    parts = {
        "W_q": codes[: size // 2] << 4 | codes[size // 2 :],
        "scale": scale,
        "zero": zero,
        "shape": np.array(shape, np.int64),
        "nbits": np.int32(4),
        "axis": np.int32(0),
        "group_size": np.int32(size),
        "compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
    }
    q, _ = load(tmp_path, parts, {"quantization_config": {"quant_method": "hqq"}})
    np.testing.assert_array_equal(values(q, np.float32), ((codes - zero) * scale).reshape(shape))
    assert q.scale.size == groups


@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "float8"])
def test_quanto(tmp_path, kind):
    t, meta = unit(f"quanto_{kind}_float16")
    parts = {name: array for name, array in t.items() if name not in ("orig", "ref_dequant")}
    files = [("quanto_qmap.json", {"m": {"weights": f"q{kind}", "activations": "none"}})]
    extra = {"shape": (meta["out_features"], meta["in_features"])} if kind in ("int2", "int4") else {}
    q, info = load(tmp_path, parts, {}, files=files, **extra)
    np.testing.assert_array_equal(values(q, np.float16), t["ref_dequant"])
    assert set(info.floats) == {"m.input_scale", "m.output_scale"}


def test_quanto_does_not_guess_shapes(tmp_path):
    t, _ = unit("quanto_int4_float16")
    parts = {name: array for name, array in t.items() if name.startswith("weight")}
    with pytest.raises(jq.QuantError, match=r"does not say the shape of this weight.*Pass shapes=\{'m': "):
        load(tmp_path, parts, {}, files=[("quanto_qmap.json", {"m": {"weights": "qint4"}})])


@pytest.mark.parametrize("name", ["torchao_float8wo", "torchao_int3_g32"])
def test_torchao(tmp_path, name):
    t, meta = unit(name)
    tensors = {n: a for n, a in t.items() if n.startswith("0.")}
    folder = checkpoint(
        tmp_path, tensors, {"quantization_config": {"quant_method": "torchao"}}, metadata=meta["safetensors_metadata"]
    )
    params, _ = jq.io.load_hf(folder)
    assert params["0.weight"].qtype == ("int3" if "int3" in name else "float8_e4m3fn")
    np.testing.assert_array_equal(values(params["0.weight"], t["ref_dequant"].dtype), t["ref_dequant"])


@pytest.mark.parametrize("name", ["w4g64", "w8g32"])
@pytest.mark.parametrize("library", ["metal", "mlx"])
def test_metal(tmp_path, name, library):
    t, meta = unit(f"metal_affine_{name}")
    sizes = {"bits": meta["bits"], "group_size": meta["group_size"]}
    parts = {"weight": t["weight"].view(np.uint32), "scales": t["scales"]}
    parts["qbiases" if library == "metal" else "biases"] = t["qbiases"]
    config = (
        {"quantization_config": {"quant_method": "metal", **sizes}} if library == "metal" else {"quantization": sizes}
    )
    q, _ = load(tmp_path, parts, config)
    np.testing.assert_array_equal(values(q, np.float32), t["ref_dequant"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gemma(tmp_path, bits):
    t, _ = unit(f"gemma_w{bits}")
    config = {"quant_method": "gemma", "module_quant_configs": {r"other": {"num_bits": 8}, r"^m$": {"num_bits": bits}}}
    parts = only(t, "weight", "weight_scale", "input_activation_scale", "output_activation_scale")
    q, info = load(tmp_path, parts, {"quantization_config": config})
    assert q.qtype == f"int{bits}"
    np.testing.assert_array_equal(values(q, np.float32), t["ref_dequant"])
    assert len(info.floats) == 2


def test_bitnet(tmp_path):
    t, _ = unit("bitnet_packed")
    q, _ = load(tmp_path, only(t, "weight", "weight_scale"), {"quantization_config": {"quant_method": "bitnet"}})
    np.testing.assert_array_equal(values(q, np.float32), t["ternary"] / t["weight_scale"])


def test_modelopt(tmp_path):
    t, _ = unit("modelopt_nvfp4_32x64")
    files = [("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4", "group_size": 16}})]
    q, _ = load(tmp_path, only(t, "weight", "weight_scale", "weight_scale_2"), {}, files=files)
    assert q.nbytes == 32 * 64 // 2 + 32 * 4 + 4
    np.testing.assert_array_equal(values(q, t["ref_dequant"].dtype), t["ref_dequant"])


@pytest.mark.parametrize("name", ["1x10_16x64", "2x8_24x64"])
def test_aqlm(tmp_path, name):
    t, _ = unit(f"aqlm_{name}")
    config = {"quantization_config": {"quant_method": "aqlm"}}
    w, info = load(tmp_path, only(t, "codes", "codebooks", "scales"), config, files=())
    assert "dequantized" in info.modules["m.weight"]
    np.testing.assert_array_equal(values(w, np.float16), t["ref_dequant"].astype(np.float16))


def test_vptq(tmp_path):
    t, meta = unit("vptq_v8_k256_r16")
    layer = {key: meta[key] for key in ("in_features", "out_features", "vector_len")}
    config = {"quantization_config": {"quant_method": "vptq", "config_for_layers": {"m": layer}}}
    parts = {name: array for name, array in t.items() if name != "ref_dequant"}
    w, info = load(tmp_path, parts, config)
    assert "dequantized" in info.modules["m.weight"]
    np.testing.assert_allclose(values(w, np.float32), t["ref_dequant"], rtol=2.0**-22, atol=1e-7)

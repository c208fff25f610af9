"""A small module in every layout: what is in its file and what its configuration says."""

import json

import ml_dtypes
import numpy as np
from hf_files import unit

__all__ = ["CASES"]


def _named(tensors, prefix="m."):
    return {f"{prefix}{name}": array for name, array in tensors.items()}


def _pick(name, *parts):
    tensors, meta = unit(name)
    return _named({part: tensors[part] for part in parts}), meta


def _bnb(name):
    tensors, _ = unit(name)
    parts = {n: a for n, a in tensors.items() if n.startswith("weight")}
    return _named(parts), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def _int8():
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (8, 16)).astype(np.int8)
    parts = {"weight": weight, "SCB": np.ones(8, np.float32), "weight_format": np.uint8(0)}
    return _named(parts), {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}


def _gptq(bits=4, layout="gptq", **config):
    tensors, _ = unit("gptq_zero_v1_v2")
    parts = {n: tensors[f"b{bits}.{n}"] for n in ("qweight", "scales", "g_idx")}
    parts["qzeros"] = tensors[f"b{bits}.qzeros_v1"]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": layout, **config}
    return _named(parts), {"quantization_config": config}


def _awq(version):
    tensors, _ = _pick(f"awq_{version}_32x128_g64", "qweight", "qzeros", "scales", "bias")
    return tensors, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": version}}


def _ct(form, parts, **weights):
    group = {"targets": ["Linear"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return _named(parts), {"dtype": "bfloat16", "quantization_config": config}


def _ct_integers():
    tensors, _ = unit("ct_pack_int32_dense")
    parts = {
        "weight_packed": tensors["b3.d1.packed"],
        "weight_scale": np.ones((4, 2), np.float32),
        "weight_shape": np.array([4, 64], np.int64),
        "weight_zero_point": tensors["b3.d0.packed"][:, :2],
        "weight_g_idx": (np.arange(64) % 2).astype(np.int32),
    }
    return _ct("pack-quantized", parts, num_bits=3, type="int", group_size=32, symmetric=False)


def _ct_fp4(nv):
    rng = np.random.default_rng(0)
    parts: dict[str, np.ndarray] = {"weight_packed": rng.integers(0, 256, (8, 32)).astype(np.uint8)}
    if nv:
        parts["weight_scale"] = rng.uniform(1, 400, (8, 4)).astype(ml_dtypes.float8_e4m3fn)
        parts["weight_global_scale"] = np.array([123.456], np.float32)
    else:
        parts["weight_scale"] = rng.integers(110, 130, (8, 2)).astype(np.uint8)
    return _ct(f"{'nv' if nv else 'mx'}fp4-pack-quantized", parts, num_bits=4, type="float")


def _fp8():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(20, 36)).astype(ml_dtypes.float8_e4m3fn)
    parts = {"weight": weight, "weight_scale_inv": rng.random((2, 3)).astype(np.float32)}
    return _named(parts), {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}


def _mxfp4():
    rng = np.random.default_rng(0)
    parts = {
        "experts.up_blocks": rng.integers(0, 256, (2, 4, 2, 16)).astype(np.uint8),
        "experts.up_scales": rng.integers(100, 140, (2, 4, 2)).astype(np.uint8),
        "experts.up_bias": np.ones((2, 4), np.float32),
    }
    return _named(parts), {"quantization_config": {"quant_method": "mxfp4"}}


def _hqq(name):
    tensors, meta = _pick(f"hqq_{name}", "W_q", "scale", "zero")
    tensors |= {
        "m.shape": np.array(meta["shape"], np.int64),
        "m.packing": np.frombuffer(meta["packing"].encode(), np.uint8),
        "m.compute_dtype": np.frombuffer(b"torch.float32", np.uint8),
        "m.nbits": np.int32(meta["nbits"]),
        "m.axis": np.int32(meta["axis"]),
        "m.group_size": np.int32(meta["group_size"]),
    }
    return tensors, {"quantization_config": {"quant_method": "hqq"}}


def _quanto():
    tensors, _ = unit("quanto_int4_float16")
    parts = {n: a for n, a in tensors.items() if n.startswith("weight")} | {"bias": np.zeros(16, np.float16)}
    return _named(parts), {"quantization_config": {"quant_method": "quanto"}}


def _metal():
    tensors, meta = _pick("metal_affine_w4g64", "weight", "scales", "qbiases")
    return tensors, {"quantization_config": {"quant_method": "metal", "group_size": meta["group_size"], "bits": 4}}


def _mlx(mode):
    rng = np.random.default_rng(0)
    scales = rng.integers(100, 126, (2, 8, 2 if mode != "nvfp4" else 4)).astype(np.uint8)
    words = rng.integers(0, 1 << 30, (2, 8, 16 if mode == "mxfp8" else 8)).astype(np.uint32) & 0x3F3F3F3F
    return _named({"weight": words, "scales": scales}), {"quantization": {"mode": mode, "m": True}}


def _gemma():
    tensors, _ = _pick("gemma_w4", "weight", "weight_scale", "input_activation_scale")
    return tensors, {"quantization_config": {"quant_method": "gemma", "module_quant_configs": {"m": {"num_bits": 4}}}}


def _bitnet():
    return _pick("bitnet_packed", "weight", "weight_scale")[0], {"quantization_config": {"quant_method": "bitnet"}}


def _modelopt():
    tensors, _ = _pick("modelopt_nvfp4_32x64", "weight", "weight_scale", "weight_scale_2")
    return tensors, {"quantization_config": {"quant_method": "modelopt"}}


def _aqlm():
    tensors, _ = _pick("aqlm_2x8_24x64", "codes", "codebooks", "scales")
    return tensors, {"quantization_config": {"quant_method": "aqlm"}}


def _vptq():
    tensors, meta = unit("vptq_v8_k256_r16")
    tensors = _named({n: a for n, a in tensors.items() if n != "ref_dequant"})
    layer = {key: meta[key] for key in ("in_features", "out_features", "vector_len")}
    return tensors, {"quantization_config": {"quant_method": "vptq", "config_for_layers": {"m": layer}}}


def _torchao(name):
    tensors, meta = unit(name)
    described = json.loads(json.dumps(meta["safetensors_metadata"]))
    config = {"quantization_config": {"quant_method": "torchao"}}
    return {n: a for n, a in tensors.items() if n.startswith("0.")}, config, described


#: name -> (tensors, config.json[, metadata of the file])
CASES = {
    "gptq": _gptq(),
    "gptq 3 bits": _gptq(3),
    "gptq planar": _gptq(3, "gptq_p"),
    "awq gemm": _awq("gemm"),
    "awq gemv": _awq("gemv"),
    "awq gemv fast": _awq("gemv_fast"),
    "bnb nf4": _bnb("bnb_nf4_48x128_b64_bfloat16"),
    "bnb nested": _bnb("bnb_fp4_48x128_b64_dq_bfloat16"),
    "bnb int8": _int8(),
    "ct pack": _ct_integers(),
    "ct nvfp4": _ct_fp4(True),
    "ct mxfp4": _ct_fp4(False),
    "ct int8": _ct(
        "int-quantized", {"weight": np.ones((8, 16), np.int8), "weight_scale": np.ones((8, 1), np.float32)}, num_bits=8
    ),
    "fp8": _fp8(),
    "mxfp4": _mxfp4(),
    "hqq": _hqq("w3_g64_ax1"),
    "hqq axis 0": _hqq("w4_g64_ax0"),
    "quanto": _quanto(),
    "torchao": _torchao("torchao_int3_g32"),
    "metal": _metal(),
    "mlx mxfp8": _mlx("mxfp8"),
    "mlx nvfp4": _mlx("nvfp4"),
    "gemma": _gemma(),
    "bitnet": _bitnet(),
    "modelopt": _modelopt(),
    "aqlm": _aqlm(),
    "vptq": _vptq(),
}

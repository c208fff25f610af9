"""The compressed-tensors layouts that vLLM and llm-compressor read and write.

    pack-quantized             integers of 2 to 8 bits: ``weight_packed`` int32 [out, words], ``weight_scale``
                               [out, groups], ``weight_shape``; with zero points ``weight_zero_point``, packed along out
    int-quantized              int8 under planned int8 activations: ``weight``, ``weight_scale``
    float-quantized            float8_e4m3fn: ``weight``, ``weight_scale``: per tensor, channel, or block
    mxfp4-pack-quantized       ``weight_packed`` uint8 [out, in / 2], ``weight_scale`` the exponents as uint8

Packed integers are unsigned, the signed code plus 2 ** (bits - 1), in one little-endian bit stream per row. Scales keep
their dtype, which is the dtype that readers dequantize to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.observers import AbsMax
from jaxquant.core.qtensor import QTensor, flat
from jaxquant.core.specs import QuantSpec
from jaxquant.io.bits import patterns
from jaxquant.io.export.integers import check_integers, check_matrix, check_stack, group_size, grouped, is_stack, words
from jaxquant.io.export.interface import Layout
from jaxquant.io.hf.schemes import NARROW
from jaxquant.io.strict_json import Json

__all__ = ["compressed_tensors", "describes"]

_SCALES = (np.float32, np.float16, ml_dtypes.bfloat16)


def compressed_tensors(act: QuantSpec | None = None) -> Layout:
    """The layout; ``act`` is the quantization of activations: None, or int8 or fp8 per token."""
    act_type = None if act is None else act.qtype
    if act is not None and act not in _TOKENS:
        rule = "activations are int8 or fp8, symmetric, dynamic, per token, with the range of the largest magnitude"
        todo = "Use QuantSpec('int8') or QuantSpec('float8_e4m3fn')"
        raise quant_error("save_hf", rule, todo=todo, act=act)
    return Layout(
        "compressed-tensors",
        functools.partial(_check, act_type),
        functools.partial(_tensors, act_type),
        functools.partial(_config, act),
        functools.partial(_constants, act_type),
        stacks=True,
    )


#: The activations that the layout can say -> the keys in which their schemes differ. The library's int8 has a step of
#: absmax / 127.5; ours, absmax / 127, is marked where its readers look at nothing.
_TOKENS: dict[QuantSpec, dict[str, Json]] = {
    QuantSpec("float8_e4m3fn"): {"type": "float"},
    QuantSpec("int8", narrow_range=False, calibration=AbsMax()): {"type": "int"},
    QuantSpec("int8"): {"type": "int", "observer_kwargs": {NARROW: True}},
}


def describes(act: QuantSpec, q: object) -> bool:
    """Whether the layout says, of activations beside a weight, exactly this."""
    if not isinstance(q, QTensor) or len(q.shape) != 2 or isinstance(q.scale, QTensor):
        return False
    return act in _TOKENS and q.qtype == act.qtype and group_size(q) == q.shape[-1]


def _format(act: str | None, q: QTensor) -> str:
    if q.qtype == "mxfp4":
        return "mxfp4-pack-quantized"
    if q.qtype == "float8_e4m3fn":
        return "float-quantized"
    return "int-quantized" if act == "int8" and q.qtype == "int8" and q.zero_point is None else "pack-quantized"


def _check(act: str | None, q: QTensor, error: Callable[..., QuantError]) -> None:
    if is_stack(q):
        _check_stacked(q, act, error)
    elif q.qtype == "mxfp4":
        check_matrix(q, error)
    elif q.qtype == "float8_e4m3fn":
        if len(q.shape) != 2 or q.stored_order != (0, 1):
            raise error("the weight must be [out, in]", todo="Store it so", weight=repr(q))
    else:
        check_integers(q, (2, 3, 4, 5, 6, 7, 8), error)
    if q.permutation is not None:
        raise error("the library no longer reads reordered columns", todo="Write gptq instead", weight=repr(q))
    if act is not None and (q.qtype != act or group_size(q) != q.shape[-1]):
        todo = f"Quantize it to {act} per channel, or leave act out"
        raise error("activations are quantized like the weight, per channel", todo=todo, act=act, weight=repr(q))
    if q.qtype != "mxfp4" and not isinstance(q.scale, QTensor) and q.scale.dtype not in map(np.dtype, _SCALES):
        raise error("scales must be float32, float16 or bfloat16", todo="Cast them", scale=q.scale)


def _check_stacked(q: QTensor, act: str | None, error: Callable[..., QuantError]) -> None:
    check_stack(q, error)
    grid = q.qtype in ("mxfp4", "float8_e4m3fn") or q.type.kind == "int"
    if not grid or q.offset is not None or (q.qtype == "mxfp4" and _turned(q)) or act is not None:
        todo = "Quantize them to integers or fp8, weights only (mxfp4 only for [experts, out, in])"
        raise error("experts of this kind have no layout", todo=todo, act=act, weight=repr(q))


def _turned(q: QTensor) -> bool:
    """Whether the groups of a stack are along the last axis but one: matrices [in, out]."""
    return q.scale.shape[-2] != q.shape[-2] and not (q.scale.shape[-2] == 1 == q.scale.shape[-1])


def _stacked(act: str | None, q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a stack: scales have all axes of the weight."""
    codes, scale = np.asarray(q.codes), np.asarray(flat(q.scale))
    if q.qtype == "float8_e4m3fn":
        return {"weight": codes, "weight_scale": scale}
    if q.qtype == "mxfp4":
        return {"weight_packed": codes, "weight_scale": scale.view(np.uint8)}
    out = {"weight_packed": words(patterns(q), q.type.bits), "weight_scale": scale}
    if q.zero_point is None:
        return out
    middle = 0 if q.type.signed else 1 << (q.type.bits - 1)
    return out | {"weight_zero_point": (np.asarray(q.zero_point, np.int16) - middle).astype(np.int8)}


def _tensors(act: str | None, q: QTensor) -> dict[str, np.ndarray]:
    if is_stack(q):
        return _stacked(act, q)
    kind = _format(act, q)
    if kind == "pack-quantized":
        codes, scale, zero, _ = grouped(q)
        out = {"weight_packed": words(codes, q.type.bits), "weight_scale": scale}
        return out if q.zero_point is None else out | {"weight_zero_point": words(zero.T, q.type.bits).T}
    codes, scale = np.asarray(q.codes), np.asarray(flat(q.scale))
    if kind == "float-quantized":
        return {"weight": codes, "weight_scale": scale.reshape(-1) if scale.size == 1 else scale}
    if kind == "mxfp4-pack-quantized":
        exponents = np.broadcast_to(scale, (q.shape[0], scale.shape[1])).view(np.uint8)
        return {"weight_packed": codes, "weight_scale": exponents}
    return {"weight": codes, "weight_scale": np.broadcast_to(scale, (q.shape[0], 1))}


def _constants(act: str | None, q: QTensor) -> dict[str, np.ndarray]:
    return {"weight_shape": np.array(q.shape, np.int64)} if _format(act, q) == "pack-quantized" else {}


def _scheme(act: QuantSpec | None, q: QTensor) -> dict[str, Json]:
    axis = -2 if is_stack(q) and _turned(q) else -1
    kind = _format(None if act is None else act.qtype, q)
    size, width = q.shape[axis] // q.scale.shape[axis], q.shape[axis]
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": size if size != width else None,
        "num_bits": q.type.bits,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "strategy": "channel" if size == width else "group",
        "symmetric": q.zero_point is None,
        "type": "int" if q.type.kind == "int" else "float",
    }
    if kind == "float-quantized" and q.scale.size == 1:
        weights["strategy"] = "tensor"
    elif kind == "float-quantized" and not is_stack(q) and (size != width or q.scale.shape[0] != q.shape[0]):
        weights |= {"strategy": "block", "block_structure": [q.shape[0] // q.scale.shape[0], size], "group_size": None}
    if kind == "mxfp4-pack-quantized":
        weights |= {"group_size": 32, "strategy": "group", "scale_dtype": "torch.uint8"}
    tokens = {
        "dynamic": True,
        "group_size": None,
        "num_bits": 8,
        "observer": None,
        "strategy": "token",
        "symmetric": True,
    }
    return {
        "format": kind,
        "input_activations": None if act is None else tokens | _TOKENS[act],
        "output_activations": None,
        "weights": weights,
    }


def _config(act: QuantSpec | None, weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Json]:
    schemes: list[dict[str, Json]] = []
    modules: list[list[str]] = []
    for module, q in weights.items():
        scheme = _scheme(act, q)
        if scheme not in schemes:
            schemes.append(scheme)
            modules.append([])
        modules[schemes.index(scheme)].append(module)
    formats = {scheme["format"] for scheme in schemes}
    named = [[f"re:^{re.escape(m)}$" for m in names] for names in modules]
    stacks = [f"re:^{re.escape(m)}$" for m, q in weights.items() if is_stack(q)]  # not of class Linear
    targets = [["Linear", *stacks]] if len(schemes) == 1 else named
    return {
        "config_groups": {
            f"group_{i}": scheme | {"targets": names}
            for i, (scheme, names) in enumerate(zip(schemes, targets, strict=True))
        },
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(floats),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": "0.19.0",
    }

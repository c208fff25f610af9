"""bitsandbytes, 4 bits: ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4``.

Blocks run over the flattened weight; the first of two codes is in the high nibble. Scales that are quantized with the
dynamic map stay quantized (double quantization): ``weight.absmax`` holds their codes, ``weight.nested_absmax`` one
float32 for every 256 codes, ``weight.nested_quant_map`` the map; the state holds the offset. Other scales are written
as their float32 values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeGuard

import numpy as np

from jaxquant.core.blocks import spread
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor, Scale, flat, scale_values
from jaxquant.io.bits import patterns
from jaxquant.io.export.integers import check_matrix, group_size
from jaxquant.io.export.interface import Layout
from jaxquant.io.strict_json import Json

__all__ = ["BITSANDBYTES"]

_NESTED_BLOCK = 256
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_COMPUTED_IN = ("float16", "bfloat16", "float32")


def _check(q: QTensor, error: Callable[..., QuantError]) -> None:
    if q.qtype not in ("nf4", "fp4") or q.permutation is not None:
        raise error("the format holds nf4 and fp4", todo="Quantize to nf4", weight=repr(q))
    check_matrix(q, error)
    if group_size(q) not in _BLOCK_SIZES or q.scale.shape[0] != q.shape[0]:
        todo = f"Quantize with a group size of {', '.join(map(str, _BLOCK_SIZES))}"
        raise error("blocks have one of a few sizes", todo=todo, weight=repr(q))
    if q.dtype.name not in _COMPUTED_IN:
        todo = f"Quantize a weight of {', '.join(_COMPUTED_IN)}"
        raise error("the format names the dtype that a weight is computed in", todo=todo, weight=repr(q))
    if _is_nested(q.scale):
        _check_nested(q.scale, error)


def _is_nested(s: Scale) -> TypeGuard[QTensor]:
    """Whether scales have the structure of double quantization."""
    return isinstance(s, QTensor) and s.qtype == "dynamic8" and s.zero_point is None and _is_array(s.offset, s.scale)


def _is_array(*values: object) -> bool:
    return not any(value is None or isinstance(value, QTensor) for value in values)


def _groups(s: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset of each group of scales, from its first element."""
    each = [spread(np.asarray(value), s.shape) for value in (s.scale, s.offset)]
    scale, offset = (value.reshape(-1)[::_NESTED_BLOCK].astype(np.float32) for value in each)
    return scale, offset


def _check_nested(s: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless the groups of scales fit the format."""
    scale, offset = _groups(s)
    places = np.arange(s.size) // _NESTED_BLOCK
    table = np.asarray(s.type.table, np.float32)[np.asarray(s.codes).reshape(-1)]
    same = np.array_equal(table * scale[places] + offset[0], np.asarray(scale_values(s)).reshape(-1))
    if not same or (offset != offset[0]).any():
        todo = f"Use jaxquant.ptq.double_quantized with groups of {_NESTED_BLOCK}, or scales in float32"
        raise error(f"quantized scales have groups of {_NESTED_BLOCK} and one offset", todo=todo, scale=repr(s))


def _tensors(q: QTensor) -> dict[str, np.ndarray]:
    pairs = patterns(q).reshape(-1, 2)
    out = {
        "weight": pairs[:, :1] << np.uint8(4) | pairs[:, 1:],
        "weight.quant_map": np.asarray(q.type.table, np.float32),
    }
    s = q.scale
    if not _is_nested(s):
        return out | {"weight.absmax": np.asarray(flat(s)).astype(np.float32).reshape(-1)}
    return out | {
        "weight.absmax": np.asarray(s.codes).reshape(-1),
        "weight.nested_absmax": _groups(s)[0],
        "weight.nested_quant_map": np.asarray(s.type.table, np.float32),
    }


def _constants(q: QTensor) -> dict[str, np.ndarray]:
    state = {"quant_type": q.qtype, "blocksize": group_size(q), "dtype": q.dtype.name, "shape": list(q.shape)}
    if _is_nested(q.scale):
        offset = float(_groups(q.scale)[1][0])
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    name = f"weight.quant_state.bitsandbytes__{q.qtype}"
    return {name: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Json]:
    kinds, dtypes = {q.qtype for q in weights.values()}, {q.dtype.name for q in weights.values()}
    if len(kinds) > 1 or len(dtypes) > 1:
        todo = "Quantize all weights alike"
        rule = "one file has one number type and one compute dtype"
        raise quant_error("save_hf", rule, todo=todo, qtypes=tuple(sorted(kinds)), dtypes=tuple(sorted(dtypes)))
    return {
        "bnb_4bit_compute_dtype": dtypes.pop(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kinds.pop(),
        "bnb_4bit_use_double_quant": any(_is_nested(q.scale) for q in weights.values()),
        "llm_int8_skip_modules": list(floats) or None,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


BITSANDBYTES = Layout("bitsandbytes", _check, _tensors, _config, _constants, nested=lambda q: _is_nested(q.scale))

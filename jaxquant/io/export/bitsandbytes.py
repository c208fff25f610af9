"""bitsandbytes, 4 bits: ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.quant_state.bitsandbytes__nf4``.

Blocks run over the flattened weight; the first of two codes is in the high nibble. Scales that are quantized
themselves are written as the float32 numbers they stand for, which is exact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import patterns
from jaxquant.io.export.integers import check_matrix, group_size
from jaxquant.io.export.layout import Layout

__all__ = ["BITSANDBYTES"]

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _check(q: QTensor, error: Callable[..., QuantError]) -> None:
    if q.qtype not in ("nf4", "fp4") or q.permutation is not None:
        raise error("the format holds nf4 and fp4", todo="Quantize to nf4", weight=repr(q))
    check_matrix(q, error)
    if group_size(q) not in _BLOCK_SIZES or q.scale.shape[0] != q.shape[0]:
        todo = f"Quantize with a group size of {', '.join(map(str, _BLOCK_SIZES))}"
        raise error("blocks have one of a few sizes", todo=todo, weight=repr(q))


def _tensors(q: QTensor) -> dict[str, np.ndarray]:
    pairs = patterns(q).reshape(-1, 2)
    return {
        "weight": pairs[:, :1] << np.uint8(4) | pairs[:, 1:],
        "weight.absmax": q.scale.astype(np.float32).reshape(-1),
        "weight.quant_map": np.asarray(q.type.table, np.float32),
    }


def _constants(q: QTensor) -> dict[str, np.ndarray]:
    state = {"quant_type": q.qtype, "blocksize": group_size(q), "dtype": q.dtype.name, "shape": list(q.shape)}
    name = f"weight.quant_state.bitsandbytes__{q.qtype}"
    return {name: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def _config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Any]:
    kinds, dtypes = {q.qtype for q in weights.values()}, {q.dtype.name for q in weights.values()}
    if len(kinds) > 1 or len(dtypes) > 1:
        todo = "Quantize all weights alike"
        rule = "one file has one number type and one compute dtype"
        raise quant_error("save_hf", rule, todo=todo, qtypes=tuple(sorted(kinds)), dtypes=tuple(sorted(dtypes)))
    return {
        "bnb_4bit_compute_dtype": dtypes.pop(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": kinds.pop(),
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": list(floats) or None,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


BITSANDBYTES = Layout("bitsandbytes", _check, _tensors, _config, _constants)

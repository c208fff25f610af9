"""Gemma's quantization-aware checkpoints.

    weight        uint8 [out, in * bits / 8], low bits first, code + 2**(bits - 1); or int8 [out, in]
    weight_scale  float32 [out, 1]

    W = q * weight_scale

The static scales of inputs and outputs (0: none) stay beside the weight.
"""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.hf.stated import matches
from jaxquant.io.hf.to_qtensor import qtensor
from jaxquant.io.strict_json import Json

__all__ = ["GEMMA"]


def read(m: Module) -> QTensor:
    """The weight of one module."""
    weight = m.array(".weight", np.uint8, np.int8, ndim=2)
    scale = m.magnitudes(".weight_scale", np.float32, np.float16, ml_dtypes.bfloat16, ndim=2)
    m.check(".weight_scale", scale.shape, (weight.shape[0], 1))
    dtype = m.checkpoint.dtype or np.dtype(np.float32)
    if weight.dtype == np.int8:
        return QTensor(weight, scale, None, qtype="int8", dtype=dtype)
    bits = _bits(m)
    if bits not in (2, 4):
        raise m.error("packed codes have 2 or 4 bits", ".weight", todo="Check module_quant_configs", num_bits=bits)
    return qtensor(weight, scale, bits=bits, length=weight.shape[1] * 8 // bits, dtype=dtype, signed=True)


def _bits(m: Module) -> Json:
    """The first entry of the table of patterns that matches the module, or the configuration's own."""
    table = m.config.get("module_quant_configs")
    for pattern, entry in table.items() if isinstance(table, dict) else ():
        if isinstance(entry, dict) and matches(re.search, pattern, m.prefix, m.checkpoint.error):
            return entry.get("num_bits", entry.get("bits"))
    return m.config.get("num_bits", m.config.get("bits"))


GEMMA = Format(
    "Gemma",
    methods=("gemma",),
    names=(Naming(marks=(".weight_scale",)),),
    read=read,
    layouts="int2, int4, int8 per row",
    zero_is_off=True,
)

"""BitNet b1.58: ternary weights.

weight        uint8 [ceil(out / 4), in]   rows i * R + r in bits 2i and 2i + 1 of row r, plus 1
weight_scale  float [1]                   W = t / weight_scale (bitlinear) or t * weight_scale (autobitlinear)
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import packed
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, dynamic
from jaxquant.io.hf.to_qtensor import qtensor

__all__ = ["BITNET"]


def read(m: Module) -> QTensor:
    """The weight of one module."""
    raw = m.array(".weight", np.uint8, ndim=2)
    scale = m.unit(".weight_scale", np.float32, np.float16, ml_dtypes.bfloat16)
    codes = np.concatenate([(raw >> np.uint8(2 * i)) & np.uint8(3) for i in range(4)])
    if (codes == 3).any():
        raise m.error("a ternary code is 0, 1 or 2", ".weight", todo="The checkpoint is damaged: fetch it again")
    factor = scale.astype(np.float32)
    if m.config.get("linear_class") != "autobitlinear":
        factor = np.float32(1) / factor
    dtype = m.checkpoint.dtype or np.dtype(np.float32)
    # An int2 code is its value plus 2.
    return qtensor(packed(codes + np.uint8(1), 2), factor, bits=2, length=raw.shape[1], dtype=dtype, signed=True)


def activation(m: Module) -> Activation:
    """int8 for each token, as the layers of BitNet have it."""
    del m
    return dynamic("int8")


BITNET = Format(
    "BitNet",
    methods=("bitnet",),
    names=(Naming(marks=(".weight_scale",), keeps=(".bias", ".rms_norm.weight")),),
    read=read,
    layouts="ternary, as int2",
    activation=activation,
)

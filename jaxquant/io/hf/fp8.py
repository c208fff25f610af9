"""fp8 with one scale per block (DeepSeek, transformers' fine-grained fp8), per row (FBGEMM) or per tensor.

    weight            fp8 [out, in]
    weight_scale_inv  float32, or a byte with the exponent: [ceil(out / rows), ceil(in / columns)], a row or a scalar

    W = weight * weight_scale_inv, in spite of the name.

``weight_block_size`` gives rows and columns of a block; the last ones may be short. Experts may be packed e2m1 codes
with exponents per 32 under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.layout import spread
from jaxquant.io.hf.module import Format, Module

__all__ = ["FP8"]


def _refuse(config: dict[str, Any], error: Callable[..., QuantError]) -> None:
    if "fnuz" in str(config.get("fmt", "")):
        todo = "Convert it to e4m3fn (half the values, twice the scales)"
        raise error("the fp8 variant of AMD's older GPUs is not read", todo=todo, fmt=config["fmt"])


def _scale_name(m: Module) -> str:
    return next(s for s in (f"{m.target}_scale_inv", f"{m.target}_scale") if m.has(s))


def read(m: Module) -> QTensor:
    """The weight of one module."""
    suffix = _scale_name(m)
    weight = m.array(m.target, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint8, np.int8, ndim=(2, 3))
    powers = m.array(suffix).dtype in (np.uint8, ml_dtypes.float8_e8m0fnu)
    scale = m.exponents(suffix) if powers else m.magnitudes(suffix)
    if weight.dtype.itemsize == 1 and weight.dtype in (np.uint8, np.int8):
        shape = (*weight.shape[:-1], 2 * weight.shape[-1])
        if not powers:
            raise m.error(
                "fp4 codes need scales that are exponents", suffix, todo="Check the format", scale=scale.dtype
            )
        m.check(suffix, scale.shape, (*shape[:-1], shape[-1] // 32))
        return QTensor(weight.view(np.uint8), scale, None, qtype="mxfp4", dtype=m.dtype, length=shape[-1])
    blocks = m.config.get("weight_block_size")
    block: tuple[int | None, ...] = (None,) * weight.ndim
    if isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks):
        block = (*block[:-2], *blocks)
    if scale.size == 1:
        found: np.ndarray | None = scale.reshape((1,) * weight.ndim)
    else:
        scale = scale[..., None] if scale.ndim == weight.ndim - 1 else scale
        found = spread(scale, weight.shape, block)
        if found is None and any(block):
            found = spread(scale, weight.shape, (None,) * weight.ndim)
            if found is not None:
                m.by_shapes(f"scales {list(scale.shape)} of equal blocks", f"weight_block_size={blocks}")
    if found is None:
        got = {"shape": scale.shape, "weight": weight.shape, "weight_block_size": blocks}
        raise m.error("the scales fit no blocks of the weight", suffix, todo="Check the configuration", **got)
    return QTensor(weight, found, None, qtype=weight.dtype.name, dtype=m.dtype)


FP8 = Format(
    "fp8",
    methods=("fp8", "fbgemm_fp8", "mxfp8", "finegrained_fp8"),
    marks={".weight_scale_inv": ".weight", ".weight_scale": ".weight", "_scale_inv": ""},
    read=read,
    layouts="blocks (ragged too), rows, tensors; float32 or exponents; fp4 experts",
    refuse=_refuse,
)

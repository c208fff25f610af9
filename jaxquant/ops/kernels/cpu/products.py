"""The kernels for one stored weight on the CPU, in order of preference."""

from __future__ import annotations

from typing import Any

from jaxquant.ops.kernels.cpu import blocked, floats, gemv, int8, residual
from jaxquant.ops.problem import Kernel

__all__ = ["PRODUCTS"]

PRODUCTS: tuple[type[Kernel[Any]], ...] = (
    floats.ExactBfloat16,
    blocked.BlockedIntegers,
    int8.Int8,
    residual.ResidualSplit,
    residual.ScaledResidualSplit,
    gemv.Gemv,
    blocked.Blocked,
)

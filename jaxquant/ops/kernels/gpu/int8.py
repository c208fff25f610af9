"""Products of int8 on both sides whose scales are applied before the result is written.

XLA fuses row scales into an int8 product only if they are arguments of the program. The scales of an activation that is
quantized on the way are computed, so XLA writes the sums in int32, four bytes each, and reads them again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxquant.core.qtensor import QTensor
from jaxquant.ops.kernels.gpu.decoded import Place, has_blocks, in_int8, run
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.problem import Kernel, Product

__all__ = ["TritonInt8"]

_FEW = 64  # codes of a column per row of x, from which sums in int32 are small compared to the weight


@dataclasses.dataclass(frozen=True)
class TritonInt8(Kernel):
    """int8 dots in `jaxquant.ops.kernels.gpu.product`, if there are enough rows that their sums are large."""

    name = "int8, scaled by Triton"
    platforms = ("cuda",)

    @classmethod
    def takes(cls, problem: Any) -> Kernel | None:
        """As for `Kernel`: symmetric int8 with one scale for each row of x and each column of the weight."""
        if not has_blocks(problem) or not all(_is_plain(v) for v in (problem.x, problem.w)):
            return None
        one = all(
            v.scale.shape[i] == 1
            for v, axes in ((problem.x, problem.x_axes), (problem.w, problem.w_axes))
            for i in axes.contract
        )
        many = problem.rows * _FEW >= problem.length and problem.length <= overflow_limit(128, 128)
        return cls() if one and many and problem.w.size < 2**31 and Place.of(problem.w, problem.w_axes) else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, problem.dtype)


def _is_plain(x: Any) -> bool:
    """Whether an operand is symmetric int8 with float scales, in any order of its axes."""
    return isinstance(x, QTensor) and in_int8(x) and x.length is None and x.split is None and x.permutation is None

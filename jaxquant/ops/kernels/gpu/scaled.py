"""Products of 8-bit codes on both sides whose scales are applied before the result is written.

XLA fuses row scales into a product of codes only if they are arguments of the program. The scales of an activation that
is quantized on the way are computed, so XLA writes the sums in int32 or float32, four bytes each, and reads them again.
It also copies a layer of a stack before it multiplies it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TypeGuard

import jax
import jax.numpy as jnp

from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.ops.kernels.gpu.decoded import Place, has_blocks, in_int8, run
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.problem import Kernel, Product

__all__ = ["TritonFloat8", "TritonInt8", "in_e4m3", "multiplies_float8"]

_FEW = 64  # codes of a column per row of x, from which sums in four bytes are small compared to the weight
_FLOAT8 = re.compile(r"\b(H100|H200|H800|H20|GH200|B100|B200|B300|GB200|GB300|L4|L40|L40S|RTX (40|50)\d\d)\b")
"""Names of NVIDIA's chips that multiply float8: compute capability 8.9 and later."""


@dataclasses.dataclass(frozen=True)
class TritonInt8(Kernel[Product]):
    """int8 dots in `jaxquant.ops.kernels.gpu.product`, of a layer of a stack or of so many rows that sums are large."""

    title = "int8, scaled by Triton"
    platforms = ("cuda",)

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: symmetric int8 with one scale for each row of x and each column of the weight."""
        fits = _fits(problem, in_int8) and problem.length <= overflow_limit(128, 128)
        return cls() if fits else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, problem.dtype)


@dataclasses.dataclass(frozen=True)
class TritonFloat8(Kernel[Product]):
    """e4m3 dots in the same kernel, on chips that have them: Triton does not compile them for others.

    Sums are float32; the tensor cores of a Hopper add the products of one step with fewer bits.
    """

    title = "float8_e4m3fn, scaled by Triton"
    platforms = ("cuda",)

    @classmethod
    def runs_on(cls, target: Target) -> bool:
        """As for `Kernel`: only on chips that are known to multiply float8."""
        return multiplies_float8(target)

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: symmetric e4m3 with one scale for each row of x and each column of the weight."""
        return cls() if _fits(problem, in_e4m3) and is_default(problem.precision) else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, jnp.float8_e4m3fn)


def multiplies_float8(target: Target) -> bool:
    """Whether a target is a chip that is known to multiply float8."""
    return target.platform == "cuda" and _FLOAT8.search(target.chip or "") is not None


def in_e4m3(x: QTensor) -> bool:
    """Whether the values of an operand are e4m3 times a scale."""
    return x.symmetric and x.qtype == "float8_e4m3fn"


def _fits(problem: Product, codes: Callable[[QTensor], bool]) -> bool:
    """Whether both have such codes, one scale per row or column, and XLA would write sums or copy a layer."""
    if not has_blocks(problem):
        return False
    both = (problem.x, problem.x_axes), (problem.w, problem.w_axes)
    plain = [(v, axes) for v, axes in both if _is_plain(v) and codes(v)]
    if len(plain) < 2:
        return False
    one = all(v.scale.shape[i] == 1 for v, axes in plain for i in axes.contract)
    many = problem.rows * _FEW >= problem.length or problem.weight.layer is not None
    return one and many and problem.w.size < 2**31 and Place.of(problem.weight, problem.w_axes) is not None


def _is_plain(x: Operand) -> TypeGuard[QTensor]:
    """Whether an operand is quantized, with its codes one per element, in any order of its axes."""
    return isinstance(x, QTensor) and x.length is None and x.split is None and x.permutation is None

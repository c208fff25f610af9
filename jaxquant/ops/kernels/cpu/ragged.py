"""Ragged products of float rows with integer experts on the CPU."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxquant.ops.forms import Matrix
from jaxquant.ops.kernels.convolution import is_whole
from jaxquant.ops.kernels.cpu.blocks import total
from jaxquant.ops.kernels.cpu.residual import digit_count, digits_of
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.kernels.ragged import int8_ragged
from jaxquant.ops.problem import Kernel, RaggedProduct

__all__ = ["ResidualSplitRagged"]


@dataclasses.dataclass(frozen=True)
class ResidualSplitRagged(Kernel[RaggedProduct]):
    """The residual split of a float activation: one int8 product for each digit.

    Attributes:
      digits: how many.
    """

    operation = RaggedProduct
    platforms = ("cpu",)

    digits: int
    title = "int8 residual split"

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: integer experts with one scale per output channel."""
        x, experts = problem.forms
        if not isinstance(x, jax.ShapeDtypeStruct) or x.dtype == jnp.float64 or not is_whole(experts):
            return None
        return cls(digit_count(problem.precision)) if experts.shape[2] <= overflow_limit(127, experts.reach) else None

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`."""
        x, experts = problem.matrices()
        digits, scale = digits_of(x, self.digits, 1)
        scales = [(scale * (1 / 254) ** i)[None] for i in range(self.digits)]
        parts = (Matrix(digit[None], s, None, experts.qtype) for digit, s in zip(digits, scales, strict=True))
        return total(int8_ragged(part, experts, problem.sizes) for part in parts)

"""Float products on the CPU: the portable kernels, in the dtypes that are fast here.

The only fast narrow dtype is bfloat16, on CPUs with instructions for it. Values are rounded to it if there are enough
rows to pay for the rounding.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxquant.core.arithmetic import promoted
from jaxquant.ops.kernels import dequantized
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.cpu.dots import is_fast
from jaxquant.ops.problem import Kernel, Problem, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["Dequantized", "ExactBfloat16", "Float", "value_dtype"]

_MANY_ROWS = 24  # with fewer, a block of the weight in bfloat16 costs more than the product gains


def value_dtype(problem: Product) -> np.dtype:
    """The dtype of the values that a float product multiplies here."""
    x, w = problem.forms
    assert isinstance(w, Matrix | Packed)
    few = problem.rows < _MANY_ROWS
    if isinstance(x, Matrix | Packed):
        exact = problem.both(lambda form: form.exact_in(jnp.bfloat16))
        return jnp.bfloat16 if exact and not few and machine.bfloat16_dots() else dequantized.value_dtype(problem)
    assert x is not None
    dtype = dequantized.value_dtype(problem)
    if dtype == jnp.float64:
        return dtype
    if not is_fast(dtype) or problem.rows == 1:
        return jnp.float32
    return jnp.float32 if few and not (w.one_scale and w.integer) else dtype  # integers take one instruction to decode


class ExactBfloat16(Kernel[Product]):
    """`dequantized.ExactBfloat16` in training, on CPUs with bfloat16 instructions.

    A stored weight is faster decoded by blocks.
    """

    platforms = ("cpu",)

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`."""
        if problem.wide or not problem.trained or not machine.bfloat16_dots():
            return None
        return dequantized.ExactBfloat16.takes(problem)


class Float(Kernel[Problem]):
    """`dequantized.Float` of convolutions and ragged products, in float32 at least."""

    operation = Problem
    platforms = ("cpu",)

    @classmethod
    def takes(cls, problem: Problem) -> Kernel[Problem] | None:
        """As for `Kernel`."""
        return None if isinstance(problem, Product) else dequantized.Float(promoted(problem.dtype, jnp.float32))


class Dequantized(Kernel[Product]):
    """`dequantized.Dequantized`: in training, and in float64."""

    platforms = ("cpu",)

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`."""
        return None if None in problem.forms else dequantized.Dequantized(value_dtype(problem))

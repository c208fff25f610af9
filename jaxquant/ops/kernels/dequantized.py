"""Float products of real values, for every platform: the fallback of the other kernels.

A bfloat16 or float16 activation is multiplied by values of its own dtype, with sums in float32, where the products of
two such numbers are exact. A weight's values are cast to that dtype
- if the cast is exact: integers and fp8 with one scale per row, which is then applied to the sums, and in bfloat16 also
  fp8 and fp4 times powers of two, the MX formats;
- if it is the weight's own dtype (`QTensor.dtype`), which the float program would use too. Each value then has a
  relative error of at most 2**-8 in bfloat16, and of 2**-11 in float16 unless it is subnormal.
Otherwise, and at ``precision=HIGHEST``, values are float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.arithmetic import promoted
from jaxquant.core.codec import values_of
from jaxquant.ops.kernels.dots import float_dot
from jaxquant.ops.kernels.precision import NARROW, is_default
from jaxquant.ops.problem import Kernel, Problem, Product
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["Dequantized", "ExactBfloat16", "Float", "ScaledActivation", "in_own_dtype", "value_dtype"]


def value_dtype(problem: Product) -> np.dtype:
    """The dtype of the values that a float product multiplies."""
    x, w = problem.forms
    assert isinstance(w, Matrix | Packed)
    if isinstance(x, Matrix | Packed):
        return promoted(x.scale.dtype, w.scale.dtype)
    assert x is not None
    if problem.wide:
        return jnp.float64
    if x.dtype not in NARROW or not is_default(problem.precision):
        return jnp.float32
    return x.dtype if w.exact_in(x.dtype) or problem.dtype == x.dtype else jnp.float32


@dataclasses.dataclass(frozen=True)
class ExactBfloat16(Kernel[Product]):
    """A bfloat16 dot of fp8 or fp4 with one scale per row on either side, or powers of two (the MX formats).

    Those values are exact in bfloat16, and their products in float32.
    """

    platforms = ("tpu", "cuda", "other")

    title = "bfloat16"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: off the CPU, which has faster kernels of its own."""
        if problem.wide:
            return None
        return cls() if problem.both(lambda form: form.minifloat) else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        ((left,), rows), ((right,), columns) = (m.numbers(jnp.bfloat16) for m in problem.matrices())
        return problem.restored(float_dot(left, right), rows, columns)


@dataclasses.dataclass(frozen=True)
class Float(Kernel[Problem]):
    """The float program's own operation, applied to real values.

    Attributes:
      dtype: of the values.
    """

    operation = Problem

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the values."""
        return jnp.dtype(self.dtype).name

    @classmethod
    def takes(cls, problem: Problem) -> Kernel[Problem] | None:
        """Takes every convolution and ragged product, and other products that gain nothing from the canonical form.

        These are products whose scales form no groups along the contraction, and products in training, where real
        values exist already and codes would have to be decoded. (Values in a narrower dtype are rounded; codes are
        not.)
        """
        wide = promoted(problem.dtype, jnp.float32)
        if not isinstance(problem, Product):
            return cls(_own_dtype(problem) or wide)
        unrounded = problem.trained and all(v.dtype.itemsize >= 4 for v in (problem.x, problem.w))
        return cls(wide) if None in problem.forms or unrounded else None

    def run(self, problem: Problem) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.float_values()
        return problem.in_float(x.astype(self.dtype), w.astype(self.dtype))


def in_own_dtype(problem: Problem, x: jax.Array, w: jax.Array) -> jax.Array:
    """The float product of real values of a problem's operands, in the dtype that `Float` uses on each platform."""

    def run(dtype: DTypeLike, x: jax.Array, w: jax.Array) -> jax.Array:
        return problem.in_float(x.astype(dtype), w.astype(dtype)).astype(problem.result)

    wide, own = promoted(x.dtype, w.dtype), _own_dtype(problem)
    if own is None or own == wide:
        return run(wide, x, w)
    return lax.platform_dependent(x, w, cpu=functools.partial(run, wide), default=functools.partial(run, own))


def _own_dtype(problem: Problem) -> np.dtype | None:
    """bfloat16 or float16, if operands, result and precision need no more; else None."""
    dtypes = {jnp.dtype(dtype) for dtype in (problem.x.dtype, problem.w.dtype, problem.result)}
    own = dtypes.pop()
    return own if not dtypes and own in NARROW and is_default(problem.precision) else None


@dataclasses.dataclass(frozen=True)
class ScaledActivation(Kernel[Product]):
    """A float dot of codes with an activation that is multiplied by scales which all rows of the weight share.

        sum_k x[m, k] (s[k] c[n, k])  =  sum_k (x[m, k] s[k]) c[n, k]

    A cache of values with a scale per token is such a weight. A GPU's compiler decodes codes within a product, but not
    codes times scales.

    Attributes:
      dtype: of both factors.
    """

    platforms = ("tpu", "cuda", "other")

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the factors."""
        return jnp.dtype(self.dtype).name

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`, except float16, in which the activation times scales could underflow."""
        x, w = problem.forms
        if not isinstance(x, jax.ShapeDtypeStruct) or not isinstance(w, Matrix | Packed) or problem.trained:
            return None
        plain = w.qtype.kind in ("int", "float") and w.zero_point is None and w.offset is None and w.multiplier is None
        dtype = x.dtype if is_default(problem.precision) else promoted(x.dtype, jnp.float32)
        fits = plain and w.groups != 1 and w.scale.shape[1] == 1 and dtype != jnp.float16 and not problem.wide
        return cls(dtype) if fits else None

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.matrices()
        scale = w.scale if w.groups == w.shape[2] else jnp.repeat(w.scale, w.shape[2] // w.groups, axis=2)
        codes = values_of(w.codes, w.qtype, self.dtype)
        out = float_dot((x.astype(scale.dtype) * scale).astype(self.dtype), codes, precision=problem.precision)
        return problem.restored(out)


@dataclasses.dataclass(frozen=True)
class Dequantized(Kernel[Product]):
    """A float dot of the dequantized operands.

    Attributes:
      dtype: of the values.
    """

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the values."""
        return jnp.dtype(self.dtype).name

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: every product that has a canonical form."""
        return None if None in problem.forms else cls(value_dtype(problem))

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        x, w = problem.matrices()
        if self.dtype in NARROW and w.exact_in(self.dtype):
            (values,), scale = w.numbers(self.dtype)
            return problem.restored(float_dot(x.astype(self.dtype), values), columns=scale)
        wide = promoted(self.dtype, jnp.float32)
        x, w = (v.values(wide) if isinstance(v, Matrix) else v for v in (x, w))
        return problem.restored(float_dot(x.astype(self.dtype), w.astype(self.dtype), precision=problem.precision))

"""Floating-point operations whose last bit matters.

XLA is free to rewrite float arithmetic, and does: these say what they compute, under ``jit`` and without.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.jitted import jitted
from jaxquant.core.sizes import number

__all__ = [
    "divide",
    "divide_twice",
    "exponent",
    "finfo",
    "have_common_dtype",
    "nan_where",
    "power_of_two",
    "promoted",
    "sums",
    "times_power_of_two",
    "times_reciprocal",
    "two_sum",
]

_BITS_OF_ONE, _BITS_OF_NAN = (np.uint32(np.float32(value).view(np.uint32)) for value in (1, np.nan))


def divide(x: jax.Array, y: jax.Array | float) -> jax.Array:
    """``x / y``, correctly rounded.

    XLA turns division by a constant or by a broadcast value into multiplication by its reciprocal. That is off by one
    unit in the last place in a quarter of all cases, which moves ties and makes codes differ from every reference. A
    divisor that depends elementwise on ``x`` is left alone.
    """
    return x / jnp.where(jnp.isnan(x), x, jnp.asarray(y, x.dtype))


def divide_twice(x: jax.Array, a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """``x / a / b`` of magnitudes, each quotient correctly rounded.

    XLA turns ``(x / a) / b`` into ``x / (a b)``, unless another operation stands between: here a maximum with 0.
    """
    return divide(jnp.maximum(divide(x, a), 0), b)


def times_reciprocal(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x * (1 / y)``, rounded twice, for y > 0: what bitsandbytes computes. Where 1 / y is subnormal, ``x / y``."""
    reciprocal = divide(jnp.ones_like(y), y)
    return jnp.where(y > 2.0**126, divide(x, y), x * reciprocal)


def exponent(magnitude: jax.Array) -> jax.Array:
    """floor(log2(magnitude)) as int32, exact, for normal numbers; the least exponent minus 1 for 0."""
    if magnitude.dtype == jnp.float64:
        return (lax.bitcast_convert_type(magnitude, jnp.int64) >> 52).astype(jnp.int32) - 1023
    return (lax.bitcast_convert_type(magnitude.astype(jnp.float32), jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """``2.0 ** exponent`` as float32, exact, for exponents of normal numbers (-126 .. 127)."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``x * 2.0 ** exponent`` in float32 for exponents 0 to 254, at most the largest finite number."""
    half = exponent >> 1
    return jnp.minimum(x * power_of_two(half) * power_of_two(exponent - half), float(finfo(jnp.float32).max))


@jitted()
def nan_where(broken: jax.Array, x: jax.Array) -> jax.Array:
    """``x``, and NaN where ``broken``.

    ``jax_debug_nans`` reports every operation that returns a NaN, and without jit the broadcast of a constant is one.
    So there the bits of NaN are chosen where it belongs, and those of 1, which every dtype holds, elsewhere. A compiled
    program has the constant: it would compute the bits in an operation of its own.
    """
    if not cast(Any, jax.config).jax_disable_jit:
        return jnp.where(broken, np.asarray(np.nan, x.dtype), x)
    bits = jnp.where(broken, _BITS_OF_NAN, _BITS_OF_ONE)
    return jnp.where(broken, lax.bitcast_convert_type(bits, jnp.float32).astype(x.dtype), x)


def finfo(dtype: DTypeLike) -> Any:
    """The limits of a float dtype, as `ml_dtypes.finfo`, whose numbers have no types of their own."""
    return cast(Any, ml_dtypes.finfo(dtype))


def promoted(a: DTypeLike, b: DTypeLike) -> np.dtype:
    """The dtype that holds both: JAX's own choice, also under ``jax_numpy_dtype_promotion="strict"``."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def have_common_dtype(a: DTypeLike, b: DTypeLike) -> bool:
    """Whether two dtypes promote to a common one, by JAX's rules; floats of 8 bits promote to no other."""
    try:
        promoted(a, b)
    except ValueError:  # JAX's TypePromotionError, which jax 0.6 does not publish
        return False
    return True


def sums(*terms: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Sums of two or more arrays of one shape and dtype along axes, which keep size 1; the arrays need not be written.

    One loop sums them all along the longest axis. A sum of one array is left to a library on CPUs, which reads it from
    memory. The other axes follow, so that no float32 sum is long.
    """
    if not axes:
        return terms
    longest = max(axes, key=lambda axis: number(terms[0].shape[axis]))
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    found = lax.reduce(terms, zeros, _plus, (longest % terms[0].ndim,))
    return tuple(jnp.sum(jnp.expand_dims(x, longest), axis=axes, keepdims=True) for x in found)


def _plus(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``a + b``, rounded, and the exact rounding error.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)

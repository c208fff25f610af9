"""Rounds float32 to the grid of a float of few bits, in registers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.qtypes import QType

__all__ = ["EXPONENT", "power_below", "rounded_float"]

EXPONENT = 0x7F800000
"""The bits of a float32's exponent."""


def rounded_float(v: jax.Array, qtype: QType) -> jax.Array:
    """The nearest grid value of a float type, ties to even, for float32 of magnitudes up to the type's largest."""
    # Adding a number that is so large leaves no place for a fraction of a step.
    large = jnp.maximum(power_below(v), 2.0**qtype.min_exponent) * (1.5 * 2.0 ** (23 - qtype.mantissa_bits))
    return (v + large) - large


def power_below(x: jax.Array) -> jax.Array:
    """The largest power of two that is not larger than a magnitude; 0 of subnormal numbers, infinity of NaN."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & EXPONENT, jnp.float32)

"""The requested precision of a product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["NARROW", "is_default", "is_highest"]

NARROW = (jnp.bfloat16, jnp.float16)
"""Dtypes whose products are exact in float32."""


def is_highest(precision: lax.PrecisionLike) -> bool:
    """Whether full float32 precision is requested; None stands for JAX's default."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    highest = {lax.Precision.HIGHEST, "highest", "float32"}
    return any(p in highest for p in (precision if isinstance(precision, tuple) else (precision,)))


def is_default(precision: lax.PrecisionLike) -> bool:
    """Whether the precision of the operands' dtype suffices: no other precision or algorithm is requested."""
    return not is_highest(precision) and not isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset)

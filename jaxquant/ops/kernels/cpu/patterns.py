"""Values of 8-bit floats, which XLA's CPU backend converts slowly."""

from __future__ import annotations

import jax
from jax.typing import DTypeLike

from jaxquant.core.codec import decoded, values_of_patterns
from jaxquant.core.qtypes import QType

__all__ = ["by_bits"]


@values_of_patterns.on("cpu")
def by_bits(codes: jax.Array, *, qtype: QType, dtype: DTypeLike) -> jax.Array:
    """Values of the uint8 patterns of an 8-bit float, assembled from their bits."""
    return decoded(codes, qtype, dtype)

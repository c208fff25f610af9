"""Whether the values of an array are finite, where they can be read."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant.core.jitted import jitted

__all__ = ["has_nan", "is_concrete", "not_finite"]


def is_concrete(x: object) -> bool:
    """Whether the values of an array can be read: it is not traced, and all of it is on this host."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def _on_host(x: jax.Array) -> bool:
    """Whether NumPy reads an array sooner than a program for its shape is compiled."""
    return x.size <= 1 << 16 and getattr(x, "is_fully_addressable", True)


def has_nan(x: jax.Array) -> bool:
    """Whether a concrete array holds a NaN; False for a tracer, or an array on other hosts too."""
    if not is_concrete(x):
        return False
    if _on_host(x):
        return bool(np.any(np.isnan(x)))
    with jax.ensure_compile_time_eval():  # a constant stays concrete during a trace
        return bool(_any_nan(x))


@jitted()
def _any_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x))


def not_finite(x: jax.Array) -> int:
    """How many elements of a concrete array are NaN or infinite."""
    if _on_host(x):
        return int(np.count_nonzero(~np.isfinite(x)))
    with jax.ensure_compile_time_eval():
        return int(_not_finite(x))


@jitted()
def _not_finite(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x))

"""What the CPU at hand does with an int8 dot, as a compiled program says: no clock, and no list of processors."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["FAST", "Int8", "int8_dots", "served"]

FAST = "__ynn_fusion"
"""What XLA:CPU writes into a program where it hands an operation to its library of fast kernels."""

Int8 = Literal["tiles", "vectors", "none"]


def served(text: str) -> bool:
    """Whether a compiled program hands anything to the library of fast kernels."""
    return FAST in text


@functools.cache
def int8_dots() -> Int8:
    """How XLA:CPU multiplies int8 matrices here.

    A dot of 64 x 64 is compiled once per process (tens of milliseconds), and read: whether the library of fast kernels
    serves it, and for which instructions it was compiled.

    Returns:
      ``"tiles"``: with instructions that multiply int8 tiles (AMX), many times faster than float32; ``"vectors"``: with
      dot products of int8 vectors (VNNI, or the like on Arm), which wins where memory is what counts, at few rows, and
      up to a factor of two elsewhere; ``"none"``: by a plain loop, slower than the float dot.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # no CPU backend: nothing is lowered for it
        return "none"
    one = jax.ShapeDtypeStruct((64, 64), jnp.int8, sharding=jax.sharding.SingleDeviceSharding(cpu))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)

    program: Any = jax.jit(dot).lower(one, one).compile()
    if not served(program.as_text()):
        return "none"
    try:
        features = program.runtime_executable().serialize()
    except Exception:  # a runtime that cannot serialize says nothing about tiles
        return "vectors"
    return "tiles" if b"+amx-int8" in features else "vectors"

"""How this CPU computes int8 and bfloat16 dots, read from a compiled program rather than timed or listed by model."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

__all__ = ["FAST", "Int8Dots", "bfloat16_dots", "cores", "int8_dots", "served"]

FAST = "__ynn_fusion"
"""The text with which XLA:CPU marks an operation that it hands to its library of fast kernels."""

Int8Dots = Literal["tiles", "vectors", "none"]


def served(text: str) -> bool:
    """Whether a compiled program hands an operation to the library of fast kernels."""
    return FAST in text


def _probe(dtype: DTypeLike, result: DTypeLike) -> bytes | None:
    """A dot of 64 x 64 as XLA:CPU compiles it, serialized; None if the library of fast kernels does not serve it.

    The bytes contain the names of the instructions that it was compiled for; they are empty if the runtime cannot
    serialize.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # no CPU backend, so no program is lowered for it
        return None
    one = jax.ShapeDtypeStruct((64, 64), dtype, sharding=jax.sharding.SingleDeviceSharding(cpu))

    def dot(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=result)

    with ThreadPoolExecutor(1) as outside:  # of any mesh that is set here
        program: Any = outside.submit(lambda: jax.jit(dot).lower(one, one).compile()).result()
    if not served(program.as_text()):
        return None
    try:
        return program.runtime_executable().serialize()
    except Exception:
        return b""


@functools.cache
def int8_dots() -> Int8Dots:
    """How XLA:CPU multiplies int8 matrices here.

    A small dot is compiled once per process (tens of milliseconds). Its program shows whether the library of fast
    kernels serves it, and for which instructions it was compiled.

    Returns:
      ``"tiles"``: with instructions that multiply int8 tiles (AMX), many times faster than float32; ``"vectors"``: with
      dot products of int8 vectors (VNNI, or similar on Arm), faster at few rows, where memory is the bound, and up to
      twice as fast elsewhere; ``"none"``: by a plain loop, slower than the float dot.
    """
    program = _probe(jnp.int8, jnp.int32)
    if program is None:
        return "none"
    return "tiles" if b"+amx-int8" in program else "vectors"


@functools.cache
def bfloat16_dots() -> bool:
    """Whether XLA:CPU multiplies bfloat16 matrices with bfloat16 instructions here, twice as fast as float32.

    As in `int8_dots`, a compiled program shows it. (The library serves bfloat16 without such instructions too, by
    widening it.)
    """
    program = _probe(jnp.bfloat16, jnp.float32)
    return program is not None and any(name in program for name in _BFLOAT16)


def cores() -> int:
    """The number of cores that this process may use; XLA:CPU starts as many threads."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_BFLOAT16 = (b"+avx512bf16", b"+amx-bf16", b"+bf16")

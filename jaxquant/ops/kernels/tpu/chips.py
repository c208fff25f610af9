"""Properties of single generations of TPUs, which are named as JAX names them (`jax.Device.device_kind`)."""

from __future__ import annotations

__all__ = ["GATHER_BYTES", "MULTIPLY_FLOATS_ONLY", "TWO_CORES", "V5E", "V6E"]

V5E = "TPU v5 lite"
V6E = "TPU v6 lite"
_V7X = "TPU7x"

GATHER_BYTES = (V6E, _V7X)
"""The vector unit gathers bytes among the rows of a register, and compares them."""

MULTIPLY_FLOATS_ONLY = (_V7X,)
"""The matrix unit multiplies bfloat16 and fp8. The compiler writes products of int8 as products of bfloat16, with
conversions on both sides."""

TWO_CORES = ("TPU v4", "TPU v5")
"""A device has two cores (a v5p is called TPU v5). A kernel runs on both if its steps may run in any order."""

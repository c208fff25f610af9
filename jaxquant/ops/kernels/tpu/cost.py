"""How many operations a kernel stands for: no compiler counts them, and none can be read from a compiled program."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["product_cost"]


def product_cost(
    x: jax.Array, codes: jax.Array, beside: Iterable[jax.Array], result: jax.ShapeDtypeStruct, *, layers: int = 1
) -> Any:
    """The cost of a product, as `pallas_call` takes it: ``2 M K N`` operations for each weight.

    They are those of the float product: what a kernel does beside, such as products of second digits, is not counted.

    Args:
      x: the activation, [..., K].
      codes: of the weight; a kernel whose rows choose among experts reads at most all of them.
      beside: scales and the like, of all layers or of one.
      result: shape and dtype of the result.
      layers: how many layers are stacked in ``codes``, and in arrays of the same length; one of them is read.
    """
    from jax.experimental import pallas as pl

    weight = sum(_nbytes(v) // (layers if v.shape[0] == codes.shape[0] else 1) for v in (codes, *beside))
    read = x.nbytes + weight
    operations = 2 * x.shape[-1] * math.prod(result.shape)
    return pl.CostEstimate(flops=operations, bytes_accessed=read + _nbytes(result), transcendentals=0)


def _nbytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes in the memory of a TPU, where two int4 share one."""
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 8 * x.dtype.itemsize
    return x.size * bits // 8

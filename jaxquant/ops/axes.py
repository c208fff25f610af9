"""The axes of an operand of a contraction, and the shape of its result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.sizes import number

__all__ = ["Axes", "split_up"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one operand of a contraction, in the order of the canonical form."""

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    contract: tuple[int, ...]

    @classmethod
    def of(cls, ndim: int, batch: tuple[int, ...], contract: tuple[int, ...]) -> Axes:
        """Axes of an operand of rank ``ndim``; axes that are neither batch nor contracted are rows."""
        return cls(batch, tuple(i for i in range(ndim) if i not in batch and i not in contract), contract)

    @property
    def order(self) -> tuple[int, ...]:
        """All axes in canonical order: batch, rows, contracted."""
        return self.batch + self.rows + self.contract

    def flatten(self, x: jax.Array) -> jax.Array:
        """``[batch, rows, K]``."""
        return jnp.transpose(x, self.order).reshape(self._sizes(x))

    def flatten_scale(self, x: jax.Array) -> jax.Array:
        """``[batch, rows, K]`` of scales, which unlike codes are stored in logical order.

        Where possible it reshapes first: codes are a transpose of the stored array, and XLA cancels two transposes that
        have no reshape between them.
        """
        parts = (self.batch, self.rows, self.contract)
        order = sorted(range(3), key=lambda i: parts[i][:1])
        if tuple(i for part in order for i in parts[part]) != tuple(range(x.ndim)):
            return self.flatten(x)
        sizes = self._sizes(x)
        return jnp.transpose(x.reshape([sizes[i] for i in order]), [order.index(i) for i in range(3)])

    def _sizes(self, x: jax.Array) -> list[int]:
        return [math.prod(x.shape[i] for i in part) for part in (self.batch, self.rows, self.contract)]


def split_up(result: jax.Array, shape: Sequence[int]) -> jax.Array:
    """A product's result in another shape.

    Where rows become several axes, the TPU's compiler scales the result in that shape, and so not within the product:
    914 thousand cycles for [2, 2048, 4096] times [4096, 4096] in W8A8 on a v5e. Where rows are kept, they are 541.
    """
    before, after = ([n for n in s if number(n) != 1] for s in (result.shape, shape))
    if before != after:
        result = lax.platform_dependent(result, tpu=lax.optimization_barrier, default=lambda x: x)
    return result.reshape(shape)

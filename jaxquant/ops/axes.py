"""The axes of an operand of a contraction, and those of its result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

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


def split_up(value: jax.Array, parts: Sequence[Sequence[int]]) -> jax.Array:
    """Each axis of an array split into several, of the sizes in its part; an axis of size 1 into as many of size 1."""

    def sizes(n: int, part: Sequence[int]) -> Sequence[int]:
        return [1] * len(part) if number(n) == 1 else part

    return value.reshape([n for size, part in zip(value.shape, parts, strict=True) for n in sizes(size, part)])

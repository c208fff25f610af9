"""What calibration can know about the inputs of a weight.

A statistic is a small frozen dataclass with two methods over plain pytrees: ``of(x)`` for the inputs of one batch, and
``merge(a, b)`` for two batches, two uses, two hosts. ``x`` is ``[batch, rows, channels]``: channels are what the weight
contracts, in the order of its reduced axes; batch is 1 unless weight and input share batch axes (experts, say), and is
kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.observers import MinMax, Observer

__all__ = ["ChannelAbsMax", "ChannelMean", "Gram", "Range", "Statistic"]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One kind of statistic; see the module's docstring."""

    def of(self, x: jax.Array) -> Any:
        """The statistic of one batch."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """The statistic of both."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Range(Statistic):
    """The state of an observer over all elements: min and max, a moving average, a histogram."""

    observer: Observer = MinMax()  # noqa: RUF009  (frozen)

    def of(self, x: jax.Array) -> Any:
        return self.observer.update(self.observer.init((1,)), x.reshape(-1), (0,))

    def merge(self, a: Any, b: Any) -> Any:
        return self.observer.merge(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelAbsMax(Statistic):
    """``max |x|`` of each channel, [batch, channels]: what SmoothQuant uses."""

    def of(self, x: jax.Array) -> Any:
        return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1)

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelMean(Statistic):
    """Sums of x and of ``|x|`` of each channel, [batch, channels], with the number of rows: bias correction and AWQ."""

    def of(self, x: jax.Array) -> Any:
        x = x.astype(jnp.float32)
        return {"sum": jnp.sum(x, axis=1), "abs_sum": jnp.sum(jnp.abs(x), axis=1), "rows": jnp.float32(x.shape[1])}

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)


@dataclasses.dataclass(frozen=True)
class Gram(Statistic):
    """``sum x^T x`` over rows, [batch, channels, channels], with the number of rows: GPTQ and what builds on it."""

    def of(self, x: jax.Array) -> Any:
        x = x.astype(jnp.float32)
        gram = jnp.einsum("brc,brd->bcd", x, x, precision=lax.Precision.HIGHEST)
        return {"gram": gram, "rows": jnp.float32(x.shape[1])}

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

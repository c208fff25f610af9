"""What calibration can know about the inputs of a weight.

A statistic is a small frozen dataclass with two methods over plain pytrees: ``of(x)`` for the inputs of one batch, and
``merge(a, b)`` for two batches, two uses, two hosts. ``x`` is ``[batch, rows, channels]``. What the channels are,
``sees`` says:

- ``"values"``: none in particular, x is a bag of numbers;
- ``"channels"``: what the weight contracts, in the order of its reduced axes; the features of a convolution's input.
  Batch is 1 unless weight and input share batch axes (as in an einsum over experts), and is kept;
- ``"columns"``: the same, with one column for each weight that an output sums over. For a convolution these are the
  features of every place of its window, and batch is its feature groups; for a ragged_dot batch is its experts, with
  rows of 0 where another expert works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.observers import MinMax, Observer

__all__ = ["ChannelAbsMax", "ChannelMean", "Gram", "Inputs", "Range", "Statistic"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What went into one use of a weight, as [batch, rows, channels]; see the module's docstring.

    Attributes:
      values: always there.
      channels: None if only a part of what the weight contracts meets this input.
      columns: computed on demand; None likewise, or if they cannot be told.
    """

    values: jax.Array
    channels: jax.Array | None
    columns: Callable[[], jax.Array] | None

    def seen_by(self, statistic: Statistic) -> jax.Array | None:
        """What a statistic looks at, if it is there."""
        if statistic.sees == "columns":
            return None if self.columns is None else self.columns()
        return self.values if statistic.sees == "values" else self.channels


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One kind of statistic; see the module's docstring."""

    sees: ClassVar[Literal["values", "channels", "columns"]] = "values"

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

    sees = "channels"

    def of(self, x: jax.Array) -> Any:
        return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1)

    def merge(self, a: Any, b: Any) -> Any:
        return jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelMean(Statistic):
    """Sums of x and of ``|x|`` of each channel, [batch, channels], with the number of rows: bias correction and AWQ."""

    sees = "channels"

    def of(self, x: jax.Array) -> Any:
        x = x.astype(jnp.float32)
        return {"sum": jnp.sum(x, axis=1), "abs_sum": jnp.sum(jnp.abs(x), axis=1), "rows": jnp.float32(x.shape[1])}

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)


@dataclasses.dataclass(frozen=True)
class Gram(Statistic):
    """``sum x^T x`` over rows, [batch, columns, columns], with the number of rows: GPTQ and what builds on it.

    For a weight of K contracted values per output that is K^2 floats; a convolution's input is copied once for each
    place of its window while it is computed.
    """

    sees = "columns"

    def of(self, x: jax.Array) -> Any:
        x = x.astype(jnp.float32)
        gram = jnp.einsum("brc,brd->bcd", x, x, precision=lax.Precision.HIGHEST)
        return {"gram": gram, "rows": jnp.float32(x.shape[1])}

    def merge(self, a: Any, b: Any) -> Any:
        return jax.tree.map(jnp.add, a, b)

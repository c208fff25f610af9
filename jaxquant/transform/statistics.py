"""Statistics that calibration collects about the inputs of a weight.

A statistic is a small frozen dataclass with two methods over plain pytrees: ``of(x)`` for the inputs of one batch, and
``merge(a, b)`` for two batches, two uses, two hosts. ``x`` is ``[batch, rows, channels]``. With a mask it is
``of(x, counted)``, with the rows that count as a boolean array ``[batch, rows]``. ``sees`` says which channels x has:

- ``"values"``: none in particular, x is a bag of numbers;
- ``"channels"``: what the weight contracts, in the order of its reduced axes; the features of a convolution's input.
  Batch is 1 unless weight and input share batch axes (as in an einsum over experts), and is kept;
- ``"columns"``: the same, with one column for each weight that an output sums over. For a convolution these are the
  features of every place of its window, and batch is its feature groups; for a ragged_dot batch is its experts, with
  rows of 0 where another expert works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import two_sum
from jaxquant.core.observers import MinMax, Observer
from jaxquant.core.types import PyTree

__all__ = ["ChannelAbsMax", "ChannelMean", "Gram", "Inputs", "Range", "Rows", "Statistic"]


_Sums: TypeAlias = Mapping[str, PyTree]
"""Sums by name, and beside them what they lack of the exact sums."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of numbers [batch, rows, channels], and which of them count, [batch, rows]; None: all do."""

    values: jax.Array
    counted: jax.Array | None = None

    def seen(self) -> jax.Array | None:
        """Whether any row counts, as an array; None if all rows count."""
        if self.values.size == 0:
            return jnp.array(False)
        return None if self.counted is None else jnp.any(self.counted)

    def broken(self) -> jax.Array:
        """Whether a row that counts holds NaN or inf."""
        bad = ~jnp.isfinite(self.values)
        return jnp.any(bad if self.counted is None else bad & self.counted[..., None])


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one use of a weight, as [batch, rows, channels]; see the module's docstring.

    Attributes:
      values: always there.
      channels: None if this input meets only a part of the weight's contracted axes.
      columns: computed on demand; None likewise, or if they cannot be told.
    """

    values: Rows
    channels: Rows | None
    columns: Callable[[], Rows] | None

    def seen_by(self, statistic: Statistic) -> Rows | None:
        """The rows that a statistic reads, if they are there."""
        if statistic.sees == "columns":
            return None if self.columns is None else self.columns()
        return self.values if statistic.sees == "values" else self.channels


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One kind of statistic; see the module's docstring."""

    sees: ClassVar[Literal["values", "channels", "columns"]] = "values"

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> PyTree:
        """The statistic of one batch: of all rows, or of the counted ones."""
        raise NotImplementedError

    def merge(self, a: PyTree, b: PyTree) -> PyTree:
        """The statistic of both."""
        raise NotImplementedError


def _only(x: jax.Array, counted: jax.Array | None) -> jax.Array:
    """x in float32, with 0 in rows that do not count, whatever is in them."""
    x = x.astype(jnp.float32)
    return x if counted is None else jnp.where(counted[..., None], x, 0.0)


def _number(x: jax.Array, counted: jax.Array | None) -> jax.Array:
    """How many rows count: the mean over the batch."""
    return jnp.float32(x.shape[1]) if counted is None else jnp.sum(counted.astype(jnp.float32)) / x.shape[0]


def _added(a: _Sums, b: _Sums, names: tuple[str, ...]) -> dict[str, PyTree]:
    """Sums of sums, with ``rest``: what they lack of the exact sum, so that one more still counts beyond 2**24."""
    out, rest = {}, {}
    for name in names:
        total, lost = two_sum(a[name], b[name])
        out[name], rest[name] = two_sum(total, lost + (a["rest"][name] + b["rest"][name]))
    return {**out, "rest": rest}


@dataclasses.dataclass(frozen=True)
class Range(Statistic):
    """The state of an observer over all elements: min and max, a moving average, a histogram."""

    observer: Observer = MinMax()  # noqa: RUF009  (frozen)

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> PyTree:
        first, flat = self.observer.init((1,)), x.reshape(x.size)
        if counted is None:
            return self.observer.update(first, flat, (0,))
        each = jnp.broadcast_to(counted[..., None], x.shape).reshape(x.size)
        return self.observer.update(first, flat, (0,), each)

    def merge(self, a: PyTree, b: PyTree) -> PyTree:
        return self.observer.merge(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelAbsMax(Statistic):
    """``max |x|`` of each channel, [batch, channels]: what SmoothQuant uses."""

    sees = "channels"

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        return jnp.max(jnp.abs(_only(x, counted)), axis=1, initial=0)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class ChannelMean(Statistic):
    """Sums of x and of ``|x|`` of each channel, [batch, channels], with the number of rows: bias correction and AWQ."""

    sees = "channels"

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> _Sums:
        rows, x = _number(x, counted), _only(x, counted)
        found = {"sum": jnp.sum(x, axis=1), "abs_sum": jnp.sum(jnp.abs(x), axis=1), "rows": rows}
        return {**found, "rest": jax.tree.map(jnp.zeros_like, found)}

    def merge(self, a: _Sums, b: _Sums) -> _Sums:
        return _added(a, b, ("sum", "abs_sum", "rows"))


_RUN = 1 << 16


@dataclasses.dataclass(frozen=True)
class Gram(Statistic):
    """``sum x^T x`` over rows, [batch, columns, columns], with the number of rows: GPTQ and what builds on it.

    For a weight of K contracted values per output that is K^2 floats; a convolution's input is copied once for each
    place of its window while it is computed. Many rows are summed in runs: a float32 sum that is 2**24 times as large
    as a row's term no longer changes.
    """

    sees = "columns"

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> _Sums:
        rows, x = _number(x, counted), _only(x, counted)
        whole = x.shape[1] // _RUN * _RUN
        gram = _squared(x[:, whole:])
        if whole:
            runs = x[:, :whole].reshape(x.shape[0], -1, _RUN, x.shape[2])
            gram = lax.fori_loop(0, runs.shape[1], lambda i, total: total + _squared(runs[:, i]), gram)
        found = {"gram": gram, "rows": rows}
        return {**found, "rest": {"rows": jnp.zeros_like(rows)}}

    def merge(self, a: _Sums, b: _Sums) -> _Sums:
        return {"gram": a["gram"] + b["gram"], **_added(a, b, ("rows",))}


def _squared(x: jax.Array) -> jax.Array:
    return jnp.einsum("brc,brd->bcd", x, x, precision=lax.Precision.HIGHEST)

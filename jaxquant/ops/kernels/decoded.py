"""Products on TPUs and GPUs with a weight of one code per element: the float program's dot, with codes decoded in it.

    y = sum_{b, k}  x[.., b, k]  ((c[b, k, n] - z[g(b, k), n]) s[g(b, k), n])

Decoding is elementwise, so XLA fuses it into the product's operand and writes no float weight to memory, provided that
the decoded values go straight into the product. A reshape of the codes, or of repeated scales, would be written to
memory first. So an axis with groups is stored as two, blocks of rows and the rows of a block (`laid_out`); the
activation's axis is split in the same way, and the product sums over both. Where a block holds several groups, its
scales are selected by row. Scales are applied in float32, since the vector units of many TPUs have no bfloat16, and
values are rounded to the activation's dtype as in `dequantized`.

Where codes are exact in that dtype and each channel has one scale, codes are multiplied and the scale is applied to the
sums. With few rows, group scales are applied to sums too: one dot per group, all in one batched dot with few results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.arithmetic import promoted
from jaxquant.core.codec import values_of, values_of_int4
from jaxquant.core.qtensor import QTensor, flat, scale_values
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.dots import dot
from jaxquant.ops.kernels.precision import NARROW, is_highest
from jaxquant.ops.problem import Kernel, Problem, Product
from jaxquant.ops.trained import is_stored_in_elements

__all__ = ["BatchedDecoded", "Decoded", "Dot", "multiplied_dtype", "product"]


@dataclasses.dataclass(frozen=True)
class Decoded(Kernel[Product]):
    """One dot of an activation's values or codes with the decoded codes of a stored weight.

    Attributes:
      dtype: of the values.
    """

    platforms = ("tpu", "cuda", "other")

    dtype: DTypeLike

    @property
    def name(self) -> str:
        """The dtype of the values, with a note that they are decoded in the product."""
        return f"{jnp.dtype(self.dtype).name}, decoded"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: off the CPU a stored weight with one code per element, and groups along one axis at most."""
        if not is_stored_in_elements(problem.w):
            return None
        return cls(multiplied_dtype(problem))

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return product(problem, self.dtype, Dot.one_dot)


@dataclasses.dataclass(frozen=True)
class BatchedDecoded(Decoded):
    """One dot for each group, all in one batched dot, scaled and summed afterwards: for few rows."""

    platforms = ("cuda", "other")

    @property
    def name(self) -> str:
        """As for `Decoded`."""
        return f"{jnp.dtype(self.dtype).name}, batched"

    @classmethod
    def takes(cls, problem: Product) -> Kernel[Product] | None:
        """As for `Kernel`: if values are exact in a narrow dtype and the results of all groups are few."""
        if Decoded.takes(problem) is None:
            return None
        w, axes = problem.weight, problem.w_axes
        at = None if w.split is None else w.ndim + w.split
        apart = all(w.scale.shape[i] == 1 for i in axes.contract if i != at)  # scales change along that axis alone
        if at is None or at not in axes.contract or not apart or w.type.kind not in ("int", "float") or not w.symmetric:
            return None
        return cls(multiplied_dtype(problem)) if cls.is_faster(problem, w.shape[at] // w.scale.shape[at]) else None

    @staticmethod
    def dot(dot: Dot) -> jax.Array:
        """Computes the dots of all groups."""
        return dot.batched()

    @classmethod
    def is_faster(cls, problem: Product, group: int) -> bool:
        """Whether this kernel is faster for groups of ``group`` elements: its results are no larger than the weight."""
        return problem.weight.type.kind == "int" and problem.rows <= group // 4

    def run(self, problem: Product) -> jax.Array:
        """As for `Kernel`."""
        return product(problem, self.dtype, self.dot)


def multiplied_dtype(problem: Problem) -> np.dtype:
    """The dtype of decoded values: that of the float product if it is narrow, unless precision is to be highest."""
    dtype = problem.dtype
    return dtype if dtype in NARROW and not is_highest(problem.precision) else promoted(dtype, jnp.float32)


class _Numbers(NamedTuple):
    """Axes of a dot: contracted and batch axes of the left and of the right operand."""

    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]

    def free(self, side: int, ndim: int) -> list[int]:
        """The other axes of an operand."""
        return [i for i in range(ndim) if i not in (*self.contract[side], *self.batch[side])]


@dataclasses.dataclass(frozen=True)
class Dot:
    """A product with the weight on the right, and the axis of groups split into two on both sides.

    Attributes:
      x: the activation's values or codes.
      rows: its scales, or None.
      w: the weight.
      numbers: the axes of x and of the weight's codes.
      at: the axis of the weight's blocks in its codes; None where it has no groups.
      multiplied: the dtype of values.
      precision: of the call.
    """

    x: jax.Array
    rows: jax.Array | None
    w: QTensor
    numbers: _Numbers
    at: int | None
    multiplied: DTypeLike
    precision: lax.PrecisionLike

    @property
    def wide(self) -> np.dtype:
        """The dtype in which scales are applied and sums kept."""
        return promoted(self.multiplied, jnp.float32)

    @property
    def group(self) -> int:
        """Elements that share a scale along the axis of groups."""
        assert self.w.split is not None
        return self.w.shape[self.w.split] // self.w.scale.shape[self.w.split]

    def batched(self) -> jax.Array:
        """[batch, rows of x, rows of the weight] without the scales of x, by one dot per group."""
        return self._batched_dot().astype(self.wide if self.rows is not None else self.multiplied)

    def one_dot(self) -> jax.Array:
        """[batch, rows of x, rows of the weight] without the scales of x, by one dot."""
        x, values, columns = self._values()
        result = self.multiplied if columns is None and self.rows is None else self.wide
        out = dot(
            x.astype(self.multiplied), values, self.numbers, precision=self.precision, preferred_element_type=result
        )
        if columns is None:
            return out
        return out * _over_result(columns, self.numbers, 1, out.ndim)

    def _values(self) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The activation, the weight's values, and the scales to apply to the sums, or None.

        Scales that all rows of the weight share are multiplied into the activation.
        """
        w, scale, zero_point = self.w, scale_values(self.w.scale).astype(self.wide), self.w.zero_point
        whole = zero_point is None or jnp.issubdtype(zero_point.dtype, jnp.integer)
        contracted = self.numbers.contract[1] if self.at is None else ()
        one = self.at is None and all(scale.shape[i] == 1 for i in contracted) and w.offset is None and whole
        if one and w.type.kind in ("int", "float"):
            if zero_point is None:
                return self.x, _grid(w, self.multiplied), scale
            return self.x, (_grid(w, self.wide) - zero_point.astype(self.wide)).astype(self.multiplied), scale
        if self.at is None and w.symmetric and self._same_for_all_rows(scale):
            return self.x.astype(self.wide) * self._over_activation(scale), _grid(w, self.multiplied), None
        values = _grid(w, self.wide)
        if zero_point is not None:
            values = values - self._by_row(zero_point.astype(self.wide))
        values = values * self._by_row(scale)
        if w.offset is not None:
            values = values + self._by_row(flat(w.offset).astype(self.wide))
        return self.x, values.astype(self.multiplied), None

    def _same_for_all_rows(self, scale: jax.Array) -> bool:
        """Whether the scales can be multiplied into the activation: float16 may be too narrow."""
        floats = self.rows is None and self.multiplied != jnp.float16 and self.w.type.kind in ("int", "float")
        return floats and all(scale.shape[i] == 1 for i in self.numbers.free(1, scale.ndim))

    def _over_activation(self, scale: jax.Array) -> jax.Array:
        """Reshapes scales that all rows of the weight share, to multiply the activation."""
        mine, its = (b + c for b, c in zip(self.numbers.batch, self.numbers.contract, strict=True))
        sizes = dict(zip(mine, (scale.shape[i] for i in its), strict=True))
        scale = jnp.transpose(scale, (*(its[mine.index(i)] for i in sorted(mine)), *self.numbers.free(1, scale.ndim)))
        return scale.reshape([sizes.get(i, 1) for i in range(self.x.ndim)])

    def _by_row(self, value: jax.Array) -> jax.Array:
        """Expands a value per group to multiply blocks of rows."""
        at = self.at
        if at is None:
            return value
        size = self.w.stored.shape[at + 1]
        groups = size // self.group
        if value.shape[at] == 1 or groups == 1:
            return jnp.expand_dims(value, at + 1)
        row = lax.broadcasted_iota(jnp.int32, [size if i == at + 1 else 1 for i in range(value.ndim + 1)], at + 1)

        def of(i: int) -> jax.Array:
            return jnp.expand_dims(lax.slice_in_dim(value, i, None, groups, axis=at), at + 1)

        found = of(0)
        for i in range(1, groups):
            found = jnp.where(row // self.group == i, of(i), found)
        return found

    def _batched_dot(self) -> jax.Array:
        """Computes one dot per group, scales the results and sums them."""
        assert self.at is not None
        (xc, wc), (xb, wb) = self.numbers
        place = wc.index(self.at)
        cut = xc[place]
        integers = self.x.dtype == jnp.int8 and self.w.type.kind == "int"
        multiplied = jnp.int8 if integers else self.multiplied
        x = self._regrouped(self.x.astype(multiplied), cut)
        codes = self._regrouped(_grid(self.w, multiplied), self.at)
        rest = [i for i in range(len(xc)) if i != place]
        numbers = _Numbers((tuple(xc[i] for i in rest), tuple(wc[i] for i in rest)), ((*xb, cut), (*wb, self.at)))
        sums = jnp.int32 if integers else self.wide
        out = dot(x, codes, numbers, precision=self.precision, preferred_element_type=sums)
        scale = jnp.expand_dims(scale_values(self.w.scale).astype(self.wide), self.at + 1)
        return jnp.sum(out.astype(self.wide) * _over_result(scale, numbers, 1, out.ndim), axis=len(xb))

    def _regrouped(self, x: jax.Array, at: int) -> jax.Array:
        """Regroups blocks of rows into groups; free if a block is a group, and on a GPU, whose arrays have no tiles."""
        return x.reshape(*x.shape[:at], -1, self.group, *x.shape[at + 2 :])


def product(problem: Product, multiplied: DTypeLike, compute: Callable[[Dot], jax.Array]) -> jax.Array:
    """The product of a problem: ``compute`` with scales of the activation applied, in the result's axes."""
    problem = problem.in_stored_order()
    x, w, x_axes, w_axes = problem.x, problem.weight.unjoined(), problem.x_axes, problem.w_axes
    rows = None
    if not isinstance(x, QTensor):
        values = x
    elif not (x.symmetric and all(x.scale.shape[i] == 1 for i in x_axes.contract)):
        values = x.dequantize(multiplied)  # exact for the MX formats
    else:
        rows = scale_values(x.scale)
        integers = x.type.kind == "int"
        values = x.logical_codes() if integers else values_of(x.logical_codes(), x.type, multiplied)
    at = None if w.split is None else w.ndim + w.split
    values, numbers = _aligned(values, w, x_axes, w_axes, at)
    out = compute(Dot(values, rows, w, numbers, at, multiplied, problem.precision))
    batch, x_rows = ([x.shape[i] for i in part] for part in (x_axes.batch, x_axes.rows))
    w_rows = [w.shape[i] for i in w_axes.rows]
    out = out.reshape(*batch, *x_rows, *w_rows)
    if rows is not None:
        own = [rows.shape[i] for i in x_axes.batch + x_axes.rows]
        out = out * jnp.transpose(rows, x_axes.order).reshape(own + [1] * len(w_rows))
    if not problem.weight_first:
        return out
    n, m = len(batch), len(x_rows)
    return jnp.transpose(out, (*range(n), *range(n + m, out.ndim), *range(n, n + m)))


def _grid(w: QTensor, dtype: DTypeLike) -> jax.Array:
    """Grid values of codes in stored form, where an axis of groups is two axes."""
    if w.in_int4:
        return values_of_int4(w.stored, w.type, dtype)
    return values_of(w.whole().logical_codes(), w.type, dtype).reshape(w.stored.shape)


def _aligned(x: jax.Array, w: QTensor, x_axes: Axes, w_axes: Axes, at: int | None) -> tuple[jax.Array, _Numbers]:
    """An activation whose contracted axes are split like those of the weight's codes, and the axes of both."""
    pairs = list(zip(x_axes.contract, w_axes.contract, strict=True))
    cut = next((i for i, j in pairs if j == at), None)
    in_x = lambda i: i + (cut is not None and i > cut)  # noqa: E731
    in_w = lambda j: j + (at is not None and j > at)  # noqa: E731
    if at is not None and cut is not None:
        x = x.reshape(*x.shape[:cut], *w.stored.shape[at : at + 2], *x.shape[cut + 1 :])
    contract = [(in_x(i), in_w(j)) for i, j in pairs]
    if at is not None and cut is not None:
        contract.insert(contract.index((cut, at)) + 1, (cut + 1, at + 1))
    xc, wc = zip(*contract, strict=True) if contract else ((), ())
    return x, _Numbers((xc, wc), (tuple(map(in_x, x_axes.batch)), tuple(map(in_w, w_axes.batch))))


def _over_result(scale: jax.Array, numbers: _Numbers, side: int, ndim: int) -> jax.Array:
    """Reshapes the weight's scales, one per row, to multiply [batch, rows of x, rows of the weight]."""
    batch, rows = numbers.batch[side], numbers.free(side, scale.ndim)
    scale = jnp.transpose(scale, (*batch, *rows, *numbers.contract[side]))
    scale = scale.reshape(scale.shape[: len(batch) + len(rows)])
    others = ndim - len(batch) - len(rows)
    return scale.reshape(*scale.shape[: len(batch)], *(1,) * others, *scale.shape[len(batch) :])

"""`ragged_dot` with quantized operands: rows of one matrix, each times the matrix of its group."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.indices import widened
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.ops.digits import digit_count, digits_of
from jaxquant.ops.floats import in_own_dtype
from jaxquant.ops.integer import overflow_limit
from jaxquant.ops.matrix import Axes, Matrix, matrix
from jaxquant.ops.operands import (
    Call,
    Operand,
    Pair,
    Static,
    precision_of,
    refuse_product_specs,
    refuse_range,
    wide_values,
)
from jaxquant.ops.tangents import straight_through

__all__ = ["choose", "ragged_dot"]

Formulation = Literal["integer", "digits", "dequantized"]


@dataclasses.dataclass(frozen=True)
class _Ragged(Call):
    """The static half of a `ragged_dot` call."""

    lhs: Operand
    rhs: Operand
    precision: Any
    dtype: Any

    def forward(self, lhs: Any, rhs: Any, lhs_static: Static, rhs_static: Static, sizes: jax.Array) -> jax.Array:
        x, experts = self.lhs.quantized(lhs, lhs_static), self.rhs.quantized(rhs, rhs_static)
        left: Any = matrix(x, Axes.of(2, (), (1,))) if isinstance(x, QTensor) else x
        right: Any = matrix(experts, Axes.of(3, (0,), (1,))) if isinstance(experts, QTensor) else experts
        how = choose(left, right)
        if how == "integer":
            return _integer(left, right, sizes).astype(self.dtype)
        if how == "digits":
            return _digits(left, right, sizes, digit_count(self.precision)).astype(self.dtype)
        return self._float(wide_values(x), wide_values(experts), sizes, lhs, rhs)

    def reference(self, lhs: Any, rhs: Any, lhs_static: Static, rhs_static: Static, sizes: jax.Array) -> jax.Array:
        return self._float(self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static), sizes, lhs, rhs)

    def again(self, lhs: Any, rhs: Any, lhs_static: Static, rhs_static: Static, sizes: jax.Array) -> jax.Array:
        """The product with every matrix, of which each row has the one of its group: JAX transposes the gradient of
        `jax.lax.ragged_dot` no further.
        """
        x, experts = self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static)
        wide = promoted(x.dtype, experts.dtype)
        products = jnp.einsum("mk,ekn->men", x.astype(wide), experts.astype(wide), precision=self.precision)
        row, ends = jnp.arange(x.shape[0])[:, None], jnp.cumsum(sizes)[None]
        mine = (ends - sizes[None] <= row) & (row < ends)
        return jnp.sum(jnp.where(mine[..., None], products, 0), axis=1).astype(self.dtype)

    def _float(self, x: jax.Array, experts: jax.Array, sizes: jax.Array, lhs: Any, rhs: Any) -> jax.Array:
        """The product of the real values of lhs and rhs."""

        def multiply(x: jax.Array, experts: jax.Array) -> jax.Array:
            return lax.ragged_dot(x, experts, sizes, precision=self.precision).astype(self.dtype)

        return in_own_dtype(multiply, x, experts, (lhs.dtype, rhs.dtype, self.dtype), self.precision)


def choose(x: Matrix | jax.Array | None, experts: Matrix | jax.Array | None) -> Formulation:
    """How a ragged product is computed, on every platform; ``"dequantized"`` is the float product.

    Args:
      x, experts: [1, M, K] and [E, N, K] if they are quantized, else float arrays; None where scales vary in a group.
    """
    if isinstance(experts, Matrix) and experts.integer and experts.groups == 1 and x is not None:
        fits = experts.shape[2] <= overflow_limit(127 if isinstance(x, jax.Array) else x.reach, experts.reach)
        if fits and isinstance(x, Matrix) and x.integer and x.groups == 1:
            return "integer"
        if fits and isinstance(x, jax.Array) and x.dtype != jnp.float64:
            return "digits"
    # Scales per group of channels, float number types, sums that could overflow.
    return "dequantized"


def _integer(lhs: Matrix, rhs: Matrix, sizes: jax.Array) -> jax.Array:
    """int8 products accumulated in int32, with exact zero-point corrections; lhs [1, M, K], rhs [E, N, K]."""
    x, experts, rows = lhs.codes[0], rhs.codes, lhs.codes.shape[1]
    out = lax.ragged_dot(x, jnp.swapaxes(experts, 1, 2), sizes, preferred_element_type=jnp.int32)
    mine = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=rows)

    def of_row(value: jax.Array) -> jax.Array:
        """[E or 1, N or 1] of each expert to [M, N or 1] of each row's expert."""
        return value[mine] if value.shape[0] > 1 else value

    if rhs.zero_point is not None:
        out = out - of_row(rhs.zero_point[..., 0]) * jnp.sum(x, axis=1, dtype=jnp.int32, keepdims=True)
    if lhs.zero_point is not None:
        sums = jnp.sum(experts, axis=2, dtype=jnp.int32)
        if rhs.zero_point is not None:
            sums = sums - rhs.zero_point[..., 0] * jnp.int32(experts.shape[2])
        out = out - lhs.zero_point[0] * of_row(sums)
    used = jnp.arange(rows)[:, None] < jnp.sum(sizes)  # rows of no group are 0
    return jnp.where(used, out.astype(jnp.float32) * lhs.scale[0] * of_row(rhs.scale[..., 0]), 0)


def _digits(x: jax.Array, rhs: Matrix, sizes: jax.Array, count: int) -> jax.Array:
    """Weight-only: one int8 product for each digit of the activation."""
    digits, scale = digits_of(x, count, 1)
    parts = (
        _integer(Matrix(digit[None], (scale * (1 / 254) ** i)[None], None, rhs.qtype), rhs, sizes)
        for i, digit in enumerate(digits)
    )
    return sum(parts, start=jnp.zeros((), jnp.float32).reshape(1, 1))


def ragged_dot(
    lhs: Any,
    rhs: Any,
    group_sizes: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    *,
    spec: OpSpec | None = None,
    act_scale: Any = None,
    act_zero_point: Any = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` whose operands may be quantized, or are quantized on the way: mixtures of experts.

    Row i of ``lhs`` is multiplied by the matrix of the group it falls in; rows beyond the last group give 0. Integer
    types with one scale per output channel of each expert run as int8 products with int32 accumulation (weight-only:
    one for each digit of the activation, see `dot_general`); scales per group of channels, float number types and sums
    that could overflow run as the float product of the dequantized operands.

    Args:
      lhs: [M, K], the activation: a float array or a QTensor.
      rhs: [E, K, N], the experts: a float array or a QTensor reduced over axis -2.
      group_sizes: integers [E]: rows of each expert, in order.
      precision, preferred_element_type, spec, act_scale, act_zero_point: as for `dot_general`.

    Returns:
      Array [M, N].

    Raises:
      QuantError: on shapes that do not fit, and as `dot_general`.

    Gradient: as `dot_general`, of every order, in both modes. Part of a second derivative takes the product of every
      row with every matrix, since JAX transposes the gradient of `jax.lax.ragged_dot` no further.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import ops, recipes
      >>> x, experts = jnp.ones((4, 8)), jnp.stack([jnp.ones((8, 2)), 2 * jnp.ones((8, 2))])
      >>> ops.ragged_dot(x, experts, jnp.array([1, 3]), spec=recipes.w8a8())[:, 0]
      Array([ 8., 16., 16., 16.], dtype=float32)
    """
    function = "ragged_dot"
    pair = Pair.of(function, lhs, rhs, spec, weight=1)
    refuse_product_specs(function, pair.spec)
    lhs, rhs, sizes = pair.lhs, pair.rhs, jnp.asarray(group_sizes)
    fits = lhs.ndim == 2 and rhs.ndim == 3 and lhs.shape[1] == rhs.shape[1] and sizes.shape == rhs.shape[:1]
    if not fits or not jnp.issubdtype(sizes.dtype, jnp.integer):
        todo = "Give lhs [M, K], rhs [E, K, N] and integer group_sizes [E]"
        got = {"lhs": lhs.shape, "rhs": rhs.shape, "group_sizes": sizes}
        raise quant_error(function, "the operands do not fit each other", todo=todo, **got)
    if pair.in_float:
        refuse_range(function, act_scale, act_zero_point)
        return lax.ragged_dot(lhs, rhs, sizes, precision, preferred_element_type)
    dtype, precision = pair.result_dtype(preferred_element_type), precision_of(function, precision)
    if 0 in lhs.shape or 0 in rhs.shape:
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    sides = pair.operands((1,), (1,))
    static = pair.static(sides, act_scale, act_zero_point)
    how = _Ragged(*sides, precision=precision, dtype=dtype)
    return straight_through(how, lhs, rhs, *static, widened(sizes))

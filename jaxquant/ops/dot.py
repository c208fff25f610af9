"""`dot_general` with quantized operands."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.arithmetic import promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.jitted import jitted
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.qtypes import FACTOR
from jaxquant.core.sizes import number
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops import outliers
from jaxquant.ops.axes import Axes
from jaxquant.ops.backward import as_stored, lhs_gradient, rhs_gradient
from jaxquant.ops.forms import matrix
from jaxquant.ops.operands import Call, Pair, Side, precision_of, random_key, refuse_range
from jaxquant.ops.placed import Placed
from jaxquant.ops.problem import Product
from jaxquant.ops.quantized_matrix import Matrix
from jaxquant.ops.rowwise import Produced
from jaxquant.ops.select import run
from jaxquant.ops.shardings import explicit_of
from jaxquant.ops.tangents import straight_through
from jaxquant.ops.trained import TrainedTensor, as_quantized, is_stored_in_elements

__all__ = ["contract", "dot_general"]


@dataclasses.dataclass(frozen=True)
class _Contraction(Call):
    """The static half of a `dot_general` call."""

    lhs: Side
    rhs: Side
    lhs_axes: Axes
    rhs_axes: Axes
    precision: lax.PrecisionLike
    dtype: DTypeLike
    grad: QuantSpec | None
    impl: Any = None
    placed: Placed | None = None

    def reference(self, *operands: PyTree) -> jax.Array:
        lhs, rhs, lhs_static, rhs_static, _ = operands
        lhs, rhs = self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static)
        dtype = promoted(lhs.dtype, rhs.dtype)
        numbers = ((self.lhs_axes.contract, self.rhs_axes.contract), (self.lhs_axes.batch, self.rhs_axes.batch))
        out = lax.dot_general(lhs.astype(dtype), rhs.astype(dtype), numbers, precision=self.precision)
        return out.astype(self.dtype)

    def keep(self, *operands: PyTree) -> tuple[jax.Array, PyTree]:
        """The product, and the codes of operands quantized on the way whose gradient needs only these."""
        lhs, rhs, lhs_static, rhs_static, _, produced = operands
        left, right = self.lhs.quantized(lhs, lhs_static, produced), self.rhs.quantized(rhs, rhs_static)
        out = run(self.product(left, right), self._stored(left, right))
        return out, (self.lhs.kept(left, lhs, lhs_static), self.rhs.kept(right, rhs, rhs_static))

    def product(self, left: Operand, right: Operand) -> Product:
        """The product of these operands."""
        placed = self.placed if self.placed is not None and self.placed.fits(left, right) else None
        return Product.of(left, right, self.lhs_axes, self.rhs_axes, self.precision, self.dtype, placed)

    def _stored(self, left: Operand, right: Operand) -> _Stored | None:
        """In training, what makes the frozen model's product; None otherwise, and for a weight with a symbolic size."""
        if isinstance(right, TrainedTensor):
            weight, first = right, False
        elif isinstance(left, TrainedTensor) and self.lhs.spec is None and not isinstance(right, QTensor):
            weight, first = left, True
        else:
            return None
        return None if math.inf in map(number, weight.shape) else _Stored(self, first)

    def back(self, kept: PyTree, operands: tuple[PyTree, ...], g: jax.Array) -> tuple[PyTree, ...]:
        lhs, rhs, lhs_static, rhs_static, key = operands
        left, right = kept
        left = self.lhs.quantized(lhs, lhs_static) if left is None else left
        right = self.rhs.quantized(rhs, rhs_static) if right is None else right
        (left, right), g = lax.optimization_barrier(((left, right), g))  # real values are not held until now
        dx, dw = self._gradients(left, right, g, None if key is None else jax.random.wrap_key_data(key, impl=self.impl))
        dx, dx_static = self.lhs.gradient(lhs, lhs_static, dx)
        dw, dw_static = self.rhs.gradient(rhs, rhs_static, dw)
        return dx, dw, dx_static, dw_static, None

    def _gradients(
        self, lhs: Operand, rhs: Operand, g: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """With respect to the real values of both operands, as the forward pass has used them."""
        left, right, dtype = self.lhs_axes, self.rhs_axes, promoted(lhs.dtype, rhs.dtype)
        rows = (math.prod(v.shape[i] for i in axes.rows) for v, axes in ((lhs, left), (rhs, right)))
        whole = g.astype(dtype)
        g, codes = whole.reshape(-1, *rows), _codes(lhs, left, "int" if self.grad is None else self.grad.type.kind)
        if self.grad is None:
            how, x = self.precision, lhs.dequantize() if isinstance(lhs, QTensor) else lhs
            x = left.flatten(x.astype(dtype)) if codes is None else codes
            if is_stored_in_elements(rhs):  # decoded within the product, as in the forward pass
                return self._by_stored(whole, rhs), rhs_gradient(g, x, right, rhs.shape, how)
            w = _codes(rhs, right, "int", as_stored(right))
            if w is None or w.zero_point is not None or dtype == jnp.float16:  # too narrow for g times scales
                w = as_stored(right).flatten((rhs.dequantize() if isinstance(rhs, QTensor) else rhs).astype(dtype))
        else:
            how, x, w = self.grad, codes, _codes(rhs, right, self.grad.type.kind, as_stored(right))
            if x is None or w is None:
                kind = "integers" if self.grad.type.kind == "int" else "fp8"
                rule = f"gradients are quantized where both operands are {kind} with one scale per channel or token"
                todo = "Leave grad out of the spec, or quantize both to such"
                raise quant_error("dot_general", rule, todo=todo, lhs=lhs, rhs=rhs)
        return lhs_gradient(g, w, left, lhs.shape, right, how, key), rhs_gradient(g, x, right, rhs.shape, how, key)

    def _by_stored(self, g: jax.Array, w: QTensor) -> jax.Array:
        """The gradient with respect to the left operand: g times the weight, summed over its rows."""
        left, right = self.lhs_axes, self.rhs_axes
        batch, rows = len(left.batch), len(left.batch) + len(left.rows)
        axes = Axes.of(g.ndim, tuple(range(batch)), tuple(range(rows, g.ndim)))
        turned = Axes(right.batch, right.contract, right.rows)
        out = run(Product.of(g, w, axes, turned, self.precision, g.dtype))
        return jnp.transpose(out, [left.order.index(i) for i in range(out.ndim)])


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Turns a product in training into the frozen model's, with the weight as `quantize` stores it.

    Attributes:
      how: the call.
      first: whether the left operand is the weight.
    """

    how: _Contraction
    first: bool

    def __call__(self, problem: Product) -> Product:
        left, right = problem.operands
        weight = left if self.first else right
        assert isinstance(weight, TrainedTensor)
        if self.first:
            return self.how.product(as_quantized(weight, self.how.lhs_axes.contract), right)
        return self.how.product(left, as_quantized(weight, self.how.rhs_axes.contract))


def _codes(x: Operand, axes: Axes, kind: str, form: Axes | None = None) -> Matrix | None:
    """The canonical form of an operand of integers or fp8 with one scale per row; None for other operands."""
    if not isinstance(x, QTensor) or x.type.kind != kind or x.offset is not None:
        return None
    if (kind == "float" and x.type.bits != 8) or (isinstance(x.scale, QTensor) and x.scale.qtype != FACTOR.name):
        return None
    whole = x.zero_point is None or jnp.issubdtype(x.zero_point.dtype, jnp.integer)
    one = all(x.scale.shape[i] == 1 for i in axes.contract)
    return matrix(x, axes if form is None else form) if whole and one else None


def _result_shape(lhs: Operand, rhs: Operand, lhs_axes: Axes, rhs_axes: Axes) -> tuple[int, ...]:
    return tuple(lhs.shape[i] for i in lhs_axes.batch + lhs_axes.rows) + tuple(rhs.shape[i] for i in rhs_axes.rows)


def _axes(axes: Iterable[int], ndim: int) -> tuple[int, ...]:
    return tuple(i % ndim if -ndim <= i < ndim else i for i in map(operator.index, axes))


def _check_dimensions(function: str, lhs: Operand, rhs: Operand, numbers: lax.DotDimensionNumbers) -> tuple[Axes, Axes]:
    def bad(rule: str):
        todo = "Give ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)) as for lax.dot_general"
        return quant_error(function, rule, todo=todo, dimension_numbers=numbers, lhs=lhs.shape, rhs=rhs.shape)

    try:
        (lc, rc), (lb, rb) = numbers
        lc, lb = _axes(lc, lhs.ndim), _axes(lb, lhs.ndim)
        rc, rb = _axes(rc, rhs.ndim), _axes(rb, rhs.ndim)
    except (TypeError, ValueError):
        raise bad("dimension_numbers have the wrong form") from None
    if len(lc) != len(rc) or len(lb) != len(rb):
        raise bad("dimension_numbers must pair axes of lhs with axes of rhs")
    for axes, ndim in ((lc + lb, lhs.ndim), (rc + rb, rhs.ndim)):
        if len(set(axes).intersection(range(ndim))) != len(axes):
            raise bad("dimension_numbers repeat an axis or name one that does not exist")
    if [lhs.shape[a] for a in lc + lb] != [rhs.shape[b] for b in rc + rb]:
        raise bad("paired axes must have one size")
    # Contract in the weight's storage order, so that no transpose of the weight is needed.
    of_weight = rc if isinstance(rhs, QTensor) or not isinstance(lhs, QTensor) else lc
    order = sorted(range(len(lc)), key=of_weight.__getitem__)
    return Axes.of(lhs.ndim, lb, tuple(lc[i] for i in order)), Axes.of(rhs.ndim, rb, tuple(rc[i] for i in order))


def _with_groups_together(lhs: Operand, rhs: Operand, lhs_axes: Axes, rhs_axes: Axes) -> tuple[Operand, Operand]:
    """Permutes the contracted axes of both to the stored order of a permuted weight, so that groups stay contiguous."""
    for q, other, mine, its in ((rhs, lhs, rhs_axes, lhs_axes), (lhs, rhs, lhs_axes, rhs_axes)):
        if not isinstance(q, QTensor) or q.permutation is None:
            continue
        axis = q.permuted_axis
        if axis in mine.contract and q.permutation.size == q.shape[axis] and not isinstance(other, QTensor):
            along = its.contract[mine.contract.index(axis)]
            other = jnp.take(other, q.permutation.reshape(-1), axis=along, mode="clip")
            q = q.replace(permutation=None)
        else:
            q = q.unpermuted()
        lhs, rhs = (other, q) if mine is rhs_axes else (q, other)
    return lhs, rhs


def contract(
    function: str,
    lhs: ArrayLike | QTensor,
    rhs: ArrayLike | QTensor,
    numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike,
    preferred: DTypeLike | None,
    spec: OpSpec | None,
    act_scale: ArrayLike | None,
    act_zero_point: ArrayLike | None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    key: jax.Array | None = None,
    placed: Placed | None = None,
    produced: Produced | None = None,
) -> jax.Array:
    """`dot_general` for a public function, which errors name.

    Args:
      function: the public function.
      lhs, rhs, numbers, precision, preferred, spec, act_scale, act_zero_point, out_sharding, key: as for it.
      placed: how operands and result lie over devices, where types do not say it.
      produced: a function of rows that makes the left operand, or None.
    """
    if isinstance(spec, OpSpec) and spec.outliers is not None:
        refuse_range(function, act_scale, act_zero_point)
        return _beside_outliers(function, lhs, rhs, numbers, precision, preferred, spec)
    pair = Pair.of(function, lhs, rhs, spec)
    lhs, rhs = pair.lhs, pair.rhs
    key, impl = _key(function, key, pair.spec.grad)
    if pair.floats is not None:
        refuse_range(function, act_scale, act_zero_point)
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return lax.dot_general(*pair.floats, numbers, precision, preferred, **sharding)
    if out_sharding is not None:
        todo = "Use jax.lax.with_sharding_constraint on the result"
        raise quant_error(function, "out_sharding is for float operands", todo=todo, out_sharding=str(out_sharding))
    axes = _check_dimensions(function, lhs, rhs, numbers)
    lhs, rhs = _with_groups_together(lhs, rhs, *axes)
    produced = produced if lhs is pair.lhs else None  # which makes the columns in their own order
    pair = dataclasses.replace(pair, lhs=lhs, rhs=rhs)
    dtype, precision = pair.result_dtype(preferred), precision_of(function, precision)
    if 0 in lhs.shape or 0 in rhs.shape:
        return jnp.zeros(_result_shape(lhs, rhs, *axes), dtype)  # no values to take a range from
    left, right = axes
    if placed is None:
        plain = (left.contract, right.contract), (left.batch, right.batch)
        placed = Placed.of((explicit_of(lhs), lhs.ndim), (explicit_of(rhs), rhs.ndim), plain)
    sides = pair.sides(left.contract, right.contract, placed)
    static = pair.static(sides, act_scale, act_zero_point)
    how = _Contraction(*sides, *axes, precision=precision, dtype=dtype, grad=pair.spec.grad, impl=impl, placed=placed)
    return straight_through(how, lhs, rhs, *static, key, beside=(produced,))


def _key(function: str, key: jax.Array | None, grad: QuantSpec | None) -> tuple[jax.Array | None, Any]:
    """The data of a key and the key's implementation; None without a key."""
    if key is None:
        return None, None
    if grad is None or grad.rounding != "stochastic":
        todo = "Leave the key out, or use grad=QuantSpec(..., rounding='stochastic')"
        raise quant_error(function, "nothing is rounded with a key", todo=todo, grad=grad)
    key = random_key(function, key)
    return jax.random.key_data(key), jax.random.key_impl(key)


def _beside_outliers(
    function: str,
    lhs: ArrayLike | QTensor,
    rhs: ArrayLike | QTensor,
    numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike,
    preferred: DTypeLike | None,
    spec: OpSpec,
) -> jax.Array:
    """The sum of two products: features without outliers by their codes, features with an outlier in float."""
    assert spec.act is not None
    assert spec.outliers is not None
    inner = dataclasses.replace(spec, outliers=None)
    pair = Pair.of(function, lhs, rhs, inner)
    side = 1 - pair.weight
    if 0 in pair.lhs.shape or 0 in pair.rhs.shape:  # no outliers
        return contract(function, lhs, rhs, numbers, precision, preferred, inner, None, None)
    axes = _check_dimensions(function, pair.lhs, pair.rhs, numbers)
    x = (pair.lhs, pair.rhs)[side]
    assert not isinstance(x, QTensor)
    small, large, some = outliers.split(x, axes[side], spec.act, spec.outliers)

    def operands(x: Operand) -> tuple[Operand, Operand]:
        return (x, pair.rhs) if side == 0 else (pair.lhs, x)

    y = contract(function, *operands(small), numbers, precision, preferred, inner, None, None)
    left, right = axes
    numbers = (left.contract, right.contract), (left.batch, right.batch)
    rest = _Rest(function, numbers, precision_of(function, precision), preferred, OpSpec(spec.weight))
    return _with_outliers(some, y, *operands(large), rest=rest)


class _Rest(NamedTuple):
    """The product of the features that have an outlier: arguments of `contract`."""

    function: str
    numbers: lax.DotDimensionNumbers
    precision: lax.PrecisionLike
    preferred: DTypeLike | None
    spec: OpSpec

    def __call__(self, lhs: Operand, rhs: Operand) -> jax.Array:
        return contract(self.function, lhs, rhs, self.numbers, self.precision, self.preferred, self.spec, None, None)


@jitted(static_argnames="rest")  # a choice between two functions, outside of a program, is compiled at every call
def _with_outliers(some: jax.Array, y: jax.Array, lhs: Operand, rhs: Operand, *, rest: _Rest) -> jax.Array:
    return lax.cond(some, lambda: y + rest(lhs, rhs), lambda: y)


def dot_general(
    lhs: ArrayLike | QTensor,
    rhs: ArrayLike | QTensor,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    spec: OpSpec | None = None,
    act_scale: ArrayLike | None = None,
    act_zero_point: ArrayLike | None = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` whose operands may be quantized, or are quantized on the way.

    With both sides quantized to integers the product runs as int8 dots with int32 accumulation: for each group of the
    contraction ``s_l s_r sum_k (q_l - z_l)(q_r - z_r)``, exact within the group, scaled and summed in float32. (Some
    CPUs are faster at many rows if exact products are summed in float32.) With one side quantized (weight-only) the
    float side is written as int8 digits. See `jaxquant.ops.select`.

    Args:
      lhs, rhs: float arrays or QTensors. The weight is ``rhs``, unless only ``lhs`` is a QTensor.
      dimension_numbers: ``((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))``.
      precision: weight-only products agree with the float product of the dequantized operands to 1e-4 relative by
        default, and to 1e-6 at ``HIGHEST``. Integer products are always exact to 1e-6. Where activation and weight are
        both bfloat16 (or both float16), values of a weight that has more than one scale per channel may be rounded to
        that dtype by default, to 2**-8 (2**-11) of each (see `jaxquant.ops.kernels.dequantized`).

      preferred_element_type: dtype of the result; by default the operands' (dequantized) dtypes, promoted.
      spec: quantizes float operands on the way: ``spec.act`` with one scale per token, ``spec.weight`` with one per
        output channel (or as their granularity says), both reduced over the contracted axes. A QTensor must agree
        with its spec. With ``spec.outliers`` the features that hold an outlier are a separate float product.
      act_scale, act_zero_point: the activation's static range, for ``spec.act.static``; the scale gets a gradient.
      out_sharding: for float operands only; otherwise it must be None.
      key: a random key, for ``spec.grad`` with stochastic rounding; needed where a gradient is taken.

    Returns:
      Array [batch..., lhs rows..., rhs rows...], as `jax.lax.dot_general`.

    Raises:
      QuantError: on dimension numbers that do not fit, a QTensor that does not agree with its spec, a static spec
        without ``act_scale``, or stochastic rounding without a key.

    Gradient: that of the float product of the dequantized (or fake-quantized) operands: straight through for float
      operands, with respect to the scales for QTensors. Higher derivatives, `jax.jvp`, `jax.linearize` and
      `jax.hessian` follow the same rule. ``spec.grad`` rounds gradients in the backward pass, and their linear terms in
      derivatives of the backward pass; rounding itself has derivative 1. Forward mode rounds no gradient.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import ops
      >>> x, w = jnp.ones((2, 64)), jnp.linspace(-1.0, 1.0, 64 * 3).reshape(64, 3)
      >>> q = jq.quantize(w, jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> y = ops.dot_general(x, q, (((1,), (0,)), ((), ())))
      >>> bool(jnp.allclose(y, x @ q.dequantize(), rtol=1e-4, atol=1e-4))
      True

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 2.3, for the zero-point terms.
    """
    return contract(
        "dot_general",
        lhs,
        rhs,
        dimension_numbers,
        precision,
        preferred_element_type,
        spec,
        act_scale,
        act_zero_point,
        out_sharding,
        key,
    )

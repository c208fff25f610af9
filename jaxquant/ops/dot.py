"""`dot_general` with quantized operands."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.ops.formulation import product
from jaxquant.ops.matrix import Axes, matrix
from jaxquant.ops.operands import Operand, as_array, operand_specs, result_dtype

__all__ = ["dot_general"]


@dataclasses.dataclass(frozen=True)
class _Contraction:
    """The static half of a `dot_general` call."""

    lhs: Operand
    rhs: Operand
    lhs_axes: Axes
    rhs_axes: Axes
    precision: Any
    dtype: Any


def _forward(how: _Contraction, lhs: Any, rhs: Any, lhs_static: Any, rhs_static: Any) -> jax.Array:
    sides = []
    for side, axes, x, static in (
        (how.lhs, how.lhs_axes, lhs, lhs_static),
        (how.rhs, how.rhs_axes, rhs, rhs_static),
    ):
        value = side.quantized(x, static)
        canonical = axes.flatten(value) if isinstance(value, jax.Array) else matrix(value, axes)
        # Scales that vary within a group of the contraction: only the float values are left to multiply.
        sides.append(axes.flatten(side.real(x, static)) if canonical is None else canonical)
    out = product(*sides, how.precision)
    shape = [lhs.shape[i] for i in how.lhs_axes.batch + how.lhs_axes.rows] + [rhs.shape[i] for i in how.rhs_axes.rows]
    return out.reshape(shape).astype(how.dtype)


def _reference(how: _Contraction, lhs: Any, rhs: Any, lhs_static: Any, rhs_static: Any) -> jax.Array:
    """The float product of the same values: what `_forward` equals up to rounding, and where gradients come from."""
    lhs, rhs = how.lhs.real(lhs, lhs_static), how.rhs.real(rhs, rhs_static)
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    numbers = ((how.lhs_axes.contract, how.rhs_axes.contract), (how.lhs_axes.batch, how.rhs_axes.batch))
    out = lax.dot_general(lhs.astype(dtype), rhs.astype(dtype), numbers, precision=how.precision)
    return out.astype(how.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(how, lhs, rhs, lhs_static, rhs_static):
    return _forward(how, lhs, rhs, lhs_static, rhs_static)


def _dot_fwd(how, *operands):
    return _forward(how, *operands), operands


def _dot_bwd(how, operands, g):
    return jax.vjp(functools.partial(_reference, how), *operands)[1](g)


_dot.defvjp(_dot_fwd, _dot_bwd)
_dot_jit = jax.jit(_dot, static_argnums=0, inline=True)


def _axes(axes: Any, ndim: int) -> tuple[int, ...]:
    return tuple(int(a) % ndim if -ndim <= int(a) < ndim else int(a) for a in axes)


def _check_dimensions(lhs: Any, rhs: Any, numbers: Any) -> tuple[Axes, Axes]:
    def bad(rule: str):
        todo = "Give ((lhs_contract, rhs_contract), (lhs_batch, rhs_batch)) as for lax.dot_general"
        return quant_error("dot_general", rule, todo=todo, dimension_numbers=numbers, lhs=lhs.shape, rhs=rhs.shape)

    try:
        (lc, rc), (lb, rb) = numbers
        lc, lb = _axes(lc, lhs.ndim), _axes(lb, lhs.ndim)
        rc, rb = _axes(rc, rhs.ndim), _axes(rb, rhs.ndim)
    except (TypeError, ValueError):
        raise bad("dimension_numbers have the wrong form") from None
    if len(lc) != len(rc) or len(lb) != len(rb):
        raise bad("dimension_numbers must pair axes of lhs with axes of rhs")
    for axes, ndim in ((lc + lb, lhs.ndim), (rc + rb, rhs.ndim)):
        if len(set(axes)) != len(axes) or any(not 0 <= a < ndim for a in axes):
            raise bad("dimension_numbers repeat an axis or name one that does not exist")
    if any(lhs.shape[a] != rhs.shape[b] for a, b in zip(lc + lb, rc + rb, strict=True)):
        raise bad("paired axes must have one size")
    # Contract in the weight's storage order, so that no transpose of the weight is needed.
    keep = rhs if isinstance(rhs, QTensor) or not isinstance(lhs, QTensor) else lhs
    pairs = sorted(zip(lc, rc, strict=True), key=lambda pair: pair[1] if keep is rhs else pair[0])
    lc, rc = (tuple(p[i] for p in pairs) for i in (0, 1))
    return Axes.of(lhs.ndim, lb, lc), Axes.of(rhs.ndim, rb, rc)


def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: Any,
    precision: lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    *,
    spec: OpSpec | None = None,
    act_scale: Any = None,
    act_zero_point: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` whose operands may be quantized, or are quantized on the way.

    With both sides quantized to integers the product runs as int8 dots with int32 accumulation: for each group of the
    contraction ``s_l s_r sum_k (q_l - z_l)(q_r - z_r)``, exact within the group, scaled and summed in float32. With one
    side quantized (weight-only) the float side is written as int8 digits (see `jaxquant.ops.formulation`).

    Args:
      lhs, rhs: float arrays or QTensors. The weight is ``rhs``, unless only ``lhs`` is a QTensor.
      dimension_numbers: ``((lhs_contract, rhs_contract), (lhs_batch, rhs_batch))``.
      precision: weight-only products agree with the float product of the dequantized operands to 1e-4 relative by
        default, and to 1e-6 at ``HIGHEST``. Integer products are always exact to 1e-6.
      preferred_element_type: dtype of the result; by default the operands' (dequantized) dtypes, promoted.
      spec: quantizes float operands on the way: ``spec.act`` with one scale per token, ``spec.weight`` with one per output
        channel (or what their granularity says), both reduced over the contracted axes. A QTensor must agree with its spec.
      act_scale, act_zero_point: the activation's static range, for ``spec.act.static``; the scale gets a gradient.
      out_sharding: passed on where nothing is quantized; otherwise it must be None.

    Returns:
      Array [batch..., lhs rows..., rhs rows...], as `jax.lax.dot_general`.

    Raises:
      QuantError: on dimension numbers that do not fit, a QTensor that does not agree with its spec, or a static spec
        without ``act_scale``.

    Gradient: that of the float product of the dequantized (or fake-quantized) operands: straight through for float
      operands, with respect to the scales for QTensors.

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
    lhs, rhs = as_array("dot_general", "lhs", lhs), as_array("dot_general", "rhs", rhs)
    weight = 0 if isinstance(lhs, QTensor) and not isinstance(rhs, QTensor) else 1
    specs = operand_specs("dot_general", lhs, rhs, spec, weight=weight)
    quantized = [isinstance(x, QTensor) or s is not None for x, s in zip((lhs, rhs), specs, strict=True)]
    if not any(quantized):
        if act_scale is not None or act_zero_point is not None:
            todo = "Pass spec=OpSpec(act=...)"
            raise quant_error("dot_general", "act_scale needs a spec for the activation", todo=todo, spec=spec)
        sharding = {} if out_sharding is None else {"out_sharding": out_sharding}
        return lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **sharding)
    if out_sharding is not None:
        todo = "Use jax.lax.with_sharding_constraint on the result"
        raise quant_error(
            "dot_general", "out_sharding is for float operands", todo=todo, out_sharding=str(out_sharding)
        )
    axes = _check_dimensions(lhs, rhs, dimension_numbers)
    sides = [
        Operand(s, tuple(sorted(a - x.ndim for a in ax.contract)))
        for s, ax, x in zip(specs, axes, (lhs, rhs), strict=True)
    ]
    static = [None, None]
    static[1 - weight] = sides[1 - weight].given("dot_general", (lhs, rhs)[1 - weight], act_scale, act_zero_point)
    for side, x in zip(sides, (lhs, rhs), strict=True):
        side.check_groups("dot_general", x)
    dtype = np.dtype(result_dtype(lhs, rhs, preferred_element_type))
    if isinstance(precision, list):
        precision = tuple(precision)
    return _dot_jit(_Contraction(*sides, *axes, precision, dtype), lhs, rhs, *static)

"""Steps that every op shares: checks of operands, the split into weight and activation, and the gradient rule."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.affine import as_codes, block_values, prepare
from jaxquant.core.arithmetic import have_common_dtype, promoted
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.qtensor import Operand, QTensor, Scale
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.placed import Parts, Placed, quantized_parts
from jaxquant.ops.problem import wide_values
from jaxquant.ops.rowwise import Produced, produced_codes
from jaxquant.ops.trained import TrainedTensor

__all__ = [
    "Call",
    "Pair",
    "Side",
    "Static",
    "as_array",
    "check_operand",
    "check_spec",
    "precision_of",
    "random_key",
    "refuse_product_specs",
    "refuse_range",
]

Static = tuple[Scale, jax.Array | None] | None
"""A given activation range: (scale, zero_point), or None."""


# -- checks -----------------------------------------------------------------------------------------------------------


def as_array(function: str, name: str, x: PyTree) -> Operand:
    """A jax array, or the QTensor itself."""
    if isinstance(x, QTensor):
        return x.checked()
    try:
        if not hasattr(x, "dtype") and not isinstance(x, numbers.Number | list | tuple):
            raise TypeError
        return jnp.asarray(x)
    except TypeError:
        raise quant_error(function, f"{name} must be an array or a QTensor", todo="Convert it", value=x) from None


def check_spec(function: str, spec: OpSpec | None) -> OpSpec:
    """Returns the OpSpec; None becomes one that quantizes nothing."""
    if spec is None:
        return OpSpec()
    if not isinstance(spec, OpSpec):
        todo = "Wrap it: OpSpec(weight=...) or OpSpec(weight=..., act=...)"
        raise quant_error(function, "spec must be an OpSpec", todo=todo, spec=spec)
    return spec


def check_operand(function: str, name: str, x: Operand, spec: QuantSpec | None) -> None:
    """Raises if an operand disagrees with its spec."""
    if spec is None:
        return
    if isinstance(x, QTensor):
        if x.qtype != spec.qtype or x.symmetric != spec.symmetric:
            raise quant_error(
                function,
                f"the {name} is quantized already, and not as its spec says",
                todo="Quantize the parameters with the spec the model runs with, or drop the spec",
                operand=repr(x),
                spec=repr(spec),
            )
    elif spec.rounding != "nearest":
        todo = "Use rounding='nearest', or call fake_quant with a key yourself"
        raise quant_error(function, "ops round to nearest", todo=todo, rounding=spec.rounding)
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        todo = "Cast it to a float dtype, or leave its spec out"
        raise quant_error(function, f"the {name} must be a float array to be quantized", todo=todo, operand=x)


def refuse_range(function: str, act_scale: ArrayLike | None, act_zero_point: ArrayLike | None) -> None:
    """Raises if an activation range is given but no activation is quantized."""
    for name, value in (("act_scale", act_scale), ("act_zero_point", act_zero_point)):
        if value is not None:
            todo = "Leave it out, or pass a float activation and spec=OpSpec(act=...)"
            got: dict[str, Any] = {name: value}
            raise quant_error(function, f"{name} without an activation to quantize", todo=todo, **got)


def refuse_product_specs(function: str, spec: OpSpec) -> None:
    """Raises if a spec has options for matrix products alone: outlier features or quantized gradients."""
    if spec.outliers is not None:
        todo = "Use recipes.w8a8() here; dot_general and einsum have outliers"
        raise quant_error(function, "outliers are for products of matrices", todo=todo, outliers=spec.outliers)
    if spec.grad is not None:
        rule, todo = "gradients are quantized in dot_general and einsum only", "Leave grad out of the spec"
        raise quant_error(function, rule, todo=todo, grad=spec.grad)


def precision_of(function: str, precision: Any) -> lax.PrecisionLike:
    """The precision in a hashable form that XLA accepts."""
    if precision is None:
        return None
    precision = tuple(precision) if isinstance(precision, list) else precision
    try:
        one = jax.ShapeDtypeStruct((1,), jnp.float32)
        jax.eval_shape(lambda a: lax.dot_general(a, a, (((0,), (0,)), ((), ())), precision=precision), one)
    except (TypeError, ValueError):
        todo = "Use None, 'highest', a jax.lax.Precision, or a pair of them"
        raise quant_error(function, "unknown precision", todo=todo, precision=precision) from None
    return precision


def random_key(function: str, key: PyTree) -> jax.Array:
    """One random key as a typed key; raw uint32 keys are wrapped."""
    try:
        typed = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
    except (AttributeError, TypeError, ValueError):
        raise quant_error(function, "key must be a random key", todo="Use jax.random.key(0)", key=key) from None
    if typed.ndim:
        raise quant_error(function, "key must be one key", todo="Use one of jax.random.split(...)", key=typed.shape)
    return typed


# -- operands ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of an op: how its operand is treated.

    Attributes:
      spec: how it is quantized on the way, if it is.
      axes: the (negative) axes that share a scale.
      parts: how it is partitioned over devices, where that is part of its type.
    """

    spec: QuantSpec | None
    axes: tuple[int, ...]
    parts: Parts | None = None

    def given(self, function: str, x: Operand, scale: ArrayLike | None, zero_point: ArrayLike | None) -> Static:
        """The static range for this operand, one entry per block; raises if the spec needs one and none is given."""
        if self.spec is None or isinstance(x, QTensor):
            refuse_range(function, scale, zero_point)
            return None
        if scale is None and (self.spec.static or zero_point is not None):
            todo = "Calibrate and pass act_scale (and act_zero_point), or use static=False without them"
            rule = "a static activation range is needed and no act_scale is given"
            raise quant_error(function, rule, todo=todo, static=self.spec.static, act_zero_point=zero_point)
        if scale is None:
            return None
        _, _, found, zero = prepare(function, x, self.spec, self.axes, scale, zero_point, None)
        assert found is not None
        return found, zero

    def check_groups(self, function: str, x: Operand) -> None:
        """Raises if the spec's groups do not fit the operand."""
        if self.spec is not None and not isinstance(x, QTensor):
            s = self.spec
            scale_shape(x.shape, block_shape(x.shape, s.granularity, self.axes, function=function))

    def quantized(self, x: Operand, static: Static, produced: Produced | None = None) -> Operand:
        """The operand of the forward pass: a `TrainedTensor` if it is quantized on the way.

        Args:
          x, static: the operand and its range.
          produced: a function of rows that makes x, or None.
        """
        if isinstance(x, TrainedTensor):
            return TrainedTensor(x, None)
        if isinstance(x, QTensor) or self.spec is None:
            return x
        exact = static is None and self.spec.type.scale_format == "e8m0"
        if static is None and self.parts is not None and self.parts.holds_whole(self.axes):
            q = quantized_parts(x, spec=self.spec, axes=self.axes, parts=self.parts)
        elif static is None and self.parts is None and produced is not None and not exact:
            how: dict[str, Any] = {"spec": self.spec, "axes": self.axes}
            q = produced_codes(x, produced.inputs, function=produced.function, **how)
        else:
            q = as_codes(x, self.spec, self.axes, *(static or (None, None)))
        return TrainedTensor(q, block_values(x, q, spec=self.spec, axes=self.axes) if exact else None)

    def passes(self, x: Operand, static: Static) -> bool:
        """Whether the gradient of an operand equals that of its real values: nothing is quantized here, or clipped."""
        if self.spec is None or isinstance(x, QTensor):
            return True
        return static is None and not self.spec.static and self.spec.never_clips

    def kept(self, q: Operand, x: Operand, static: Static) -> TrainedTensor | None:
        """The codes q of an operand if they were made of x and suffice for its gradient; else None."""
        if not isinstance(q, TrainedTensor) or isinstance(x, QTensor) or not self.passes(x, static):
            return None
        return TrainedTensor(q, None)

    def gradient(self, x: Operand, static: Static, dx: jax.Array) -> tuple[PyTree, PyTree]:
        """The gradients of an operand and of its range, from the gradient of its real values.

        In a shard_map, an operand that is replicated over devices gets the sum of their gradients.

        Args:
          x, static: the operand and its range.
          dx: the gradient with respect to the real values.
        """
        if not self.passes(x, static):
            real, pull = jax.vjp(self.real, x, static)
            return pull(_summed(dx, real))
        if isinstance(x, TrainedTensor):
            return TrainedTensor(jax.tree.map(lambda _: None, x.frozen), _summed(dx, x.dequantize())), None
        if isinstance(x, QTensor):
            real, pull = jax.vjp(QTensor.dequantize, x)
            return pull(_summed(dx, real))[0], None
        return _summed(dx, x), None

    def real(self, x: Operand, static: Static) -> jax.Array:
        """The values that `quantized` stands for, differentiable: dequantized, or fake-quantized (straight through)."""
        if isinstance(x, QTensor) or self.spec is None:
            return wide_values(x)
        scale, zero_point = static or (None, None)
        return fake_quant(x, self.spec, reduce_axes=self.axes, scale=scale, zero_point=zero_point)


def _summed(dx: jax.Array, real: jax.Array) -> jax.Array:
    """Casts a gradient to the dtype of ``real``, and sums it over devices on which ``real`` is replicated."""
    dx = dx.astype(real.dtype)
    return jax.vjp(lambda v: v + lax.stop_gradient(dx), real)[1](dx)[0]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both operands of a product, checked against a spec before anything is computed.

    Attributes:
      lhs, rhs: arrays or QTensors.
      weight: which of them is the weight, 0 or 1.
      spec: how the product is quantized.
    """

    function: str
    lhs: Operand
    rhs: Operand
    weight: int
    spec: OpSpec

    @classmethod
    def of(
        cls,
        function: str,
        lhs: ArrayLike | QTensor,
        rhs: ArrayLike | QTensor,
        spec: OpSpec | None,
        *,
        weight: int | None = None,
    ) -> Pair:
        """Checks operands and spec; the weight is ``rhs`` unless ``weight`` is given or only ``lhs`` is a QTensor."""
        left, right = as_array(function, "lhs", lhs), as_array(function, "rhs", rhs)
        if weight is None:
            weight = 0 if isinstance(left, QTensor) and not isinstance(right, QTensor) else 1
        pair = cls(function, left, right, weight, check_spec(function, spec))
        if pair.floats is None and not have_common_dtype(left.dtype, right.dtype):
            rule, todo = "the dtypes of the operands promote to no common one", "Cast one, as x.astype(jnp.bfloat16)"
            raise quant_error(function, rule, todo=todo, lhs=left, rhs=right)
        for name, x, s in zip(("lhs", "rhs"), (left, right), pair.specs, strict=True):
            role = "weight" if name == ("lhs", "rhs")[weight] else "activation"
            check_operand(function, f"{role} ({name})", x, s)
        return pair

    @property
    def specs(self) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The spec of lhs and of rhs."""
        w, a = self.spec.weight, self.spec.act
        return (w, a) if self.weight == 0 else (a, w)

    @property
    def floats(self) -> tuple[jax.Array, jax.Array] | None:
        """Both operands, if they stay in float; else None."""
        if self.specs != (None, None) or isinstance(self.lhs, QTensor) or isinstance(self.rhs, QTensor):
            return None
        return self.lhs, self.rhs

    def sides(
        self, lhs_axes: Iterable[int], rhs_axes: Iterable[int], placed: Placed | None = None
    ) -> tuple[Side, Side]:
        """How each operand is treated, from the axes of each that share a scale."""
        both = (self.lhs, lhs_axes), (self.rhs, rhs_axes)
        parts = (None, None) if placed is None else (placed.lhs, placed.rhs)
        lhs, rhs = (
            Side(None if isinstance(x, QTensor) else spec, tuple(sorted(a - x.ndim for a in axes)), own)
            for spec, (x, axes), own in zip(self.specs, both, parts, strict=True)
        )
        lhs.check_groups(self.function, self.lhs)
        rhs.check_groups(self.function, self.rhs)
        return lhs, rhs

    def static(
        self, sides: tuple[Side, Side], act_scale: ArrayLike | None, act_zero_point: ArrayLike | None
    ) -> tuple[Static, Static]:
        """The given range of each operand: of the activation, or of none."""
        if self.weight == 0:
            return None, sides[1].given(self.function, self.rhs, act_scale, act_zero_point)
        return sides[0].given(self.function, self.lhs, act_scale, act_zero_point), None

    def result_dtype(self, preferred: DTypeLike | None) -> np.dtype:
        """The dtype of the float operation: the preferred one, or the promotion of the (dequantized) dtypes."""
        dtype = np.dtype(promoted(self.lhs.dtype, self.rhs.dtype) if preferred is None else preferred)
        if not jnp.issubdtype(dtype, jnp.floating):
            todo = "Use a float preferred_element_type, and real operands"
            raise quant_error(self.function, "a quantized product is a float array", todo=todo, dtype=dtype)
        return dtype


# -- gradients --------------------------------------------------------------------------------------------------------


class Call:
    """The static half of a call, hashable: the fast computation and its float reference, as a `tangents.Rule`."""

    def reference(self, *operands: PyTree) -> jax.Array:
        """The result of `keep`, up to rounding, in differentiable float arithmetic, from which gradients are taken."""
        raise NotImplementedError

    def again(self, *operands: PyTree) -> jax.Array:
        """`reference` in arithmetic whose gradient JAX differentiates in both modes, for second derivatives."""
        return self.reference(*operands)

    def keep(self, *operands: PyTree) -> tuple[jax.Array, PyTree]:
        """The result, computed fast, and the residuals that the backward pass needs beside the operands."""
        raise NotImplementedError

    def back(self, kept: PyTree, operands: tuple[PyTree, ...], g: jax.Array) -> tuple[PyTree, ...]:
        """The gradient with respect to each operand, from the residuals and the gradient of the result."""
        del kept
        return jax.vjp(self.reference, *operands)[1](g)

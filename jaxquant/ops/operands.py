"""What every op does with its operands first: checks, and the split into weight and activation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.affine import Encoded, encode, prepare
from jaxquant.core.blocks import block_shape, scale_shape
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType
from jaxquant.core.specs import OpSpec, QuantSpec

__all__ = ["Operand", "Static", "as_array", "operand_specs", "result_dtype"]

Static = tuple[jax.Array, jax.Array | None] | None
"""A given activation range: (scale, zero_point), or None."""


def as_array(function: str, name: str, x: Any) -> Any:
    """A jax array, or the QTensor itself."""
    if isinstance(x, QTensor):
        return x
    if not hasattr(x, "dtype") and not np.isscalar(x) and not isinstance(x, list | tuple):
        raise quant_error(function, f"{name} must be an array or a QTensor", todo="Convert it first", **{name: x})
    return jnp.asarray(x)


def _check_spec(function: str, name: str, x: Any, spec: QuantSpec | None) -> None:
    if spec is None:
        return
    if spec.rounding != "nearest":
        todo = "Use rounding='nearest', or call fake_quant with a key yourself"
        raise quant_error(function, "ops round to nearest", todo=todo, rounding=spec.rounding)
    if not isinstance(x, QTensor):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            todo = "Cast it to a float dtype, or leave its spec out"
            raise quant_error(function, f"the {name} must be a float array to be quantized", todo=todo, **{name: x})
        return
    if x.qtype != spec.qtype or x.symmetric != spec.symmetric:
        raise quant_error(
            function,
            f"the {name} is quantized already, and not as its spec says",
            todo="Quantize the parameters with the spec the model runs with, or drop the spec",
            operand=repr(x),
            spec=repr(spec),
        )


def operand_specs(
    function: str, lhs: Any, rhs: Any, spec: OpSpec | None, *, weight: int
) -> tuple[QuantSpec | None, QuantSpec | None]:
    """The spec of each operand, checked against it.

    Args:
      function: who asks.
      lhs, rhs: arrays or QTensors.
      spec: how the operation is quantized, or None.
      weight: which operand is the weight, 0 or 1.
    """
    if spec is None:
        return None, None
    if not isinstance(spec, OpSpec):
        todo = "Wrap it: OpSpec(weight=...) or OpSpec(weight=..., act=...)"
        raise quant_error(function, "spec must be an OpSpec", todo=todo, spec=spec)
    specs = (spec.weight, spec.act) if weight == 0 else (spec.act, spec.weight)
    for x, s, name in zip((lhs, rhs), specs, ("lhs", "rhs"), strict=True):
        _check_spec(function, f"{'weight' if (name == 'lhs') == (weight == 0) else 'activation'} ({name})", x, s)
    return specs


def result_dtype(lhs: Any, rhs: Any, preferred: Any) -> Any:
    """What the float operation would return: the preferred type, or the promotion of the operands' (dequantized) dtypes."""
    return np.dtype(preferred) if preferred is not None else jnp.promote_types(lhs.dtype, rhs.dtype)


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of an op is treated: its spec and the (negative) axes that share a scale."""

    spec: QuantSpec | None
    axes: tuple[int, ...]

    def given(self, function: str, x: Any, scale: Any, zero_point: Any) -> Static:
        """The static range for this operand, one entry per block; raises if the spec wants one and there is none."""
        if self.spec is None or isinstance(x, QTensor):
            if scale is not None:
                todo = "Leave act_scale out"
                raise quant_error(
                    function, "act_scale without a float activation to quantize", todo=todo, act_scale=scale
                )
            return None
        if self.spec.static and scale is None:
            todo = "Calibrate and pass act_scale (and act_zero_point), or use static=False"
            raise quant_error(function, "a static activation range is needed and none is given", todo=todo, static=True)
        if scale is None:
            return None
        _, _, scale, zero_point = prepare(function, x, self.spec, self.axes, scale, zero_point, None)
        return scale, zero_point

    def check_groups(self, function: str, x: Any) -> None:
        """Raises if the spec's groups do not fit the operand."""
        if self.spec is not None and not isinstance(x, QTensor):
            s = self.spec
            scale_shape(x.shape, block_shape(x.shape, s.granularity, s.group_size, self.axes, function=function))

    def quantized(self, x: Any, static: Static) -> QTensor | tuple[Encoded, QType] | jax.Array:
        """The operand as the forward pass uses it: quantized if it is or if its spec says so."""
        if isinstance(x, QTensor) or self.spec is None:
            return x
        return encode(x, self.spec, self.axes, *(static or (None, None))), self.spec.type

    def real(self, x: Any, static: Static) -> jax.Array:
        """The same values in float, differentiable: dequantized, or fake-quantized with a straight-through gradient."""
        if isinstance(x, QTensor):
            return x.dequantize(jnp.promote_types(x.dtype, jnp.float32))
        if self.spec is None:
            return x
        scale, zero_point = static or (None, None)
        return fake_quant(x, self.spec, reduce_axes=self.axes, scale=scale, zero_point=zero_point)

    def length(self, shape: tuple[int, ...]) -> int:
        """Elements that share a scale if it is per channel."""
        return math.prod(shape[a] for a in self.axes)

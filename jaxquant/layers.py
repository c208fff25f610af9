"""The parts that the quantized layers of `jaxquant.linen` and `jaxquant.nnx` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant.core.affine import observed_range
from jaxquant.core.errors import quant_error
from jaxquant.core.extremes import no_range, or_nan
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.granularity import PerTensor
from jaxquant.core.qtensor import QTensor, Scale
from jaxquant.core.scale_zero_point import scale_zero_point
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.recipes import recipe

__all__ = [
    "act_alone",
    "act_range",
    "check_shape",
    "checked_spec",
    "is_known",
    "kernel_to_mask",
    "observed",
    "promoted",
    "rows_at",
    "static_act",
    "unobserved",
]


# -- specs -------------------------------------------------------------------------------------------------------------


def checked_spec(layer: str, spec: OpSpec | str | None) -> OpSpec | None:
    """The spec of a layer, given as such or by the name of a recipe; raises if no layer can have it."""
    if isinstance(spec, str):
        spec = recipe(spec)
    if spec is not None and not isinstance(spec, OpSpec):
        todo = "Use OpSpec(weight=...), a recipe such as recipes.w8a8() or 'w8a8', or None"
        raise quant_error(layer, "spec must be an OpSpec or None", todo=todo, spec=spec)
    act = static_act(spec)
    if act is not None and not isinstance(act.granularity, PerTensor) and not act.static_unit:
        todo = "Use granularity=PerTensor(), or static=False"
        raise quant_error(layer, "a static range is one for the whole activation", todo=todo, act=repr(act))
    return spec


def static_act(spec: OpSpec | None) -> QuantSpec | None:
    """The activation's spec, if its range is static."""
    return spec.act if spec is not None and spec.act is not None and spec.act.static else None


def act_alone(spec: OpSpec | None) -> OpSpec:
    """The spec of a product with a fake-quantized weight: that of its activation alone."""
    return OpSpec() if spec is None else OpSpec(act=spec.act, outliers=spec.outliers)


# -- weights -----------------------------------------------------------------------------------------------------------


def check_shape(layer: str, path: str, weight: object, shape: tuple[int, ...], todo: str) -> None:
    """Raises if a weight is a QTensor of another shape. Flax cannot check it: its leaves have shapes of their own."""
    if isinstance(weight, QTensor) and weight.shape != shape:
        rule = f"the weight must have shape {shape}"
        raise quant_error(layer, rule, todo=todo, path=path, value=repr(weight), shape=weight.shape)


def promoted(
    promote: Callable[[tuple[Any, ...]], Any], spec: OpSpec | None, inputs: Any, weight: Any, *rest: Any
) -> tuple[Any, ...]:
    """``promote`` of all arrays; a weight that is or will be quantized only influences the common dtype.

    A float weight is quantized in the dtype it is stored in, as `quantize_params` does, not in the compute dtype.
    """
    if not isinstance(weight, QTensor) and (spec is None or spec.weight is None):
        return tuple(promote((inputs, weight, *rest)))
    inputs, _, *others = promote((inputs, jnp.zeros((), weight.dtype), *rest))
    return inputs, weight, *others


def kernel_to_mask(kernel: QTensor | jax.Array, spec: OpSpec | None) -> jax.Array:
    """The float kernel of a convolution with a mask: it is quantized first and masked then."""
    if isinstance(kernel, QTensor):
        return kernel.dequantize()
    if spec is None or spec.weight is None:
        return kernel
    return fake_quant(kernel, spec.weight, reduce_axes=tuple(range(-kernel.ndim, -1)))


def rows_at(indices: jax.Array | np.ndarray, rows: int) -> jax.Array | np.ndarray:
    """The indices of a lookup in a table of so many rows; one of one row answers every index with it, as in Flax."""
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    return jnp.zeros_like(indices) if rows == 1 else indices


# -- static ranges -----------------------------------------------------------------------------------------------------


def unobserved(act: QuantSpec, stack: tuple[int, ...] = ()) -> dict[str, PyTree]:
    """The state of a static range before any data: ``lo``, ``hi`` and what the observer has ``seen``."""
    lo, hi = no_range(stack)
    seen = {name: jnp.broadcast_to(x, (*stack, *x.shape)) for name, x in act.observer.init((1,)).items()}
    return {"lo": lo, "hi": hi, "seen": seen}


def observed(seen: PyTree, x: jax.Array, act: QuantSpec) -> dict[str, PyTree]:
    """The state after the observer has seen an activation of any shape."""
    x = jax.lax.stop_gradient(x)
    x = x.reshape(-1) if x.size else jnp.zeros(1, x.dtype)  # an empty batch counts as a 0, which every range holds
    seen = act.observer.update(seen, x, (0,))
    lo, hi = observed_range(seen, act)
    return {"lo": lo.reshape(()), "hi": hi.reshape(()), "seen": seen}


def is_known(lo: jax.Array, hi: jax.Array) -> bool:
    """Whether a range is nonempty and finite; True for a traced range."""
    return isinstance(hi, jax.core.Tracer) or bool(np.all((np.asarray(lo) <= np.asarray(hi)) & np.isfinite(hi)))


def act_range(lo: jax.Array, hi: jax.Array, act: QuantSpec) -> tuple[Scale, jax.Array | None]:
    """Scale and zero point of a static range; NaN where nothing was observed and tracing hides it."""
    return scale_zero_point(*or_nan(lo, hi), act)

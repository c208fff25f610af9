"""Ranges that are trained: the entries of the ``state``, and the gradients of the papers.

An entry is a dict of float arrays. Its keys say what is learned, and so whose gradients it has:

| entry | scale | zero point | source |
|---|---|---|---|
| ``scale`` | the step itself | none | LSQ |
| ``scale, zero_point`` | the step itself | constant, rounded | LSQ of an asymmetric spec |
| ``scale, offset`` | the step itself | ``round(-offset / scale)`` | LSQ+ |
| ``clip`` | ``clip / qmax`` | none | PACT |

With ``v = x / scale + zero_point`` and ``q`` its code, per element and where ``qmin < v < qmax`` (inside) or not:

    d/dx      = 1 inside, 0 outside
    d/dscale  = q - v inside, q - zero_point outside          times 1 / sqrt(n qmax)
    d/doffset = 0 inside, 1 outside                           times 1 / sqrt(n qmax)
    d/dclip   = 0 inside, q / qmax outside

``n`` is how many elements share the step: of a weight, those of a block; of an activation, those of one row. (For an
offset the derivative of the scale has the term through ``zero_point`` too, so that outside it is q, as published.)

Sources: Esser et al. 2020, LSQ (arXiv:1902.08153), equations 3 to 5 and section 2.2; Bhalgat et al. 2020, LSQ+
(arXiv:2004.09576), equations 4 to 6; Choi et al. 2018, PACT (arXiv:1805.06085), equations 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.affine import as_codes
from jaxquant.core.arithmetic import divide
from jaxquant.core.derivatives import with_derivatives
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import PACT, PAPER, fake_quant_given
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec

__all__ = ["ENTRIES", "STEPS", "Entry", "check_entry", "learned_codes", "learned_range", "learned_values"]

Entry = Mapping[str, jax.Array]
"""One learned range: names to float arrays."""

ENTRIES = (("scale",), ("scale", "zero_point"), ("offset", "scale"), ("clip",))
"""The keys that an entry may have, sorted."""

STEPS = ("scale", "clip")
"""The keys of entries that have to stay above 0."""


def _scaled_gradient(factor: float, x: jax.Array) -> jax.Array:
    """x, whose gradient is multiplied on the way back."""
    return with_derivatives(x, x * factor)


def _rounded(x: jax.Array) -> jax.Array:
    """round(x), with the gradient of x."""
    return with_derivatives(jnp.rint(lax.stop_gradient(x)), x)


def learned_range(entry: Entry, spec: QuantSpec, n: int = 1) -> tuple[jax.Array, jax.Array | None]:
    """The scale and the zero point (whole, in float) of an entry, differentiable in it.

    Args:
      entry: what is learned.
      spec: of the array.
      n: how many elements share a step.
    """
    factor = 1 / math.sqrt(n * spec.type.qmax)
    if "clip" in entry:
        return _stored(divide(entry["clip"], float(spec.type.qmax)), spec), None
    scale = _stored(_scaled_gradient(factor, entry["scale"]), spec)
    if "offset" in entry:
        zero_point = _rounded(divide(-_scaled_gradient(factor, entry["offset"]), scale.astype(entry["offset"].dtype)))
    elif "zero_point" in entry:
        zero_point = jnp.rint(jax.lax.stop_gradient(entry["zero_point"]))
    else:
        return scale, None
    within = jax.lax.stop_gradient(jnp.clip(zero_point, spec.type.qmin, spec.type.qmax) - zero_point)
    return scale, zero_point + within  # differences of small integers are exact


def _stored(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """A scale in the dtype that it is stored in."""
    return scale if spec.scale_dtype is None else scale.astype(spec.scale_dtype)


def learned_values(
    x: jax.Array, spec: QuantSpec, axes: tuple[int, ...], entry: Entry, n: int, blocks: tuple[int, ...]
) -> jax.Array:
    """``x`` with the values of its codes, differentiable in ``x`` and in the entry.

    Args:
      x: float array.
      spec: how it is quantized.
      axes: the axes that share a scale.
      entry: the range, of shapes that broadcast to ``blocks``.
      n: how many elements share a step.
      blocks: the shape of the scales of x.
    """
    scale, zero_point = learned_range(entry, spec, n)
    zero_point = None if zero_point is None else jnp.broadcast_to(zero_point, blocks)
    slopes = PACT if "clip" in entry else PAPER
    return fake_quant_given(spec, axes, slopes, x, jnp.broadcast_to(scale, blocks), zero_point)


def learned_codes(
    x: jax.Array, spec: QuantSpec, axes: tuple[int, ...], entry: Entry, blocks: tuple[int, ...]
) -> QTensor:
    """The values of `learned_values` as a QTensor, without gradients; the arguments are the same."""
    scale, zero_point = learned_range(jax.lax.stop_gradient(dict(entry)), spec)
    if zero_point is not None:
        zero_point = jnp.broadcast_to(zero_point.astype(spec.type.code_dtype), blocks)
    return as_codes(jax.lax.stop_gradient(x), spec, axes, jnp.broadcast_to(scale, blocks), zero_point)


def check_entry(function: str, path: str, entry: object, spec: QuantSpec, shape: tuple[int, ...]) -> None:
    """Raises unless an entry holds one learned range for each place of ``shape``; checks concrete values."""
    found = dict(cast(Mapping[str, Any], entry)) if isinstance(entry, Mapping) else {}
    names = tuple(sorted(found))
    todo = "Pass what qat.learned_steps returned for this plan, trained or not"
    if names not in ENTRIES or (("zero_point" in names or "offset" in names) == spec.symmetric):
        keys = names if names else type(cast(object, entry)).__name__
        rule = "an entry of the state is no learned range of its spec"
        raise quant_error(function, rule, todo=todo, path=path, entry=keys, symmetric=spec.symmetric)
    for name, value in found.items():
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating) or value.shape != shape:
            got: dict[str, Any] = {name: value, "expected": shape}
            raise quant_error(function, f"{name} must be floats, one for each step", todo=todo, path=path, **got)
        known = not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
        if known and isinstance(value, jax.Array | np.ndarray):
            numbers = np.asarray(cast(Any, value))
            if not np.all(np.isfinite(numbers)):
                raise quant_error(function, f"{name} must be finite", todo="Lower its learning rate", path=path)
            if name in STEPS and not np.all(numbers > 0):
                todo = "Keep it so: state = qat.clamp_steps(state) after each update"
                least = float(np.min(numbers))
                raise quant_error(function, f"{name} must be above 0", todo=todo, path=path, least=least)

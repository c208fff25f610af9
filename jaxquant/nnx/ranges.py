"""Static ranges of activations, as NNX keeps state; values of Variables on every version of Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
from flax import nnx

from jaxquant import layers
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import Scale
from jaxquant.core.specs import QuantSpec

__all__ = ["ActRange", "QuantStat", "set_value", "value_of"]


def value_of(variable: nnx.Variable) -> Any:
    """The value of a Variable, of whatever type it is."""
    if hasattr(nnx.Variable, "get_value"):
        return variable.get_value()
    return variable.value  # Flax 0.11


def set_value(variable: nnx.Variable, value: object) -> None:
    """Replaces the value of a Variable."""
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


class QuantStat(nnx.Variable):
    """The input statistics of a layer with a static activation range."""


class ActRange(nnx.Module):
    """The static range of one activation, and what the spec's observer needs to update it.

    Args:
      spec: the activation's `QuantSpec`, per tensor.
      stack: leading axes, for the layers of a stack that is scanned or vmapped.

    Attributes:
      calibrating: True: every call shows its input to the observer first. Set by ``model.set_attributes``.
      lo, hi: the range; empty, with lo above hi, until something has been observed.
    """

    def __init__(self, spec: QuantSpec, stack: tuple[int, ...] = ()):
        self.spec = spec
        self.calibrating = False
        fresh = layers.unobserved(spec, stack)
        self.lo, self.hi = QuantStat(fresh["lo"]), QuantStat(fresh["hi"])
        for name, value in fresh["seen"].items():
            setattr(self, f"seen_{name}", QuantStat(value))

    def __call__(self, x: jax.Array, layer: str) -> tuple[Scale, jax.Array | None]:
        """Scale and zero point for an activation; NaN where nothing was observed and tracing hides it."""
        if self.calibrating:
            names = self.spec.observer.init((1,))
            state = layers.observed({n: value_of(getattr(self, f"seen_{n}")) for n in names}, x, self.spec)
            for name, value in state["seen"].items():
                set_value(getattr(self, f"seen_{name}"), value)
            set_value(self.lo, state["lo"])
            set_value(self.hi, state["hi"])
        lo, hi = value_of(self.lo), value_of(self.hi)
        if not layers.is_known(lo, hi):
            raise quant_error(
                layer,
                "spec.act is static and its range is not known",
                todo="Calibrate: model.set_attributes(calibrating=True), call the model on data that is finite, then "
                "model.set_attributes(calibrating=False); or load the QuantStat variables",
                path="act_range",
                hi=float(hi),
            )
        return layers.act_range(lo, hi, self.spec)

"""Assigns rules to the float tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from jaxquant.core.errors import QuantError
from jaxquant.core.granularity import PerChannel, PerGroup
from jaxquant.core.paths import nearest
from jaxquant.core.specs import QuantSpec
from jaxquant.io.experts import experts_of, is_experts
from jaxquant.io.safetensors import TensorSpec
from jaxquant.io.strict_json import Json
from jaxquant.rules import Rule

__all__ = ["Assigned", "Assignment", "assign"]

_NO_WEIGHT = re.compile(r"bias|norm|(^|\.)ln_", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Assigned:
    """How a weight is quantized.

    Attributes:
      spec: of each matrix in it.
      reduce_axes: the contracted axes.
      rule: the rule that matches it.
      stack: the number of matrices along the first axis of a weight with two axes.
    """

    spec: QuantSpec
    reduce_axes: tuple[int, ...]
    rule: Rule
    stack: int = 1

    def whole(self, shape: tuple[int, ...]) -> QuantSpec:
        """The spec that quantizes the whole weight at once, with no scale shared between matrices."""
        if self.stack == 1 or self.reduce_axes != (-2,) or not isinstance(self.spec.granularity, PerChannel):
            return self.spec
        return dataclasses.replace(self.spec, granularity=PerGroup(shape[0] // self.stack))


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The result of `assign`.

    Attributes:
      weights: name of each quantized weight -> how.
      skipped: name of each tensor that matches a quantizing rule but stays in float -> why.
    """

    weights: dict[str, Assigned]
    skipped: dict[str, str]


def assign(
    tensors: Mapping[str, TensorSpec],
    rules: Sequence[Rule],
    error: Callable[..., QuantError],
    config: Mapping[str, Json],
) -> Assignment:
    """Assigns to each weight the first rule that matches its name.

    A weight is a tensor of floats of 16 bits or more: a matrix whose name ends in "weight", the experts of a family of
    models whose layout is known, or any tensor for which a rule gives ``reduce_axes``. A rule that keeps tensors in
    float may name any tensor.

    Args:
      tensors: the tensors of the checkpoint.
      rules: the first that matches counts.
      error: makes the errors.
      config: the model's ``config.json``, for the layout of experts.

    Raises:
      QuantError: listing all rules that match no weight, or all experts whose layout is not known.
    """
    floats = {
        name: spec.shape
        for name, spec in tensors.items()
        if jnp.issubdtype(spec.dtype, jnp.floating) and spec.dtype.itemsize > 1
    }
    weights: dict[str, Assigned] = {}
    skipped: dict[str, str] = {}
    unknown: dict[str, str] = {}
    used: set[int] = set()
    for name, shape in floats.items():
        for i, rule in enumerate(rules):
            if not rule.matches(name):
                continue
            if rule.spec is None or rule.spec.weight is None:
                used.add(i)
                skipped.pop(name, None)
                break
            if rule.reduce_axes is not None:
                found: Assigned | str = Assigned(rule.spec.weight, rule.reduce_axes, rule)
            elif is_experts(name, shape, config):
                where = experts_of(name, shape, config)
                if isinstance(where, str):
                    unknown[name] = where
                    used.add(i)
                    break
                found = Assigned(rule.spec.weight, (where.axis,), rule, where.stack)
            else:
                found = _matrix(rule, rule.spec.weight, name, shape)
            if isinstance(found, str):
                if found:
                    skipped.setdefault(name, found)
                continue  # another rule may keep it
            used.add(i)
            skipped.pop(name, None)
            weights[name] = found
            break
    if unknown:
        name, why = next(iter(unknown.items()))
        todo = (
            "Write Rule(pattern, spec, reduce_axes=(-1,)) for [experts, out, in] or (-2,) for [experts, in, out], "
            "or keep them in float with Rule(pattern, None)"
        )
        got = {"shape": floats[name], "experts": tuple(unknown)[:20], "of": len(unknown)}
        raise error(f"a rule matches weights of experts, and {why}", name, todo=todo, **got)
    idle = tuple(rule.pattern for i, rule in enumerate(rules) if i not in used)
    if idle:
        todo = f"Nearest weights: {nearest(idle[0], floats)}"
        got = {} if not skipped else {"stay_in_float": tuple(skipped.items())[:5]}
        raise error("a rule matches no weight", todo=todo, pattern=idle[0] if len(idle) == 1 else idle, **got)
    return Assignment(weights, skipped)


def _matrix(rule: Rule, spec: QuantSpec, name: str, shape: tuple[int, ...]) -> Assigned | str:
    """How a tensor other than experts is quantized; or why it is not; or "" if it is not a weight."""

    if len(shape) == 2 and name.endswith("weight"):
        return Assigned(spec, (-1,), rule)
    if len(shape) < 2 or _NO_WEIGHT.search(name):
        return ""
    what = f"it has {len(shape)} axes" if len(shape) > 2 else "its name does not end in weight"
    return f"{what}, and the rule gives no reduce_axes"

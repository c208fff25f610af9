"""Weights whose contracted axes no group of a rule's size divides, and what the rule says of them."""

from __future__ import annotations

import dataclasses
import math

from jaxquant.core.blocks import group_error, groups_fit
from jaxquant.core.granularity import PerChannel
from jaxquant.core.qtypes import qtype_of
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.rules import Rule

__all__ = ["fitted"]


def fitted(
    function: str, path: str, rule: Rule, spec: OpSpec, shape: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[OpSpec | None, str]:
    """The rule's spec of one layer, fitted to its shape.

    Args:
      function: who asks, for the error message.
      path: of the parameter.
      rule: the one that matches it.
      spec: the rule's, as far as it concerns this parameter.
      shape: of the layer.
      axes: the contracted ones, counted from the end, sorted.

    Returns:
      The spec, or None if the layer stays in float; and what to know of it, if it is not the rule's own.

    Raises:
      QuantError: if groups do not fit, and the rule does not say what then.
    """
    channels = tuple(shape[axis] for axis in axes)
    places = {"weight": (shape, axes), "act": (channels, tuple(range(-len(channels), 0)))}
    changed, notes = {}, []
    for name, (of, along) in places.items():
        part = getattr(spec, name)
        if part is None or part.group_size is None or groups_fit(of, along, part.group_size):
            continue
        fixed = qtype_of(part.qtype).group_size is not None
        if rule.misfit is None or (rule.misfit == "per_channel" and fixed):
            place = function if name == "weight" else f"{function} (activation)"
            raise group_error(place, of, along, part.group_size, path=path, todo=_todo(part, fixed), fixed=fixed)
        notes.append(f"no group of {part.group_size} divides {math.prod(channels)}")
        changed[name] = _per_channel(part)
    if not changed:
        return spec, ""
    note = "; ".join(dict.fromkeys(notes))
    if rule.misfit == "float":
        return None, note
    return dataclasses.replace(spec, **changed), f"{' and '.join(changed)} per channel: {note}"


def _per_channel(spec: QuantSpec) -> QuantSpec:
    return dataclasses.replace(spec, granularity=PerChannel(), two_level=False)


def _todo(spec: QuantSpec, fixed: bool) -> str:
    if fixed:
        return f"another type, since {spec.qtype} has no other groups, or misfit='float' in the rule (--misfit float)"
    return "granularity=PerChannel(), or misfit='per_channel' in the rule (--misfit per_channel)"

"""Which elements of an array share a scale: `PerTensor`, `PerChannel`, `PerGroup`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeAlias, cast

import numpy as np

from jaxquant.core.errors import quant_error

__all__ = ["Granularity", "PerChannel", "PerGroup", "PerTensor", "group_of", "grouped"]


class _Named:
    """Equality with the name of the kind, beside equality with a value.

    A spec used to hold the name. ``spec.granularity == "per_group"`` keeps its meaning, whatever the size.
    """

    name: ClassVar[str]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, str):
            return other == self.name
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)  # not of the size: equal values, the name among them, have one hash


@dataclasses.dataclass(frozen=True, eq=False)
class PerTensor(_Named):
    """One scale for the whole array.

    Example:
      >>> import jaxquant as jq
      >>> jq.QuantSpec("int8", granularity=jq.PerTensor()) == jq.QuantSpec("int8", granularity="per_tensor")
      True
    """

    name: ClassVar[str] = "per_tensor"


@dataclasses.dataclass(frozen=True, eq=False)
class PerChannel(_Named):
    """One scale for each index of the axes that are not reduced: per output of a weight, per token of an activation.

    Example:
      >>> import jaxquant as jq
      >>> jq.QuantSpec("int8").granularity
      PerChannel()
    """

    name: ClassVar[str] = "per_channel"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PerGroup(_Named):
    """One scale for each group of consecutive elements along the reduced axes, in row-major order.

    Args:
      size: elements of a group, a positive integer that divides the length of the reduced axes.

    Raises:
      QuantError: if the size is no positive integer.

    Example:
      >>> import jaxquant as jq
      >>> jq.QuantSpec("int4", granularity=jq.PerGroup(64))
      QuantSpec('int4', granularity=PerGroup(64))
    """

    name: ClassVar[str] = "per_group"
    size: int

    def __post_init__(self):
        object.__setattr__(self, "size", group_of("PerGroup", "size", self.size))

    def __repr__(self) -> str:
        return f"PerGroup({self.size})"


Granularity: TypeAlias = PerTensor | PerChannel | PerGroup


def group_of(function: str, name: str, size: object) -> int:
    """The size of a group, an argument of ``function``; raises if it is no positive integer."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        got: dict[str, Any] = {name: size}
        raise quant_error(function, f"{name} must be a positive integer", todo="Use 32, 64 or 128", **got)
    return int(cast(int, size))


def grouped(size: int | None) -> PerChannel | PerGroup:
    """Groups of a size; None: one scale per channel."""
    return PerChannel() if size is None else PerGroup(size)

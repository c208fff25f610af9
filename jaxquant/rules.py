"""Rules that choose a spec for parameters and products: `Rule` and `OpRule`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from jaxquant.core.errors import quant_error
from jaxquant.core.specs import OpSpec, Value, checked_keys
from jaxquant.recipes import recipe

__all__ = ["OpRule", "Rule", "Stated"]


def _check_pattern(function: str, pattern: str) -> None:
    try:
        if not isinstance(pattern, str):
            raise TypeError("not text")
        re.compile(pattern)
    except (re.error, TypeError) as error:
        todo = "Write a pattern that re.search accepts"
        raise quant_error(function, f"bad regular expression ({error})", todo=todo, pattern=pattern) from None


def _spec(function: str, spec: OpSpec | str | None) -> OpSpec | None:
    """The spec of a rule: an `OpSpec`, given as such or by the name of a recipe, or None."""
    if spec is None or isinstance(spec, OpSpec):
        return spec
    if isinstance(spec, str):
        return recipe(spec)
    todo = "Use an OpSpec such as recipes.w8a16(), the name of a recipe such as 'w8a16', or None"
    raise quant_error(function, "spec must be an OpSpec or None", todo=todo, spec=spec)


def _read(spec: dict[str, Any] | str | None) -> OpSpec | str | None:
    """A rule's spec, from plain values: fields, the name of a recipe, or nothing."""
    return OpSpec.from_dict(spec) if isinstance(spec, dict) else spec


@dataclasses.dataclass(frozen=True, repr=False)
class Rule(Value):
    """Which parameters get which `OpSpec`: ``re.search(pattern, path)``, the first rule that matches wins.

    Args:
      pattern: a regular expression, searched in the parameter's path (``"params/encoder/Dense_0/kernel"``).
      spec: the `OpSpec`, or the name of a `recipe` such as ``"w4a16:g128"``; None keeps what matches in float.
      reduce_axes: the contracted axes of the parameters that match, counted from the end; only needed where no plan
        gives them and neither name nor shape says what kind of layer it is.
      dequantize: also quantize a parameter some of whose uses have no quantized form (a norm of the weight, say);
        those run on the dequantized weight, and the plan says so. Without it such a parameter stays in float.
      misfit: of a parameter whose contracted axes no group of the spec's size divides, ``"per_channel"`` takes one
        scale per channel instead, ``"float"`` leaves it in float; the plan says of which. None: it is an error.

    Raises:
      QuantError: if the pattern does not compile, spec is neither an OpSpec nor a recipe, or misfit is another word.

    Example:
      >>> import jaxquant as jq
      >>> jq.Rule("head", None)
      Rule('head', None)
      >>> jq.Rule(".*", "w8a16")
      Rule('.*', OpSpec(weight=QuantSpec('int8')))
    """

    pattern: str
    spec: OpSpec | None
    reduce_axes: tuple[int, ...] | None = None
    dequantize: bool = False
    misfit: Literal["per_channel", "float"] | None = None

    if TYPE_CHECKING:  # it takes more than the fields hold

        def __init__(
            self,
            pattern: str,
            spec: OpSpec | str | None,
            reduce_axes: Sequence[int] | int | None = None,
            dequantize: bool = False,
            misfit: Literal["per_channel", "float"] | None = None,
        ) -> None: ...

    def __post_init__(self):
        _check_pattern("Rule", self.pattern)
        if self.misfit not in (None, "per_channel", "float"):
            raise quant_error("Rule", "unknown misfit", todo="Use 'per_channel', 'float' or None", misfit=self.misfit)
        object.__setattr__(self, "spec", _spec("Rule", self.spec))
        if self.reduce_axes is not None:
            axes = tuple(self.reduce_axes) if isinstance(self.reduce_axes, Sequence) else (self.reduce_axes,)
            if not axes or not all(isinstance(a, int) and a < 0 for a in axes):
                todo = "Count them from the end: (-2,) for a dense kernel"
                raise quant_error("Rule", "reduce_axes must be negative axes", todo=todo, reduce_axes=axes)
            object.__setattr__(self, "reduce_axes", axes)

    def matches(self, path: str) -> bool:
        """Whether this rule's pattern is found in ``path``."""
        return re.search(self.pattern, path) is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        out: dict[str, Any] = {"pattern": self.pattern, "spec": None if self.spec is None else self.spec.to_dict()}
        if self.reduce_axes is not None:
            out["reduce_axes"] = list(self.reduce_axes)
        if self.dequantize:
            out["dequantize"] = True
        if self.misfit is not None:
            out["misfit"] = self.misfit
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Rule:
        """Inverse of `to_dict`."""
        data = checked_keys(cls, data)
        if not {"pattern", "spec"} <= set(data):
            todo = "Give both; the spec null keeps what matches in float"
            raise quant_error("Rule", "the field pattern or spec is missing", todo=todo, fields=tuple(data))
        return cls(
            data["pattern"],
            _read(data["spec"]),
            data.get("reduce_axes"),
            data.get("dequantize", False),
            data.get("misfit"),
        )


class Stated(Rule):
    """A rule of a checkpoint: for these very paths, which a function need not use.

    Args:
      paths: of parameters.
      spec: the `OpSpec`.
    """

    paths: frozenset[str]

    def __init__(self, paths: frozenset[str], spec: OpSpec):
        super().__init__("", spec)
        object.__setattr__(self, "paths", paths)

    def matches(self, path: str) -> bool:
        """Whether it is one of the paths."""
        return path in self.paths


@dataclasses.dataclass(frozen=True, repr=False)
class OpRule(Value):
    """Which products of two activations get which `OpSpec`: attention scores and values, say. The others stay in float.

    Such a product has no parameter to be named after. Its name is the name stack of the traced function, which Flax,
    Haiku and `jax.named_scope` write and to which `jnp.einsum` adds its subscripts:
    ``"Block_0/attn/bqhd,bkhd->bhqk/dot_general"``. ``re.search(pattern, name)``; the first rule that matches wins.

    Args:
      pattern: a regular expression, searched in the product's name.
      spec: an `OpSpec`, or the name of a `recipe`: ``act`` is for the left operand and ``weight`` for the right one,
        both dynamic; each is quantized over the axes that the product contracts. None keeps what matches in float.

    Raises:
      QuantError: if the pattern does not compile, spec is not an OpSpec, one of its operands is missing or static.

    Example:
      >>> import jaxquant as jq
      >>> from jaxquant import recipes
      >>> jq.OpRule("bqhd,bkhd->bhqk", recipes.w8a8())
      OpRule('bqhd,bkhd->bhqk', OpSpec(weight=QuantSpec('int8'), act=QuantSpec('int8')))
    """

    pattern: str
    spec: OpSpec | None

    if TYPE_CHECKING:

        def __init__(self, pattern: str, spec: OpSpec | str | None) -> None: ...

    def __post_init__(self):
        _check_pattern("OpRule", self.pattern)
        object.__setattr__(self, "spec", _spec("OpRule", self.spec))
        if self.spec is None:
            return
        if self.spec.weight is None or self.spec.act is None:
            todo = "Give both: act for the left operand, weight for the right one"
            raise quant_error("OpRule", "both operands of a product are quantized", todo=todo, spec=self.spec)
        if self.spec.act.static:
            todo = "Use static=False"
            raise quant_error("OpRule", "ranges of such a product are dynamic", todo=todo, spec=self.spec)

    def matches(self, name: str) -> bool:
        """Whether this rule's pattern is found in the name of an operation."""
        return re.search(self.pattern, name) is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {"pattern": self.pattern, "spec": None if self.spec is None else self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OpRule:
        """Inverse of `to_dict`."""
        data = checked_keys(cls, data)
        if set(data) != {"pattern", "spec"}:
            todo = "Give both; the spec null keeps what matches in float"
            raise quant_error("OpRule", "the field pattern or spec is missing", todo=todo, fields=tuple(data))
        return cls(data["pattern"], _read(data["spec"]))

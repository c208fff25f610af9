"""Descriptions of a quantization, as small frozen values: `QuantSpec`, `OpSpec`.

All are hashable (they can be static arguments of a jitted function) and survive a round trip through JSON.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
import json
from typing import Any, Literal, SupportsIndex, TypeVar, cast

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core import observers
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.granularity import Granularity, PerChannel, PerGroup, PerTensor, group_of
from jaxquant.core.qtypes import QType, qtype_of

__all__ = ["OpSpec", "QuantSpec", "Value", "checked_keys"]

_CALIBRATORS: dict[str, type[observers.Observer]] = {
    c.__name__: c for c in (getattr(observers, n) for n in observers.__all__) if c is not observers.Observer
}
_Self = TypeVar("_Self", bound="Value")


@dataclasses.dataclass(frozen=True, repr=False)
class Value(abc.ABC):
    """A brief ``repr``, and JSON on top of ``to_dict`` and ``from_dict``."""

    def __repr__(self) -> str:
        given, parts = inspect.signature(type(self)).parameters, list[str]()
        for field in dataclasses.fields(self):
            value, default = getattr(self, field.name), given[field.name].default
            if default is inspect.Parameter.empty:
                parts.append(repr(value))
            elif value != default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""

    @classmethod
    @abc.abstractmethod
    def from_dict(cls: type[_Self], data: dict[str, Any]) -> _Self:
        """Inverse of `to_dict`."""

    def to_json(self) -> str:
        """This value as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls: type[_Self], text: str) -> _Self:
        """Inverse of `to_json`; unknown keys and wrong values raise `QuantError`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise quant_error(cls.__name__, f"not JSON ({error})", todo="Pass what to_json returned") from None
        return cls.from_dict(data)


def checked_keys(cls: type[Value], data: object) -> dict[str, Any]:
    """The data of a value, a dict with no other keys than the arguments of its class."""
    names = list(inspect.signature(cls).parameters)
    if not isinstance(data, dict):
        got: dict[str, Any] = {"data": data}
    elif not set(data := cast(dict[str, Any], data)) <= set(names):
        got = {"fields": tuple(sorted(map(str, data)))}
    else:
        return data
    raise quant_error(cls.__name__, "unknown fields", todo=f"Use a dict with only {', '.join(names)}", **got)


@dataclasses.dataclass(frozen=True, repr=False, init=False)
class QuantSpec(Value):
    """How one array is quantized. Axis-free: the operation supplies ``reduce_axes``, the axes that share a scale.

    Args:
      qtype: the number type, by name (``"int4"``) or dtype (``jnp.int8``); see `dtype_table`.
      granularity: ``PerTensor()``: one scale; ``PerChannel()``: one for each index of the axes that are not reduced
        (per token, for an activation); ``PerGroup(64)``: one for every 64 elements along the reduced axes. Also by
        name: ``"per_tensor"``, ``"per_channel"``, or ``"per_group"`` with ``group_size``. The attribute is a value,
        which equals its name. mxfp8, mxfp4 and nvfp4 fix their groups, of 32, 32 and 16.
      group_size: elements of a group, with ``"per_group"``. The attribute is the size of any groups, else None.
      symmetric: True: no zero point. False: an integer zero point, for integer types only. A symmetric *unsigned*
        type represents nothing below 0: negative values saturate to 0.
      narrow_range: True: a symmetric signed type leaves out its lowest code (-127..127 rather than -128..127), and
        the largest magnitude has the code qmax. False: the whole range, its ends half a step beyond the last codes (see
        `scale_zero_point`), or on them for a block that is on codes altogether, so that what was quantized before stays
        as it is. None: True at 7 and 8 bits, unless the range comes from `observers.MSE`; False below, where the code
        more counts: the relative error of normal weights in groups of 128 falls from .117 to .105 at 4 bits, from .274
        to .221 at 3, from .766 to .507 at 2 (benchmarks/narrow_range.py).
      calibration: an observer from `jaxquant.observers`; None: AbsMax when symmetric, MinMax when not
        (and for a symmetric unsigned type, whose range is ``[0, max(x)]``); for a whole range both ends on their own.
      static: for an activation, True if its range comes from ``state`` and not from the very array. For nvfp4 the
        float32 scale of the whole array comes from ``state``, and the scales of its blocks from the array.
      scale_dtype: float dtype of the scales; None: float32.
      two_level: the scales of groups are integers 1 .. 15 times one float32 for all groups along ``reduce_axes``; for
        symmetric integers of at most 4 bits. A code times its integer fits in 8 bits, so a product takes one integer
        dot.
      rounding: ``"nearest"`` (half to even) or ``"stochastic"`` (up with the probability of the fraction; needs a key).
        The ends of a range are codes then, so that all values are right in the mean; but for scales that are rounded
        themselves (two-level, mxfp8, mxfp4, nvfp4), where what lies beyond the last code saturates.

    Raises:
      QuantError: on an unknown type or a combination that has no meaning.

    Example:
      >>> import jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity=jq.PerGroup(64))
      >>> jq.QuantSpec.from_json(spec.to_json()) == spec
      True
    """

    qtype: str
    granularity: Granularity
    symmetric: bool
    narrow_range: bool | None
    calibration: observers.Observer | None
    static: bool
    scale_dtype: str | None
    two_level: bool
    rounding: Literal["nearest", "stochastic"]

    def __init__(
        self,
        qtype: DTypeLike | QType,
        *,
        granularity: Granularity | str = "per_channel",
        group_size: SupportsIndex | None = None,
        symmetric: bool = True,
        narrow_range: bool | None = None,
        calibration: observers.Observer | None = None,
        static: bool = False,
        scale_dtype: DTypeLike | None = None,
        two_level: bool = False,
        rounding: Literal["nearest", "stochastic"] = "nearest",
    ):
        info = qtype_of(qtype)
        fields = {
            "qtype": info.name,
            "granularity": _granularity(info, granularity, group_size),
            "symmetric": symmetric,
            "narrow_range": narrow_range,
            "calibration": calibration,
            "static": static,
            "scale_dtype": None if scale_dtype is None else _scale_dtype(info, scale_dtype),
            "two_level": two_level,
            "rounding": rounding,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        _check_kinds(info, fields)
        self._check(info)

    def _check(self, info: QType) -> None:
        """Raises for a combination that has no meaning."""
        if not self.symmetric and info.kind != "int":
            todo = "Use symmetric=True, or an integer type"
            raise _error(info, f"{info.name} has no zero point", todo=todo, symmetric=False)
        if self.narrow_range and not (self.symmetric and info.kind == "int" and info.signed):
            rule = "narrow_range=True needs a symmetric signed integer type"
            raise _error(info, rule, todo="Leave narrow_range out", narrow_range=True, symmetric=self.symmetric)
        if not self.two_level:
            return
        grouped = isinstance(self.granularity, PerGroup) and info.group_size is None
        if not (grouped and self.symmetric and info.kind == "int" and info.qmax <= 7):
            rule = "two-level scales are for symmetric integers of at most 4 bits, per group"
            todo = "Leave two_level out, or use QuantSpec('int4', granularity=PerGroup(64), two_level=True)"
            raise _error(info, rule, todo=todo, granularity=self.granularity, symmetric=self.symmetric)
        if self.scale_dtype is not None:
            rule = "two-level scales are integers times one float32"
            raise _error(info, rule, todo="Leave scale_dtype out", scale_dtype=self.scale_dtype)

    @property
    def group_size(self) -> int | None:
        """Elements of a group; None if scales are per channel or per tensor."""
        return self.granularity.size if isinstance(self.granularity, PerGroup) else None

    @functools.cached_property
    def type(self) -> QType:
        """The number type with this spec's ``qmin`` (narrowed where ``narrow_range`` says so)."""
        info = qtype_of(self.qtype)
        narrow = self.narrow_range
        if narrow is None:
            narrow = self.symmetric and info.bits > 6 and not (self.calibration and self.calibration.all_codes)
        if narrow and info.kind == "int" and info.signed:
            return dataclasses.replace(info, qmin=-info.qmax)
        return info

    @property
    def brief(self) -> str:
        """A few words for tables: the type, what shares a scale unless it is a channel, and what else is not usual."""
        match self.granularity:
            case PerGroup(size):
                shared = f" g{size}"
            case PerTensor():
                shared = " tensor"
            case PerChannel():
                shared = ""
        return f"{self.qtype}{shared}{'' if self.symmetric else ' asym'}{' static' if self.static else ''}"

    @functools.cached_property
    def whole_range(self) -> bool:
        """Whether the range uses the extra negative code of a symmetric type."""
        return self.symmetric and self.type.kind == "int" and self.type.qmin < -self.type.qmax < 0

    @property
    def static_unit(self) -> bool:
        """Whether the one float32 beside fp8 block scales comes from ``state``, and the block scales from the array."""
        return self.static and self.type.scale_format == "e4m3"

    @functools.cached_property
    def observer(self) -> observers.Observer:
        """The calibrator in force."""
        if self.calibration is not None:
            return self.calibration
        if self.whole_range:
            return observers.MinMax() if self.rounding == "stochastic" else observers.WholeRange(self.type.qmax)
        return observers.AbsMax() if self.symmetric and self.type.signed else observers.MinMax()

    @functools.cached_property
    def never_clips(self) -> bool:
        """Whether a range computed from the array itself covers all of it."""
        covers = not self.observer.clips and self.type.scale_format is None and not self.two_level
        return covers and (self.type.signed or not self.symmetric)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; defaults left out.

        Files have the granularity as its name and ``group_size``, and two-level scales as ``"scale_dtype": "uint4"``.
        """
        out: dict[str, Any] = {"qtype": self.qtype}
        if self.granularity != PerChannel() and qtype_of(self.qtype).group_size is None:
            out["granularity"] = self.granularity.name
            if self.group_size is not None:
                out["group_size"] = self.group_size
        plain = ("symmetric", "narrow_range", "calibration", "static", "scale_dtype", "rounding")
        defaults = inspect.signature(QuantSpec).parameters
        out |= {name: value for name in plain if (value := getattr(self, name)) != defaults[name].default}
        if self.calibration is not None:
            out["calibration"] = {type(self.calibration).__name__: dataclasses.asdict(self.calibration)}
        if self.two_level:
            out["scale_dtype"] = "uint4"
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`."""
        data = dict(checked_keys(cls, data))
        if "qtype" not in data:
            raise quant_error("QuantSpec", "the field qtype is missing", todo="Name a number type", fields=tuple(data))
        calibration = data.get("calibration")
        if isinstance(calibration, dict):
            data["calibration"] = _calibrator(cast(dict[str, Any], calibration))
        if data.get("scale_dtype") == "uint4":
            del data["scale_dtype"]
            data["two_level"] = True
        return cls(data.pop("qtype"), **data)


def _calibrator(data: dict[str, Any]) -> observers.Observer:
    """The observer of ``{name: arguments}``."""
    name, arguments = next(iter(data.items())) if len(data) == 1 else ("", dict[str, Any]())
    try:
        return _CALIBRATORS[name](**arguments)
    except (KeyError, TypeError):
        todo = f"Use one of {', '.join(_CALIBRATORS)}"
        raise quant_error("QuantSpec", "unknown calibration", todo=todo, calibration=data) from None


def _error(info: QType, rule: str, *, todo: str, **got: Any) -> QuantError:
    return quant_error("QuantSpec", rule, todo=todo, qtype=info.name, **got)


def _granularity(info: QType, granularity: Granularity | str, group_size: SupportsIndex | None) -> Granularity:
    """Which elements share a scale, from a value, or from a name and the size of a group."""
    got = {"granularity": granularity, "group_size": group_size}
    if isinstance(granularity, PerGroup):
        if group_size is not None:
            rule = "granularity and group_size both give the size of a group"
            raise _error(info, rule, todo="Use one of them: granularity=PerGroup(...)", **got)
        granularity, group_size = "per_group", granularity.size
    if granularity not in (names := [kind.name for kind in (PerTensor, PerChannel, PerGroup)]):
        todo = f"Use PerTensor(), PerChannel(), PerGroup(64), or a name: {', '.join(names)}"
        raise _error(info, "unknown granularity", todo=todo, granularity=granularity)
    if info.group_size is not None:
        if group_size not in (None, info.group_size) or granularity == "per_tensor":
            rule = f"{info.name} always has one scale per {info.group_size} elements"
            raise _error(info, rule, todo="Leave granularity and group_size out", **got)
        return PerGroup(info.group_size)
    if (granularity == "per_group") != (group_size is not None):
        rule = "group_size goes with granularity='per_group', and only with it"
        raise _error(info, rule, todo="Give both or neither, or granularity=PerGroup(64)", **got)
    if group_size is None:
        return PerTensor() if granularity == "per_tensor" else PerChannel()
    return PerGroup(group_of("QuantSpec", "group_size", group_size))


def _scale_dtype(info: QType, given: DTypeLike) -> str:
    """The name of the dtype of scales."""
    if info.group_size is not None:
        rule = f"{info.name} fixes the format of its scales"
        raise _error(info, rule, todo="Leave scale_dtype out", scale_dtype=str(given))
    try:
        dtype = np.dtype(given)
    except (TypeError, ValueError):
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        todo = "Use float32, bfloat16 or float16; for two-level scales two_level=True"
        rule = "scale_dtype must be a float dtype of 16 bits or more"
        raise _error(info, rule, todo=todo, scale_dtype=str(given))
    return dtype.name


def _check_kinds(info: QType, fields: dict[str, Any]) -> None:
    """Raises for values that are not of the kind that their field has."""
    for name in ("symmetric", "static", "two_level"):
        if not isinstance(fields[name], bool):
            raise _error(info, f"{name} must be True or False", todo="Pass a bool", **{name: fields[name]})
    if not isinstance(narrow := fields["narrow_range"], bool | None):
        rule = "narrow_range must be True, False or None"
        raise _error(info, rule, todo="Leave it out", narrow_range=narrow)
    if not isinstance(calibration := fields["calibration"], observers.Observer | None):
        todo = f"Use None or one of {', '.join(f'{n}(...)' for n in _CALIBRATORS)} from jaxquant.observers"
        raise _error(info, "calibration must be an observer", todo=todo, calibration=calibration)
    if (rounding := fields["rounding"]) not in ("nearest", "stochastic"):
        raise _error(info, "unknown rounding", todo="Use 'nearest' or 'stochastic'", rounding=rounding)


def _is_plain(spec: QuantSpec) -> bool:
    """Whether a spec gives integers or fp8 with one scale for all reduced axes, from the array, without clipping."""
    known = spec.type.kind == "int" or (spec.type.kind == "float" and spec.type.bits == 8)
    one = not isinstance(spec.granularity, PerGroup)
    return known and one and not (spec.static or spec.observer.clips)


@dataclasses.dataclass(frozen=True, repr=False)
class OpSpec(Value):
    """How one operation is quantized. A weight spec alone means weight-only.

    Args:
      weight: spec of the weight operand, or None to leave it in float.
      act: spec of the other operand (the activation), or None.
      grad: spec of the gradient that comes into a `dot_general` of two integer operands, or two of fp8, whose two
        products of the backward pass then are such products too; None for float ones. It has one scale per token for
        the activation's gradient and per output channel for the weight's, from the gradient itself. With
        ``rounding="stochastic"`` its expectation is the gradient; `quantized` and the ops then take a key.
      outliers: a positive threshold: a feature of the activation in which any magnitude reaches it is multiplied in
        float, all others by their codes (LLM.int8()). The activation is symmetric, dynamic, per token and rounded to
        nearest. None: all features are multiplied by their codes.

    Raises:
      QuantError: if a spec is not a `QuantSpec` or None, the weight spec is static, the weight is quantized to a
        symmetric unsigned type (which would set every negative weight to 0), or ``grad`` is no symmetric integer or fp8
        type, or goes with a weight or activation of another kind, or with more than one scale per channel or token; if
        ``outliers`` is not positive, or the activation is not of that kind.

    Example:
      >>> import jaxquant as jq
      >>> jq.OpSpec(weight=jq.QuantSpec("int8"), act=jq.QuantSpec("int8"))  # W8A8, dynamic
      OpSpec(weight=QuantSpec('int8'), act=QuantSpec('int8'))
    """

    weight: QuantSpec | None = None
    act: QuantSpec | None = None
    grad: QuantSpec | None = None
    outliers: float | None = None

    def __post_init__(self):
        for name in ("weight", "act", "grad"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec):
                raise quant_error("OpSpec", f"{name} must be a QuantSpec or None", todo="Wrap it", **{name: spec})
        if self.weight is not None and self.weight.static:
            raise quant_error(
                "OpSpec", "a weight's range is taken from the weight", todo="Use static=True on act only", static=True
            )
        if self.weight is not None and self.weight.symmetric and not self.weight.type.signed:
            raise quant_error(
                "OpSpec",
                "a symmetric unsigned type would set every negative weight to 0",
                todo="Use symmetric=False, or a signed type",
                qtype=self.weight.qtype,
            )
        if self.grad is not None:
            self._check_grad(self.grad)
        if self.outliers is not None:
            object.__setattr__(self, "outliers", self._threshold(self.outliers))

    def _threshold(self, outliers: object) -> float:
        """The threshold ``outliers``; raises if it is none, or the activation cannot be split."""
        if isinstance(outliers, bool) or not isinstance(outliers, int | float) or not outliers > 0:
            raise quant_error("OpSpec", "outliers must be a positive threshold", todo="Use 6.0", outliers=outliers)
        act = self.act
        plain = act is not None and not act.static and act.symmetric and act.rounding == "nearest"
        if act is None or not plain or not isinstance(act.granularity, PerChannel):
            rule = "outliers are for activations with a dynamic, symmetric range per token, rounded to nearest"
            todo = "Leave outliers out, or use act=QuantSpec('int8')"
            raise quant_error("OpSpec", rule, todo=todo, outliers=outliers, act=act)
        return float(outliers)

    def _check_grad(self, grad: QuantSpec) -> None:
        """Raises unless gradients have scales that are constant along the axes that the products sum over."""
        if not (_is_plain(grad) and grad.symmetric and grad.type.signed):
            todo = "Use for example grad=QuantSpec('int8')"
            raise quant_error(
                "OpSpec", "grad must be a symmetric integer or fp8 spec per channel", todo=todo, grad=grad
            )

        def fits(spec: QuantSpec) -> bool:
            return _is_plain(spec) and spec.type.kind == grad.type.kind

        act = self.act if self.outliers is None else None
        if act is None or not fits(act) or not (self.weight is None or fits(self.weight)):
            integer = grad.type.kind == "int"
            recipe, kind = ("recipes.w8a8()", "an integer") if integer else ("recipes.fp8()", "an fp8")
            todo = f"Leave grad out, or use one scale per channel and per token, such as {recipe}"
            rule = f"quantized gradients need {kind} activation, and {kind} weight, with one scale per channel"
            raise quant_error("OpSpec", rule, todo=todo, weight=self.weight, act=self.act)

    @property
    def brief(self) -> str:
        """A few words for tables: the types of weight, activation and gradient."""
        parts = {"w": self.weight and self.weight.brief, "a": self.act_brief, "g": self.grad and self.grad.brief}
        return ", ".join(f"{name} {text}" for name, text in parts.items() if text) or "float"

    @property
    def act_brief(self) -> str:
        """A few words on the activation; none if it stays in float."""
        below = "" if self.outliers is None else f" below {self.outliers:g}"
        return "" if self.act is None else f"{self.act.brief}{below}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values only. Files have ``outliers`` beside the fields of ``act``."""
        specs = {"weight": self.weight, "act": self.act, "grad": self.grad}
        out = {name: spec.to_dict() for name, spec in specs.items() if spec is not None}
        if self.outliers is not None:
            out["act"]["outliers"] = self.outliers
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OpSpec:
        """Inverse of `to_dict`."""
        data = dict(checked_keys(cls, data))
        outliers = data.pop("outliers", None)
        if isinstance(data.get("act"), dict) and "outliers" in data["act"]:
            data["act"] = dict(data["act"])
            outliers = data["act"].pop("outliers")
        return cls(**{name: QuantSpec.from_dict(spec) for name, spec in data.items()}, outliers=outliers)

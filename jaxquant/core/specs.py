"""Descriptions of a quantization, as small frozen values: `QuantSpec`, `OpSpec`.

All are hashable (they can be static arguments of a jitted function) and survive a round trip through JSON.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxquant.core import observers
from jaxquant.core.errors import quant_error
from jaxquant.core.qtypes import QType, qtype_of

__all__ = ["OpSpec", "QuantSpec", "Value", "checked_keys"]

_GRANULARITIES = ("per_tensor", "per_channel", "per_group")
_CALIBRATORS = {
    c.__name__: c for c in (getattr(observers, n) for n in observers.__all__) if c is not observers.Observer
}


class Value:
    """A brief ``repr``, and JSON on top of ``to_dict`` and ``from_dict``."""

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                parts.append(repr(value))
            elif value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def to_json(self) -> str:
        """This value as one line of JSON."""
        return json.dumps(self.to_dict())  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, text: str):
        """Inverse of `to_json`; unknown keys and wrong values raise `QuantError`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise quant_error(cls.__name__, f"not JSON ({error})", todo="Pass what to_json returned") from None
        return cls.from_dict(data)  # type: ignore[attr-defined]


def checked_keys(cls: type, data: Any) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if not isinstance(data, dict) or not set(data) <= set(names):
        got: dict[str, Any] = {"fields": tuple(sorted(map(str, data)))} if isinstance(data, dict) else {"data": data}
        raise quant_error(cls.__name__, "unknown fields", todo=f"Use a dict with only {', '.join(names)}", **got)
    return data


@dataclasses.dataclass(frozen=True, repr=False)
class QuantSpec(Value):
    """How one array is quantized. Axis-free: the operation supplies ``reduce_axes``, the axes that share a scale.

    Args:
      qtype: the number type, by name (``"int4"``) or dtype (``jnp.int8``); see `dtype_table`.
      granularity: ``"per_tensor"``: one scale; ``"per_channel"``: one for each index of the axes that are not reduced
        (per token, for an activation); ``"per_group"``: one per ``group_size`` elements along the reduced axes.
      group_size: elements of a group. Fixed (32, 32, 16) for mxfp8, mxfp4 and nvfp4, which are always per group.
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
      static: for an activation, True if its range comes from ``state`` and not from the very array.
      scale_dtype: float dtype of the scales; None: float32. ``"uint4"``, for symmetric types of at most 4 bits per
        group: two-level scales, integers 1 .. 15 times one float32 for all that ``reduce_axes`` join. A code times its
        integer stays within 8 bits, so that a product needs no more than one integer dot.
      outliers: for an activation of a product, symmetric and per token: a feature in which any magnitude reaches this
        threshold is multiplied in float, all others by their codes (LLM.int8(); None: no feature is).
      rounding: ``"nearest"`` (half to even) or ``"stochastic"`` (up with the probability of the fraction; needs a key).

    Raises:
      QuantError: on an unknown type or a combination that has no meaning.

    Example:
      >>> import jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity="per_group", group_size=64)
      >>> jq.QuantSpec.from_json(spec.to_json()) == spec
      True
    """

    qtype: str
    _: dataclasses.KW_ONLY
    granularity: Literal["per_tensor", "per_channel", "per_group"] = "per_channel"
    group_size: int | None = None
    symmetric: bool = True
    narrow_range: bool | None = None
    calibration: observers.Observer | None = None
    static: bool = False
    scale_dtype: Any = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    outliers: float | None = None

    def __post_init__(self):
        info = qtype_of(self.qtype)
        self._set(qtype=info.name)
        self._check_blocks(info)
        self._check_range(info)
        self._check_scale_dtype(info)
        if self.rounding not in ("nearest", "stochastic"):
            raise self._error("unknown rounding", todo="Use 'nearest' or 'stochastic'", rounding=self.rounding)
        self._check_outliers()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_blocks(self, info: QType) -> None:
        """Settles which elements share a scale: ``granularity`` and ``group_size``."""
        got = {"granularity": self.granularity, "group_size": self.group_size}
        if self.granularity not in _GRANULARITIES:
            todo = f"Use one of {', '.join(_GRANULARITIES)}"
            raise self._error("unknown granularity", todo=todo, granularity=self.granularity)
        if info.group_size is not None:
            if self.group_size not in (None, info.group_size) or self.granularity == "per_tensor":
                rule = f"{info.name} always has one scale per {info.group_size} elements"
                raise self._error(rule, todo="Leave granularity and group_size out", **got)
            self._set(granularity="per_group", group_size=info.group_size)
        if (self.granularity == "per_group") != (self.group_size is not None):
            rule = "group_size goes with granularity='per_group', and only with it"
            raise self._error(rule, todo="Give both or neither", **got)
        if self.group_size is None:
            return
        integer = isinstance(self.group_size, int | np.integer) and not isinstance(self.group_size, bool)
        if not integer or self.group_size < 1:
            rule = "group_size must be a positive integer"
            raise self._error(rule, todo="Use 32, 64 or 128", group_size=self.group_size)
        self._set(group_size=int(self.group_size))

    def _check_range(self, info: QType) -> None:
        """Which range the codes cover, and where it comes from."""
        for name in ("symmetric", "static"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(f"{name} must be True or False", todo="Pass a bool", **{name: getattr(self, name)})
        if not isinstance(self.narrow_range, bool | None):
            rule = "narrow_range must be True, False or None"
            raise self._error(rule, todo="Leave it out", narrow_range=self.narrow_range)
        if not self.symmetric and info.kind != "int":
            todo = "Use symmetric=True, or an integer type"
            raise self._error(f"{info.name} has no zero point", todo=todo, symmetric=False)
        if self.narrow_range and not (self.symmetric and info.kind == "int" and info.signed):
            rule = "narrow_range=True needs a symmetric signed integer type"
            raise self._error(rule, todo="Leave narrow_range out", narrow_range=True, symmetric=self.symmetric)
        if self.calibration is not None and not isinstance(self.calibration, observers.Observer):
            todo = f"Use None or one of {', '.join(f'{n}(...)' for n in _CALIBRATORS)} from jaxquant.observers"
            raise self._error("calibration must be an observer", todo=todo, calibration=self.calibration)

    def _check_scale_dtype(self, info: QType) -> None:
        """Settles ``scale_dtype`` as the name of a dtype."""
        if self.scale_dtype is None:
            return
        if info.group_size is not None:
            rule = f"{info.name} fixes the format of its scales"
            raise self._error(rule, todo="Leave scale_dtype out", scale_dtype=str(self.scale_dtype))
        try:
            dtype = np.dtype(self.scale_dtype)
        except (TypeError, ValueError):
            dtype = None
        if dtype is not None and dtype == jnp.uint4:
            if self.granularity != "per_group" or not self.symmetric or info.kind != "int" or info.qmax > 7:
                raise self._error(
                    "two-level scales ('uint4') are for symmetric integers of at most 4 bits, per group",
                    todo="Leave scale_dtype out, or use QuantSpec('int4', granularity='per_group', ...)",
                    granularity=self.granularity,
                    symmetric=self.symmetric,
                )
        elif dtype is None or not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise self._error(
                "scale_dtype must be a float dtype of 16 bits or more, or 'uint4'",
                todo="Use float32, bfloat16 or float16; 'uint4' for two-level scales",
                scale_dtype=str(self.scale_dtype),
            )
        self._set(scale_dtype=dtype.name)

    def _check_outliers(self) -> None:
        """Settles the threshold ``outliers`` as a float."""
        if self.outliers is None:
            return
        if not isinstance(self.outliers, int | float) or not self.outliers > 0:
            raise self._error("outliers must be a positive threshold", todo="Use 6.0", outliers=self.outliers)
        if self.static or not self.symmetric or self.granularity != "per_channel":
            raise self._error(
                "outliers are for activations with a dynamic, symmetric range per token",
                todo="Leave outliers out, or static, symmetric and granularity",
                granularity=self.granularity,
                symmetric=self.symmetric,
                static=self.static,
            )
        self._set(outliers=float(self.outliers))

    def _error(self, rule: str, *, todo: str, **got: Any):
        return quant_error("QuantSpec", rule, todo=todo, qtype=self.qtype, **got)

    @property
    def type(self) -> QType:
        """The number type with this spec's ``qmin`` (narrowed where ``narrow_range`` says so)."""
        info = qtype_of(self.qtype)
        narrow = self.narrow_range
        if narrow is None:
            narrow = self.symmetric and info.bits > 6 and not isinstance(self.calibration, observers.MSE)
        if narrow and info.kind == "int" and info.signed:
            return dataclasses.replace(info, qmin=-info.qmax)
        return info

    @property
    def brief(self) -> str:
        """A few words for tables: the type, what shares a scale unless it is a channel, and what else is not usual."""
        outliers = "" if self.outliers is None else f" below {self.outliers:g}"
        group = f" g{self.group_size}" if self.group_size else {"per_tensor": " tensor"}.get(self.granularity, "")
        return f"{self.qtype}{group}{'' if self.symmetric else ' asym'}{' static' if self.static else ''}{outliers}"

    @property
    def whole_range(self) -> bool:
        """Whether the range uses the extra negative code of a symmetric type."""
        return self.symmetric and self.type.kind == "int" and self.type.qmin < -self.type.qmax < 0

    @property
    def two_level(self) -> bool:
        """Whether scales are integers times one float for all groups that are reduced together."""
        return self.scale_dtype == "uint4"

    @property
    def observer(self) -> observers.Observer:
        """The calibrator in force."""
        if self.calibration is not None:
            return self.calibration
        if self.whole_range:
            return observers.WholeRange(self.type.qmax)
        return observers.AbsMax() if self.symmetric and self.type.signed else observers.MinMax()

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; defaults left out."""
        out: dict[str, Any] = {}
        fixed = qtype_of(self.qtype).group_size is not None
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default or (fixed and field.name in ("granularity", "group_size")):
                continue
            if field.name == "calibration":
                value = {type(value).__name__: dataclasses.asdict(value)}
            out[field.name] = value
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QuantSpec:
        """Inverse of `to_dict`."""
        data = dict(checked_keys(cls, data))
        if "qtype" not in data:
            raise quant_error("QuantSpec", "the field qtype is missing", todo="Name a number type", fields=tuple(data))
        calibration = data.get("calibration")
        if isinstance(calibration, dict):
            name, arguments = next(iter(calibration.items())) if len(calibration) == 1 else (None, {})
            try:
                data["calibration"] = _CALIBRATORS[name](**arguments)  # type: ignore[index]
            except (KeyError, TypeError):
                todo = f"Use one of {', '.join(_CALIBRATORS)}"
                raise quant_error("QuantSpec", "unknown calibration", todo=todo, calibration=calibration) from None
        return cls(data.pop("qtype"), **data)


def _is_plain(spec: QuantSpec) -> bool:
    """Whether a spec gives integers or fp8 with one scale for all reduced axes, from the array, without clipping."""
    known = spec.type.kind == "int" or (spec.type.kind == "float" and spec.type.bits == 8)
    one = spec.granularity != "per_group" and not spec.two_level
    return known and one and not (spec.static or spec.observer.clips) and spec.outliers is None


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

    Raises:
      QuantError: if a field is not a `QuantSpec` or None, the weight spec is static, the weight is quantized to a
        symmetric unsigned type (which would set every negative weight to 0), or ``grad`` is no symmetric integer or fp8
        type, or goes with a weight or activation of another kind, or with more than one scale per channel or token.

    Example:
      >>> import jaxquant as jq
      >>> jq.OpSpec(weight=jq.QuantSpec("int8"), act=jq.QuantSpec("int8"))  # W8A8, dynamic
      OpSpec(weight=QuantSpec('int8'), act=QuantSpec('int8'))
    """

    weight: QuantSpec | None = None
    act: QuantSpec | None = None
    grad: QuantSpec | None = None

    def __post_init__(self):
        for name in ("weight", "act", "grad"):
            spec = getattr(self, name)
            if spec is not None and not isinstance(spec, QuantSpec):
                raise quant_error("OpSpec", f"{name} must be a QuantSpec or None", todo="Wrap it", **{name: spec})
        if self.weight is not None and self.weight.static:
            raise quant_error(
                "OpSpec", "a weight's range is taken from the weight", todo="Use static=True on act only", static=True
            )
        if self.weight is not None and self.weight.outliers is not None:
            todo = "Use outliers on act only"
            raise quant_error("OpSpec", "a weight has no outliers", todo=todo, outliers=self.weight.outliers)
        if self.weight is not None and self.weight.symmetric and not self.weight.type.signed:
            raise quant_error(
                "OpSpec",
                "a symmetric unsigned type would set every negative weight to 0",
                todo="Use symmetric=False, or a signed type",
                qtype=self.weight.qtype,
            )
        if self.grad is not None:
            self._check_grad(self.grad)

    def _check_grad(self, grad: QuantSpec) -> None:
        """Raises unless gradients have scales that are constant along the axes that the products sum over."""
        if not (_is_plain(grad) and grad.symmetric and grad.type.signed):
            todo = "Use for example grad=QuantSpec('int8')"
            raise quant_error(
                "OpSpec", "grad must be a symmetric integer or fp8 spec per channel", todo=todo, grad=grad
            )

        def fits(spec: QuantSpec) -> bool:
            return _is_plain(spec) and spec.type.kind == grad.type.kind

        if self.act is None or not fits(self.act) or not (self.weight is None or fits(self.weight)):
            integer = grad.type.kind == "int"
            recipe, kind = ("recipes.w8a8()", "an integer") if integer else ("recipes.fp8()", "an fp8")
            todo = f"Leave grad out, or use one scale per channel and per token, such as {recipe}"
            rule = f"quantized gradients need {kind} activation, and {kind} weight, with one scale per channel"
            raise quant_error("OpSpec", rule, todo=todo, weight=self.weight, act=self.act)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {f.name: s.to_dict() for f in dataclasses.fields(self) if (s := getattr(self, f.name)) is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OpSpec:
        """Inverse of `to_dict`."""
        return cls(**{k: QuantSpec.from_dict(v) for k, v in checked_keys(cls, data).items()})

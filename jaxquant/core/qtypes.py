"""The number types: the values of the codes, and their bits.

Three kinds of grid share the law ``x ~ (grid(code) - zero_point) * scale``:

- ``"int"``: the grid is the integers ``qmin .. qmax``;
- ``"float"``: the grid is a small floating-point format (fp8, fp4), symmetric about 0;
- ``"table"``: the grid is a list of 2**bits values (nf4, bitsandbytes' fp4 and its dynamic maps, in [-1, 1]; binary,
  quaternary and ggml's iq4_nl, integers).

The block formats (mxfp8, mxfp4, nvfp4) are a float grid together with a group size and a format for the scales.
To add a number type, add one entry to ``QTYPES``; `jaxquant.core.codec` handles the kinds.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.errors import quant_error

__all__ = ["FACTOR", "QTYPES", "DtypeTable", "QType", "dtype_table", "qtype_of"]

# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a normal distribution, normalised to [-1, 1].
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# bitsandbytes' own fp4, in the order of its codes (which is not the order of e2m1); units of 1/12.
_BNB_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_BNB_FP4 = tuple(
    float(np.float32(sign) * np.float32(v) / np.float32(12)) for sign in (1, -1) for v in _BNB_FP4_TWELFTHS
)

# ggml's grid for IQ4_NL and IQ4_XS (kvalues_iq4nl).
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _dynamic_map(decades: int, *, signed: bool) -> tuple[float, ...]:
    """Dettmers 2016 (arXiv:1511.04561): twice as many linear steps in each decade as in the one below it, 0, and 1.

    Signed: both signs, one step in the least decade; unsigned: two there. The edges of the steps are counted from the
    nearer end and rounded once to float32, as in bitsandbytes' tables.
    """
    values = [np.float32(0), np.float32(1)]
    for i in range(decades):
        n, low, high = 2**i if signed else 2 ** (i + 1), np.float32(0.1), np.float32(1)
        step, at = np.float64((high - low) / np.float32(n)), np.asarray(range(n + 1))
        edges = np.where(at < (n + 1) // 2, low + step * at, high - step * (n - at)).astype(np.float32)
        middles = np.float32(10.0 ** (i + 1 - decades)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*middles, *-middles] if signed else [*middles]
    return tuple(sorted(map(float, values)))


@dataclasses.dataclass(frozen=True)
class QType:
    """One number type.

    Attributes:
      name: the name used in specs, tables and files.
      kind: ``"int"``, ``"float"`` or ``"table"``.
      bits: bits of one code, as stored.
      qmin: smallest value of the grid (an integer for ``"int"``).
      qmax: largest value of the grid.
      mantissa_bits: explicit mantissa bits (``"float"`` only).
      min_exponent: exponent of the smallest normal number (``"float"`` only).
      table: the 2**bits grid values in code order (``"table"`` only).
      element: the ml_dtypes name of the float format (``"float"`` only).
      group_size: the group size a block format fixes, else None.
      scale_format: ``None`` (a float scale), ``"e8m0"`` (a power of two) or ``"e4m3"`` (an fp8 number
        times one float32 for the whole array).
    """

    name: str
    kind: Literal["int", "float", "table"]
    bits: int
    qmin: float
    qmax: float
    mantissa_bits: int = 0
    min_exponent: int = 0
    table: tuple[float, ...] = ()
    element: str | None = None
    group_size: int | None = None
    scale_format: Literal["e8m0", "e4m3"] | None = None

    @functools.cached_property
    def signed(self) -> bool:
        """Whether the grid has negative values."""
        return self.qmin < 0

    @functools.cached_property
    def has_zero(self) -> bool:
        """Whether 0 is on the grid."""
        return self.kind != "table" or 0.0 in self.table

    @functools.cached_property
    def has_nan(self) -> bool:
        """Whether a code stands for NaN."""
        return self.kind == "float" and self.bits == 8

    @functools.cached_property
    def code_dtype(self) -> np.dtype:
        """The dtype of one unpacked code.

        Integers have the smallest integer dtype that holds the grid, fp8 its own dtype, and 4-bit floats and
        tables the uint8 index of their bit pattern.
        """
        if self.kind == "int":
            return np.dtype(np.int8 if self.signed else np.uint8)
        return np.dtype(self.element) if self.bits >= 8 and self.element else np.dtype(np.uint8)

    @functools.cached_property
    def packed(self) -> bool:
        """Whether codes are stored packed, several to a byte or across bytes."""
        return self.bits < 8


def _int(bits: int, signed: bool) -> QType:
    qmin, qmax = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return QType(f"{'' if signed else 'u'}int{bits}", "int", bits, qmin, qmax)


def _float(name: str, element: str, **block: Any) -> QType:
    info = cast(Any, ml_dtypes.finfo(element))
    return QType(
        name,
        "float",
        int(info.bits),
        -float(info.max),
        float(info.max),
        mantissa_bits=int(info.nmant),
        min_exponent=int(info.minexp),
        element=element,
        **block,
    )


def _dynamic(name: str, bits: int, decades: int, *, signed: bool) -> QType:
    table = _dynamic_map(decades, signed=signed)
    return QType(name, "table", bits, table[0], table[-1], table=table)


QTYPES: dict[str, QType] = {
    t.name: t
    for t in (
        *(_int(bits, True) for bits in range(2, 9)),
        *(_int(bits, False) for bits in range(2, 9)),
        _float("float8_e4m3fn", "float8_e4m3fn"),
        _float("float8_e5m2", "float8_e5m2"),
        _float("float4_e2m1fn", "float4_e2m1fn"),
        QType("binary", "table", 1, -1.0, 1.0, table=(-1.0, 1.0)),
        QType("quaternary", "table", 2, -3.0, 3.0, table=(-3.0, -1.0, 1.0, 3.0)),
        QType("nf4", "table", 4, -1.0, 1.0, table=_NF4),
        QType("fp4", "table", 4, -1.0, 1.0, table=_BNB_FP4),
        QType("iq4_nl", "table", 4, -127.0, 113.0, table=tuple(float(v) for v in _IQ4_NL)),
        _dynamic("dynamic4", 4, 3, signed=True),
        _dynamic("dynamic8", 8, 7, signed=True),
        _dynamic("udynamic8", 8, 7, signed=False),
        _float("mxfp8", "float8_e4m3fn", group_size=32, scale_format="e8m0"),
        _float("mxfp4", "float4_e2m1fn", group_size=32, scale_format="e8m0"),
        _float("nvfp4", "float4_e2m1fn", group_size=16, scale_format="e4m3"),
    )
}


#: Numbers as they are: the type of a scale that is the product of two factors, not one that arrays are quantized to.
FACTOR = _float("float32", "float32")

_FP8, _FP4 = ("float8_e4m3fn", "float8_e5m2"), ("float4_e2m1fn", "mxfp4", "nvfp4")
_OTHER_NAMES = {
    "fp8": _FP8, "f8": _FP8, "float8": _FP8, "e4m3": _FP8[:1], "f8e4m3": _FP8[:1], "fp8e4m3": _FP8[:1],
    "e5m2": _FP8[1:], "f8e5m2": _FP8[1:], "fp8e5m2": _FP8[1:], "float4": _FP4, "f4": _FP4, "e2m1": _FP4[:1],
    "fp4e2m1": _FP4[:1], "mxfp6": ("mxfp8", "mxfp4"), "nvfp8": ("mxfp8", "nvfp4"),
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "f16", "float16", "half"), (*_FP8, "int8")),
    **dict.fromkeys(("fp32", "f32", "float32", "fp64", "float64"), (*_FP8, "int8")),
}  # fmt: skip


def _nearest(name: str) -> list[str]:
    """Types that a name may mean: by names of other libraries, by bits, by spelling."""
    word = name.lower().replace("_", "").replace("-", "").removesuffix("fn")
    if word in _OTHER_NAMES:
        return list(_OTHER_NAMES[word])
    integer = re.match(r"(u?)(?:int|i|q|w)?(\d+)", name.lower())
    if integer:
        sign, bits = integer.groups()
        return [f"{sign}int{n}" for n in sorted(range(2, 9), key=lambda n: abs(n - int(bits)))[:2]]
    return difflib.get_close_matches(name.lower(), QTYPES, n=3)


def qtype_of(name: DTypeLike | QType, *, function: str = "QuantSpec") -> QType:
    """The `QType` of a name (``"int4"``) or of a dtype (``jnp.int4``); `QuantError` if there is none."""
    if isinstance(name, QType):
        return name
    if isinstance(name, str):
        key = name
    else:
        try:
            key = np.dtype(name).name
        except (TypeError, ValueError):
            key = repr(name)
    if key not in QTYPES:
        near = _nearest(key)
        nearest = f"Nearest: {', '.join(near)}. " if near else ""
        todo = f"{nearest}All: {', '.join(QTYPES)}"
        raise quant_error(function, "unknown number type", todo=todo, qtype=key)
    return QTYPES[key]


@dataclasses.dataclass(frozen=True)
class DtypeTable:
    """The rows of `dtype_table`; prints as a table, renders as Markdown with `.markdown()`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join(line.rstrip() for line in [text[0], "  ".join("-" * w for w in widths), *text[1:]])

    def __iter__(self) -> Iterator[dict[str, str]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def dtype_table() -> DtypeTable:
    """The number types side by side: bits, range and resolution.

    Float rows give sign, exponent and mantissa bits, the largest finite magnitude (``min`` is its negative), the
    smallest normal number and ``resolution``, the distance from 1.0 to the next number (0.5 ** mantissa bits).
    Integer rows give ``qmin`` and ``qmax``; their resolution is 1 step, whatever the scale. The block formats
    list the grid of one element and how their scales are stored.

    Returns:
      A `DtypeTable`: printable, iterable as dicts.

    Example:
      >>> import jaxquant as jq
      >>> table = jq.dtype_table()
      >>> next(row for row in table if row["dtype"] == "bfloat16")["exponent"]
      '8'
      >>> [row["max"] for row in table if row["dtype"] in ("int4", "uint4", "float8_e4m3fn")]
      ['7', '15', '448']

    Source: the formats' own definitions, read from ``ml_dtypes.finfo``; OCP Microscaling Formats v1.0 (2023) for mx.
    """
    columns = ("dtype", "bits", "sign", "exponent", "mantissa", "min", "max", "smallest normal", "resolution", "scale")
    rows: list[tuple[str, ...]] = []

    def show(value: float) -> str:
        return f"{value:.6g}"

    def float_row(name: str, element: DTypeLike | None, scale: str) -> tuple[str, ...]:
        info = cast(Any, ml_dtypes.finfo(element))
        return (
            name,
            str(info.bits),
            "1",
            str(int(info.bits) - 1 - int(info.nmant)),
            str(int(info.nmant)),
            show(float(info.min)),
            show(float(info.max)),
            show(float(info.smallest_normal)),
            show(0.5 ** int(info.nmant)),
            scale,
        )

    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        rows.append(float_row(np.dtype(dtype).name, dtype, "none"))
    scales = {"e8m0": "power of two", "e4m3": "fp8 x one float32"}
    for t in QTYPES.values():
        per_group = f" per {t.group_size}" if t.group_size else ""
        scale = scales.get(t.scale_format or "", "float") + per_group
        if t.kind == "float":
            rows.append(float_row(t.name, t.element, scale))
        elif t.kind == "int":
            sign = "1" if t.signed else "0"
            rows.append((t.name, str(t.bits), sign, "0", "-", str(int(t.qmin)), str(int(t.qmax)), "-", "1", scale))
        else:
            steps = np.diff(np.unique(np.asarray(t.table, np.float32)))
            rows.append(
                (
                    t.name,
                    str(t.bits),
                    "-",
                    "-",
                    "table",
                    show(t.qmin),
                    show(t.qmax),
                    "-",
                    show(float(steps.min())),
                    scale,
                )
            )
    return DtypeTable(columns, tuple(rows))

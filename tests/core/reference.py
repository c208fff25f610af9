"""Quantization written a second time: in NumPy and float64, from the equations in the docstrings, slow and plain.

It shares nothing with the package but the names of number types and the fields of a spec. Rounding to float32
(`Rounder`) happens where the package says that it computes in float32: the scale, the quotient and the product.

Everything is per element: blocks are told apart by an id for each element, not by a reshape.
"""

import dataclasses
import functools

import ml_dtypes
import numpy as np
from core import vectors
from numpy.typing import DTypeLike

__all__ = ["Grid", "Result", "block_ids", "expand", "grid", "quantize"]

# name: (exponent bits, mantissa bits, bias, patterns without sign that are no numbers)
_FLOATS = {
    "float8_e4m3fn": (4, 3, 7, {0x7F}),
    "float8_e5m2": (5, 2, 15, set(range(0x7C, 0x80))),
    "float4_e2m1fn": (2, 1, 1, set()),
}
_ELEMENT = {"mxfp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn", "nvfp4": "float4_e2m1fn"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values a code can stand for, ascending, and the code of each."""

    values: np.ndarray
    codes: np.ndarray
    is_table: bool = False

    def nearest(self, v: np.ndarray) -> np.ndarray:
        """Index of the value nearest to v; saturates. Ties: even code, or for a table the lower value."""
        values = self.values
        v = np.clip(v, values[0], values[-1])
        if self.is_table:
            middles = ((values[:-1] + values[1:]) / 2).astype(np.float32)
            return np.sum(v[..., None] > middles, axis=-1)
        high = np.clip(np.searchsorted(values, v), 1, len(values) - 1)
        to_low, to_high = v - values[high - 1], values[high] - v
        high_is_even = self.codes[high] % 2 == 0
        return np.where((to_high < to_low) | ((to_high == to_low) & high_is_even), high, high - 1)

    def gap(self, v: np.ndarray) -> np.ndarray:
        """Distance between the two grid values around v."""
        high = np.clip(np.searchsorted(self.values, v), 1, len(self.values) - 1)
        return self.values[high] - self.values[high - 1]

    def isolation(self, values: np.ndarray) -> np.ndarray:
        """Distance from each grid value to its nearer neighbour."""
        gaps = np.diff(self.values, prepend=-np.inf, append=np.inf)
        return np.minimum(gaps[:-1], gaps[1:])[np.searchsorted(self.values, values)]

    def value_of(self, codes: np.ndarray) -> np.ndarray:
        """The value of each code; a second zero, where a format has one, counts as 0."""
        order = np.argsort(self.codes)
        at = np.searchsorted(self.codes[order], codes.astype(np.int64))
        at = np.minimum(at, len(order) - 1)
        found = self.codes[order][at] == codes
        return np.where(found, self.values[order][at], 0.0)


def _float_value(pattern: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    mantissa = pattern & ((1 << mantissa_bits) - 1)
    exponent = (pattern >> mantissa_bits) & ((1 << exponent_bits) - 1)
    if exponent == 0:
        return mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@functools.cache
def grid(qtype: str, narrow: bool = False) -> Grid:
    """The grid of a number type; ``narrow`` leaves out the lowest code of a signed integer."""
    qtype = _ELEMENT.get(qtype, qtype)
    if qtype == "binary":
        return Grid(np.array([-1.0, 1.0]), np.arange(2), is_table=True)
    if qtype == "quaternary":  # Liu et al. 2025, ParetoQ (arXiv:2502.02631): half a step from 0, in units of half steps
        return Grid(2.0 * (np.arange(4) - 1.5), np.arange(4), is_table=True)
    if qtype == "dynamic4":  # Li et al. 2023 (arXiv:2309.01507): three decades of 1, 2 and 4 steps
        edges = [np.linspace(0.1, 1, n + 1, dtype=np.float32) for n in (1, 2, 4)]
        middles = [np.float32(u) * (e[1:] + e[:-1]) / np.float32(2) for u, e in zip((0.01, 0.1, 1), edges, strict=True)]
        steps = np.concatenate(middles).astype(np.float64)  # .0055, .0325, .0775, .2125, .4375, .6625, .8875
        values = np.array([*-steps[::-1], 0, *steps, 1])
        return Grid(values, np.arange(16), is_table=True)
    if qtype in ("nf4", "fp4", "dynamic8", "udynamic8"):
        file, name = (
            (f"bnb_blockwise8_{'s' if qtype == 'dynamic8' else 'u'}_1024", "code")
            if qtype.endswith("dynamic8")
            else (
                f"bnb_{qtype}_48x128_b64_bfloat16",
                "weight.quant_map",
            )
        )
        table = vectors.load(file)[name].astype(np.float64)
        values, first = np.unique(table, return_index=True)
        return Grid(values, first, is_table=True)
    if qtype == "iq4_nl":  # what ggml makes of each code, with the block's scale divided out
        unit = vectors.load("gguf_IQ4_NL")
        blocks = unit["blocks"].reshape(-1, 18)
        codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=-1)
        values = unit["ref_dequant"].reshape(-1, 32) / blocks[:, :2].copy().view(np.float16).astype(np.float64)
        numbers, first = np.unique(codes, return_index=True)
        return Grid(values.reshape(-1)[first], numbers, is_table=True)
    if qtype in _FLOATS:
        exponent_bits, mantissa_bits, bias, excluded = _FLOATS[qtype]
        sign = 1 << (exponent_bits + mantissa_bits)
        numbers = [p for p in range(sign) if p not in excluded]
        values = np.array([_float_value(p, exponent_bits, mantissa_bits, bias) for p in numbers])
        return Grid(
            np.concatenate([-values[:0:-1], values]),
            np.concatenate([np.array(numbers[:0:-1]) + sign, np.array(numbers)]),
        )
    bits = int(qtype.removeprefix("u").removeprefix("int"))
    low, high = (0, 2**bits - 1) if qtype.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    integers = np.arange(-high if narrow else low, high + 1)
    return Grid(integers.astype(np.float64), integers)


def block_ids(shape, granularity, group_size, axes) -> np.ndarray:
    """A number for each element; equal where elements share a scale."""
    axes = {a % len(shape) for a in axes} if shape else set()
    index = np.indices(shape)
    kept = np.zeros(shape, np.int64)
    along = np.zeros(shape, np.int64)
    for axis, n in enumerate(shape):
        if axis in axes:
            along = along * n + index[axis]
        else:
            kept = kept * n + index[axis]
    if granularity == "per_tensor":
        return np.zeros(shape, np.int64)
    if granularity == "per_channel":
        return kept
    return kept * (along.max() + 1) + along // group_size


def expand(per_block, shape) -> np.ndarray:
    """A per-block value (one entry per block, the array's rank) repeated over the elements, in float64."""
    out = np.asarray(per_block).astype(np.float64)
    for axis, n in enumerate(shape):
        out = np.repeat(out, n // out.shape[axis], axis=axis)
    return out


class Rounder:
    """Rounds float64 to the dtype that the package computes in, and back."""

    def __init__(self, compute):
        self.compute = compute

    def __call__(self, a):
        return np.asarray(a, np.float64).astype(self.compute).astype(np.float64)


_F32 = Rounder(np.float32)


@dataclasses.dataclass(frozen=True)
class Result:
    """Per element: index into the grid, code, scale, zero point (0 if symmetric), dequantized value."""

    index: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    dequantized: np.ndarray


def _over_blocks(ids, x, reduce, start):
    out = np.full(ids.max() + 1, start, np.float64)
    reduce.at(out, ids.ravel(), x.ravel())
    return out[ids]


def _to_dtype(scale, dtype):
    info = ml_dtypes.finfo(dtype)
    return np.clip(scale, float(info.tiny), float(info.max)).astype(dtype).astype(np.float64)


def _scale(spec, top, steps, r):
    """top / steps in the scale's dtype; where top is 0, 1, or the least number if no value of the grid is 0."""
    empty = 1.0 if 0.0 in grid(spec.qtype).values else float(ml_dtypes.finfo(spec.scale_dtype or np.float32).tiny)
    return np.where(top == 0, empty, _to_dtype(r(top / steps), np.dtype(spec.scale_dtype or np.float32)))


def _whole_scale(spec, ids, x, lo, hi, g, r):
    """Ends half a step beyond the last codes, or on them, where that has less than a quarter of the squared error."""
    above, below = g.values[-1] + 0.5, 0.5 - g.values[0]

    def candidate(lo, hi):
        return _scale(spec, np.maximum(r(r(-lo) * r(above / below)), hi), above, r)

    def error(scale):
        away = r(g.values[g.nearest(r(x / scale))] * scale) - x
        return _over_blocks(ids, away**2, np.add, 0.0)

    tight, wide = candidate(lo, hi), candidate(r(lo * r(below / (below - 0.5))), r(hi * r(above / (above - 0.5))))
    return np.where(4 * error(wide) < error(tight), wide, tight)


@np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")
def quantize(x, spec, axes, *, compute: DTypeLike = np.float32) -> Result:
    """What `jaxquant.quantize` and `dequantize` should give, for the default range choices."""
    x = np.asarray(x)
    dtype, r, info = x.dtype, Rounder(compute), spec.type
    x = x.astype(np.float64)
    g = grid(spec.qtype, narrow=info.qmin == -info.qmax and info.kind == "int")
    qmin, qmax = g.values[0], g.values[-1]
    ids = block_ids(x.shape, spec.granularity, spec.group_size, axes)
    finite = np.where(np.isinf(x), 0, x)
    absmax = _over_blocks(ids, np.abs(finite), np.maximum, 0.0)
    lo, hi = _over_blocks(ids, finite, np.minimum, 0.0), _over_blocks(ids, finite, np.maximum, 0.0)
    zero_point = np.zeros_like(x)
    if spec.qtype in ("mxfp8", "mxfp4"):  # OCP MX: 2 ** (floor(log2(absmax)) - emax)
        exponent = np.frexp(absmax)[1] - 1 - (np.frexp(qmax)[1] - 1)
        scale = np.where(absmax == 0, 1.0, 2.0 ** np.clip(exponent, -126, 127))
    elif spec.qtype == "nvfp4":  # fp8 scales, and one float32 that maps the largest of them to 448
        largest = grid("float8_e4m3fn").values[-1]
        unit = _F32(r(absmax.max() / (qmax * largest))) if absmax.max() > 0 else 1.0
        fp8 = grid("float8_e4m3fn")
        local = fp8.values[fp8.nearest(np.maximum(r(r(absmax / qmax) / unit), 2.0**-9))]
        scale = _F32(np.where(absmax == 0, 1.0, local) * unit)
    elif spec.symmetric and info.kind == "int" and qmin < -qmax:
        scale = _whole_scale(spec, ids, finite, lo, hi, g, r)
    elif spec.symmetric:
        scale = _scale(spec, absmax if qmin < 0 else hi, qmax, r)
    else:
        scale = _scale(spec, r(hi - lo), qmax - qmin, r)
        zero_point = np.clip(np.rint(r(qmin - r(lo / scale))), qmin, qmax)
    v = r(x * r(1 / scale)) if g.is_table else r(x / scale)
    index = g.nearest(v if spec.symmetric else np.rint(v) + zero_point)
    values = r((g.values[index] - zero_point) * scale)
    return Result(index, g.codes[index], scale, zero_point, values.astype(dtype))

"""A `Comparison` (of compare.py, which imports this) as one HTML page: everything inside, nothing fetched."""

from __future__ import annotations

import itertools
import math
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import numpy as np

from jaxquant.core.units import in_bytes

__all__ = ["render"]

_BINS = 36


class Axis(NamedTuple):
    """A linear scale: values between ``low`` and ``high`` are places between 0 and 100 (percent).

    Attributes:
      low: the first tick.
      high: the last tick.
      ticks: whole numbers between them.
    """

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Axis:
        """A scale with round ends around all values."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if low == high:
            low, high = low - 1, high + 1
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step = max(1.0, step * next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 7))
        first, last = math.floor(low / step), math.ceil(high / step)
        return cls(first * step, last * step, [round(i * step, 10) for i in range(first, last + 1)])

    def place(self, value: float) -> float:
        """The position of a value, in percent; values beyond an end lie on it."""
        return round(100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0), 2)


def render(found: Any, title: str, explanation: Any = None) -> str:
    """The page's text."""
    layers = found.layers
    values = [
        v for x in layers for v in (x.weight_sqnr, x.input_sqnr, x.act_sqnr) if v is not None and math.isfinite(v)
    ]
    axis = Axis.of([*values, 0.0] if values and min(values) < 15 else values)
    rows = [_row(x, axis) for x in layers]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["bytes"] = in_bytes
    environment.filters["small"] = _small
    environment.filters["time"] = _time
    template = environment.from_string(
        resources.files("jaxquant.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        found=found,
        rows=rows,
        prefix=_prefix([x.path for x in layers]),
        axis=axis,
        histogram=_histogram([x.error for x in found.inputs]),
        worst=found.worst(12),
        kinds=sorted({x.kind for x in layers}),
        saved=found.bytes_before / max(found.bytes_after, 1),
        explanation=explanation,
        outputs="unchanged" if math.isinf(found.sqnr) else f"{found.sqnr:.1f} dB",
    )


def _prefix(paths: list[str]) -> str:
    """The common start of all paths, up to a slash."""
    parts = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    common = list(itertools.takewhile(lambda names: len(set(names)) == 1, parts))
    return "".join(f"{names[0]}/" for names in common)


def _row(layer: Any, axis: Axis) -> dict[str, Any]:
    """A layer with the places of its marks."""

    def mark(value: float | None) -> float | None:
        return None if value is None else 100.0 if math.isinf(value) else axis.place(value)

    return {
        "layer": layer,
        "weight": mark(layer.weight_sqnr),
        "input": mark(layer.input_sqnr),
        "act": mark(layer.act_sqnr),
        "kept": round(100 * layer.bytes_after / max(layer.bytes_before, 1), 2),
    }


def _histogram(errors: list[float]) -> dict[str, Any]:
    """Bars of relative errors on a logarithmic scale: left edge, width and height in percent, and what is inside."""
    positive = [e for e in errors if e > 0]
    if not positive:
        return {"bars": [], "ticks": [], "exact": len(errors)}
    marks = [m * 10.0**k for k in range(-12, 4) for m in (1, 2, 5)]
    low = max([m for m in marks if m <= min(positive)], default=marks[0])
    high = min([m for m in marks if m > max(positive)], default=marks[-1])
    start, length = math.log10(low), math.log10(high) - math.log10(low)
    counts, edges = np.histogram(np.log10(positive), bins=_BINS, range=(start, start + length))
    width = 100 / _BINS
    bars = [
        {
            "left": round(i * width, 2),
            "width": round(width, 2),
            "height": round(100 * int(n) / int(counts.max()), 2),
            "count": int(n),
            "low": 10 ** edges[i],
            "high": 10 ** edges[i + 1],
        }
        for i, n in enumerate(counts)
        if n
    ]
    inside = [m for m in marks if low <= m <= high]
    inside = [m for m in inside if f"{m:e}"[0] == "1" or len(inside) < 9]
    ticks = [(round(100 * (math.log10(m) - start) / length, 2), f"{m:g}") for m in inside]
    return {"bars": bars, "ticks": ticks, "exact": len(errors) - len(positive)}


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:,.1f}"


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4f}"

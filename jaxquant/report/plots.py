"""A `Comparison` (of compare.py, which imports this) as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

__all__ = ["plot"]


def plot(found: Any, file: Path) -> None:
    """Layers with the ratio of signal to noise of their weights and inputs; the outputs' cosines as a histogram."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = found.layers[::-1]
    figure = Figure(figsize=(10, max(3.0, 0.24 * len(layers) + 1.2)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(layers))
    series = (
        ("weight", "#4269d0", "o", [x.weight_sqnr for x in layers]),
        ("input, with all layers before quantized", "#e07b39", "D", [x.input_sqnr for x in layers]),
    )
    for label, color, marker, values in series:
        shown = [(v, i) for v, i in zip(values, places, strict=True) if v is not None and math.isfinite(v)]
        if shown:
            axes[0].plot(*zip(*shown, strict=True), linestyle="", marker=marker, color=color, label=label, markersize=5)
    axes[0].set_yticks(list(places), [x.path for x in layers], fontsize=7)
    axes[0].set_xlabel("signal to noise (dB)")
    axes[0].grid(alpha=0.25)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False, fontsize=8)
    axes[1].hist([x.cosine for x in found.inputs], bins=30, color="#4269d0")
    axes[1].set_xlabel("cosine of an input's outputs")
    axes[1].set_ylabel("inputs")
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].set_title(f"mean {found.cosine:.5f}, {found.bytes_before / found.bytes_after:.2f}x smaller", fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)

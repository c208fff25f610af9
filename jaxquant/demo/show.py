"""The results as a person reads them: a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from jaxquant.demo.result import Row

__all__ = ["plot", "table"]


def table(rows: Sequence[Row], *, test_images: int, batch: int) -> Table:
    """One line per scheme; fits 80 columns."""
    caption = (
        "bytes: codes, scales and biases of all layers; file: with its header.\n"
        "agrees: predictions equal to the float model's, on the test images.\n"
        f"forward: {test_images} images in one batch; step: training on {batch}; fastest of many."
    )
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    out.add_column("\nscheme", style="bold", no_wrap=True)
    out.add_column("\nweights", no_wrap=True)
    out.add_column("activ-\nations", no_wrap=True)
    for name in ("\nbytes", "\nfile", "test\naccuracy", "\nagrees", "forward\nms", "step\nms"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.scheme,
            row.weights,
            row.activations,
            f"{row.param_bytes:,}",
            f"{row.file_bytes:,}",
            f"{row.accuracy:.1%}",
            f"{row.agreement:.1%}",
            f"{row.forward_ms:.2f}",
            "" if row.step_ms is None else f"{row.step_ms:.2f}",
        )
    return out


def plot(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy against the bytes of the parameters, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    kinds = (
        ("float32", "0.3", "s", lambda row: row.scheme == "float32"),
        ("quantized after training", "tab:blue", "o", lambda row: row.scheme != "float32" and not row.qat),
        ("trained at these bits (QAT)", "tab:red", "D", lambda row: row.qat),
    )
    for label, color, marker, belongs in kinds:
        chosen = [row for row in rows if belongs(row)]
        x, y = [row.param_bytes / 1024 for row in chosen], [100 * row.accuracy for row in chosen]
        axes.plot(x, y, linestyle="", label=label, color=color, marker=marker)
    axes.axhline(100 * rows[0].accuracy, color="0.6", linewidth=1, linestyle="--", zorder=0)

    sizes, accuracies = [row.param_bytes / 1024 for row in rows], [100 * row.accuracy for row in rows]
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.35)
    margin = max(0.08 * (max(accuracies) - min(accuracies)), 0.1)
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    _name_points(axes, rows, apart=0.045 * (max(accuracies) - min(accuracies) + 2 * margin))

    ticks = [2**i for i in range(20) if min(sizes) / 1.15 <= 2**i <= max(sizes) * 1.35]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("size of the parameters (KiB, logarithmic)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_title("Accuracy and size of a perceptron on digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _name_points(axes: Any, rows: Sequence[Row], apart: float) -> None:
    """Writes each scheme's name to the right of its point; in a column of points, names keep their distance."""
    last: dict[int, float] = {}
    for row in sorted(rows, key=lambda row: row.accuracy):
        y = max(100 * row.accuracy, last.get(row.param_bytes, float("-inf")) + apart)
        last[row.param_bytes] = y
        axes.annotate(
            row.scheme,
            (row.param_bytes / 1024, y),
            xytext=(8, 0),
            textcoords="offset points",
            verticalalignment="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )

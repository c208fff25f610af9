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


def table(rows: Sequence[Row], test_images: int) -> Table:
    """One line per scheme."""
    out = Table(
        box=box.SIMPLE_HEAD,
        title=f"scikit-learn digits, {test_images} test images, MLP 64-128-128-10, every layer quantized",
        caption="bytes: all parameters, scales and biases included; file: the checkpoint. agreement: predictions equal "
        f"to the float model's. inference: {test_images} images, median; step: one training step of 64 images, median.",
        title_style="bold",
        caption_justify="left",
    )
    out.add_column("scheme", style="bold", no_wrap=True)
    for name in ("weights", "activ.", "trained"):
        out.add_column(name, no_wrap=True)
    for name in ("bytes", "file", "test\naccuracy", "agree-\nment", "inference\nms", "step\nms"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        out.add_row(
            row.scheme,
            row.weights,
            row.activations,
            "QAT" if row.qat else "float",
            f"{row.param_bytes:,}",
            f"{row.file_bytes:,}",
            f"{row.accuracy:.1%}",
            f"{row.agreement:.1%}",
            f"{row.inference_ms:.2f}",
            "" if row.train_step_ms is None else f"{row.train_step_ms:.2f}",
        )
    return out


def plot(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy against the bytes of the parameters, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for qat, label, style in (
        (False, "trained in float, then quantized", {"marker": "o", "color": "#1f77b4"}),
        (True, "trained for it (QAT)", {"marker": "D", "color": "#d62728"}),
    ):
        chosen = [row for row in rows if row.qat == qat]
        sizes, accuracies = [r.param_bytes / 1024 for r in chosen], [100 * r.accuracy for r in chosen]
        axes.plot(sizes, accuracies, ls="", label=label, **style)
    for row in rows:
        axes.annotate(
            row.scheme, (row.param_bytes / 1024, 100 * row.accuracy), xytext=(7, -3), textcoords="offset points"
        )
    axes.axhline(100 * rows[0].accuracy, color="0.6", lw=1, ls="--", zorder=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.12)
    axes.set_xlabel("parameters (KiB, logarithmic)")
    axes.set_ylabel("test accuracy (percent)")
    axes.set_title("Accuracy against size: MLP 64-128-128-10 on digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path)

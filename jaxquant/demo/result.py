"""The measurements of the demonstration."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

__all__ = ["Result", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one scheme, after reloading its checkpoint.

    Attributes:
      scheme, weights, activations, qat: as in `Scheme`.
      param_bytes: true bytes of all parameters, scales and biases included.
      file_bytes: the same with the header of the checkpoint.
      accuracy: fraction of the test images.
      agreement: fraction of the test images for which the prediction is the float model's.
      forward_ms: for all test images in one batch, the fastest of many runs.
      step_ms: for the fastest training step, or None if the scheme was not trained.
      checkpoint: the file.
    """

    scheme: str
    weights: str
    activations: str
    qat: bool
    param_bytes: int
    file_bytes: int
    accuracy: float
    agreement: float
    forward_ms: float
    step_ms: float | None
    checkpoint: str


class Result(NamedTuple):
    """Everything that a run leaves behind; ``file`` has the same as JSON."""

    rows: list[Row]
    settings: dict[str, Any]
    plot: str
    file: str

    def to_json(self) -> str:
        """The settings, the path of the plot and the table."""
        rows = [dataclasses.asdict(row) for row in self.rows]
        return json.dumps({**self.settings, "plot": self.plot, "rows": rows}, indent=2)

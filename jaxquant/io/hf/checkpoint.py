"""A Hugging Face directory: the tensors of all shards, and the configuration."""

from __future__ import annotations

import functools
import os

import ml_dtypes
import numpy as np

from jaxquant.io.sharded import Checkpoint
from jaxquant.io.strict_json import Json

__all__ = ["HFCheckpoint"]

_FLOATS = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


class HFCheckpoint(Checkpoint):
    """A checkpoint with its ``config.json``.

    Attributes:
      config: the object in ``config.json``, or an empty dict.
      dtype: the model's dtype by the configuration, or None.
    """

    def __init__(self, path: str | os.PathLike[str], *, function: str = "load_hf"):
        super().__init__(path, function=function)
        self.config: dict[str, Json] = self.json("config.json") or {}
        self.dtype: np.dtype | None = None
        for place in (self.config.get("text_config"), self.config):
            if isinstance(place, dict):
                name = str(place.get("dtype") or place.get("torch_dtype")).removeprefix("torch.")
                self.dtype = _FLOATS.get(name, self.dtype)

    @functools.cached_property
    def owners(self) -> frozenset[str]:
        """The names of the tensors without their last part."""
        return frozenset(name.rpartition(".")[0] for name in self.tensors)

    def metadata(self) -> dict[str, str]:
        """The strings of all files' headers."""
        return {key: text for file in self.files.values() for key, text in file.metadata.items()}

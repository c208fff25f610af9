"""The interface of a layout to the writers: tensors for each weight, and a config for all weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.strict_json import Json

__all__ = ["Layout"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to write quantized weights.

    Attributes:
      name: the user's name for it.
      check: raises (through the given ``error``) unless a weight can be written without change.
      tensors: suffix of the module's name -> array, of a QTensor of NumPy arrays.
      constants: suffix -> small array, made when the weight is checked.
      config: the ``quantization_config`` for weights by module, and the modules that stay in float.
      files: further JSON files, from that config.
      stacks: whether the layout supports experts that are stacked in one tensor.
      nested: whether scales that are a QTensor are written in quantized form; ``tensors`` gets all others in float.
      keys: the keys of ``config.json`` that hold the config.
    """

    name: str
    check: Callable[[QTensor, Callable[..., QuantError]], None]
    tensors: Callable[[QTensor], dict[str, np.ndarray]]
    config: Callable[[Mapping[str, QTensor], Sequence[str]], dict[str, Json]]
    constants: Callable[[QTensor], dict[str, np.ndarray]] = lambda q: {}
    files: Callable[[dict[str, Json]], dict[str, dict[str, Json]]] = lambda config: {}
    stacks: bool = False
    nested: Callable[[QTensor], bool] = lambda q: False
    keys: tuple[str, ...] = ("quantization_config",)

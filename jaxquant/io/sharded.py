"""Safetensors files of one checkpoint: a single file, or a directory of shards with an index, and its JSON files.

    config.json                      the configuration of the model
    model.safetensors                all tensors, or
    model.safetensors.index.json     {"metadata": {...}, "weight_map": {tensor: file name}} and the files it names

The index is not trusted: it may name files of its own directory only, and index and files must agree on every tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec
from jaxquant.io.strict_json import Json, parse

__all__ = ["Checkpoint", "located", "read_json"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_JSON = 256_000_000
#: A file that is one of several, by its name.
_PART = re.compile(r".*-(\d+)-of-(\d+)\.safetensors", re.DOTALL)


def read_json(path: str | os.PathLike[str], *, function: str) -> dict[str, Json]:
    """The object in an untrusted JSON file; `QuantError` with the reason if the file does not hold one."""
    place = os.fsdecode(path)
    with open(path, "rb") as file:
        text = file.read(_MAX_JSON + 1)
    todo = "The file is damaged: fetch it again"
    if len(text) > _MAX_JSON:
        raise quant_error(function, f"the file has more than {_MAX_JSON} bytes", todo=todo, path=place)
    try:
        value = parse(text)
    except ValueError as reason:
        raise quant_error(function, f"the file is not JSON ({reason})", todo=todo, path=place) from None
    if not isinstance(value, dict):
        raise quant_error(function, "the file must hold a JSON object", todo=todo, path=place, value=value)
    return value


#: A name on the Hugging Face hub: an organisation and a model.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def _is_file(path: str) -> bool:
    """Whether a name can only be that of a file."""
    return path.endswith((".safetensors", ".gguf"))


def located(path: str, function: str) -> str:
    """The directory or file to read; for a model's directory in the cache of huggingface_hub, its snapshot."""
    if not os.path.exists(path) and _HUB_NAME.fullmatch(path) and not path.startswith(".") and not _is_file(path):
        todo = f"Fetch it first: huggingface_hub.snapshot_download({path!r}) returns a directory to pass"
        rule = "there is no such directory, and names of the hub are not fetched"
        raise quant_error(function, rule, todo=todo, path=path)
    snapshots = os.path.join(path, "snapshots")
    if not os.path.basename(os.path.abspath(path)).startswith("models--") or not os.path.isdir(snapshots):
        return path
    main = os.path.join(path, "refs", "main")
    found = sorted(os.listdir(snapshots))
    if os.path.isfile(main):
        with open(main, encoding="ascii", errors="replace") as file:
            wanted = file.read(64).strip()
        found = [name for name in found if name == wanted]
    if len(found) != 1:
        todo = "Pass one of the directories in snapshots"
        rule = "the cache does not say which snapshot is meant"
        raise quant_error(function, rule, todo=todo, path=path, snapshots=tuple(found))
    return os.path.join(snapshots, found[0])


class Checkpoint:
    """Tensors by name in all files of a directory; mapped, not read.

    Args:
      path: a safetensors file, or a directory with ``model.safetensors``, with shards and their index, or with one
        other safetensors file; or a model's directory in the cache of huggingface_hub.
      function: the public function that errors name.

    Attributes:
      path: of the file or the directory.
      tensors: name -> `TensorSpec`, in the order of the files.
      files: name of a file -> `SafetensorsFile`.
      place: tensor -> name of its file.

    Raises:
      QuantError: if the path is a name of the hub, there are no safetensors files, a file is damaged, or index and
        files disagree.
      OSError: if a file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, function: str = "load_hf"):
        self.path, self._function = located(os.fsdecode(path), function), function
        self.tensors: dict[str, TensorSpec] = {}
        self.place: dict[str, str] = {}
        if os.path.isdir(self.path):
            self._directory, weight_map = self.path, self._weight_map()
        else:
            self._directory, weight_map = os.path.dirname(self.path), os.path.basename(self.path)
        if isinstance(weight_map, str) and (part := _PART.fullmatch(weight_map)) and int(part[2]) > 1:
            rule = f"the file is one of {int(part[2])} parts, by its name"
            raise self.error(rule, weight_map, todo=f"Name the directory of all parts and of {_INDEX}")
        names = [weight_map] if isinstance(weight_map, str) else sorted(set(weight_map.values()))
        self.files = {name: SafetensorsFile(os.path.join(self._directory, name), function=function) for name in names}
        todo = "The checkpoint is damaged, or of two models: fetch it again"
        for file_name, file in self.files.items():
            for name, spec in file.tensors.items():
                if name in self.tensors:
                    raise file.error("a tensor is in two files", name, todo=todo, other=self.place[name])
                self.tensors[name], self.place[name] = spec, file_name
        if not isinstance(weight_map, str):
            self._check_index(weight_map)

    def replace(self, other: Checkpoint) -> None:
        """Reads the tensors of another checkpoint in place of those with the same names and forms."""
        for name, spec in other.tensors.items():
            if self.tensors.get(name) != spec:
                rule, todo = "a tensor does not fit the checkpoint that it is for", "Make it for this checkpoint"
                raise other.error(rule, name, todo=todo, got=spec, wanted=self.tensors.get(name))
            self.place[name] = os.path.join(other.path, other.place[name])
        self.files |= {os.path.join(other.path, name): file for name, file in other.files.items()}

    def array(self, name: str) -> np.ndarray:
        """The array of a name: a read-only view of its file."""
        return self.files[self.place[name]].array(name)

    def forget(self) -> None:
        """Releases the memory of pages that were read; they can be read again."""
        for file in self.files.values():
            file.forget()

    def json(self, name: str) -> dict[str, Json] | None:
        """The object in a JSON file of the directory; None if there is no such file."""
        path = os.path.join(self._directory, name)
        return read_json(path, function=self._function) if os.path.isfile(path) else None

    def error(self, rule: str, name: str | None = None, /, *, todo: str, **got: Any) -> QuantError:
        """A `QuantError` that names the checkpoint, and the file and tensor."""
        if name in self.place:
            return self.files[self.place[name]].error(rule, name, todo=todo, **got)
        place = self.path if name is None else f"{self.path}, {name[:200]!r}"
        return quant_error(self._function, rule, todo=todo, path=place, **got)

    def _weight_map(self) -> str | dict[str, str]:
        """Tensor -> file name, or the name of the only file."""
        if os.path.isfile(os.path.join(self.path, _INDEX)):
            return self._checked_index()
        if os.path.isfile(os.path.join(self.path, _SINGLE)):
            return _SINGLE
        found = sorted(name for name in os.listdir(self.path) if name.endswith(".safetensors"))
        if len(found) == 1:
            return found[0]
        rule = "several safetensors files need an index" if found else "there is no safetensors file"
        todo = "Files of pickled tensors (.bin, .pt) are never read; convert them where they came from"
        raise self.error(rule, todo=f"Add {_INDEX}" if found else todo, files=tuple(sorted(os.listdir(self.path))[:20]))

    def _checked_index(self) -> dict[str, str]:
        path = os.path.join(self.path, _INDEX)
        weight_map = read_json(path, function=self._function).get("weight_map")
        todo = "The index is damaged: fetch it again"
        if not isinstance(weight_map, dict) or not weight_map:
            raise self.error("the index needs a weight_map from tensors to files", _INDEX, todo=todo, got=weight_map)
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
                rule = "the index may name safetensors files of its own directory only"
                raise self.error(rule, tensor, todo=todo, file=name)
        missing = sorted({name for name in weight_map.values() if not os.path.isfile(os.path.join(self.path, name))})
        if missing:
            todo = "Fetch the files that are missing"
            raise self.error("the index names files that are not there", _INDEX, todo=todo, missing=tuple(missing[:20]))
        return weight_map

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        todo = "The checkpoint is damaged: fetch it again"
        for tensor, name in weight_map.items():
            if self.place.get(tensor) != name:
                rule = "the index names a tensor that its file does not have"
                raise self.error(rule, tensor, todo=todo, file=name, tensors=len(self.files[name].tensors))
        extra = sorted(self.tensors.keys() - weight_map.keys())
        if extra:
            raise self.error("a file has tensors that the index does not name", extra[0], todo=todo, extra=len(extra))

"""A model in one GGUF file or in several: the parts of a split file are read as one; any part may be named.

    STEM-00001-of-00003.gguf   all metadata, and split.no 0
    STEM-00002-of-00003.gguf   split.no 1, and the metadata of every part
    every part                 split.count, the number of parts; split.tensors.count, the number of tensors in all parts

Parts are found by their names, and names and metadata must agree. A missing part, a part of another model, and a wrong
number of tensors are errors.

Source: llama.cpp's gguf-split, and files that gguf 0.19.0 splits on writing.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.io.gguf.container import GGUFFile, TensorInfo, Value

__all__ = ["GGUFModel"]

_NAME = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})(\.gguf)", re.DOTALL | re.IGNORECASE)
_PREFIX, _PART, _COUNT, _TENSORS = "split.", "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 1 << 16


class GGUFModel:
    """All parts of a model, with the interface of one file.

    Args:
      path: the file, or any of its parts.
      function: the public function that errors name.

    Attributes:
      path: of the first part.
      files: the parts.
      version: of the container.
      metadata: of the first part, without the keys that number the parts.
      tensors: name -> `TensorInfo`, in the order of the parts.

    Raises:
      QuantError: if a part is damaged, missing, or of another model, or the number of tensors is wrong.
      OSError: if a part cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, function: str = "load_gguf"):
        self.files = _parts(GGUFFile(path, function=function), function)
        first = self.files[0]
        self.path, self.version = first.path, first.version
        self.metadata = {key: value for key, value in first.metadata.items() if not key.startswith(_PREFIX)}
        self.tensors: dict[str, TensorInfo] = {}
        self._place: dict[str, GGUFFile] = {}
        for file in self.files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    todo = "The parts are of different models: fetch all of them again"
                    raise file.error("a tensor is in two parts", name, todo=todo, other=self._place[name].path)
                self.tensors[name], self._place[name] = info, file
        if len(self.files) > 1:
            self._check_parts()

    @property
    def paths(self) -> list[str]:
        """The files of all parts."""
        return [file.path for file in self.files]

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 of its ``stored_shape``: a read-only view of its file."""
        return self._place[name].blocks(name)

    def forget(self) -> None:
        """Releases the memory of pages that were read; they can be read again."""
        for file in self.files:
            file.forget()

    def error(self, rule: str, name: str | None = None, /, *, todo: str, **got: Any) -> QuantError:
        """A `QuantError` that names the part that holds the tensor, or the first part."""
        place = self.files[0] if name is None else self._place.get(name, self.files[0])
        return place.error(rule, name, todo=todo, **got)

    def _check_parts(self) -> None:
        todo = "The parts are of different models, or damaged: fetch all of them again"
        first, *others = self.files
        for file in others:
            for key, value in file.metadata.items():
                if not key.startswith(_PREFIX) and not _same(value, first.metadata.get(key)):
                    raise file.error("two parts say different things about the model", key, todo=todo, first=first.path)
        for file in self.files:
            wanted = _number(file, _TENSORS)
            if wanted != len(self.tensors):
                rule = "the tensors of all parts are not as many as there should be"
                raise file.error(rule, todo=todo, tensors=len(self.tensors), split_tensors_count=wanted)


def _number(file: GGUFFile, key: str) -> int | None:
    """A number from the file's metadata on its parts; None if the key is missing."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, np.integer) or not 0 <= int(value) <= 1 << 31:
        todo = "The file is damaged: fetch it again"
        raise file.error("not a number of parts or tensors", key, todo=todo, value=value)
    return int(value)


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, np.generic | np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    return a == b if type(a) is type(b) else False


def _parts(file: GGUFFile, function: str) -> list[GGUFFile]:
    """The file, or all parts of the model that it belongs to, in their order."""
    name = _NAME.fullmatch(file.path)
    count, part = _number(file, _COUNT) or 1, _number(file, _PART) or 0
    said = (int(name[2]), int(name[3])) if name else (1, 1)
    if (part + 1, count) != said or not 0 <= part < count <= _MAX_PARTS:
        todo = "Give the file the name that it had, such as model-00001-of-00003.gguf, with the other parts beside it"
        rule = "the file is one of several parts, by its name or its metadata, and these differ"
        raise file.error(rule, todo=todo, split_no=part, split_count=count)
    if name is None or count == 1:
        return [file]
    width = len(name[3])
    paths = [f"{name[1]}-{i:0{width}}-of-{name[3]}{name[4]}" for i in range(1, count + 1)]
    missing = [os.path.basename(path) for path in paths if not os.path.isfile(path)]
    if missing:
        todo = "Fetch the parts that are missing"
        raise file.error("parts of the model are missing", todo=todo, missing=tuple(missing[:20]), of=count)
    files = [file if i == part else GGUFFile(path, function=function) for i, path in enumerate(paths)]
    for i, other in enumerate(files):
        found = (_number(other, _PART), _number(other, _COUNT))
        if found != (i, count):
            todo = "The file has the name of a part and is another one, or of another model: fetch it again"
            rule = f"the file is not part {i + 1} of {count}"
            raise other.error(rule, todo=todo, split_no=found[0], split_count=found[1])
    return files

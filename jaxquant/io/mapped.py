"""Base classes of the readers of files and of their leaves."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor

__all__ = ["Leaves", "MappedFile"]


class MappedFile:
    """An untrusted file that is mapped into memory.

    Attributes:
      path: the file's path.
    """

    def __init__(self, path: str | os.PathLike[str], function: str):
        self.path, self._function = os.fsdecode(path), function
        self._map: mmap.mmap | None = None

    def _mapped(self, file: BinaryIO) -> np.ndarray:
        """The bytes of the file, read-only."""
        if os.fstat(file.fileno()).st_size:  # an empty file cannot be mapped
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(self._map or b"", np.uint8)

    def forget(self) -> None:
        """Releases the memory of pages that were read; they can be read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def error(self, rule: str, name: str | None = None, /, *, todo: str, **got: Any) -> QuantError:
        """A `QuantError` that names this file, and the place in it."""
        place = self.path if name is None else f"{self.path}, {name[:200]!r}"
        return quant_error(self._function, rule, todo=todo, path=place, **got)


class Leaves(Mapping[str, QTensor | np.ndarray]):
    """Names -> QTensors and arrays, of NumPy arrays that may be views of files; each access reads again.

    Attributes:
      paths: the files that leaves are read from.
    """

    def __init__(self, names: Collection[str], paths: list[str]):
        self._names, self.paths = dict.fromkeys(names), paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

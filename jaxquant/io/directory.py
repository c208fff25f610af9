"""Writes a checkpoint of many tensors: all checks precede the first byte, and an interruption costs one shard.

A directory is written under another name, ``NAME.partial``, beside its final path, and renamed when it is complete.
Until then it holds ``plan.json``, which describes the output and its source. Shards are written one after another, each
atomically. A lock, which ends with the writer's process, admits one writer at a time. A second call with the same
arguments keeps the finished shards and writes the others; the result has the same bytes as an uninterrupted one. A
partial directory with another plan is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.atomic import check_room, claimed, is_temporary, replacing
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_parts
from jaxquant.io.strict_json import Json

__all__ = ["SHARD_BYTES", "Layout", "Piece", "identity", "in_shards", "json_bytes", "write_directory"]

SHARD_BYTES = 4 << 30
_PLAN = "plan.json"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tensors that are made together.

    Attributes:
      tensors: name -> dtype and shape.
      make: makes them when they are to be written.
    """

    tensors: Mapping[str, TensorSpec]
    make: Callable[[], Mapping[str, np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


@dataclasses.dataclass(frozen=True)
class Layout:
    """The assignment of pieces to files.

    Attributes:
      shards: file name -> its pieces.
      files: file name -> content, the index included.
    """

    shards: dict[str, list[Piece]]
    files: dict[str, bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and files."""
        tensors = sum(piece.nbytes for pieces in self.shards.values() for piece in pieces)
        return tensors + sum(map(len, self.files.values()))


def identity(paths: Iterable[str]) -> list[list[Json]]:
    """Name, size and time of files, which identify their content."""
    status = {os.path.basename(path): os.stat(path) for path in paths}
    return [[name, found.st_size, found.st_mtime_ns] for name, found in status.items()]


def json_bytes(value: Json) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def in_shards(pieces: Sequence[Piece], files: Mapping[str, bytes], shard_bytes: int, *, function: str) -> Layout:
    """Fills shards in order, each up to ``shard_bytes`` or with one piece; a single shard gets no index."""
    groups: list[list[Piece]] = [[]]
    seen: set[str] = set()
    size = 0
    for piece in pieces:
        if twice := seen & piece.tensors.keys():
            todo = "Rename one of the modules"
            raise quant_error(function, "two tensors would have one name", todo=todo, path=min(twice))
        seen |= piece.tensors.keys()
        if groups[-1] and size + piece.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.nbytes
    if len(groups) == 1:
        return Layout({"model.safetensors": groups[0]}, dict(files))
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    shards = dict(zip(names, groups, strict=True))
    place = {tensor: name for name, group in shards.items() for piece in group for tensor in piece.tensors}
    index = {"metadata": {"total_size": sum(p.nbytes for p in pieces)}, "weight_map": place}
    return Layout(shards, {**files, _INDEX: json_bytes(index)})


def write_directory(
    directory: str | os.PathLike[str],
    layout: Layout,
    *,
    source: Mapping[str, Json],
    function: str,
    progress: Callable[[int, int, str], object] | None = None,
) -> None:
    """Writes a directory, or continues a partial one.

    Args:
      directory: where to write; it must not exist, or be empty.
      layout: from `in_shards`.
      source: JSON values that identify the source of the tensors and the settings: a partial directory is continued if
        it was begun with the same values.
      function: the public function that errors name.
      progress: called with the bytes done, all bytes, and the name of the tensor that comes next.

    Raises:
      QuantError: before writing, if the disk is full, the path cannot be a directory, a partial directory has another
        plan, or another writer has the directory.
    """
    target = os.path.abspath(directory)
    partial = f"{target}.partial"
    plan = json_bytes({"source": source, "shards": _described(layout), "files": _digests(layout.files)})
    if _content(os.path.join(target, _PLAN)) == plan:  # complete except that this file was not removed
        _remove_plan(target)
        return
    _check_destination(target, function)
    with claimed(partial, function=function, target=target):
        _write(target, partial, plan, layout, function, progress)
    if progress is not None:
        progress(layout.nbytes, layout.nbytes, "")


def _write(
    target: str,
    partial: str,
    plan: bytes,
    layout: Layout,
    function: str,
    progress: Callable[[int, int, str], object] | None,
) -> None:
    """Fills the partial directory, which this writer has locked, and renames it."""
    _check_destination(target, function)  # again: another writer may have completed it before this one got the lock
    done = _preflight(target, partial, plan, layout, function)
    for name in os.listdir(partial):
        if is_temporary(name):  # left by a killed process, since this writer has the lock
            os.remove(os.path.join(partial, name))
    with replacing(os.path.join(partial, _PLAN), function=function) as file:
        file.write(plan)
    total, written = layout.nbytes, 0

    def parts(pieces: list[Piece]) -> Iterator[Mapping[str, np.ndarray]]:
        nonlocal written
        for piece in pieces:
            if progress is not None:
                progress(written, total, next(iter(piece.tensors), ""))
            yield piece.make()
            written += piece.nbytes

    for name, pieces in layout.shards.items():
        if name in done:
            written += sum(piece.nbytes for piece in pieces)
            continue
        specs = {tensor: spec for piece in pieces for tensor, spec in piece.tensors.items()}
        write_parts(os.path.join(partial, name), specs, parts(pieces), {"format": "pt"}, function=function)
    for name, content in layout.files.items():
        with replacing(os.path.join(partial, name), function=function) as file:
            file.write(content)
    os.rename(partial, target)
    _remove_plan(target)


def _remove_plan(target: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # another writer that finds the directory complete removes it too
        os.remove(os.path.join(target, _PLAN))


def _content(path: str) -> bytes | None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return None


def _described(layout: Layout) -> dict[str, Json]:
    return {
        shard: {name: [spec.dtype.name, list(spec.shape)] for piece in pieces for name, spec in piece.tensors.items()}
        for shard, pieces in layout.shards.items()
    }


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _check_destination(target: str, function: str) -> None:
    parent = os.path.dirname(target)
    if not os.path.isdir(parent):
        rule, todo = "the directory to write to does not exist", "Create it first"
        raise quant_error(function, rule, todo=todo, path=target, directory=parent)
    if os.path.lexists(target) and (not os.path.isdir(target) or os.listdir(target)):
        raise quant_error(function, "the destination exists", todo="Choose another, or remove it first", path=target)


def _preflight(target: str, partial: str, plan: bytes, layout: Layout, function: str) -> set[str]:
    """The finished shards; `QuantError` if writing cannot succeed."""
    begun = not all(map(is_temporary, os.listdir(partial)))
    if begun and _content(os.path.join(partial, _PLAN)) != plan:
        todo = f"Remove {partial}, or write with the settings and the source it was begun with"
        raise quant_error(function, "a partial directory of something else is in the way", todo=todo, path=target)
    done: set[str] = set()
    for name, pieces in layout.shards.items():
        specs = {tensor: spec for piece in pieces for tensor, spec in piece.tensors.items()}
        path = os.path.join(partial, name)
        if os.path.isfile(path) and SafetensorsFile(path, function=function).tensors == specs:
            done.add(name)
    needed = layout.nbytes - sum(piece.nbytes for name in done for piece in layout.shards[name])
    check_room(partial, needed, function=function, path=target)
    return done

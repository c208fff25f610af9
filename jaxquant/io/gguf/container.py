"""The GGUF container: typed metadata, and named arrays of blocks, in one file.

All numbers are little-endian; strings are a uint64 length and UTF-8:

    "GGUF", uint32 version (2 or 3), uint64 tensors, uint64 entries of metadata
    entry    string key, uint32 kind, value; an array is uint32 kind, uint64 length, values
    tensor   string name, uint32 rank, uint64 sizes (the last axis first), uint32 type, uint64 offset
    data     from the next multiple of the alignment on (``general.alignment``, 32 if absent); each tensor begins at
             the next such multiple after the one before it

Files are not trusted: every length is compared with the rest of the file before memory is allocated, and tensors must
follow one another as the format says, so that they cannot overlap.

Source: the format's description in the ggml repository (docs/gguf.md), and files written by gguf 0.19.0.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.atomic import replacing
from jaxquant.io.gguf.types import BY_ID, BlockType
from jaxquant.io.mapped import MappedFile

__all__ = ["GGUFFile", "TensorInfo", "write_gguf"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_RANK = 4
_MAX_SIZE = 1 << 56
_BOOL, _STRING, _ARRAY = 7, 8, 9
#: The kinds of numbers by their ids.
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype(np.uint8),
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    3: np.dtype(np.int16),
    4: np.dtype(np.uint32),
    5: np.dtype(np.int32),
    6: np.dtype(np.float32),
    _BOOL: np.dtype(np.bool_),
    10: np.dtype(np.uint64),
    11: np.dtype(np.int64),
    12: np.dtype(np.float64),
}
_KINDS = {dtype: kind for kind, dtype in _NUMBERS.items()}


Value: TypeAlias = Any
"""A value of the metadata: text, a bool, a NumPy number, or a list or array of such."""


class TensorInfo(NamedTuple):
    """Type and shape of a stored tensor; blocks run along the last axis."""

    type: BlockType
    shape: tuple[int, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of its bytes: ``[..., blocks, bytes of a block]``."""
        *rows, length = self.shape or (1,)
        return (*rows, length // self.type.elements, self.type.nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.stored_shape)


# -- reading -----------------------------------------------------------------------------------------------------------


class GGUFFile(MappedFile):
    """A GGUF file, checked and mapped into memory.

    Args:
      path: the file.
      function: the public function that errors name.

    Attributes:
      path: the file's path.
      version: of the container.
      alignment: of the tensors.
      metadata: by key: NumPy scalars and arrays, str, lists of str.
      tensors: name -> `TensorInfo`, in the order of the data.

    Raises:
      QuantError: if the file breaks a rule of the format, or a tensor's type is unknown.
      OSError: if it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, function: str = "load_gguf"):
        super().__init__(path, function)
        with open(path, "rb") as file:
            self._data = self._mapped(file)
        self._position = 0
        if self._bytes(4, "the first four bytes").tobytes() != _MAGIC:
            raise self.error("the file must begin with GGUF", todo="Check that it is a GGUF file", size=self._data.size)
        self.version = self._number("<I", "the version")
        if self.version not in _VERSIONS:
            todo = "Convert it with the current tools of llama.cpp; big-endian files are not read"
            raise self.error("only versions 2 and 3, little-endian, are read", todo=todo, version=self.version)
        tensors, entries = self._number("<Q", "the number of tensors"), self._number("<Q", "the number of entries")
        self.metadata = self._read_metadata(entries)
        self.alignment = self._checked_alignment()
        self.tensors, self._begin = self._read_tensors(tensors)

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8 of its ``stored_shape``: a read-only view of the file."""
        info, begin = self.tensors[name], self._begin[name]
        return self._data[begin : begin + info.nbytes].reshape(info.stored_shape)

    def _bytes(self, count: int, what: str) -> np.ndarray:
        left = self._data.size - self._position
        if count > left:
            todo = "The file is damaged or truncated: fetch it again"
            raise self.error(f"the file ends before {what[:200]} does", todo=todo, needed=count, left=left)
        self._position += count
        return self._data[self._position - count : self._position]

    def _number(self, code: str, what: str) -> int:
        return struct.unpack(code, self._bytes(struct.calcsize(code), what).tobytes())[0]

    def _string(self, what: str) -> str:
        text = self._bytes(self._number("<Q", what), what).tobytes()
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            # Tokens are bytes, which need not be valid UTF-8.
            return text.decode("utf-8", "surrogateescape")

    def _read_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self._string("a key of the metadata")
            if key in metadata:
                raise self.error("a key of the metadata occurs twice", key, todo="Which one counts is not known")
            metadata[key] = self._value(self._number("<I", key), key)
        return metadata

    def _value(self, kind: int, key: str) -> Value:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            kind, count = self._number("<I", key), self._number("<Q", key)
            if kind == _STRING:
                return [self._string(key) for _ in range(count)]
            return self._numbers(kind, count, key)
        return self._numbers(kind, 1, key)[0]

    def _numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        if kind not in _NUMBERS:
            todo = "The file is damaged, or newer than this reader"
            raise self.error("unknown kind of metadata", key, todo=todo, kind=kind)
        dtype = _NUMBERS[kind]
        raw = self._bytes(count * dtype.itemsize, key)
        if kind == _BOOL and count and raw.max() > 1:
            raise self.error("a boolean must be 0 or 1", key, todo="The file is damaged", byte=int(raw.max()))
        return np.frombuffer(raw.tobytes(), dtype.newbyteorder("<")).astype(dtype, copy=False)

    def _checked_alignment(self) -> int:
        value = self.metadata.get(_ALIGNMENT, np.uint32(_DEFAULT_ALIGNMENT))
        if (
            getattr(value, "dtype", None) != np.uint32
            or not 1 <= int(value) <= 1 << 20
            or int(value) & (int(value) - 1)
        ):
            todo = "The file is damaged: fetch it again"
            raise self.error("the alignment must be a power of two up to 2**20", _ALIGNMENT, todo=todo, value=value)
        return int(value)

    def _read_tensors(self, count: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        found: dict[str, TensorInfo] = {}
        offsets: dict[str, int] = {}
        for _ in range(count):
            name = self._string("a tensor's name")
            if name in found:
                raise self.error("a tensor occurs twice", name, todo="Which one counts is not known")
            found[name], offsets[name] = self._tensor(name)
        start = self._position + -self._position % self.alignment
        position = 0
        todo = "The file is damaged or truncated: fetch it again"
        for name, info in found.items():
            if offsets[name] != position:
                rule = "tensors must follow one another without holes or overlaps"
                raise self.error(rule, name, todo=todo, offset=offsets[name], expected=position)
            end = start + position + info.nbytes
            if end > self._data.size:
                raise self.error("the tensor reaches beyond the file", name, todo=todo, end=end, size=self._data.size)
            position += info.nbytes + -info.nbytes % self.alignment
        if self._data.size > max(start + position, self._position):
            extra = self._data.size - start - position
            raise self.error("there is data that belongs to no tensor", todo=todo, extra_bytes=extra)
        return found, {name: start + offset for name, offset in offsets.items()}

    def _tensor(self, name: str) -> tuple[TensorInfo, int]:
        todo = "The file is damaged: fetch it again"
        rank = self._number("<I", name)
        if rank > _MAX_RANK:
            raise self.error(f"a tensor has at most {_MAX_RANK} axes", name, todo=todo, rank=rank)
        shape = tuple(self._number("<Q", name) for _ in range(rank))[::-1]
        if math.prod(max(n, 1) for n in shape) > _MAX_SIZE:
            raise self.error("not the shape of a tensor", name, todo=todo, shape_in_file=shape)
        number = self._number("<I", name)
        if number not in BY_ID:
            newer = "The file is damaged, or newer than this reader"
            raise self.error("unknown type of tensor", name, todo=newer, type=number)
        kind = BY_ID[number]
        if (shape or (1,))[-1] % kind.elements:
            rule = f"rows of {kind.name} are whole blocks of {kind.elements}"
            raise self.error(rule, name, todo=todo, shape_in_file=shape)
        return TensorInfo(kind, shape), self._number("<Q", name)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    function: str = "save_gguf",
) -> None:
    """Writes a file, one tensor at a time; ``path`` is replaced only when the whole file is on the disk.

    Args:
      path: the file to create or replace.
      metadata: by key: NumPy scalars and arrays of one axis, bool, str, lists of str.
      tensors: name -> type and shape, in the order of writing.
      read: returns the bytes of a name, uint8 of its ``stored_shape``. Called once for each name, in order.
      function: the public function that errors name.

    Raises:
      QuantError: if the format has no kind for a value of the metadata, or the path cannot be a file.
    """
    alignment = int(metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT))
    head = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_packed_string(key), _packed_value(key, value, function)]
    offset = 0
    for name, info in tensors.items():
        sizes = info.shape[::-1]
        head += [_packed_string(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)]
        head.append(struct.pack("<IQ", info.type.number, offset))
        offset += info.nbytes + -info.nbytes % alignment
    nbytes = sum(map(len, head)) + alignment + offset
    with replacing(path, nbytes=nbytes, function=function) as file:
        _write_aligned(file, b"".join(head), alignment)
        for name, info in tensors.items():
            blocks = read(name)
            if (blocks.dtype, blocks.shape) != (np.uint8, info.stored_shape):
                todo = "Do not change the parameters while they are saved"
                raise quant_error(function, "the array has changed since it was looked at", todo=todo, path=name)
            _write_aligned(file, np.ascontiguousarray(blocks).reshape(-1).data, alignment)


def _write_aligned(file: BinaryIO, data: bytes | memoryview, alignment: int) -> None:
    file.write(data)
    file.write(b"\0" * (-len(data) % alignment))


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _packed_value(key: str, value: Value, function: str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _packed_string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_packed_string, value))
    if isinstance(value, bool | np.generic) and (kind := _KINDS.get(np.asarray(value).dtype)) is not None:
        return struct.pack("<I", kind) + _little_endian(np.asarray(value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and (kind := _KINDS.get(value.dtype)) is not None:
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + _little_endian(value)
    todo = "Use NumPy scalars (np.uint32(4)), arrays with one axis, bool, str or lists of str"
    raise quant_error(function, "a value of the metadata must have a width", todo=todo, path=key, value=value)


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()

"""The safetensors container: named arrays in one file; needs only NumPy and ml_dtypes.

    8 bytes    N, the length of the header: an unsigned integer, little-endian, at most 100 MB
    N bytes    the header: a JSON object in UTF-8, padded with spaces so that 8 + N is a multiple of 8
    the rest   the data

The header maps each name to ``{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}``, offsets counted from
the start of the data, and ``"__metadata__"`` to an object of strings. Arrays are row-major and little-endian. Together
they cover the data without holes or overlaps; written by this module they are sorted by item size, largest first, then
by name, so that each one is aligned.

Files are not trusted: every number is compared with the size of the file before it is used, and the data is mapped, not
read. Arrays of all dtypes that the format names can be saved; see ``DTYPES``.

Source: the format's specification, https://github.com/huggingface/safetensors (README, "Format"), with its limit on the
header. The sub-byte dtypes F4 and F6 are not read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.atomic import replacing
from jaxquant.io.mapped import MappedFile
from jaxquant.io.strict_json import Json, parse

__all__ = ["DTYPES", "SafetensorsFile", "TensorSpec", "is_shape", "write_parts", "write_safetensors"]

#: The format's names.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "I64": np.int64,
        "U64": np.uint64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000
_MAX_NDIM = 32  # the limit of NumPy 1
_MAX_SIZE = 1 << 56  # elements of an array, not counting empty axes; keeps NumPy's sizes from overflowing


class TensorSpec(NamedTuple):
    """Dtype and shape of a stored array."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_shape(value: object) -> bool:
    """Whether ``value``, as parsed from JSON, can be the shape of an array."""
    if not isinstance(value, list | tuple) or len(value) > _MAX_NDIM:
        return False
    if not all(type(n) is int and n >= 0 for n in value):
        return False
    return math.prod(max(n, 1) for n in value) <= _MAX_SIZE


# -- writing -----------------------------------------------------------------------------------------------------------


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
    *,
    function: str = "save",
) -> None:
    """Writes a file, one array at a time; ``path`` is replaced only when the whole file is on the disk.

    Args:
      path: the file to create or replace.
      tensors: name -> dtype and shape.
      read: returns the array of a name. Called once for each name, in the order of the file; arrays are not kept.
      metadata: strings by name.
      function: the public function that errors name.

    Raises:
      QuantError: if the header exceeds the format's 100 MB, an array does not match ``tensors``, or the path cannot be
        a file.
    """
    order = _order(tensors)
    write_parts(path, tensors, ({name: read(name)} for name in order), metadata, function=function)


def write_parts(
    path: str | os.PathLike[str],
    tensors: Mapping[str, TensorSpec],
    parts: Iterable[Mapping[str, np.ndarray]],
    metadata: Mapping[str, str],
    *,
    function: str = "save",
) -> None:
    """As `write_safetensors`, for arrays that are made several at a time, in any order.

    Args:
      path: the file to create or replace.
      tensors: name -> dtype and shape.
      parts: arrays by name; each name once. A part is released before the next one is requested.
      metadata: strings by name.
      function: the public function that errors name.

    Raises:
      QuantError: as `write_safetensors`; also if a name is missing or comes twice.
    """
    order = _order(tensors)
    header, begin = _header(tensors, order, metadata)
    if len(header) > _MAX_HEADER:
        raise quant_error(
            function,
            f"the header may have at most {_MAX_HEADER} bytes",
            todo="Save parts of the tree in files of their own, or less metadata",
            path=os.fsdecode(path),
            header_length=len(header),
        )
    todo = "Do not change the parameters while they are saved"
    start = 8 + len(header)
    nbytes = start + sum(spec.nbytes for spec in tensors.values())
    with replacing(path, nbytes=nbytes, function=function) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for part in parts:
            for name, array in part.items():
                if name not in begin or (array.dtype, array.shape) != tensors[name]:
                    raise quant_error(function, "the array has changed since it was looked at", todo=todo, path=name)
                file.seek(start + begin.pop(name))
                file.write(_little_endian_bytes(array))
        if begin:
            raise quant_error(function, "the array is no longer there", todo=todo, path=min(begin))


def _order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order of the data: wide elements first, so that all arrays are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _header(
    tensors: Mapping[str, TensorSpec], order: list[str], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and the offset of each array after it."""
    header: dict[str, Json] = {_METADATA: dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        spec = tensors[name]
        end = begin + spec.nbytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), {name: header[name]["data_offsets"][0] for name in order}


def _little_endian_bytes(array: np.ndarray) -> memoryview:
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8).data


# -- reading -----------------------------------------------------------------------------------------------------------


class SafetensorsFile(MappedFile):
    """A safetensors file, checked and mapped into memory.

    Args:
      path: the file.
      function: the public function that errors name.

    Attributes:
      path: the file's path.
      tensors: name -> `TensorSpec`, in the order of the data.
      metadata: the strings of ``__metadata__``.

    Raises:
      QuantError: if the file breaks a rule of the format.
      OSError: if it cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import numpy as np
      >>> from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_safetensors
      >>> arrays = {"a": np.arange(3, dtype=np.int8)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "a.safetensors")
      ...     specs = {name: TensorSpec(a.dtype, a.shape) for name, a in arrays.items()}
      ...     write_safetensors(path, specs, arrays.__getitem__, {})
      ...     SafetensorsFile(path).array("a").tolist()
      [0, 1, 2]
    """

    def __init__(self, path: str | os.PathLike[str], *, function: str = "load"):
        super().__init__(path, function)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = self._read_header(file, size)
            start = file.tell()
            self.metadata = self._checked_metadata(header.pop(_METADATA, {}))
            self.tensors, self._begin = self._checked_tensors(header, size - start)
            self._data = self._mapped(file)[start:]

    def array(self, name: str) -> np.ndarray:
        """The array of a name: a read-only view of the file."""
        spec, begin = self.tensors[name], self._begin[name]
        data = self._data[begin : begin + spec.nbytes]
        if spec.dtype == np.bool_ and data.size and data.max() > 1:
            todo = "The file is damaged: save it again"
            raise self.error("the bytes of a BOOL array must be 0 or 1", name, todo=todo, byte=int(data.max()))
        return data.view(spec.dtype.newbyteorder("<")).reshape(spec.shape)

    def _read_header(self, file: BinaryIO, size: int) -> dict[str, Json]:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        todo = "Check that it is a safetensors file and arrived whole"
        if len(prefix) < 8:
            raise self.error("the file is shorter than the 8 bytes every file begins with", todo=todo, size=size)
        if length > _MAX_HEADER:
            rule = f"the header may have at most {_MAX_HEADER} bytes"
            rule = "this is a GGUF file" if prefix[:4] == b"GGUF" else rule
            raise self.error(rule, todo=todo, header_length=length)
        if length > size - 8:
            raise self.error("the header is longer than the file", todo=todo, header_length=length, size=size)
        text = file.read(length)
        try:
            header = parse(text)
        except ValueError as error:
            raise self.error(f"the header is not JSON ({error})", todo=todo, header_length=length) from None
        if not isinstance(header, dict) or text[:1] != b"{":
            raise self.error("the header must be a JSON object", todo=todo, header=text[:40].decode(errors="replace"))
        return header

    def _checked_metadata(self, metadata: Json) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            todo = "Write the file again, with text in its metadata"
            raise self.error("the metadata must be strings by name", _METADATA, todo=todo, metadata=metadata)
        return metadata

    def _checked_tensors(self, header: dict[str, Json], size: int) -> tuple[dict[str, TensorSpec], dict[str, int]]:
        """Specs and first bytes by name, in the order of the data; together they cover ``size`` bytes exactly."""
        found = [(*self._checked_entry(name, entry), name) for name, entry in header.items()]
        found.sort(key=lambda item: item[:2])
        position = 0
        todo = "The file is damaged or truncated: fetch it or save it again"
        for begin, end, _, name in found:
            if begin != position:
                rule = "arrays must follow one another without holes or overlaps"
                raise self.error(rule, name, todo=todo, data_offsets=(begin, end), expected=position)
            position = end
        if position != size:
            raise self.error("the arrays must take up all of the file's data", todo=todo, data=size, arrays=position)
        return {name: spec for _, _, spec, name in found}, {name: begin for begin, _, _, name in found}

    def _checked_entry(self, name: str, entry: Json) -> tuple[int, int, TensorSpec]:
        todo = "The file is damaged: fetch it or save it again"
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self.error("an array needs dtype, shape and data_offsets", name, todo=todo, entry=entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            known = f"Convert it to one of {', '.join(DTYPES)}"
            raise self.error("unknown dtype", name, todo=known, dtype=dtype)
        if not is_shape(shape):
            raise self.error("not the shape of an array", name, todo=todo, shape_in_file=shape)
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
            raise self.error("data_offsets must be two integers from 0", name, todo=todo, data_offsets=offsets)
        spec = TensorSpec(DTYPES[dtype], tuple(shape))
        begin, end = offsets
        if end - begin != spec.nbytes:
            rule = f"data_offsets must span the {spec.nbytes} bytes of {dtype}{list(shape)}"
            raise self.error(rule, name, todo=todo, data_offsets=(begin, end))
        return begin, end, spec

"""Bit streams of files, in NumPy: `jaxquant.core.packing` without JAX, which would compile a program for every shape.

The codes of a row form a little-endian bit stream, as in a `QTensor`.
"""

from __future__ import annotations

import numpy as np

from jaxquant.core.packing import packed_length
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType

__all__ = ["bytes_of", "packed", "patterns", "stored", "unpacked"]


def bytes_of(words: np.ndarray) -> np.ndarray:
    """The bytes of an array's last axis, little-endian."""
    words = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    return words.view(np.uint8) if words.ndim else words.reshape(1).view(np.uint8)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes of one byte each to a bit stream along the last axis: `jaxquant.core.packing.pack` in NumPy.

    Eight codes take ``bits`` bytes, the lowest ones of a 64-bit word.
    """
    if bits == 8:
        return codes
    *rows, length = codes.shape
    words = np.zeros((*rows, -(-length // 8)), "<u8")
    for k in range(min(8, length)):
        place = codes[..., k::8]
        words[..., : place.shape[-1]] |= place.astype(np.uint64) << np.uint64(k * bits)
    stream = words[..., None].view(np.uint8)[..., :bits]
    return stream.reshape(*rows, words.shape[-1] * bits)[..., : packed_length(length, bits)]


def unpacked(stream: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Inverse of `packed`."""
    stream = stream[..., : packed_length(length, bits)]
    if bits == 8:
        return stream
    *rows, nbytes = stream.shape
    count = -(-length // 8)
    padded = np.zeros((*rows, count * bits), np.uint8)
    padded[..., :nbytes] = stream
    words = np.zeros((*rows, count, 8), np.uint8)
    words[..., :bits] = padded.reshape(*rows, count, bits)
    words, mask = words.view("<u8")[..., 0], np.uint64((1 << bits) - 1)
    codes = np.empty((*rows, count, 8), np.uint8)
    for k in range(8):
        codes[..., k] = words >> np.uint64(k * bits) & mask
    return codes.reshape(*rows, count * 8)[..., :length]


def patterns(q: QTensor) -> np.ndarray:
    """The unsigned pattern of each code, one per byte, in stored order: ``code - qmin`` for integers."""
    codes = np.asarray(q.codes)
    if q.length is not None:
        return unpacked(codes, q.type.bits, q.length)
    return codes.view(np.uint8) ^ np.uint8(128) if codes.dtype == np.int8 else codes


def stored(codes: np.ndarray, qtype: QType) -> tuple[np.ndarray, int | None]:
    """The ``codes`` and ``length`` of a QTensor, from one code per element."""
    if not qtype.packed:
        return codes, None
    low = int(qtype.qmin) if qtype.kind == "int" else 0
    return packed((codes.astype(np.int16) - low).astype(np.uint8), qtype.bits), codes.shape[-1]

"""The parts of a block (codes, scales, and shifts if a type has them), and the bit fields that all types use.

A type of tensor is a pair of functions between the bytes of its blocks, ``uint8[..., nbytes]``, and `Parts`. They only
locate the bits: every stored value is returned unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BlockType", "Parts", "Scales", "fields", "half", "half_bytes", "merge"]


class Scales(NamedTuple):
    """Two-level scales: ``codes * unit``.

    Attributes:
      codes: [..., groups], integers.
      unit: [..., 1], float16.
      qtype: number type of the codes.
    """

    codes: np.ndarray
    unit: np.ndarray
    qtype: str


class Parts(NamedTuple):
    """The parts of blocks: ``grid(codes) * scale + shift``.

    Attributes:
      codes: [..., elements], in the order of the elements.
      scale: [..., groups], or `Scales`.
      shift: like scale, of the same groups; None if the type has no shifts.
    """

    codes: np.ndarray
    scale: Any
    shift: Any = None


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
      name: in ggml.
      number: in files.
      elements: in a block.
      nbytes: of a block.
      qtype: number type of the codes; None for plain arrays and for types that are not read.
      dtype: of a plain array.
      split, join: bytes to `Parts` and back.
      groups: scales in a block.
      nested: number type of the scales' own codes, if they are `Scales`.
      shifted: whether there are shifts.
      refused: why the type is not read.
    """

    name: str
    number: int
    elements: int
    nbytes: int
    qtype: str | None = None
    split: Callable[[np.ndarray], Parts] | None = None
    join: Callable[[Parts], np.ndarray] | None = None
    groups: int = 1
    nested: str | None = None
    shifted: bool = False
    dtype: np.dtype | None = None
    refused: str | None = None


def fields(raw: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Fields of ``bits`` bits from bytes [..., n]: for each run of bytes, all lowest fields first, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = raw.reshape(*raw.shape[:-1], -1, 1, run) >> shifts
    return (planes & np.uint8((1 << bits) - 1)).reshape(*raw.shape[:-1], -1)


def merge(values: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Inverse of `fields`."""
    per = 8 // bits
    planes = values.astype(np.uint8).reshape(*values.shape[:-1], -1, per, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(planes << shifts, axis=-2).reshape(*values.shape[:-1], -1)


def half(raw: np.ndarray) -> np.ndarray:
    """float16 [..., n] from bytes [..., 2 n]."""
    return np.ascontiguousarray(raw).view("<f2")


def half_bytes(values: np.ndarray) -> np.ndarray:
    """Inverse of `half`."""
    return np.ascontiguousarray(values, "<f2").view(np.uint8)

"""How a product with a quantized weight is cut into programs of a GPU, by a small model of the processor."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

from jaxquant.core.qtypes import QType
from jaxquant.ops.kernels.segments import most_tiles

__all__ = ["Blocks", "Decoding", "Scales", "Stored", "blocks"]

Stored = Literal["bytes", "nibbles", "int4"]
"""A code in a byte; two in a byte; an int4 array whose last axis is odd, so that its rows begin within bytes."""

Scales = Literal["float", "e8m0", "e4m3", "nibbles"]
"""Types of the entries of a weight's scale."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The values and the layout of codes.

    Attributes:
      qtype: the number type.
      stored: the number of codes in a byte.
      k_last: whether k is the axis that is stored last.
      length: K.
      columns: N.
      groups: G, runs of equal scales along k.
      scales: the stored type of the scales.
      stacked: names of the arrays that are of a whole stack of layers, of which the kernel reads one.
    """

    qtype: QType
    stored: Stored
    k_last: bool
    length: int
    columns: int
    groups: int = 1
    scales: Scales = "float"
    stacked: frozenset[str] = frozenset()

    @property
    def group(self) -> int:
        """Codes of a group."""
        return self.length // self.groups

    @property
    def nbytes(self) -> float:
        """Of all codes."""
        return self.length * self.columns * (1.0 if self.stored == "bytes" else 0.5)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a product is cut into programs.

    Attributes:
      rows, columns: of the result, for one program.
      depth: of a step along k, in each slice.
      slices: of k, that a program works on at once.
      parts: of k, for programs of their own.
      warps, stages: for the compiler; stages are steps whose tiles are under way.
    """

    rows: int
    columns: int
    depth: int
    slices: int
    parts: int
    warps: int
    stages: int


_PROCESSORS = 132  # of an H100; an A100 has 108
_PRODUCTS, _INSTRUCTIONS, _LOADS = 2048, 128, 64  # per cycle and processor: two-byte products, instructions, bytes
_DECODING = 6  # instructions per code in total, counted in the machine code of the kernel
_NARROWEST = 32  # bytes of a row that are read at once
_PART_COST = 1 / 16  # of the weight's bytes: the most that sums of parts may write and read


def blocks(rows: int, w: Decoding, *, segments: int = 1, codes: bool = False) -> Blocks:
    """Blocks for a product of so many rows, by a small model of the processor.

    A warp holds 16 rows of the left operand of a tensor core, here columns of the weight. With few rows of x there are
    too few warps to keep all processors busy. So the warps of a program share columns, and each has a slice of k. The
    tensor cores then multiply every slice of the weight by every slice of x, although only matching slices are needed.
    This is free as long as reading the weight is the bound.

    Args:
      rows: M.
      w: the weight, or one expert.
      segments: of the rows of a ragged product, each of which has an expert.
      codes: whether codes of 8 bits are multiplied, and not values.
    """

    def cycles(tile: tuple[int, int, int]) -> float:
        """Cycles for one k, of all programs."""
        m, slices, warps = tile
        programs = most_tiles(rows, segments, m) * math.ceil(w.columns / _columns(w, slices, warps))
        left, right, size = 16 * warps, m * slices, 1 if codes else 2
        products = left * right / _PRODUCTS / (2 if codes else 1)
        loads, decoding = (left + right * size) / _LOADS, left * (1 if plain else _DECODING) / _INSTRUCTIONS
        return (math.ceil(programs / _PROCESSORS) * (max(products, loads) + decoding) + decoding) / slices

    plain = codes and w.stored == "bytes"
    tiles = itertools.product((8, 16, 32, 64, 128), (1, 2, 4), (4, 8))
    fitting = [(m, s, warps) for m, s, warps in tiles if m * s <= 128 and 16 * warps // s >= _NARROWEST]
    m, slices, warps = min(fitting, key=cycles)
    columns, power = _columns(w, slices, warps), w.group & -w.group
    depth = 128 if m * slices <= 64 and power >= 128 else 64
    if w.groups > 1 and (codes or depth % w.group):  # a sum of integers stays within a group
        depth = min(depth, power)
    programs = most_tiles(rows, segments, m) * math.ceil(w.columns / columns)
    read = w.nbytes * min(segments, rows)
    affordable = int(_PART_COST * read / (8.0 * rows * w.columns))  # float32, written and read
    parts = max(1, min(affordable, -(-2 * _PROCESSORS // programs), w.length // (4 * depth * slices)))
    return Blocks(m, columns, depth, slices, parts, warps, 4 if m * slices <= 64 else 3)


def _columns(w: Decoding, slices: int, warps: int) -> int:
    """Columns of a program: those of all its warps, in all planes of codes."""
    planes = 2 if w.stored == "nibbles" and not w.k_last else 1
    return 16 * warps // slices * planes

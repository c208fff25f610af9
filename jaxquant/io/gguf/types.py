"""ggml's types of tensors, by name and by number."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxquant.io.gguf import k_quants, legacy, microscaling, tables, ternary
from jaxquant.io.gguf.block_types import BlockType

__all__ = ["BY_ID", "BY_NAME", "PLAIN", "BlockType", "support_table"]

_CODEBOOK = "its codebook is not part of this package"
_INTERNAL = "it is a type of intermediate results, not of files"


def _plain(name: str, number: int, dtype: type) -> BlockType:
    return BlockType(name, number, 1, np.dtype(dtype).itemsize, dtype=np.dtype(dtype))


def _refused(name: str, number: int, elements: int, nbytes: int, reason: str) -> BlockType:
    return BlockType(name, number, elements, nbytes, refused=reason)


_ALL = (
    _plain("F32", 0, np.float32),
    _plain("F16", 1, np.float16),
    _plain("I8", 24, np.int8),
    _plain("I16", 25, np.int16),
    _plain("I32", 26, np.int32),
    _plain("I64", 27, np.int64),
    _plain("F64", 28, np.float64),
    _plain("BF16", 30, ml_dtypes.bfloat16),
    *legacy.TYPES,
    *k_quants.TYPES,
    *tables.TYPES,
    *ternary.TYPES,
    *microscaling.TYPES,
    _refused("Q8_1", 9, 32, 40, _INTERNAL),
    _refused("Q8_K", 15, 256, 292, _INTERNAL),
    _refused("IQ2_XXS", 16, 256, 66, _CODEBOOK),
    _refused("IQ2_XS", 17, 256, 74, _CODEBOOK),
    _refused("IQ3_XXS", 18, 256, 98, _CODEBOOK),
    _refused("IQ1_S", 19, 256, 50, _CODEBOOK),
    _refused("IQ3_S", 21, 256, 110, _CODEBOOK),
    _refused("IQ2_S", 22, 256, 82, _CODEBOOK),
    _refused("IQ1_M", 29, 256, 56, _CODEBOOK),
    _refused("Q1_0", 41, 128, 18, "its layout is too new to be stable"),
)
BY_ID = {kind.number: kind for kind in _ALL}
BY_NAME = {kind.name: kind for kind in _ALL}
#: The types of plain arrays by dtype.
PLAIN = {kind.dtype: kind for kind in _ALL if kind.dtype is not None}


def support_table() -> str:
    """A Markdown table of the types, and of the arrays or QTensors that they become."""
    rows = ["| Type | Bits per weight | Becomes |", "| --- | --- | --- |"]
    for kind in sorted(_ALL, key=lambda kind: kind.number):
        if kind.refused:
            becomes = f"not read: {kind.refused}"
        elif kind.dtype is not None:
            becomes = f"an array, {kind.dtype.name}"
        else:
            groups = kind.elements // kind.groups
            scales = f", scales {kind.nested} in blocks of {kind.elements}" if kind.nested else ""
            becomes = f"`{kind.qtype}`, groups of {groups}{scales}{', with offsets' if kind.shifted else ''}"
        rows.append(f"| {kind.name} | {8 * kind.nbytes / kind.elements:g} | {becomes} |")
    return "\n".join(rows)

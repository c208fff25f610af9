"""Codes that index 16 values: IQ4_NL, IQ4_XS.

    IQ4_NL   18 bytes / 32    d f16, nibbles[16]                                     d * table[n]
    IQ4_XS  136       / 256   d, high u16, low[4], nibbles[128], 8 groups            d * (s - 32) * table[n]

Low nibbles are the first half of each 32. The six-bit scales s of IQ4_XS are the nibbles of ``low`` in order (the low
one first) below the two-bit fields of ``high``, lowest first. The table is the number type ``iq4_nl``.
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.gguf.block_types import BlockType, Parts, Scales, fields, half, half_bytes, merge

__all__ = ["TYPES"]


def _nl(raw: np.ndarray) -> Parts:
    return Parts(fields(raw[..., 2:], 16, 4), half(raw[..., :2]))


def _nl_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([half_bytes(parts.scale), merge(parts.codes, 16, 4)], -1)


def _xs(raw: np.ndarray) -> Parts:
    six = fields(raw[..., 4:8], 1, 4) | fields(raw[..., 2:4], 1, 2) << np.uint8(4)
    scale = Scales(six.view(np.int8) - np.int8(32), half(raw[..., :2]), "int6")
    return Parts(fields(raw[..., 8:], 16, 4), scale)


def _xs_bytes(parts: Parts) -> np.ndarray:
    six = (parts.scale.codes + np.int8(32)).view(np.uint8)
    head = [half_bytes(parts.scale.unit), merge(six >> 4, 1, 2), merge(six & 15, 1, 4)]
    return np.concatenate([*head, merge(parts.codes, 16, 4)], -1)


TYPES = (
    BlockType("IQ4_NL", 20, 32, 18, "iq4_nl", _nl, _nl_bytes),
    BlockType("IQ4_XS", 23, 256, 136, "iq4_nl", _xs, _xs_bytes, groups=8, nested="int6"),
)

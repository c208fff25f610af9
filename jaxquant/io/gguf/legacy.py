"""Blocks of 32 with a scale, Q8_0, Q4_0, Q5_0, or with a scale and a shift, Q4_1, Q5_1.

    Q8_0   34 bytes   d f16, q i8[32]                        d * q
    Q4_0   18         d, nibbles[16]                         d * (n - 8)
    Q5_0   22         d, high bits u32, nibbles[16]          d * (n + 16 h - 16)
    Q4_1   20         d, m f16, nibbles[16]                  d * n + m
    Q5_1   24         d, m, high bits, nibbles[16]           d * (n + 16 h) + m

The low nibbles are elements 0 to 15, the high ones 16 to 31; high bit j belongs to element j.
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.gguf.block_types import BlockType, Parts, fields, half, half_bytes, merge

__all__ = ["TYPES"]


def _q8_0(raw: np.ndarray) -> Parts:
    return Parts(raw[..., 2:].view(np.int8), half(raw[..., :2]))


def _q8_0_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([half_bytes(parts.scale), parts.codes.astype(np.int8).view(np.uint8)], -1)


def _unsigned(raw: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 or 5 bits from the bytes that follow the scales."""
    if bits == 4:
        return fields(raw, 16, 4)
    return fields(raw[..., 4:], 16, 4) | fields(raw[..., :4], 1, 1) << np.uint8(4)


def _unsigned_bytes(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    low = merge(codes & 15, 16, 4)
    return [low] if bits == 4 else [merge(codes >> 4, 1, 1), low]


def _symmetric(name: str, number: int, nbytes: int, bits: int) -> BlockType:
    offset = np.int8(1 << (bits - 1))

    def split(raw: np.ndarray) -> Parts:
        return Parts(_unsigned(raw[..., 2:], bits).view(np.int8) - offset, half(raw[..., :2]))

    def join(parts: Parts) -> np.ndarray:
        codes = (parts.codes + offset).view(np.uint8)
        return np.concatenate([half_bytes(parts.scale), *_unsigned_bytes(codes, bits)], -1)

    return BlockType(name, number, 32, nbytes, f"int{bits}", split, join)


def _shifted(name: str, number: int, nbytes: int, bits: int) -> BlockType:
    def split(raw: np.ndarray) -> Parts:
        return Parts(_unsigned(raw[..., 4:], bits), half(raw[..., :2]), half(raw[..., 2:4]))

    def join(parts: Parts) -> np.ndarray:
        head = [half_bytes(parts.scale), half_bytes(parts.shift)]
        return np.concatenate([*head, *_unsigned_bytes(parts.codes, bits)], -1)

    return BlockType(name, number, 32, nbytes, f"uint{bits}", split, join, shifted=True)


TYPES = (
    _symmetric("Q4_0", 2, 18, 4),
    _shifted("Q4_1", 3, 20, 4),
    _symmetric("Q5_0", 6, 22, 5),
    _shifted("Q5_1", 7, 24, 5),
    BlockType("Q8_0", 8, 32, 34, "int8", _q8_0, _q8_0_bytes),
)

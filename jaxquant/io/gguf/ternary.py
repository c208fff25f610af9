"""Codes -1, 0 and 1 in blocks of 256 with one scale: TQ1_0, TQ2_0.

    TQ2_0   66 bytes   q[64], d f16          d * (q - 1), two-bit fields of runs of 32 bytes
    TQ1_0   54         q[48], high[4], d     d * (digit - 1), five digits of base 3 in a byte

A byte b of TQ1_0 stands for the fraction b / 256, whose digits of base 3 are ``(3 * (b * 3**k mod 256)) >> 8``,
k = 0 to 4. Elements 0 to 159 are the digits of the first 32 bytes, all first digits first; 160 to 239 those of
the next 16; the last 16 are the first four digits of ``high``.
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.gguf.block_types import BlockType, Parts, fields, half, half_bytes, merge

__all__ = ["TYPES"]

_RUNS = ((0, 32, 5), (32, 48, 5), (48, 52, 4))  # first byte, end, digits


def _two_bits(raw: np.ndarray) -> Parts:
    return Parts(fields(raw[..., :64], 32, 2).view(np.int8) - np.int8(1), half(raw[..., 64:]))


def _two_bits_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([merge((parts.codes + np.int8(1)).view(np.uint8), 32, 2), half_bytes(parts.scale)], -1)


def _digits(raw: np.ndarray) -> Parts:
    codes = []
    for begin, end, count in _RUNS:
        powers = (3 ** np.arange(count)).astype(np.uint8)[:, None]
        fractions = raw[..., None, begin:end] * powers  # modulo 256
        digits = (fractions.astype(np.uint16) * 3 >> 8).astype(np.int8) - np.int8(1)
        codes.append(digits.reshape(*raw.shape[:-1], -1))
    return Parts(np.concatenate(codes, -1), half(raw[..., 52:]))


def _digits_bytes(parts: Parts) -> np.ndarray:
    out, first = [], 0
    for begin, end, count in _RUNS:
        width = end - begin
        digits = (parts.codes[..., first : first + width * count] + np.int8(1)).astype(np.uint16)
        powers = (3 ** (4 - np.arange(count))).astype(np.uint16)[:, None]
        number = (digits.reshape(*digits.shape[:-1], count, width) * powers).sum(-2, dtype=np.uint16)
        out.append(((number.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))  # rounded up: digits come back
        first += width * count
    return np.concatenate([*out, half_bytes(parts.scale)], -1)


TYPES = (
    BlockType("TQ1_0", 34, 256, 54, "int2", _digits, _digits_bytes),
    BlockType("TQ2_0", 35, 256, 66, "int2", _two_bits, _two_bits_bytes),
)

"""Blocks of 256 whose scales are integers times one float16: the K-quants.

    Q2_K    84 bytes   scales[16], q[64], d, dmin            16 groups   d * (s & 15) * q - dmin * (s >> 4)
    Q3_K   110         high bits[32], q[64], scales[12], d   16          d * (s - 32) * (q + 4 h - 4)
    Q4_K   144         d, dmin, scales[12], q[128]            8          d * s * q - dmin * m
    Q5_K   176         d, dmin, scales[12], high[32], q[128]  8          d * s * (q + 16 h) - dmin * m
    Q6_K   210         low[128], high[64], scales i8[16], d  16          d * s * (q - 32)

d and dmin are float16. Two-bit fields come from runs of 32 bytes (all lowest fields of a run first, see
`block_types.fields`), nibbles from runs of 32 (Q6_K: 64). The six-bit scales of Q3_K are the nibbles of
bytes 0 to 7 and, above them, the two-bit fields of bytes 8 to 11. Those of Q4_K and Q5_K: s 0 to 3 are the low six
bits of bytes 0 to 3 and m 0 to 3 those of bytes 4 to 7; s 4 to 7 are the low nibbles of bytes 8 to 11 below the two
high bits of bytes 0 to 3, m 4 to 7 the high nibbles below the high bits of bytes 4 to 7.

Source: ggml's block definitions (ggml-common.h); agrees bit for bit with gguf 0.19.0.
"""

from __future__ import annotations

import numpy as np

from jaxquant.io.gguf.block_types import BlockType, Parts, Scales, fields, half, half_bytes, merge

__all__ = ["TYPES"]


def _q2(raw: np.ndarray) -> Parts:
    packed, d, dmin = raw[..., :16], half(raw[..., 80:82]), half(raw[..., 82:84])
    scale, least = Scales(packed & 15, d, "uint4"), Scales(packed >> 4, -dmin, "uint4")
    return Parts(fields(raw[..., 16:80], 32, 2), scale, least)


def _q2_bytes(parts: Parts) -> np.ndarray:
    scale, least = parts.scale, parts.shift
    packed = scale.codes | least.codes << np.uint8(4)
    return np.concatenate([packed, merge(parts.codes, 32, 2), half_bytes(scale.unit), half_bytes(-least.unit)], -1)


def _q3(raw: np.ndarray) -> Parts:
    high, low, packed = raw[..., :32], raw[..., 32:96], raw[..., 96:108]
    six = fields(packed[..., :8], 8, 4) | fields(packed[..., 8:], 4, 2) << np.uint8(4)
    codes = fields(low, 32, 2) | fields(high, 32, 1) << np.uint8(2)
    scale = Scales(six.view(np.int8) - np.int8(32), half(raw[..., 108:]), "int6")
    return Parts(codes.view(np.int8) - np.int8(4), scale)


def _q3_bytes(parts: Parts) -> np.ndarray:
    codes, six = (parts.codes + np.int8(4)).view(np.uint8), (parts.scale.codes + np.int8(32)).view(np.uint8)
    packed = [merge(six & 15, 8, 4), merge(six >> 4, 4, 2)]
    bits = [merge(codes >> 2, 32, 1), merge(codes & 3, 32, 2)]
    return np.concatenate([*bits, *packed, half_bytes(parts.scale.unit)], -1)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(s, m), eight of each, from 12 bytes."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    s = np.concatenate([a & 63, c & 15 | (a >> 6) << 4], -1)
    return s, np.concatenate([b & 63, c >> 4 | (b >> 6) << 4], -1)


def _six_bits_bytes(s: np.ndarray, m: np.ndarray) -> list[np.ndarray]:
    upper = [x[..., :4] | x[..., 4:] >> 4 << 6 for x in (s, m)]
    return [*upper, s[..., 4:] & 15 | m[..., 4:] << 4]


def _with_least(raw: np.ndarray, codes: np.ndarray) -> Parts:
    s, m = _six_bits(raw[..., 4:16])
    return Parts(codes, Scales(s, half(raw[..., :2]), "uint6"), Scales(m, -half(raw[..., 2:4]), "uint6"))


def _least_bytes(parts: Parts) -> list[np.ndarray]:
    scale, least = parts.scale, parts.shift
    return [half_bytes(scale.unit), half_bytes(-least.unit), *_six_bits_bytes(scale.codes, least.codes)]


def _q4(raw: np.ndarray) -> Parts:
    return _with_least(raw, fields(raw[..., 16:], 32, 4))


def _q4_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([*_least_bytes(parts), merge(parts.codes, 32, 4)], -1)


def _q5(raw: np.ndarray) -> Parts:
    return _with_least(raw, fields(raw[..., 48:], 32, 4) | fields(raw[..., 16:48], 32, 1) << np.uint8(4))


def _q5_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([*_least_bytes(parts), merge(parts.codes >> 4, 32, 1), merge(parts.codes & 15, 32, 4)], -1)


def _q6(raw: np.ndarray) -> Parts:
    codes = fields(raw[..., :128], 64, 4) | fields(raw[..., 128:192], 32, 2) << np.uint8(4)
    scale = Scales(raw[..., 192:208].view(np.int8), half(raw[..., 208:]), "int8")
    return Parts(codes.view(np.int8) - np.int8(32), scale)


def _q6_bytes(parts: Parts) -> np.ndarray:
    codes = (parts.codes + np.int8(32)).view(np.uint8)
    scales = [parts.scale.codes.view(np.uint8), half_bytes(parts.scale.unit)]
    return np.concatenate([merge(codes & 15, 64, 4), merge(codes >> 4, 32, 2), *scales], -1)


TYPES = (
    BlockType("Q2_K", 10, 256, 84, "uint2", _q2, _q2_bytes, groups=16, nested="uint4", shifted=True),
    BlockType("Q3_K", 11, 256, 110, "int3", _q3, _q3_bytes, groups=16, nested="int6"),
    BlockType("Q4_K", 12, 256, 144, "uint4", _q4, _q4_bytes, groups=8, nested="uint6", shifted=True),
    BlockType("Q5_K", 13, 256, 176, "uint5", _q5, _q5_bytes, groups=8, nested="uint6", shifted=True),
    BlockType("Q6_K", 14, 256, 210, "int6", _q6, _q6_bytes, groups=16, nested="int8"),
)

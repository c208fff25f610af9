"""Four-bit floats (e2m1) with small float scales: MXFP4, NVFP4.

    MXFP4   17 bytes / 32   e, nibbles[16]                 2 ** (e - 127) * value
    NVFP4   36       / 64   scales[4], nibbles[4][8]       scale * value, groups of 16

Low nibbles are the first half of each group. The scales of NVFP4 are e4m3, and their sign is ignored; there is no scale
of the whole tensor. ggml's code uses values twice as large and scales half as large; the products are the same.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxquant.io.gguf.block_types import BlockType, Parts, fields, merge

__all__ = ["TYPES"]


def _mx(raw: np.ndarray) -> Parts:
    return Parts(fields(raw[..., 1:], 16, 4), raw[..., :1].view(ml_dtypes.float8_e8m0fnu))


def _mx_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(parts.scale).view(np.uint8), merge(parts.codes, 16, 4)], -1)


def _nv(raw: np.ndarray) -> Parts:
    return Parts(fields(raw[..., 4:], 8, 4), (raw[..., :4] & 127).view(ml_dtypes.float8_e4m3fn))


def _nv_bytes(parts: Parts) -> np.ndarray:
    return np.concatenate([np.ascontiguousarray(parts.scale).view(np.uint8), merge(parts.codes, 8, 4)], -1)


TYPES = (
    BlockType("MXFP4", 39, 32, 17, "mxfp4", _mx, _mx_bytes),
    BlockType("NVFP4", 40, 64, 36, "nvfp4", _nv, _nv_bytes, groups=4),
)

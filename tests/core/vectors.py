"""Reads the committed reference vectors in tests/golden (safetensors, every dtype)."""

import functools
import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

__all__ = ["load", "nibbles"]

_FOLDER = Path(__file__).parents[1] / "golden"
_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
}


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """The tensors of one file, by name."""
    data = (_FOLDER / f"{name}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = {}
    for key, info in header.items():
        if key != "__metadata__":
            start, end = info["data_offsets"]
            tensors[key] = np.frombuffer(body[start:end], _DTYPES[info["dtype"]]).reshape(info["shape"])
    return tensors


def nibbles(packed: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    """Two 4-bit codes from each byte, along the last axis."""
    pair = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], -1)

"""Stores arrays whose dtype the container has no name for as bit patterns.

The elements in row-major order form one little-endian bit stream (see `jaxquant.core.packing`), stored as uint8[bytes]:
an int4 array of n elements takes ceil(n / 2) bytes, element 0 in the low half of byte 0. The caller stores dtype and
shape elsewhere.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxquant.core.packing import pack, packed_length, unpack
from jaxquant.io.safetensors import TensorSpec

__all__ = ["NAMELESS", "from_patterns", "pattern_spec", "to_patterns"]

#: Bits of one element, for dtypes of JAX that the container does not support.
NAMELESS: dict[np.dtype, int] = {
    np.dtype(ml_dtypes.int2): 2,
    np.dtype(ml_dtypes.uint2): 2,
    np.dtype(ml_dtypes.int4): 4,
    np.dtype(ml_dtypes.uint4): 4,
    np.dtype(ml_dtypes.float4_e2m1fn): 4,
    np.dtype(ml_dtypes.float8_e3m4): 8,
    np.dtype(ml_dtypes.float8_e4m3): 8,
    np.dtype(ml_dtypes.float8_e4m3b11fnuz): 8,
    np.dtype(np.complex128): 128,
}


def pattern_spec(spec: TensorSpec) -> TensorSpec:
    """The stored form of an array of a nameless dtype."""
    return TensorSpec(np.dtype(np.uint8), (packed_length(math.prod(spec.shape), NAMELESS[spec.dtype]),))


def to_patterns(array: np.ndarray) -> np.ndarray:
    """uint8[bytes] of an array of a nameless dtype."""
    bits = NAMELESS[array.dtype]
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    # In memory an element narrower than a byte takes a whole byte, whose upper bits are unspecified.
    return flat if bits >= 8 else np.asarray(pack(jnp.asarray(flat & ((1 << bits) - 1)), bits))


def from_patterns(stored: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Inverse of `to_patterns`."""
    bits = NAMELESS[spec.dtype]
    flat = stored if bits >= 8 else np.asarray(unpack(jnp.array(stored), bits, math.prod(spec.shape)))
    return flat.view(spec.dtype.newbyteorder("<")).reshape(spec.shape)

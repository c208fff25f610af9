"""Codes narrower than a byte, packed along the last axis into uint8.

The layout is one little-endian bit stream per row: code k occupies bits ``[k * bits, (k + 1) * bits)``, lowest bits
first. For 4 bits that is two codes a byte, the even one in the low nibble; for 3 bits eight codes in three bytes.
A row is padded with zero bits to a whole number of bytes.

Packed codes are plain uint8 arrays: XLA never sees a 1-, 2- or 3-bit dtype, whose lowering aborts in places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["pack", "packed_length", "unpack"]


def packed_length(length: int, bits: int) -> int:
    """Bytes that ``length`` codes of ``bits`` bits take."""
    return -(-length * bits // 8)


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that fills whole bytes."""
    codes = 8 // next(d for d in (8, 4, 2, 1) if bits % d == 0)
    return codes, codes * bits // 8


def _to_multiple(x: jax.Array, multiple: int, axis: int = -1) -> jax.Array:
    short = -x.shape[axis] % multiple
    if not short:
        return x
    return jnp.pad(x, [(0, short if i == axis % x.ndim else 0) for i in range(x.ndim)])


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Packs unsigned codes along an axis, the last one by default.

    Args:
      codes: integer array [..., n, ...] with values in ``[0, 2**bits)``.
      bits: 1 to 8.
      axis: the axis of n.

    Returns:
      uint8 array [..., ceil(n * bits / 8), ...].
    """
    codes = codes.astype(jnp.uint8)
    if bits == 8:
        return codes
    axis, n = axis % codes.ndim, codes.shape[axis]
    per_unit, unit_bytes = _unit(bits)
    runs = _to_multiple(codes, per_unit, axis)
    before, after = codes.shape[:axis], codes.shape[axis + 1 :]
    runs = runs.reshape(*before, -1, per_unit, *after)
    places = [lax.index_in_dim(runs, k, axis + 1, keepdims=False) for k in range(per_unit)]
    out = [jnp.zeros(places[0].shape, jnp.uint8) for _ in range(unit_bytes)]
    for k, place in enumerate(places):
        byte, shift = divmod(k * bits, 8)
        out[byte] = out[byte] | (place << shift)
        if shift + bits > 8:
            out[byte + 1] = out[byte + 1] | (place >> (8 - shift))
    packed = jnp.stack(out, axis=axis + 1).reshape(*before, -1, *after)
    return lax.slice_in_dim(packed, 0, packed_length(n, bits), axis=axis)


def unpack(packed: jax.Array, bits: int, length: int) -> jax.Array:
    """Inverse of `pack`.

    Args:
      packed: uint8 array [..., ceil(length * bits / 8)].
      bits: 1 to 8.
      length: number of codes in a row.

    Returns:
      uint8 array [..., length] with values in ``[0, 2**bits)``.
    """
    if bits == 8:
        return packed
    per_unit, unit_bytes = _unit(bits)
    runs = _to_multiple(packed, unit_bytes)
    runs = runs.reshape(*packed.shape[:-1], -1, unit_bytes)
    mask = jnp.uint8((1 << bits) - 1)
    codes: list[jax.Array] = []
    for k in range(per_unit):
        byte, shift = divmod(k * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code = code | (runs[..., byte + 1] << (8 - shift))
        codes.append(code & mask)
    unpacked = jnp.stack(codes, axis=-1).reshape(*packed.shape[:-1], -1)
    return unpacked[..., :length]

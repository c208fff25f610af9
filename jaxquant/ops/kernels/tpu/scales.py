"""Scales of groups in a kernel, stored so that one load takes a row and repeats it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.decode import BLOCK, scale_of
from jaxquant.ops.kernels.tpu.loops import lanes

__all__ = ["in_blocks", "repeated_scales", "row_of_blocks"]


def in_blocks(scale: jax.Ref, form: str, out: jax.Ref) -> None:
    """Writes scales in blocks of 128 columns, from which one load takes a row and repeats it."""
    for j in range(out.shape[0]):
        out[j] = scale_of(scale[:, lanes(j)], form)


def row_of_blocks(blocks: jax.Ref, at: Any) -> jax.Array:
    """A row of the scales that `in_blocks` wrote, eight times."""
    return jnp.concatenate([jnp.broadcast_to(blocks[j, at, :], (8, BLOCK)) for j in range(blocks.shape[0])], axis=1)


def repeated_scales(blocks: jax.Ref, first: Index, count: int, rows: int) -> jax.Array:
    """``count`` rows of the scales that `in_blocks` wrote, each repeated: [rows, columns]."""
    from jax.experimental import pallas as pl

    found = [row_of_blocks(blocks, pl.ds(first + p, 1)) for p in range(count)]
    each = rows // count
    if each >= 8:
        return jnp.concatenate([v for v in found for _ in range(each // 8)], axis=0)
    row, mixed = lax.broadcasted_iota(jnp.int32, found[0].shape, 0), []
    for start in range(0, count, 8 // each):
        part = found[start]
        for p in range(1, 8 // each):
            part = jnp.where(row >= p * each, found[start + p], part)
        mixed.append(part)
    return jnp.concatenate(mixed, axis=0)

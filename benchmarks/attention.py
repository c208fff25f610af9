"""Attention of the benchmarks: JAX's kernel for a TPU over many tokens, `ops.cached_attention` over a cache.

JAX's kernel keeps the scores near the arithmetic units; plain products write [heads, tokens, tokens] to memory. Its
keys are one block: then the compiler's schedule counts every step, also those above the diagonal of the mask. With
several blocks the kernel passes over some, and the schedule counts such a branch by a share that is not its own. (For
that reason it is not splash attention: of that the schedule counts less than its products take.)

Its gradients are kernels too, with blocks of 512 by 512. For two sequences of 2,048 tokens, 32 heads and 8 of keys and
values, the schedules for a v5e have 1,550 thousand cycles forwards, 1,740 for the gradient of queries and 2,505 for
those of keys and values; without a mask 1,394, 2,064 and 2,802. The kernels pass over 6 of 16 blocks, which lie above
the diagonal, and their schedules count a part of these, the same in all programs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

from jaxquant import ops

BLOCK = 512
GRADIENTS = [field.name for field in dataclasses.fields(BlockSizes) if field.name.endswith(("dkv", "dq"))]


def heads(x: jax.Array, count: int) -> jax.Array:
    """[B, S, heads times width] as [B, heads, S, width]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], count, -1), 1, 2)


def joined(x: jax.Array) -> jax.Array:
    """[B, heads, S, width] as [B, S, heads times width]."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(*x.shape[:2], -1)


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [B, H, S, W] over the keys and values [B, G, S, W] of the same tokens."""
    batch, count, s, w = q.shape
    n = min(BLOCK, s)
    sizes = BlockSizes(block_b=1, block_q=n, block_k_major=s, block_k=n, **dict.fromkeys(GRADIENTS, n))

    def one(q: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, causal=True, sm_scale=w**-0.5, block_sizes=sizes)

    grouped = q.reshape(batch, k.shape[1], -1, s, w)
    return jax.vmap(one, 2, 2)(grouped).reshape(batch, count, s, w)


def cached(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: tuple[jax.Array, jax.Array], place: jax.Array, layer: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """q [B, H, 1, W] of one token per sequence over a layer of the cache, in which its key and value are written first.

    k and v are [B, G, 1, W]; the cache of all layers is keys [L, B, G, S, W] and values [L, B, G, W, S].
    """
    zero = jnp.zeros((), place.dtype)
    keys = lax.dynamic_update_slice(cache[0], k[None], (layer, zero, zero, place, zero))
    values = lax.dynamic_update_slice(cache[1], jnp.swapaxes(v, 2, 3)[None], (layer, zero, zero, zero, place))
    valid = jnp.ones((q.shape[0], keys.shape[3]), jnp.bool_)
    return ops.cached_attention(q, keys, values, valid, place, layer), (keys, values)

"""Attention of the benchmarks: JAX's kernel for a TPU over many tokens, and plain products over a cache.

The kernel keeps the scores near the arithmetic units; plain products write [heads, tokens, tokens] to memory. Its keys
are one block: then the compiler's schedule counts every step, also those above the diagonal of the mask. With several
blocks the kernel passes over some, and the schedule counts such a branch by a share that is not its own. (For that
reason it is not splash attention: of that the schedule counts less than its products take.)

In training, attention is plain products. Of the kernels for gradients there is no estimate: with blocks of 128 by 2,048
the compiler takes more than 300 s for the schedule of one, and ends at the other.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

BLOCK = 512


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
    sizes = BlockSizes(block_b=1, block_q=n, block_k_major=s, block_k=n)

    def one(q: jax.Array) -> jax.Array:
        return flash_attention(q, k, v, causal=True, sm_scale=w**-0.5, block_sizes=sizes)

    grouped = q.reshape(batch, k.shape[1], -1, s, w)
    return jax.vmap(one, 2, 2)(grouped).reshape(batch, count, s, w)


def cached(q: jax.Array, k: jax.Array, v: jax.Array, cache: tuple[jax.Array, jax.Array]) -> jax.Array:
    """q [B, H, 1, W] of one token over its own key and value [B, G, 1, W] and the cached ones, [B, G, S, W]."""
    return _over(q, [cache, (k, v)])


def causal_products(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`causal`, by plain products."""
    return _over(q, [(k, v)])


def _over(q: jax.Array, parts: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Over keys and values in parts, the last of which are those of the same tokens."""
    b, _, s, w = q.shape
    grouped = q.reshape(b, parts[0][0].shape[1], -1, s, w) * jnp.asarray(w**-0.5, q.dtype)
    scores = [jnp.einsum("bgrsw,bgtw->bgrst", grouped, k, preferred_element_type=jnp.float32) for k, _ in parts]
    if s > 1:
        scores[-1] = jnp.where(jnp.tri(s, dtype=bool).reshape(1, 1, 1, s, s), scores[-1], -1e30)
    top = jnp.stack([x.max(axis=-1, keepdims=True) for x in scores]).max(axis=0)
    weights = [jnp.exp(x - top) for x in scores]
    total = sum(x.sum(axis=-1, keepdims=True) for x in weights)
    values = (jnp.einsum("bgrst,bgtw->bgrsw", x.astype(q.dtype), v) for x, (_, v) in zip(weights, parts, strict=True))
    out: Any = sum(x.astype(jnp.float32) for x in values)
    return (out / total).astype(q.dtype).reshape(q.shape)

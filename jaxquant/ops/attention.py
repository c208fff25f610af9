"""Attention of a few tokens over a cache of keys and values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.typing import ArrayLike

from jaxquant.core.by_platform import Target, by_platform
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import Operand, QTensor, scale_values
from jaxquant.core.sizes import number
from jaxquant.core.types import PyTree
from jaxquant.ops.einsum import einsum
from jaxquant.ops.kernels.tpu import attention as tpu
from jaxquant.ops.kernels.tpu.attention import Scores
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.ops.operands import Call, as_array
from jaxquant.ops.tangents import straight_through

__all__ = ["Scores", "attention", "cached_attention"]


def attention(
    q: jax.Array,
    k: Operand,
    v: Operand,
    valid: jax.Array,
    start: ArrayLike,
    layer: jax.Array | None = None,
    *,
    scores: Scores,
) -> jax.Array:
    """`cached_attention` of [B, G, R, T, D], as two products and a softmax between them."""
    k, v = (x if layer is None else _layer(x, layer) for x in (k, v))
    x = einsum("bgrtd,bgsd->bgrts", q, k) * jnp.asarray(scores.scale, q.dtype)
    x = x if scores.cap is None else jnp.tanh(x / scores.cap) * scores.cap
    seen = _seen(valid, start, q.shape[3], scores.window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, x.astype(jnp.float32), -jnp.inf), axis=-1)
    if q.dtype != jnp.float16 and isinstance(v, QTensor) and v.symmetric and tpu.has_one_scale(v, -2):
        # A scale of a place is one of its weight, if the product of both is not too small for the dtype.
        weights = weights * scale_values(v.scale)[:, :, None]
        v = v.replace(scale=jnp.ones((1, 1, 1, 1), jnp.float32))
    return einsum("bgrts,bgds->bgrtd", weights.astype(q.dtype), v).astype(q.dtype)


def _layer(x: Operand, layer: jax.Array) -> Operand:
    """One layer of a stack; all layers may share a scale."""
    return jax.tree.map(lambda v: v[0] if v.shape[0] == 1 else lax.dynamic_index_in_dim(v, layer, 0, False), x)


def _seen(valid: jax.Array, start: ArrayLike, tokens: int, window: int | None) -> jax.Array:
    """[B, T, S]: which places a token attends to; padding, to itself, so that no row is empty."""
    place, own = jnp.arange(valid.shape[1])[None, :], (start + jnp.arange(tokens))[:, None]
    seen = place <= own
    if window is not None:
        seen &= place > own - window
    return (seen[None] & valid[:, None, :]) | (place == own)[None]


@dataclasses.dataclass(frozen=True)
class _Attention(Call):
    """The static half of a call, and how each platform computes it."""

    scores: Scores

    def keep(self, *operands: PyTree) -> tuple[jax.Array, None]:
        return by_platform(self, *operands), None

    def reference(self, *operands: PyTree) -> jax.Array:
        return attention(*operands, scores=self.scores)

    def on(self, target: Target, *operands: PyTree) -> jax.Array:
        q, k, v = operands[:3]
        if target.platform != "tpu" or not tpu.takes(q, k, v):
            return self.reference(*operands)
        leaves, tree = jax.tree.flatten(operands)

        def kernel(*leaves: jax.Array) -> jax.Array:
            return tpu.run(*jax.tree.unflatten(tree, leaves), scores=self.scores)

        def products(*leaves: jax.Array) -> jax.Array:
            return self.reference(*jax.tree.unflatten(tree, leaves))

        return if_undivided(kernel, products, *leaves)

    def like(self, *operands: PyTree) -> jax.Array:
        q, _, v = operands[:3]
        return jnp.zeros((*q.shape[:-1], v.shape[-2]), q.dtype)

    def stands_for(self, *operands: PyTree) -> tuple[Primitive, dict[str, object]] | None:
        del operands


def cached_attention(
    q: ArrayLike,
    k: ArrayLike | QTensor,
    v: ArrayLike | QTensor,
    valid: ArrayLike,
    start: ArrayLike,
    layer: ArrayLike | None = None,
    *,
    scale: float | None = None,
    cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Causal attention of T tokens over a cache of S places that holds them too.

        y = sum_s softmax_s(cap tanh(scale q k_s / cap)) v_s

    over the places s that are valid, not behind the token and within its window, and the token's own. Heads are
    grouped: H / G of the queries share a head of the cache.

    On a TPU with queries in bfloat16 one kernel reads keys and values as they are stored, in bfloat16, int8 or fp8, and
    only up to the last token; scores stay on the chip. It runs on one device, and in a `jax.shard_map` over all axes of
    a mesh. Elsewhere attention is two products, as `einsum` computes them, and a softmax.

    Args:
      q: floats [B, H, T, D], where T is at most S.
      k: keys [B, G, S, D]: floats, or a QTensor with one scale per head and place, or a single scale.
      v: values [B, G, D, S], likewise. The features are before the places, so that both products sum over the last
        axis, and a TPU pads no head to its 128 lanes.
      valid: bool [B, S], False for padding.
      start: integer [], the place of the first of the tokens.
      layer: integer []: k and v are stacks of layers, [L, ...], and this one is read, by the kernel without a copy, in
        a `jax.lax.scan` over layers. None: they are of one layer.
      scale: the factor of scores; None is ``D ** -0.5``.
      cap: the largest magnitude of a score, approached smoothly; None: scores stay.
      window: how many places a token attends to, its own included; None: to all before it.

    Returns:
      [B, H, T, D], of q's dtype.

    Raises:
      QuantError: on shapes that do not fit each other, or a window or cap that is not positive.

    Gradient: as that of the two products, with respect to q, float keys and values, and scales.

    Source: grouped queries are Ainslie et al. 2023; the kernel corrects sums of earlier blocks as FlashAttention does
    (Dao et al. 2022, algorithm 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import QuantSpec, ops, quantize
      >>> k = quantize(jnp.ones((1, 1, 4, 8)), QuantSpec("int8"), reduce_axes=(-1,))
      >>> v = quantize(jnp.broadcast_to(jnp.arange(4.0), (1, 1, 8, 4)), QuantSpec("int8"), reduce_axes=(-2,))
      >>> ops.cached_attention(jnp.ones((1, 2, 1, 8)), k, v, jnp.ones((1, 4), bool), 2)[0, :, 0, 0]
      Array([1., 1.], dtype=float32)
    """
    function = "cached_attention"
    queries, keys, values = (as_array(function, name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    places, at = jnp.asarray(valid), jnp.asarray(start)
    which = None if layer is None else jnp.asarray(layer)
    if isinstance(queries, QTensor) or not jnp.issubdtype(queries.dtype, jnp.floating):
        raise quant_error(function, "q must be floats", todo="Dequantize the queries", q=queries)
    shapes: dict[str, Any] = {"q": queries.shape, "k": keys.shape, "v": values.shape, "valid": places.shape}
    scalars = all(x is None or (x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)) for x in (at, which))
    if not _fit(*shapes.values(), stacked=which is not None) or not scalars or places.dtype != jnp.bool_:
        todo = "Give q [B, H, T, D], k [B, G, S, D], v [B, G, D, S], bool valid [B, S], integers; with a layer, stacks"
        raise quant_error(function, "the operands do not fit each other", todo=todo, **shapes, start=at, layer=which)
    if (cap is not None and not cap > 0) or (window is not None and not window > 0):
        raise quant_error(function, "cap and window must be positive", todo="Use None for none", cap=cap, window=window)
    (b, h, t, d), g = queries.shape, keys.shape[-3]
    if 0 in (b, h, t):
        return jnp.zeros((b, h, t, values.shape[-2]), queries.dtype)
    scores = Scores(d**-0.5 if scale is None else float(scale), cap, window)
    grouped = queries.reshape(b, g, h // g, t, d)
    out = straight_through(_Attention(scores), grouped, keys, values, places, at, *([] if which is None else [which]))
    return out.reshape(b, h, t, -1)


def _fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], valid: tuple[int, ...], *, stacked: bool) -> bool:
    """Whether shapes fit each other."""
    if (len(q), len(k), len(v), len(valid)) != (4, 4 + stacked, 4 + stacked, 2) or k[:stacked] != v[:stacked]:
        return False
    (b, h, t, d), (g, s, width) = q, (k[-3], k[-2], v[-2])
    same = (k[stacked:], v[stacked:], valid) == ((b, g, s, d), (b, g, width, s), (b, s))
    room = math.isinf(number(t)) or number(t) <= number(s)  # where both are known
    return same and 0 not in (g, s, d) and h % g == 0 and room

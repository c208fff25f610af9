"""Attention over a cache on a TPU: each key and each value is read once, as it is stored, and no score leaves the chip.

    y[r] = sum_s p[r, s] b[s] v[:, s],    p = softmax over s of cap(scale a[s] q[r] k[s]),    a, b the scales of int8

A step of the grid multiplies the queries of one tile of tokens with a block of keys and values, of all heads that fit;
maxima and sums of earlier blocks are corrected as in FlashAttention (Dao et al. 2022, algorithm 1). Blocks behind the
last token, or outside of the window, are not read. XLA writes scores to memory, converts keys and values of int8 in
passes of their own, and reads the whole cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxquant.core.indices import clamped, widened
from jaxquant.core.qtensor import Operand, QTensor, scale_values
from jaxquant.core.types import Index
from jaxquant.ops.kernels.tpu.pallas import LIMIT, MEMORY, compiler_params, shape_like

__all__ = ["Scores", "attended", "has_one_scale", "run", "takes"]

_PLACES = 1024
"""Places of a block, at most."""

_ROWS = 512
"""Rows of a tile, at most: queries of one head of the cache, for each of a few tokens."""

_Numbers = Callable[[jax.Array], jax.Array]

_LEAST = -1e30
"""The score of a place that is not seen: finite, since the difference of two infinities is no number."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are computed from queries and keys.

    Attributes:
      scale: the factor of ``q k``.
      cap: scores are ``cap tanh(scores / cap)``; None: as they are.
      window: how many places a token sees, its own included; None: all before it.
    """

    scale: float
    cap: float | None = None
    window: int | None = None


def takes(q: jax.Array, k: Operand, v: Operand) -> bool:
    """Whether the kernel takes these queries [B, G, R, T, D], keys [.., B, G, S, D] and values [.., B, G, D, S].

    It takes bfloat16, and keys and values of int8 or fp8 with one scale for each head and place, or for all.
    """
    known = all(isinstance(n, int) for x in (q, k, v) for n in x.shape)
    if q.dtype != jnp.bfloat16 or not known or v.shape[-2] != q.shape[-1] or q.shape[2] > _ROWS:
        return False
    return all(_read_as_stored(x, axis) for x, axis in ((k, -1), (v, -2)))


def _read_as_stored(x: Operand, axis: int) -> bool:
    """Whether the kernel reads keys, or values: floats, or codes that share a scale along the axis of features."""
    if not isinstance(x, QTensor):
        return x.dtype == jnp.bfloat16
    plain = x.symmetric and x.offset is None and x.permutation is None and x.split is None and x.layer is None
    stored = x.qtype == "int8" or x.type.element in ("float8_e4m3fn", "float8_e5m2")
    return plain and stored and x.minor in ((), (axis,)) and has_one_scale(x, axis)


def has_one_scale(x: QTensor, axis: int) -> bool:
    """Whether the features along an axis share a scale, in each head and place or in all of some axes."""
    return x.scale.shape[axis] == 1 and all(n in (1, m) for n, m in zip(x.scale.shape, x.shape, strict=True))


def run(
    q: jax.Array,
    k: Operand,
    v: Operand,
    valid: jax.Array,
    start: jax.Array,
    layer: jax.Array | None = None,
    *,
    scores: Scores,
    interpret: bool = False,
) -> jax.Array:
    """`attended`, of operands that the kernel takes; with a layer, of that layer in stacks of keys and values."""
    arrays, scales = [], []
    for x, axis in ((k, -1), (v, -2)):
        if isinstance(x, QTensor):
            scale = jnp.squeeze(scale_values(x.scale).astype(jnp.float32), axis)
            scale = jnp.broadcast_to(scale, (*x.shape[:-2], x.shape[-3 - axis]))
            scales.append(scale.reshape(-1, *scale.shape[-2:]))
        else:
            scales.append(None)
        stored = x.kept if isinstance(x, QTensor) else x
        assert isinstance(stored, jax.Array)
        arrays.append(stored.reshape(-1, *stored.shape[-3:]))
    elements = [x.type.element if isinstance(x, QTensor) else None for x in (k, v)]
    first = 0 if layer is None else _index(layer, k.shape[0]) * valid.shape[0]
    turned = isinstance(v, QTensor) and v.minor != ()
    how: dict[str, Any] = {"scores": scores, "elements": tuple(elements), "turned": turned, "interpret": interpret}
    return attended(q, *arrays, valid, start, first, *scales, **how)


def _index(layer: jax.Array, layers: int) -> ArrayLike:
    """A layer as `jax.lax.dynamic_index_in_dim` finds it: from the end if it is negative, and never outside."""
    layer = widened(layer)
    return clamped(jnp.where(layer < 0, layer + layers, layer), 1, layers)


@functools.partial(jax.jit, static_argnames=("scores", "elements", "turned", "interpret"))
def attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    start: ArrayLike,
    first: ArrayLike,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    scores: Scores,
    elements: tuple[str | None, str | None] = (None, None),
    turned: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """Attention, with products in bfloat16 and sums in float32.

    Args:
      q: bfloat16 [B, G, R, T, D]: for each head of the cache R queries of T tokens.
      k: [C, G, S, D], bfloat16, int8, or patterns of fp8 in uint8: B sequences, or those of several layers. The kernel
        reads them without a copy of the layer.
      v: [C, G, D, S], likewise.
      valid: bool [B, S], the places that hold a token.
      start: int32 [], the place of the first token.
      first: int32 [], the first of the B sequences among the C.
      k_scale, v_scale: float32 [C, G, S]; None is 1.
      scores: how scores are computed.
      elements: the number types of k and v if they are patterns. XLA converts no pattern where it lies: a view of
        uint8 as fp8 takes a v5e 14 times as long as reading it.
      turned: whether v is [C, G, S, D].
      interpret: run in Pallas' interpreter.

    Returns:
      bfloat16 [B, G, R, T, D].
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (b, g, r, t, d), s = q.shape, k.shape[2]
    bt = min(1 << (t - 1).bit_length(), 1 << (max(_ROWS // r, 1).bit_length() - 1))
    rows, tiles = r * bt, -(-t // bt)
    heads, bs = _blocks(b, g, s, d, rows, k.dtype.itemsize)
    tiled = _tiled(q, bt, tiles)
    scales = [x for x in (k_scale, v_scale) if x is not None]

    def block(i: Index, j: Index, at: jax.Ref) -> Index:
        """The j-th block that a tile of tokens needs; if there are fewer, the last one, which is not read again."""
        begin, end = _span(at[0], i, bt, bs, s, scores.window)
        return jnp.minimum(begin + j, end)

    def of_tile(e: Index, h: Index, i: Index, j: Index, at: jax.Ref) -> tuple[Index, ...]:
        return e, h, i, 0, 0

    def rows_of(e: Index, h: Index, i: Index, j: Index, at: jax.Ref) -> tuple[Index, ...]:
        return at[1] + e, h, block(i, j, at), 0

    def columns_of(e: Index, h: Index, i: Index, j: Index, at: jax.Ref) -> tuple[Index, ...]:
        return at[1] + e, h, 0, block(i, j, at)

    of_keys, of_values = (functools.partial(_numbers, element, interpret=interpret) for element in elements)
    values = pl.BlockSpec((None, heads, bs, d), rows_of) if turned else pl.BlockSpec((None, heads, d, bs), columns_of)
    per_place = pl.BlockSpec((None, heads, bs), lambda e, h, i, j, at: (at[1] + e, h, block(i, j, at)))
    begins = jnp.stack([jnp.asarray(x, jnp.int32) for x in (start, first)])
    moved = 2 * q.nbytes + sum(x.nbytes for x in (k, v, *scales)) * b // k.shape[0]
    out = pl.pallas_call(
        functools.partial(
            _kernel, scores, (of_keys, of_values), bt, s, turned, k_scale is not None, v_scale is not None
        ),
        out_shape=shape_like(tiled, tiled.shape, jnp.bfloat16),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, pl.cdiv(g, heads), tiles, pl.cdiv(s, bs)),
            in_specs=[
                pl.BlockSpec((None, heads, None, rows, d), of_tile),
                pl.BlockSpec((None, heads, bs, d), rows_of),
                values,
                pl.BlockSpec((None, 1, bs), lambda e, h, i, j, at: (e, 0, block(i, j, at))),
                *(per_place for _ in scales),
            ],
            out_specs=pl.BlockSpec((None, heads, None, rows, d), of_tile),
            scratch_shapes=[pltpu.VMEM((heads, rows, width), jnp.float32) for width in (1, 1, d)],
        ),
        interpret=interpret,
        compiler_params=compiler_params(LIMIT, interpret=interpret),
        cost_estimate=pl.CostEstimate(flops=4 * q.size * s, bytes_accessed=moved, transcendentals=q.size // d * s),
        name="cached_attention",
    )(begins, tiled, k, v, valid[:, None].astype(jnp.int32), *scales)
    out = jnp.moveaxis(out.reshape(b, g, tiles, r, bt, d), 2, 3)
    return out.reshape(b, g, r, tiles * bt, d)[:, :, :, :t]


def _tiled(q: jax.Array, bt: int, tiles: int) -> jax.Array:
    """[B, G, tile, row, D]: rows are the R queries of ``bt`` tokens each, the last of which may be padding."""
    b, g, r, t, d = q.shape
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, tiles * bt - t), (0, 0)))
    return jnp.moveaxis(q.reshape(b, g, r, tiles, bt, d), 3, 2).reshape(b, g, tiles, r * bt, d)


def _blocks(b: int, g: int, s: int, d: int, rows: int, itemsize: int) -> tuple[int, int]:
    """The heads and the places of a block: all heads, or 8, and as many places as fit in memory twice.

    There are two blocks of a sequence and four in all, or more, since nothing runs while the first is read.
    """
    heads = 8 if g % 8 == 0 else g
    bs = min(_PLACES, -(-s // 128) * 128)

    def bytes_of(bs: int) -> int:
        return 4 * heads * bs * (d * itemsize + 4) + 4 * rows * (3 * bs + 4 * heads * d)

    while bs > 256 and (bytes_of(bs) > MEMORY // 2 or s <= bs or b * (g // heads) * -(-s // bs) < 4):
        bs = -(-bs // 256) * 128
    return heads, bs


def _span(start: Index, i: Index, bt: int, bs: int, s: int, window: int | None) -> tuple[Index, Index]:
    """The first and the last block that the i-th tile of tokens sees."""
    begin = start + i * bt
    last = jnp.minimum(begin + bt, s) - 1
    first = jnp.int32(0) if window is None else jnp.maximum(begin - window + 1, 0)
    return lax.div(first, jnp.int32(bs)), lax.div(last, jnp.int32(bs))


def _kernel(
    scores: Scores, numbers: tuple[_Numbers, _Numbers], bt: int, s: int, turned: bool, scaled_keys: bool,
    scaled_values: bool, at: jax.Ref, q: jax.Ref, k: jax.Ref, v: jax.Ref, valid: jax.Ref, *refs: Any,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    *scales, out, top, total, sums = refs
    k_scale = scales[0] if scaled_keys else None
    v_scale = scales[-1] if scaled_values else None
    (heads, bs, _), rows = k.shape, q.shape[1]
    i, j = pl.program_id(2), pl.program_id(3)
    first, last = _span(at[0], i, bt, bs, s, scores.window)

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full_like(top, _LEAST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(first + j <= last)
    def _() -> None:
        place = (first + j) * bs + lax.broadcasted_iota(jnp.int32, (rows, bs), 1)
        own = at[0] + i * bt + (lax.broadcasted_iota(jnp.int32, (rows, bs), 0) & (bt - 1))
        seen = (place <= own) & (valid[...] != 0)
        if scores.window is not None:
            seen &= place > own - scores.window
        seen |= place == own

        def inside(x: jax.Array, axis: int) -> jax.Array:
            """0 for places behind the end of the cache, where memory holds anything, NaN too."""
            if s % bs == 0:
                return x
            return jnp.where((first + j) * bs + lax.broadcasted_iota(jnp.int32, x.shape, axis) < s, x, 0)

        for h in range(heads):
            x = _dot(q[h], numbers[0](k[h]), 1)
            x = x * scores.scale if k_scale is None else x * (k_scale[h : h + 1] * scores.scale)
            if scores.cap is not None:
                x = jnp.tanh(x / scores.cap) * scores.cap
            x = jnp.where(seen, x, _LEAST)
            new = jnp.maximum(top[h], jnp.max(x, axis=1, keepdims=True))
            share, weights = jnp.exp(top[h] - new), jnp.exp(x - new)
            top[h] = new
            total[h] = total[h] * share + jnp.sum(weights, axis=1, keepdims=True)
            weights = weights if v_scale is None else weights * inside(v_scale[h : h + 1], 1)
            axis = 0 if turned else 1
            part = _dot(weights.astype(q.dtype), inside(numbers[1](v[h]), axis), axis)
            sums[h] = sums[h] * share + part

    @pl.when(j == pl.num_programs(3) - 1)
    def _() -> None:
        out[...] = (sums[...] / total[...]).astype(out.dtype)


def _numbers(element: str | None, stored: jax.Array, *, interpret: bool) -> jax.Array:
    """Keys or values in bfloat16, exactly."""
    from jax.experimental.pallas import tpu as pltpu

    if element is not None:
        stored = (lax.bitcast_convert_type if interpret else pltpu.bitcast)(stored, jnp.dtype(element))
    return stored.astype(jnp.bfloat16)


def _dot(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """The product over the last axis of x and an axis of y, summed in float32."""
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

"""Coordinate descent on the error of the outputs, in codes, scales and zero points."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import nan_where
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.clipped import diagonal_blocks
from jaxquant.ptq.gptq import blocking, gptq
from jaxquant.ptq.gram import WeightStats, damped, gram_of, normal
from jaxquant.ptq.layer import Layer, Steps, stored_scale

__all__ = ["descend"]


def descend(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    start: Callable[..., QTensor] = gptq,
    sweeps: int = 8,
    refit: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
) -> QTensor:
    """Improves the result of another quantizer, one code and one scale at a time; never makes it worse.

    With H the damped Gram matrix of the inputs and ``E = W - Q`` the error, ``tr(E^T H E)`` is a parabola in each
    single element of Q, whose minimum on the grid is

        q_i = nearest(Q_i + (H E)_i / H_ii)

    A sweep sets each contracted element in turn to this minimum, for all outputs at once; ``H E`` is updated block by
    block, in matrix products. Then each group's scale is set to the minimum of its own parabola, for its zero point or
    a neighbouring one, whichever gives the lowest error. Repeated sweeps converge to a local minimum, at which no
    change of a single code lowers the error.

    Args:
      w: float weight of any rank.
      spec: number type and granularity.
      reduce_axes: the contracted axes.
      stats: of this weight, from `calibrate` with ``{"gram": Gram()}``.
      start: the quantizer to start from, called with the same arguments.
      sweeps: the number of visits to each element. A sweep costs about as much as the updates of `gptq`.
      refit: also fit scales and zero points. Scales that depend on each other, per tensor and of nvfp4, stay.
      damping: added to the diagonal of H, in units of its mean: keeps Q close to W in directions that calibration has
        not seen.
      block_size: elements between two updates of the gradient; does not change the result.

    Returns:
      `QTensor` of w's shape.

    Raises:
      QuantError: as `quantize` and ``start``; if the Gram matrix is missing, of another size, NaN or infinite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.descend import descend
      >>> from jaxquant.ptq.gptq import gptq
      >>> x = jax.random.normal(jax.random.key(0), (64, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
      >>> w, spec = jax.random.normal(jax.random.key(2), (16, 8)), jq.QuantSpec("int2", symmetric=False)
      >>> stats = {"gram": {"gram": (x.T @ x)[None], "rows": jnp.float32(64)}}
      >>> error = lambda q: float(jnp.sum((x @ (w - q.dequantize())) ** 2))
      >>> first = gptq(w, spec, reduce_axes=(-2,), stats=stats)
      >>> error(descend(w, spec, reduce_axes=(-2,), stats=stats)) < error(first)
      True

    Source: the sweeps over codes are those of QuantEase (Behdin et al. 2023, arXiv:2309.01885), which keeps the scales;
    the fit of scales and zero points between sweeps is an addition.
    """
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise quant_error("descend", "sweeps must be a number of sweeps", todo="Use 8", sweeps=sweeps)
    if not damping > 0:
        raise quant_error("descend", "damping must be positive", todo="Use for example 0.01", damping=damping)
    layer, w = Layer.of("descend", w, spec, reduce_axes)
    layer, gram = gram_of("descend", stats, layer)
    q = start(w, spec, reduce_axes=reduce_axes, stats=stats)
    if q.permutation is not None or q.offset is not None:
        todo = "Start from a quantizer that keeps the order and gives zero points"
        raise quant_error("descend", "the start has a permutation or offsets", todo=todo, start=repr(q))
    return _descend(w, gram, q, damping, layer=layer, sweeps=sweeps, refit=refit, block_size=block_size)


@functools.partial(jax.jit, static_argnames=("layer", "sweeps", "refit", "block_size"))
def _descend(
    w: jax.Array,
    gram: jax.Array,
    q: QTensor,
    damping: float | jax.Array,
    *,
    layer: Layer,
    sweeps: int,
    refit: bool,
    block_size: int,
) -> QTensor:
    def one(x: jax.Array, gram: jax.Array, values: jax.Array, steps: Steps) -> tuple[jax.Array, Steps]:
        h = damped(normal(gram, layer)[0], damping)

        def sweep(_: jax.Array, state: tuple[jax.Array, Steps]) -> tuple[jax.Array, Steps]:
            values, steps = state
            steps = fit_steps(x, h, values, steps, layer) if refit and not layer.shared else steps
            return fit_codes(x, h, values, steps, layer, block_size), steps

        values, steps = lax.fori_loop(0, sweeps, sweep, (values, steps))
        return values, Steps(nan_where(jnp.isnan(h[0, 0]), steps.scale), steps.zero)

    with jax.default_matmul_precision("highest"):
        values, steps = layer.map(one, layer.split(w.astype(jnp.float32)), gram, *layer.values(q))
    return layer.qtensor(values, steps, w.dtype, q.scale)


def _spread(steps: Steps, length: int) -> Steps:
    """Steps [groups, rows] for every element."""
    return jax.tree.map(lambda s: jnp.repeat(s, length // s.shape[0], axis=0), steps)


def fit_codes(x: jax.Array, h: jax.Array, values: jax.Array, steps: Steps, layer: Layer, block_size: int) -> jax.Array:
    """One sweep over the codes: sets each grid value of [contracted, rows] in turn to the best, others fixed."""
    length, group, rows = layer.length, layer.group, x.shape[-1]
    block, padded = blocking(length, group, block_size)
    spare = (0, padded - length)
    gradient = jnp.pad(h @ (x - _spread(steps, length).real(values)), (spare, (0, 0)))
    h = jnp.pad(h, (spare, spare)) + jnp.diag(jnp.arange(padded) >= length).astype(h.dtype)
    values, table = jnp.pad(values, (spare, (0, 0))), jnp.pad(jnp.arange(length) // group, spare)

    def in_block(gradient: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = b * block
        own, old, which = (lax.dynamic_slice_in_dim(a, start, block) for a in (gradient, values, table))
        across = lax.dynamic_slice_in_dim(h, start, block)
        square = lax.dynamic_slice_in_dim(across, start, block, 1)

        def element(moves: jax.Array, each: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            i, row, g = each
            step = steps[g]
            now = step.real(old[i])
            value = step.round(now + (own[i] - row @ moves) / row[i], layer.spec)
            return moves.at[i].set(step.real(value) - now), value

        moves, new = lax.scan(element, jnp.zeros_like(own), (jnp.arange(block), square, which))
        return gradient - across.T @ moves, new

    _, new = lax.scan(in_block, gradient, jnp.arange(padded // block))
    return new.reshape(padded, rows)[:length]


def fit_steps(x: jax.Array, h: jax.Array, values: jax.Array, steps: Steps, layer: Layer) -> Steps:
    """Sets each group's scale and zero point in turn to the best for the codes, with the other groups fixed.

    With c the codes less their zero point, g the gradient ``H E`` and a change of the scale by a and of the zero point
    by d, the values move by ``a c' - s d`` with ``c' = c - d``, and the error by

        a^2 c'Hc' - 2 a (c'g + s d 1Hc') + (s d)^2 1H1 + 2 s d 1g

    whose best a is rounded to the scale's stored dtype. The best d of -1, 0, 1 is taken if it lowers the error.
    """
    spec, group, rows = layer.spec, layer.group, x.shape[-1]
    length, info = layer.length, spec.type
    gradient = h @ (x - _spread(steps, length).real(values))
    grouped = values.reshape(-1, group, rows)

    def in_group(gradient: jax.Array, each: tuple[jax.Array, jax.Array, jax.Array, Steps]) -> tuple[jax.Array, Steps]:
        start, square, value, step = each
        c, s = value - step.zero[None], step.scale
        g = lax.dynamic_slice_in_dim(gradient, start, group)
        hc, ones = square @ c, jnp.sum(square)
        best = (jnp.zeros_like(s), s, step.zero)
        for d in (0,) if spec.symmetric else (0, -1, 1):
            moved, b = c - d, s * d
            mhm = jnp.sum(c * hc, 0) - 2 * d * jnp.sum(hc, 0) + d * d * ones
            ohm = jnp.sum(hc, 0) - d * ones
            mg = jnp.sum(moved * g, 0) + b * ohm
            scale = (s + mg / jnp.where(mhm > 0, mhm, jnp.inf)).astype(stored_scale(spec)).astype(jnp.float32)
            a, zero = scale - s, step.zero + d
            change = a * a * mhm - 2 * a * mg + b * b * ones + 2 * b * jnp.sum(g, 0)
            won = (change < best[0]) & (scale > jnp.finfo(jnp.float32).tiny) & jnp.isfinite(scale)
            won = won & (zero >= info.qmin) & (zero <= info.qmax) if d else won
            best = tuple(jnp.where(won, n, o) for n, o in zip((change, scale, zero), best, strict=True))
        new = Steps(best[1], best[2])
        move = new[None].real(value) - step[None].real(value)
        across = lax.dynamic_slice_in_dim(h, start, group)
        return gradient - across.T @ move, new

    each = (jnp.arange(0, length, group), diagonal_blocks(h, group), grouped, steps)
    return lax.scan(in_group, gradient, each)[1]

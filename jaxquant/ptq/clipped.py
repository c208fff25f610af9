"""Clipped rounding: finds for each block the range of least error in the layer's outputs."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jaxquant.core.affine import quantize, roundtrip
from jaxquant.core.errors import quant_error
from jaxquant.core.extremes import array_absmax
from jaxquant.core.granularity import PerTensor
from jaxquant.core.least_error import least_error
from jaxquant.core.observers import MinMax
from jaxquant.core.qtensor import QTensor, Scale
from jaxquant.core.scale_zero_point import affine
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.gram import WeightStats, gram_of, normal
from jaxquant.ptq.layer import Layer

__all__ = ["Weighting", "clipped", "diagonal_blocks", "least_ranges"]

Weighting = Literal["gram", "diagonal", "none"]


def diagonal_blocks(h: jax.Array, group: int) -> jax.Array:
    """The blocks [groups, group, group] on the diagonal of a matrix."""
    groups = h.shape[-1] // group
    index = jnp.arange(groups)
    return h.reshape(groups, group, groups, group)[index, :, index, :]


def least_ranges(
    x: jax.Array,
    h: jax.Array,
    spec: QuantSpec,
    *,
    axes: tuple[int, ...] = (-2,),
    top: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The ranges ``(lo, hi)`` for which rounding to nearest has the least error ``e^T H e``.

    Args:
      x: groups of weights, [..., group, rows].
      h: weights of the error: Gram matrices [..., group, group], or their diagonals [..., group, 1].
      spec: the number type.
      axes: axes of x that share a range.
      top: the largest magnitude of the whole weight, for types with a scale per tensor.

    Returns:
      Two arrays of x's rank, of size 1 on ``axes``.
    """
    full = h.shape[-1] == h.shape[-2] and x.shape[-2] > 1
    positive = tuple(a % x.ndim for a in axes)
    step = roundtrip(spec, top)
    lo, hi = MinMax().range(x, positive, symmetric=spec.symmetric, roundtrip=step)
    absmax = jnp.maximum(-lo, hi)
    unit = jnp.where(absmax > 0, absmax, 1)

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        weighed = jnp.matmul(h, b, precision="highest") if full else h * b
        return jnp.sum(a * weighed, axis=positive, keepdims=True)

    def evaluate(lo: jax.Array, hi: jax.Array) -> tuple[jax.Array, jax.Array]:
        v, xn = step(x, lo, hi) / unit, x / unit
        vv = product(v, v)
        return product(xn - v, xn - v), jnp.where(vv > 0, product(xn, v) / jnp.where(vv > 0, vv, 1), 1)

    return least_error(evaluate, lo, hi, both=not spec.symmetric)


def clipped(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    weighting: Weighting = "gram",
) -> QTensor:
    """Rounds to nearest, with the range for each block that minimises the error of the outputs.

    For a block of weights x with Gram matrix H of their inputs, minimises ``(x - x_q)^T H (x - x_q)`` over ranges: 90
    clips from the full range down to 1 percent of it, each end separately if the spec is asymmetric, then alternating
    least squares between codes and scale. Errors of different blocks are treated as independent.

    Args:
      w: float weight.
      spec: number type and granularity; its calibration is not used.
      reduce_axes: the contracted axes.
      stats: of this weight, from `calibrate` with ``{"gram": Gram()}``; not needed for ``weighting="none"``.
      weighting: ``"gram"``: the block's own part of the Gram matrix; with one block per channel it costs a product with
        H for each candidate. ``"diagonal"``: only the mean square of each input, little dearer than no weights.
        ``"none"``: the plain squared error of the weights, as ``calibration=observers.MSE()``.

    Returns:
      `QTensor` of w's shape.

    Raises:
      QuantError: as `quantize`; if the Gram matrix is missing, of another size, NaN or infinite.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.clipped import clipped
      >>> w = jnp.array([[0.1], [0.2], [-0.3], [9.0]])  # the large weight meets small inputs
      >>> stats = {"gram": {"gram": jnp.diag(jnp.array([1.0, 1.0, 1.0, 1e-4]))[None], "rows": jnp.float32(1)}}
      >>> spec = jq.QuantSpec("int4")
      >>> values = clipped(w, spec, reduce_axes=(-2,), stats=stats).dequantize()[:3, 0]
      >>> [round(float(v), 2) for v in values]
      [0.1, 0.2, -0.3]

    Source: grid search for the clip as in Banner et al. 2019 (arXiv:1810.05723); weighted by the inputs as in AWQ (Lin
    et al. 2024, arXiv:2306.00978, section 3.2), which samples inputs; this uses the Gram matrix of all inputs.
    """
    if weighting not in ("gram", "diagonal", "none"):
        todo = "Use 'gram', 'diagonal' or 'none'"
        raise quant_error("clipped", "unknown weighting", todo=todo, weighting=weighting)
    layer, w = Layer.of("clipped", w, spec, reduce_axes)
    gram = jnp.ones((1, 1, 1), jnp.float32)
    if weighting != "none":
        layer, gram = gram_of("clipped", stats, layer)
    scale, zero_point = _ranges(w, gram, layer=layer, weighting=weighting)
    return quantize(w, spec, reduce_axes=layer.axes, scale=scale, zero_point=zero_point)


@functools.partial(jax.jit, static_argnames=("layer", "weighting"))
def _ranges(w: jax.Array, gram: jax.Array, *, layer: Layer, weighting: Weighting) -> tuple[Scale, jax.Array | None]:
    spec, group = layer.spec, layer.group
    groups = layer.length // group
    x = layer.split(w.astype(jnp.float32)).reshape(layer.batch, groups, group, -1)
    if weighting == "none":
        h = jnp.ones((layer.batch, groups, group, 1), jnp.float32)
    else:
        full = jnp.stack([normal(g, layer)[0] for g in gram])
        h = jax.vmap(lambda a: diagonal_blocks(a, group))(full)
        if weighting == "diagonal":
            h = jnp.diagonal(h, axis1=-2, axis2=-1)[..., None]
    top = array_absmax(w) if spec.type.scale_format == "e4m3" else None
    if isinstance(spec.granularity, PerTensor):
        lo, hi = least_ranges(x, h, spec, axes=(0, 1, 2, 3))
        lo, hi = (jnp.broadcast_to(b, (layer.batch, 1, 1, x.shape[-1])) for b in (lo, hi))
    else:
        lo, hi = least_ranges(x, h, spec, top=top)
    return affine(layer.join_scale(lo[..., 0, :]), layer.join_scale(hi[..., 0, :]), spec, top)

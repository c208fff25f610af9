"""Scales for the input channels of weights before they are quantized: SmoothQuant's rule and AWQ's search.

Both give positive scales s for ``x @ w = (x / s) @ (s * w)``, one per input channel, for one weight or for several that
share an input. `jaxquant.invariances.rescale` fuses the scales into neighbouring layers, and
`jaxquant.invariances.precondition` applies them online. `awq_clip` is the other half of AWQ, a clip of the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.clipped import diagonal_blocks
from jaxquant.ptq.gram import WeightStats
from jaxquant.ptq.rtn import rtn

__all__ = ["awq_clip", "awq_scale", "smooth_scale"]


def smooth_scale(absmax: jax.Array, weights: Sequence[jax.Array], *, alpha: float = 0.5) -> jax.Array:
    """``s = max|x| ** alpha / max|w| ** (1 - alpha)`` per channel: moves outliers from activations into weights.

    Args:
      absmax: of each channel of the input, [channels].
      weights: the weights that share the input, each [channels, outputs].
      alpha: 1 moves the whole range of activations into the weights, 0 that of the weights into the activations.

    Returns:
      Scales [channels], at least 1e-5. A channel in which input or weights are all zero gets 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant.ptq.scaling import smooth_scale
      >>> smooth_scale(jnp.array([100.0, 1.0]), [jnp.array([[1.0], [0.25]])])
      Array([10.,  2.], dtype=float32)

    Source: Xiao et al. 2022 (arXiv:2211.10438), equation 4.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(w), axis=1) for w in weights]), axis=0)
    alive = (absmax > 0) & (largest > 0)
    scale = jnp.where(alive, absmax, 1.0) ** alpha / jnp.where(alive, largest, 1.0) ** (1 - alpha)
    return jnp.where(alive, jnp.maximum(scale, 1e-5), 1.0)


def awq_scale(
    weights: Sequence[jax.Array],
    specs: Sequence[QuantSpec],
    stats: WeightStats | list[WeightStats],
    *,
    method: Callable[..., QTensor] = rtn,
    ratios: int = 20,
    families: tuple[Literal["duo", "activations"], ...] = ("duo", "activations"),
    module: Callable[[list[jax.Array]], jax.Array] | None = None,
) -> jax.Array:
    """The scales of least output error among ``s = mean|x| ** r / mean|w| ** (1 - r)`` and ``mean|x| ** r``.

    For each r of 0, 1 / ratios, ..: quantize ``s * w``, and take the s with the least
    ``sum |x (w - Q(s w) / s)|^2 = tr(e^T H e)``, H being the Gram matrix of the inputs. r = 0 of the second family
    means no scaling, so the result is never worse than no scaling.

    Args:
      weights: the weights that share the input, each [channels, outputs], or [experts, channels, outputs].
      specs: how each is quantized.
      stats: of the input: ``"gram"`` and ``"mean"`` as `calibrate` collects them with ``Gram`` and ``ChannelMean``. A
        list has those of each weight, which see different rows of the input; of experts they have a leading axis.
      method: the quantizer to search for.
      ratios: the number of values of r.
      families: ``"duo"`` is the first of the two, ``"activations"`` the second.
      module: a function from the list of weights to outputs on some inputs; the error is then the mean square change of
        these outputs, and of the statistics only ``"mean"`` is needed. None: the error above.

    Returns:
      Scales [channels]; the geometric mean of the least and the largest is 1.

    Raises:
      QuantError: if no family is given, or an unknown one.

    Source: Lin et al. 2023 (arXiv:2306.00978), equation 5, and AutoAWQ 0.2.9, whose scales this reproduces with
      ``families=("duo",)`` and its ``module``. By default this tries both families and measures the error of the
      weights' own outputs over all calibration inputs; AutoAWQ runs a whole module on some inputs.
    """
    if not families or not set(families) <= {"duo", "activations"}:
        todo = "Use 'duo', 'activations' or both"
        raise quant_error("awq_scale", "unknown families of scales", todo=todo, families=tuple(families))
    distinct: list[WeightStats] = stats if isinstance(stats, list) else [stats]
    mean = jnp.maximum(_mean_magnitude([s["mean"] for s in distinct]), 1e-8)
    grams = None if module is not None else [jnp.mean(s["gram"]["gram"], axis=-3) for s in distinct]
    if grams is not None and len(grams) < len(weights):
        grams = grams * len(weights)
    parts = []
    for w, spec in zip((_experts_as_outputs(w) for w in weights), specs, strict=True):
        size = spec.group_size or w.shape[0]
        groups = jnp.abs(w).reshape(-1, size, w.shape[1])
        parts.append((groups / (jnp.max(groups, axis=1, keepdims=True) + 1e-6)).reshape(w.shape))
    w_mean = jnp.mean(jnp.concatenate(parts, axis=1), axis=1)

    def scaled(r: jax.Array, duo: jax.Array) -> jax.Array:
        s = mean**r / jnp.where(duo, w_mean ** (1 - r) + 1e-4, 1.0)
        s = jnp.maximum(s, 1e-4)
        return s / jnp.sqrt(jnp.max(s) * jnp.min(s))

    def error(choice: tuple[jax.Array, jax.Array]) -> jax.Array:
        s = scaled(*choice)[:, None]

        def rounded(w: jax.Array, spec: QuantSpec) -> jax.Array:
            return method(w * s, spec, reduce_axes=(-2,), stats=None).dequantize(jnp.float32) / s

        def lost(w: jax.Array, gram: jax.Array, spec: QuantSpec) -> jax.Array:
            e = w - rounded(w, spec)
            return jnp.sum(e * (gram @ e))

        each = zip(weights, specs, strict=True)
        if grams is None:
            assert module is not None
            return jnp.mean((module(list(weights)) - module([rounded(*one) for one in each])) ** 2)
        total = jnp.zeros(())
        for (w, spec), gram in zip(each, grams, strict=True):
            of_one = functools.partial(lost, spec=spec)
            total += of_one(w, gram) if w.ndim == 2 else jnp.sum(jax.vmap(of_one)(w, gram))
        return total

    r = jnp.arange(ratios, dtype=jnp.promote_types(weights[0].dtype, jnp.float32)) / ratios
    choices = jnp.tile(r, len(families)), jnp.repeat(jnp.array([f == "duo" for f in families]), ratios)
    best = jnp.argmin(lax.map(error, choices))
    return scaled(choices[0][best], choices[1][best])


def _mean_magnitude(seen: Sequence[Mapping[str, jax.Array]]) -> jax.Array:
    """``mean |x|`` of each channel, over all rows of all inputs; statistics of experts have a leading axis."""
    sums = [jnp.mean(mean["abs_sum"], axis=-2) for mean in seen]
    rows = [jnp.mean(jnp.reshape(mean["rows"], (*s.shape[:-1], -1)), -1) for mean, s in zip(seen, sums, strict=True)]
    total = functools.reduce(jnp.add, [jnp.sum(s, axis=tuple(range(s.ndim - 1))) for s in sums])
    return total / functools.reduce(jnp.add, map(jnp.sum, rows))


def _experts_as_outputs(w: jax.Array) -> jax.Array:
    """[channels, outputs] of all experts."""
    return w if w.ndim == 2 else jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1)


def awq_clip(w: jax.Array, spec: QuantSpec, stats: WeightStats, *, steps: int = 20, least: float = 0.5) -> jax.Array:
    """The magnitude to which AWQ clips each group of weights: ``|w| (1 - i / steps)`` of least error in its outputs.

    It tries ``i < (1 - least) steps`` and measures ``e^T H e`` with a group's own part of the Gram matrix, as the
    reference does. `clipped` tries more clips, each end separately, and fits the scale, so its error is lower.

    Args:
      w: [channels, outputs].
      spec: how it is quantized, after the clip.
      stats: of its inputs: ``"gram"`` as `calibrate` collects it with ``Gram``.
      steps: the number of steps from ``|w|`` to 0.
      least: the lowest ratio of the clip to ``|w|``.

    Returns:
      [groups, outputs]; quantize ``jnp.clip(w, -c, c)`` with c repeated along each group.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.scaling import awq_clip
      >>> w = jnp.array([[0.3], [0.6], [-0.6], [1.0]])
      >>> stats = {"gram": {"gram": jnp.diag(jnp.array([9.0, 9.0, 9.0, 0.1]))[None]}}
      >>> round(float(awq_clip(w, jq.QuantSpec("int2", narrow_range=True), stats)[0, 0]), 2)  # the last input is small
      0.55

    Source: Lin et al. 2023 (arXiv:2306.00978), section 3.2, as AutoAWQ 0.2.9 does it with sampled inputs.
    """
    group = spec.group_size or w.shape[0]
    h = diagonal_blocks(jnp.mean(stats["gram"]["gram"], axis=0), group)
    groups = w.reshape(-1, group, w.shape[1])
    absmax = jnp.max(jnp.abs(groups), axis=1, keepdims=True)

    def error(i: jax.Array) -> jax.Array:
        bound = absmax * (1 - i / steps)
        q = rtn(jnp.clip(groups, -bound, bound).reshape(w.shape), spec, reduce_axes=(-2,)).dequantize(jnp.float32)
        e = groups - q.reshape(groups.shape)
        return jnp.sum(e * jnp.matmul(h, e, precision="highest"), axis=1)

    dtype = jnp.promote_types(w.dtype, jnp.float32)
    best = jnp.argmin(lax.map(error, jnp.arange(int((1 - least) * steps), dtype=dtype)), axis=0)
    return absmax[:, 0] * (1 - best.astype(dtype) / steps)

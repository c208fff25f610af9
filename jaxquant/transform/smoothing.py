"""Scales on the input channels of planned weights, fused into their neighbours or as bases for `precondition`.

smoothquant, awq, equalize       params -> params, along the pairs that `scale_pairs` has found: free at run time
smooth_bases, awq_bases,         path -> `Basis` for every planned weight, whatever comes before it: `precondition`
rotation_bases                     applies them online
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Leaf, Params, leaves_with_paths
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree, Stats
from jaxquant.ptq.bases import Basis, ChannelScale, Rotation
from jaxquant.ptq.scaling import awq_scale, smooth_scale
from jaxquant.transform.analysis.scales import Member, ScalePair
from jaxquant.transform.folding import rescale
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.weights import as_matrix

__all__ = ["awq", "awq_bases", "equalize", "rotation_bases", "smooth_bases", "smoothquant"]


def _stat(function: str, stats: Stats, path: str, name: str) -> PyTree:
    found = stats.get(path, {}).get(name)
    if found is None:
        kind = {"absmax": "ChannelAbsMax", "mean": "ChannelMean", "gram": "Gram"}[name]
        todo = (
            f'Pass collect={{"{name}": jq.calibration.{kind}(), ...}} to calibrate, over batches that reach the weight'
        )
        raise quant_error(function, f"there is no {name} of the inputs", todo=todo, path=path)
    return found


def _layers(fn: Callable[..., jax.Array], stack: tuple[int, ...]) -> Callable[..., jax.Array]:
    """A function of one layer as one of the whole stack; layer by layer, for the memory."""
    for _ in stack:
        fn = functools.partial(_mapped, fn)
    return fn


def _mapped(fn: Callable[..., jax.Array], *args: PyTree) -> jax.Array:
    return jax.lax.map(lambda a: fn(*a), args)


def _along(item: Item, member: Member, values: jax.Array) -> jax.Array:
    """Values per input channel [.., channels] as values along one of the reduced axes (the largest over the rest)."""
    shape = tuple(item.shape[axis] for axis in item.reduce_axes)
    place = item.reduce_axes.index(member.axis)
    split = values.reshape(*values.shape[:-1], *shape)
    return jnp.max(split, axis=tuple(i - len(shape) for i in range(len(shape)) if i != place))


def smoothquant(params: Params, plan: Plan, pairs: Iterable[ScalePair], stats: Stats, *, alpha: float = 0.5) -> Params:
    """Outliers moved from the activations into the weights: `smooth_scale` along every pair. The function stays.

    Args:
      params: float parameters.
      plan: their plan.
      pairs: from `scale_pairs`.
      stats: from `calibrate`, with ``"absmax"``.
      alpha: how much of the activations' range the weights take.

    Returns:
      The same tree.

    Raises:
      QuantError: if the statistics of a sink are missing.

    Source: Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438).
    """
    for pair in pairs:
        leaves, _ = leaves_with_paths(params)
        absmax, rows = [], []
        for member in pair.sinks:
            item = plan[member.path]
            seen = _along(item, member, jnp.max(_stat("smoothquant", stats, member.path, "absmax"), axis=-2))
            absmax.append(jnp.max(seen, axis=tuple(range(len(pair.stack), seen.ndim - 1))))
            rows.append(_ranges(leaves, pair, member))
        one = functools.partial(smooth_scale, alpha=alpha)
        inputs, largest = (functools.reduce(jnp.maximum, each) for each in (absmax, rows))
        scale = _layers(lambda a, w, one=one: one(a, [w[:, None]]), pair.stack)(inputs, largest)
        params = rescale(params, pair, scale)
    return params


def awq(params: Params, plan: Plan, pairs: Iterable[ScalePair], stats: Stats, *, ratios: int = 20) -> Params:
    """Channels that matter scaled up before they are rounded: `awq_scale` along every pair. The function stays.

    Args:
      params: float parameters.
      plan: their plan.
      pairs: from `scale_pairs`. Sinks that contract several axes are left out.
      stats: from `calibrate`, with ``"gram"`` and ``"mean"``.
      ratios: how fine the search is.

    Returns:
      The same tree.

    Raises:
      QuantError: if the statistics of a sink are missing.

    Source: Lin et al. 2023 (AWQ, arXiv:2306.00978).
    """
    for pair in pairs:
        leaves, _ = leaves_with_paths(params)
        sinks = [m for m in pair.sinks if len(plan[m.path].reduce_axes) == 1]
        if not sinks:
            continue
        found = [{name: _stat("awq", stats, m.path, name) for name in ("gram", "mean")} for m in sinks]
        experts = [m.stacked - len(pair.stack) for m in sinks]
        known = found if any(experts) else found[0]  # experts see different rows
        items = [plan[m.path] for m in sinks]
        how = tuple((i.reduce_axes, _weight_spec("awq", i), n) for i, n in zip(items, experts, strict=True))
        weights = [jnp.asarray(leaves[m.path]) for m in sinks]
        scale = _awq_scales(weights, known, how=how, stack=pair.stack, ratios=ratios)
        params = rescale(params, pair, scale)
    return params


@functools.partial(jax.jit, static_argnames=("how", "stack", "ratios"))
def _awq_scales(
    weights: list[jax.Array],
    known: PyTree,
    *,
    how: tuple[tuple[tuple[int, ...], QuantSpec, int], ...],
    stack: tuple[int, ...],
    ratios: int,
) -> jax.Array:
    """`awq_scale` of each layer: compiled once for all weights of one shape.

    ``how`` is for each weight its contracted axes, its spec, and how many axes of experts it has.
    """

    def one(weights: list[jax.Array], known: PyTree) -> jax.Array:
        matrices = [_matrices(w, axes, experts) for (axes, _, experts), w in zip(how, weights, strict=True)]
        if isinstance(known, list):
            known = [_one_axis(seen, experts) for seen, (_, _, experts) in zip(known, how, strict=True)]
        return awq_scale(matrices, [spec for _, spec, _ in how], known, ratios=ratios)

    return _layers(one, stack)(weights, known)


def _matrices(w: jax.Array, axes: tuple[int, ...], experts: int) -> jax.Array:
    """[channels, outputs] of a weight, or [experts, channels, outputs]."""
    if not experts:
        return as_matrix(w, axes)
    return jax.vmap(lambda one: as_matrix(one, axes))(w.reshape(-1, *w.shape[experts:]))


def _one_axis(seen: PyTree, experts: int) -> PyTree:
    """Statistics with all axes of experts as one."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[experts:]), seen) if experts else seen


def _weight_spec(function: str, item: Item) -> QuantSpec:
    if item.spec.weight is None:
        raise quant_error(function, "the weight stays in float", todo="Plan it with a weight spec", path=item.path)
    return item.spec.weight


def equalize(params: Params, plan: Plan, pairs: Iterable[ScalePair], *, rounds: int = 10) -> Params:
    """Ranges of channels made equal on both sides of every pair: cross-layer equalization. Needs no data.

    ``s = sqrt(max|source| / max|sink|)`` per channel, where both are weights; repeated, since a weight is sink of one
    pair and source of another. The function stays.

    Args:
      params: float parameters.
      plan: their plan.
      pairs: from `scale_pairs`; those whose sources are norms only are left alone.
      rounds: how often.

    Returns:
      The same tree.

    Source: Nagel et al. 2019 (Data-free quantization, arXiv:1906.04721), equations 9 to 11.
    """
    chosen = [(p, [m for m in p.sources if m.path in plan and m.power < 0]) for p in pairs]
    for _ in range(rounds):
        for pair, sources in chosen:
            if not sources:
                continue
            leaves, _ = leaves_with_paths(params)
            made = functools.reduce(jnp.maximum, [_ranges(leaves, pair, m) for m in sources])
            used = functools.reduce(jnp.maximum, [_ranges(leaves, pair, m) for m in pair.sinks])
            alive = (made > 0) & (used > 0)
            scale = jnp.where(alive, jnp.sqrt(jnp.where(alive, made, 1.0) / jnp.where(alive, used, 1.0)), 1.0)
            params = rescale(params, pair, scale)
    return params


def _ranges(leaves: Mapping[str, Leaf], pair: ScalePair, member: Member) -> jax.Array:
    w = jnp.abs(jnp.asarray(leaves[member.path], jnp.float32))
    return jnp.max(w, axis=tuple(i for i in range(len(pair.stack) - w.ndim, 0) if i != member.axis))


def smooth_bases(params: Params, plan: Plan, stats: Stats, *, alpha: float = 0.5) -> dict[str, Basis]:
    """`smooth_scale` for every planned product, to be applied online: path -> `ChannelScale`."""
    leaves, _ = leaves_with_paths(params)
    out: dict[str, Basis] = {}
    for item in _products(plan):
        absmax = jnp.max(_stat("smooth_bases", stats, item.path, "absmax"), axis=-2)
        one = functools.partial(_smooth_one, item.reduce_axes, alpha)
        out[item.path] = ChannelScale(_layers(one, item.shape[: item.stacked])(absmax, jnp.asarray(leaves[item.path])))
    return out


def _smooth_one(axes: tuple[int, ...], alpha: float, absmax: jax.Array, w: jax.Array) -> jax.Array:
    return smooth_scale(absmax, [as_matrix(w, axes)], alpha=alpha)


def awq_bases(params: Params, plan: Plan, stats: Stats, *, ratios: int = 20) -> dict[str, Basis]:
    """`awq_scale` for every planned product, to be applied online: path -> `ChannelScale`."""
    leaves, _ = leaves_with_paths(params)
    out: dict[str, Basis] = {}
    for item in _products(plan):
        known = {name: _stat("awq_bases", stats, item.path, name) for name in ("gram", "mean")}
        how, w = ((item.reduce_axes, _weight_spec("awq_bases", item), 0),), jnp.asarray(leaves[item.path])
        scale = _awq_scales([w], known, how=how, stack=item.shape[: item.stacked], ratios=ratios)
        out[item.path] = ChannelScale(scale)
    return out


def rotation_bases(plan: Plan, key: jax.Array) -> dict[str, Basis]:
    """A random `Rotation` for every planned product: path -> `Rotation`.

    Weights get the same rotation whenever the key and their path are the same.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> params, x = {"w": jnp.ones((8, 4))}, jnp.ones((1, 8))
      >>> plan = jq.make_plan(lambda p, x: x @ p["w"], params, x, rules=[jq.Rule("w", recipes.w8a8())])
      >>> jq.invariances.rotation_bases(plan, jax.random.key(0))["w"].channels
      8

    Source: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456); here every rotation is online; those of
    `rotation_groups` are fused.
    """
    out: dict[str, Basis] = {}
    for item in _products(plan):
        own = jax.random.fold_in(key, zlib.crc32(item.path.encode()))
        out[item.path] = Rotation.random(own, item.channels, item.shape[: item.stacked])
    return out


def _products(plan: Plan) -> list[Item]:
    """Weights that can have a basis."""
    return [item for item in plan.items if item.op in ("dot_general", "ragged_dot")]

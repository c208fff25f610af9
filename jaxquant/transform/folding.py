"""Moves factors and bases between parameters; the function of them stays the same.

rescale       a scale of channels, along a `ScalePair`
fold_gains    the gains of norms, into the weights that read them
rotate        an orthogonal matrix, into all members of a `RotationGroup`
correct_bias  the mean error of a quantized weight's outputs, into its bias
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxquant.core.arithmetic import promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import Stats
from jaxquant.transform.analysis.rotations import RotationGroup
from jaxquant.transform.analysis.scales import Member, ScalePair
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.weights import as_matrix

__all__ = ["correct_bias", "fold_gains", "rescale", "rotate"]


def _spread(values: jax.Array, w: jax.Array, member: Member) -> jax.Array:
    """Values [stack.., channels] along a member's axis of its parameter, repeated along all others."""
    stack = values.shape[:-1]
    shape = [*stack, *[1] * (w.ndim - len(stack))]
    shape[member.axis] = values.shape[-1]
    return values.reshape(shape)


def rescale(params: Params, pair: ScalePair, scale: jax.Array) -> Params:
    """Moves a scale: sinks are multiplied by it along their channels, sources divided. The function stays the same.

    Args:
      params: float parameters.
      pair: from `scale_pairs`.
      scale: positive, ``[*pair.stack, pair.channels]``.

    Returns:
      The same tree.

    Raises:
      QuantError: if the scale has another shape.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.transform.analysis.scales import Member, ScalePair
      >>> pair = ScalePair((Member("b", -2, 1, 0),), (Member("a", -1, -1, 0),), 2)
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}
      >>> new = jq.invariances.rescale(params, pair, jnp.array([2.0, 4.0]))
      >>> new["a"].tolist(), new["b"].tolist()
      ([[0.5, 0.25]], [[2.0], [4.0]])
    """
    expected = (*pair.stack, pair.channels)
    if tuple(jnp.shape(scale)) != expected:
        raise quant_error(
            "rescale", "the scale does not fit the pair", todo=f"Pass one of shape {expected}", shape=jnp.shape(scale)
        )
    leaves, treedef = leaves_with_paths(params)
    for member in (*pair.sinks, *pair.sources):
        w = jnp.asarray(leaves[member.path])
        factor = _spread(jnp.asarray(scale, promoted(w.dtype, jnp.float32)), w, member)
        leaves[member.path] = (w * factor if member.power > 0 else w / factor).astype(w.dtype)
    return jax.tree.unflatten(treedef, leaves.values())


def fold_gains(params: Params, pairs: Iterable[ScalePair]) -> Params:
    """The gains of norms multiplied into the weights that read them, and 1 in their place. The function stays.

    Args:
      params: float parameters.
      pairs: from `scale_pairs`, with a plan of all weights that should take gains. Those count whose only source is a
        vector: norms without a bias.

    Returns:
      The same tree.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> fn = lambda p, x: (x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) * p["gain"]) @ p["w"]
      >>> params, x = {"gain": jnp.array([[2.0, 3.0]]), "w": jnp.ones((2, 2))}, jnp.ones((1, 2))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.OpSpec(jq.QuantSpec("int8")))])
      >>> jq.invariances.fold_gains(params, jq.invariances.scale_pairs(fn, plan, params, x))["w"].tolist()
      [[2.0, 2.0], [3.0, 3.0]]
    """
    leaves, treedef = leaves_with_paths(params)
    for pair in pairs:
        if len(pair.sources) != 1 or pair.sources[0].power > 0:
            continue
        source = pair.sources[0]
        gain = jnp.asarray(leaves[source.path])
        if gain.size != math.prod(pair.stack) * pair.channels:
            continue
        flat = gain.reshape(*pair.stack, pair.channels)
        for member in pair.sinks:
            w = jnp.asarray(leaves[member.path])
            leaves[member.path] = (w * _spread(flat, w, member)).astype(w.dtype)
        leaves[source.path] = jnp.ones_like(gain)
    return jax.tree.unflatten(treedef, leaves.values())


def rotate(params: Params, group: RotationGroup, matrix: jax.Array) -> Params:
    """Turns every member of a group by an orthogonal matrix R: ``w[.., j] = sum_i w[.., i] R[i, j]`` along its axis.

    Args:
      params: float parameters.
      group: from `rotation_groups`.
      matrix: orthogonal, [group.size, group.size].

    Returns:
      The same tree. The function of them is the same, up to rounding in float.

    Raises:
      QuantError: if the matrix has another shape, or a member is quantized already.

    Gradient: with respect to params and matrix.
    """
    if tuple(jnp.shape(matrix)) != (group.size, group.size):
        todo = f"Pass one of shape {(group.size, group.size)}"
        raise quant_error("rotate", "the matrix does not fit the group", todo=todo, shape=jnp.shape(matrix))
    leaves, treedef = leaves_with_paths(params)
    for path, axis in (*group.sinks, *group.others):
        w = leaves[path]
        if isinstance(w, QTensor):
            todo = "Rotate the float params, then quantize"
            raise quant_error("rotate", "the parameter is quantized already", todo=todo, path=path)
        last = jnp.moveaxis(jnp.asarray(w), axis, -1)
        pieces = last.reshape(*last.shape[:-1], -1, group.size)
        turned = jnp.matmul(pieces, matrix.astype(jnp.float32), precision="highest").reshape(last.shape)
        leaves[path] = jnp.moveaxis(turned, -1, axis).astype(w.dtype)
    return jax.tree.unflatten(treedef, leaves.values())


def correct_bias(params: Params, qparams: Params, plan: Plan, found: Mapping[str, str], stats: Stats) -> Params:
    """``b <- b + E[x] (W - W_q)``: the mean of each output is what it was.

    Args:
      params: the float parameters.
      qparams: what `quantize_params` made of them, by any method.
      plan: their plan.
      found: weight -> bias, from `biases`.
      stats: from `calibrate`, with ``"mean"``.

    Returns:
      ``qparams`` with other biases.

    Raises:
      QuantError: if the statistics of a weight with a bias are missing.

    Source: Nagel et al. 2019 (Data-free quantization, arXiv:1906.04721), section 4.2, with measured means.
    """
    leaves, changed = leaves_with_paths(params)[0], leaves_with_paths(qparams)
    new, treedef = changed
    for path, bias in found.items():
        item = plan[path]
        mean = stats.get(path, {}).get("mean")
        if mean is None:
            todo = 'Pass collect={"mean": jq.calibration.ChannelMean()} to calibrate'
            raise quant_error("correct_bias", "there is no mean of the inputs", todo=todo, path=path)
        leaf = new[path]
        delta = jnp.asarray(leaves[path], jnp.float32) - (
            leaf.dequantize(jnp.float32) if isinstance(leaf, QTensor) else jnp.asarray(leaf, jnp.float32)
        )

        def shift(delta: jax.Array, mean: Mapping[str, jax.Array], item: Item = item) -> jax.Array:
            rows = jnp.maximum(jnp.sum(mean["rows"]), 1.0)
            return (jnp.sum(mean["sum"], axis=0) / rows) @ as_matrix(delta, item.reduce_axes)

        b = jnp.asarray(new[bias])
        new[bias] = (b + item.stack(shift)(delta, mean).reshape(b.shape)).astype(b.dtype)
    return jax.tree.unflatten(treedef, new.values())

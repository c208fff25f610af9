"""`correct_bias`: what rounding does to a layer's mean output, taken back by its bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.transform.pairs import body_of
from jaxquant.transform.paths import leaves_with_paths
from jaxquant.transform.plan import Item, Plan, is_float
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.trace import trace

__all__ = ["biases", "correct_bias"]


class _Tag(NamedTuple):
    """What is known of a value: that it is a parameter, or the product of an input with one."""

    path: str
    product: bool = False


_VIEWS = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy", "transpose"}


def _seen(plan: Plan, eqn: Any, tag: _Tag | None, size: int | None) -> _Tag | None:
    """What is left of a tag after a view: the outputs, and what is added to them, must stay on the last axes.

    ``size`` is how many outputs a product has, or how many elements a parameter.
    """
    if tag is None or size is None:
        return None
    shape = tuple(eqn.outvars[0].aval.shape)
    if str(eqn.primitive) == "transpose":
        return tag if not tag.product and tag.path in plan and len(shape) == 2 else None
    if not tag.product and tag.path in plan:
        return tag
    if str(eqn.primitive) == "broadcast_in_dim":
        long = [i for i, n in zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True) if n > 1]
        if long != list(range(len(shape) - len(long), len(shape))):
            return None
    suffixes = [math.prod(shape[i:]) for i in range(len(shape))]
    return tag if size in suffixes and (shape[-1] != 1 or size == 1) else None


def biases(fn: Callable[..., Any], plan: Plan, params: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
    """Which parameter is added to the product with each planned weight, and to nothing else.

    Found from the trace: the result of a weight's product, reshaped or cast, plus a parameter, reshaped, repeated or
    cast, that has one number for each output and no other use.

    Args:
      fn: a function of params; traced, never run.
      plan: its plan.
      params: its parameters: arrays or shapes.
      *args, **kwargs: its further arguments.

    Returns:
      Path of the weight -> path of its bias, for the weights that have one.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((4, 3)), "b": jnp.zeros((1, 3))}
      >>> plan = jq.make_plan(fn, params, jnp.ones((2, 4)), rules=[jq.Rule("w", recipes.w8a16())])
      >>> jq.biases(fn, plan, params, jnp.ones((2, 4)))
      {'w': 'b'}
    """
    check_plan("biases", plan, leaves_with_paths(params)[0])
    traced = trace("biases", fn, params, args, kwargs)
    found: dict[str, set[str]] = {}
    uses: dict[str, int] = {}
    leaves = traced.params.items()
    tags = [_Tag(path) if is_float(leaf) and not isinstance(leaf, QTensor) else None for path, leaf in leaves]
    for tag in _walk(plan, traced.jaxpr, [*tags, *[None] * len(traced.arrays)], found, uses):
        _count(uses, tag)
    out = {}
    for item in plan.items:
        added = found.get(item.path, set())
        if len(added) == 1 and uses[item.path] == 1:
            (path,) = added
            if uses[path] == 1 and math.prod(traced.params[path].shape) == math.prod(item.shape) // _channels(item):
                out[item.path] = path
    return out


def _channels(item: Item) -> int:
    return math.prod(item.shape[axis] for axis in item.reduce_axes)


def _size(plan: Plan, v: Any, tag: _Tag | None) -> int | None:
    """How many outputs a product has, or how many elements a parameter (before anything repeats it)."""
    if tag is None:
        return None
    if not tag.product:
        return math.prod(n for n in v.aval.shape)
    item = plan[tag.path]
    return math.prod(item.shape[item.stacked :]) // _channels(item)


def _count(uses: dict[str, int], tag: _Tag | None) -> None:
    if tag is not None and not tag.product:
        uses[tag.path] = uses.get(tag.path, 0) + 1


def _walk(
    plan: Plan, closed: ClosedJaxpr, inputs: list[_Tag | None], found: dict[str, set[str]], uses: dict[str, int]
) -> list[_Tag | None]:
    """Tags of the outputs; adds to ``found`` (weight -> what is added) and ``uses`` (of each parameter)."""
    jaxpr = closed.jaxpr
    env: dict[Any, _Tag | None] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(v: Any) -> _Tag | None:
        return None if isinstance(v, Literal) else env.get(v)

    for eqn in jaxpr.eqns:
        tags, name = [read(v) for v in eqn.invars], str(eqn.primitive)
        results: list[_Tag | None] = [None] * len(eqn.outvars)
        body = eqn.params["jaxpr"] if name == "scan" else body_of(eqn)
        if body is not None:
            moving = range(0)
            if name == "scan":
                moving = range(eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"])
            for i in moving:
                _count(uses, tags[i])
            inner = _walk(plan, body, [None if i in moving else t for i, t in enumerate(tags)], found, uses)
            results = results if name == "scan" else inner
        elif name in _VIEWS:
            results = [_seen(plan, eqn, tags[0], _size(plan, eqn.invars[0], tags[0]))]
            if results[0] is None:
                _count(uses, tags[0])
        else:
            for tag in tags:
                _count(uses, tag)
            known = [t for t in tags if t is not None]
            if name == "dot_general" and tags[0] is None and not eqn.params["dimension_numbers"][1][1]:
                if known and not known[0].product and known[0].path in plan:  # the outputs are the last axes
                    results = [_Tag(known[0].path, product=True)]
            elif name in ("add", "add_any") and len(known) == 2 and known[0].product != known[1].product:
                weight, bias = sorted(known, key=lambda t: not t.product)
                found.setdefault(weight.path, set()).add(bias.path)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars]


def correct_bias(params: Any, qparams: Any, plan: Plan, found: Mapping[str, str], stats: Mapping[str, Any]) -> Any:
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
            todo = 'Pass collect={"mean": jq.statistics.ChannelMean()} to calibrate'
            raise quant_error("correct_bias", "there is no mean of the inputs", todo=todo, path=path)
        leaf = new[path]
        delta = jnp.asarray(leaves[path], jnp.float32) - (
            leaf.dequantize(jnp.float32) if isinstance(leaf, QTensor) else jnp.asarray(leaf, jnp.float32)
        )

        def shift(delta: jax.Array, mean: Any, item: Item = item) -> jax.Array:
            first = tuple(range(len(item.reduce_axes)))
            flat = jnp.moveaxis(delta, item.reduce_axes, first).reshape(_channels(item), -1)
            return (jnp.sum(mean["sum"], axis=0) / jnp.maximum(jnp.sum(mean["rows"]), 1.0)) @ flat

        b = jnp.asarray(new[bias])
        new[bias] = (b + item.stack(shift)(delta, mean).reshape(b.shape)).astype(b.dtype)
    return jax.tree.unflatten(treedef, new.values())

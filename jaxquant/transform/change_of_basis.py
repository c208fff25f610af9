"""`precondition`: a function whose planned weights are multiplied in another basis; `precondition_params`: the params.

If a change of basis cannot be fused into a neighbour (`jaxquant.invariances.scale_pairs` finds where it can), it runs
online: the input of the product is transformed at each call.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, leaves_with_paths, nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ptq.bases import Basis
from jaxquant.transform.interpreter import Interpreter
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import check_plan, weights_of
from jaxquant.transform.trace import trace
from jaxquant.transform.weights import Weight, as_array, as_matrix, from_matrix

__all__ = ["precondition", "precondition_params"]

_OPS = ("dot_general", "ragged_dot")


def precondition(fn: Callable[..., PyTree], plan: Plan, bases: Mapping[str, Basis]) -> Callable[..., PyTree]:
    """``fn`` with the inputs of some planned weights in another basis: a function with ``fn``'s own signature.

    ``precondition(fn, plan, bases)(precondition_params(params, plan, bases), ...)`` equals ``fn(params, ...)`` up to
    rounding in float. The new function is an ordinary one: plan it, calibrate it, quantize its parameters. It pays for
    each basis at run time (see `jaxquant.ptq.bases`).

    Args:
      fn: a function of params.
      plan: its plan; says which axes of a weight are its input channels. The specs do not matter here.
      bases: path -> `Basis`, for any of the plan's weights.

    Returns:
      A function ``(params, *args, **kwargs)``.

    Raises:
      QuantError: if a path is not planned, its weight goes into another operation than a product (a lookup, say, of a
        tied table: there the weight is needed as it was), or the basis is for another number of channels.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(8)}
      >>> x = jnp.arange(8.0)[None]
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.w8a8())])
      >>> bases = {"w": jq.ptq.bases.Rotation.random(jax.random.key(0), 8)}
      >>> rotated = jq.invariances.precondition(fn, plan, bases)
      >>> turned = jq.invariances.precondition_params(params, plan, bases)
      >>> bool(jnp.allclose(rotated(turned, x), fn(params, x), atol=1e-5))
      True
    """
    for path, basis in bases.items():
        _check(plan, path, basis)
    items = tuple(dataclasses.replace(plan[path], spec=OpSpec()) for path in bases)
    bare = Plan(items)

    @functools.wraps(fn)
    def run(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        traced = trace("precondition", fn, params, args, kwargs)
        check_plan("precondition", bare, traced.params)
        interpreter = Interpreter(bare, entering=_into_basis)
        results = interpreter.run(traced.jaxpr, weights_of(traced, bare, bases))
        return traced.rebuild([r.real() if isinstance(r, Weight) else as_array(r) for r in results])

    return run


def _into_basis(weight: Weight, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """``x`` with its channels, which lie on ``axes``, in the weight's basis."""
    last = tuple(range(-len(axes), 0))
    moved = jnp.moveaxis(x, axes, last)
    flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
    return jnp.moveaxis(weight.state.inputs(flat).reshape(moved.shape), last, axes)


def precondition_params(params: Params, plan: Plan, bases: Mapping[str, Basis]) -> Params:
    """The parameters for `precondition`: the weights in the dual bases.

    Args:
      params: float parameters of the function that was planned.
      plan: its plan.
      bases: path -> `Basis`.

    Returns:
      The same tree; weights that have no basis are the same arrays.

    Raises:
      QuantError: as `precondition`, and for a weight that is quantized already.
    """
    leaves, treedef = leaves_with_paths(params)
    check_plan("precondition_params", plan, leaves)
    for path, basis in bases.items():
        item = _check(plan, path, basis)
        if isinstance(leaves[path], QTensor):
            todo = "Change the basis of the float params, then quantize"
            raise quant_error("precondition_params", "the weight is quantized already", todo=todo, path=path)
        leaves[path] = item.stack(functools.partial(_weight, item.reduce_axes))(jnp.asarray(leaves[path]), basis)
    return jax.tree.unflatten(treedef, leaves.values())


def _weight(axes: tuple[int, ...], w: jax.Array, basis: Basis) -> jax.Array:
    return from_matrix(basis.weights(as_matrix(w, axes)), w.shape, axes)


def _check(plan: Plan, path: str, basis: Basis) -> Item:
    item = plan.get(path)
    if item is None:
        todo = f"Nearest planned weights: {nearest(path, plan)}"
        raise quant_error("precondition", "a basis for a weight that is not planned", todo=todo, path=path)
    if item.op not in _OPS or item.in_float or item.dequantize:
        todo = f"Leave it out; bases are for weights whose only use is one of {', '.join(_OPS)}"
        raise quant_error("precondition", "the weight is used in another way too", todo=todo, path=path, op=item.op)
    if basis.channels != item.channels:
        todo = f"Make it for {item.channels} channels"
        raise quant_error("precondition", "the basis does not fit", todo=todo, path=path, channels=basis.channels)
    return item

"""`update_params`: steps and averages of quantized weights, computed on their values."""

from __future__ import annotations

from collections.abc import Callable

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import Params, is_qtensor, leaves_with_paths
from jaxquant.core.refusals import Refusals
from jaxquant.core.types import PyTree
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan

__all__ = ["update_params"]


def update_params(fn: Callable[..., PyTree], plan: Plan, params: Params, *others: PyTree) -> PyTree:
    """Applies ``fn`` to dequantized params and quantizes the result: averages of weights, steps of an optimizer.

        update_params(fn, plan, p, ...) = quantize_params(fn(dequantize_params(p), ...), plan)

    To `jax.tree.map` a QTensor is a tree of codes and scales, and a sum of codes is no sum of weights.

    Args:
      fn: a function of float trees, such as `optax.apply_updates`.
      plan: of the params; it says how each weight is quantized.
      params: a tree with QTensors where the plan has quantized weights. Floats there are taken as they are.
      others: further trees for ``fn``. QTensors among their leaves are dequantized too.

    Returns:
      The results of ``fn``, with QTensors for the weights of the plan. A value moves by whole steps of its scale: keep
      the average itself in float if changes are smaller than half a step.

    Raises:
      QuantError: naming the path, if a QTensor is none of the plan's, or its leaves are those of a gradient with
        respect to codes (float0), of arithmetic on codes, or None; and as `quantize_params`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, jnp.ones((1, 4))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.w8a16())])
      >>> half = lambda old, new: jax.tree.map(lambda a, b: (a + b) / 2, old, new)
      >>> average = jq.qat.update_params(half, plan, jq.quantize_params(params, plan), {"w": 3 * jnp.eye(4)})
      >>> average["w"].dequantize()[0]
      Array([2., 0., 0., 0.], dtype=float32)
    """
    function = "update_params"
    if not isinstance(plan, Plan):
        raise quant_error(function, "plan must be a Plan", todo="Pass what make_plan returned", plan=plan)
    planned = {item.path for item in plan.items if item.spec.weight is not None}
    refusals = Refusals(function)
    for number, tree in enumerate((params, *others)):
        for path, leaf in leaves_with_paths(tree)[0].items():
            with refusals.gather():
                _check_values(function, path, leaf, path in planned or number > 0)
    refusals.close()
    return quantize_params(fn(*map(dequantize_params, (params, *others))), plan)


def _check_values(function: str, path: str, leaf: object, planned: bool) -> None:
    """Raises for a QTensor that stands for no values, or that would stay in float."""
    if not is_qtensor(leaf):
        return
    if not planned:
        todo = "Pass the plan that it was quantized by"
        raise quant_error(function, "the plan does not quantize this QTensor", todo=todo, path=path, tensor=repr(leaf))
    try:
        leaf.checked()
    except (AttributeError, QuantError, TypeError):
        rule = "the leaves of this QTensor are no codes and scales"
        todo = "Codes have no gradient: train float params (see make_plan), and pass float updates"
        raise quant_error(function, rule, todo=todo, path=path, codes=leaf.stored, scale=leaf.scale) from None

"""`quantize_params`: float leaves to `QTensor`s, by rules on their paths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.core.affine import has_nan
from jaxquant.core.blocks import block_shape, negative_axes
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor, dequantize
from jaxquant.core.specs import QuantSpec, Rule
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.make_plan import check_rules
from jaxquant.transform.paths import is_qtensor, leaves_with_paths, nearest
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.quantized import check_plan

__all__ = ["dequantize_params", "quantize_params"]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What kind of layer a parameter belongs to: which axes it contracts and how its codes are stored."""

    reduce_axes: tuple[int, ...]
    contraction_minor: bool = True
    stacked: int = 0


def _layer_of(path: str, ndim: int) -> _Layer | None:
    """The kind of layer, from Flax's parameter names; None where they leave it open.

    Dense: a 2-dimensional ``kernel``. Embed: a 2-dimensional ``embedding``, one scale per row, for lookup and tied
    attention alike. Conv: a ``kernel`` of 3 to 5 dimensions in a module with "conv" in its name; stored in its own axis
    order, which is the one a convolution reads fast.
    """
    *modules, name = path.split("/")
    if name == "embedding" and ndim == 2:
        return _Layer((-1,))
    if name != "kernel":
        return None
    if ndim == 2:
        return _Layer((-2,))
    if 3 <= ndim <= 5 and modules and "conv" in modules[-1].lower():
        return _Layer(tuple(range(-ndim, -1)), contraction_minor=False)
    return None


def _assign(leaves: Mapping[str, Any], rules: Sequence[Rule]) -> dict[str, tuple[QuantSpec, _Layer]]:
    """path -> (weight spec, layer) for every leaf that a rule quantizes; checks the rules."""
    function = "quantize_params"
    rules = check_rules(function, rules)
    assigned: dict[str, tuple[QuantSpec, _Layer]] = {}
    used = [False] * len(rules)
    for path, leaf in leaves.items():
        won = False
        for i, rule in enumerate(rules):
            if not rule.matches(path):
                continue
            layer = None
            if rule.spec is not None and is_float(leaf):
                layer = _Layer(rule.reduce_axes) if rule.reduce_axes else _layer_of(path, len(leaf.shape))
                if layer is None and path.split("/")[-1] == "kernel" and not won:
                    raise quant_error(
                        function,
                        "neither name nor shape says which axes this kernel contracts",
                        todo=f"Write Rule({rule.pattern!r}, spec, reduce_axes=(...)) with the contracted axes, "
                        "counted from the end",
                        path=path,
                        shape=leaf.shape,
                    )
            used[i] = used[i] or rule.spec is None or layer is not None
            if not won and layer is not None and rule.spec is not None and rule.spec.weight is not None:
                assigned[path] = (rule.spec.weight, layer)
            won = won or rule.spec is None or layer is not None
    for rule, hit in zip(rules, used, strict=True):
        if not hit:
            weights = [p for p, leaf in leaves.items() if is_float(leaf) and _layer_of(p, len(leaf.shape))]
            raise quant_error(
                function,
                "a rule matches no weight",
                todo=f"Nearest weights: {nearest(rule.pattern, weights or leaves)}. For a parameter that is not named "
                "as Flax names it, give the rule reduce_axes",
                pattern=rule.pattern,
            )
    return assigned


def _check_weight(path: str, leaf: Any, spec: QuantSpec, layer: _Layer) -> None:
    if isinstance(leaf, QTensor):
        todo = "Quantize the float params, or leave it out with Rule(pattern, None)"
        raise quant_error("quantize_params", "the weight is quantized already", todo=todo, path=path, weight=repr(leaf))
    shape = tuple(leaf.shape)
    if math.prod(shape) == 0:
        todo = "Leave it in float with Rule(pattern, None)"
        raise quant_error("quantize_params", "the weight is empty", todo=todo, path=path, shape=shape)
    try:
        axes = negative_axes(layer.reduce_axes, len(shape), function="quantize_params", shape=shape)
    except QuantError as error:
        raise quant_error("quantize_params", str(error), todo="Correct the rule", path=path) from None
    block_shape(shape[layer.stacked :], spec.granularity, spec.group_size, axes, function="quantize_params", path=path)
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
        return
    if not bool(jnp.all(jnp.isfinite(leaf))):
        bad = int(jnp.sum(~jnp.isfinite(jnp.asarray(leaf))))
        todo = "Find out why training produced them; a checkpoint with NaN or inf cannot be quantized"
        raise quant_error(
            "quantize_params", "a weight must be finite", todo=todo, path=path, nan_or_inf=bad, shape=shape
        )


def _check_stats(path: str, stats: Any) -> None:
    """Raises if what was collected of a weight's inputs holds a NaN, wherever a method could not tell: under vmap."""
    for leaf in jax.tree.leaves(stats):
        if is_float(leaf) and has_nan(leaf):
            todo = "Find the batch that holds NaN, or in which NaN arises"
            raise quant_error("quantize_params", "the statistics hold NaN", todo=todo, path=path)


def quantize_params(
    params: Any,
    plan: Plan | Sequence[Rule],
    *,
    method: Callable[..., QTensor] = rtn,
    stats: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Replaces the weights that rules name by `QTensor`s; the tree keeps its structure, the input is not changed.

    With a plan, all is settled. With rules, the axes that share a scale come from the kind of layer, by Flax's
    parameter names: the input features of a ``kernel`` of two dimensions, everything but the output features of a
    convolution's ``kernel``, each row of an ``embedding``.
    Where names and shape leave it open (``DenseGeneral``, stacked layers, other libraries), the rule says it:
    ``Rule(pattern, spec, reduce_axes=(-3, -2))``. Parameters of no such kind (biases, norms) stay in float.

    All weights are checked before the first is quantized.

    Args:
      params: a pytree of float arrays.
      plan: a `Plan` from `make_plan`, or rules: the first that matches a path wins, ``Rule(pattern, None)`` keeps what
        it matches in float.
      method: a quantizer ``(w, spec, *, reduce_axes, stats) -> QTensor``; see `jaxquant.ptq`.
      stats: path -> what the method wants to know about the inputs of that weight.
      progress: called after each weight with how many are done, and of how many.

    Returns:
      The same tree with QTensors in place of the weights that were quantized.

    Raises:
      QuantError: naming the path, if a rule matches no weight, the axes of a matching kernel are not known, a group
        size does not divide, a weight is empty, quantized already, NaN or infinite, or its statistics hold NaN.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> params = {"Dense_0": {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}}
      >>> jq.quantize_params(params, [jq.Rule(".*", recipes.w4a16(group_size=32))])["Dense_0"]["kernel"]
      QTensor(int4[64, 32] -> float32, group 32 on axis -2, symmetric, 1.2 KiB)
    """
    leaves, treedef = leaves_with_paths(params)
    if isinstance(plan, Plan):
        check_plan("quantize_params", plan, leaves)
        planned = [(i.path, i.spec.weight, _Layer(i.reduce_axes, i.contraction_minor, i.stacked)) for i in plan.items]
        assigned = {path: (spec, layer) for path, spec, layer in planned if spec is not None}
    else:
        assigned = _assign(leaves, plan)
    for path, (spec, layer) in assigned.items():
        _check_weight(path, leaves[path], spec, layer)
        _check_stats(path, (stats or {}).get(path))
    for done, (path, (spec, layer)) in enumerate(assigned.items(), 1):

        def one(w: jax.Array, known: Any, spec: QuantSpec = spec, layer: _Layer = layer) -> QTensor:
            q = method(w, spec, reduce_axes=layer.reduce_axes, stats=known)
            return q if layer.contraction_minor else q.store(())

        for _ in range(layer.stacked):
            one = jax.vmap(one)
        leaves[path] = one(jnp.asarray(leaves[path]), (stats or {}).get(path))
        if progress is not None:
            jax.block_until_ready(leaves[path])
            progress(done, len(assigned))
    return jax.tree.unflatten(treedef, leaves.values())


def dequantize_params(params: Any) -> Any:
    """Every `QTensor` of a tree to the float array it stands for; other leaves as they are.

    Args:
      params: a pytree with QTensors among its leaves.

    Returns:
      The same tree in float.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> params = {"w": jq.quantize(jnp.eye(2), jq.QuantSpec("int8"), reduce_axes=(-2,)), "b": jnp.zeros(2)}
      >>> jq.dequantize_params(params)["w"]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    return jax.tree.map(lambda x: dequantize(x) if is_qtensor(x) else x, params, is_leaf=is_qtensor)

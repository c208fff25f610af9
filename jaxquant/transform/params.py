"""`quantize_params`: float leaves to `QTensor`s, by rules on their paths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.core.affine import quantize
from jaxquant.core.blocks import block_shape, negative_axes
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.finite import has_nan, not_finite
from jaxquant.core.layout import Layout
from jaxquant.core.learned import learned_range
from jaxquant.core.paths import Leaf, Params, is_qtensor, leaves_with_paths, nearest, path_of
from jaxquant.core.qtensor import QTensor, dequantize
from jaxquant.core.refusals import Refusals
from jaxquant.core.relayout import laid_out
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree, State
from jaxquant.ops.shardings import explicit_of, shardings
from jaxquant.ops.targets import Platform, check_target, layout_for
from jaxquant.ptq.gram import NeedsStatisticsError
from jaxquant.ptq.named import quantizer
from jaxquant.ptq.rtn import rtn
from jaxquant.rules import Rule
from jaxquant.transform.make_plan import check_rules
from jaxquant.transform.misfits import fitted
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.primitives import automatic
from jaxquant.transform.quantized import check_plan, check_state

__all__ = ["dequantize_params", "quantize_params"]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """The kind of layer of a parameter: which axes it contracts, how its codes are stored, and whether it is only
    looked up.
    """

    reduce_axes: tuple[int, ...]
    contraction_minor: bool = True
    stacked: int = 0
    lookup: bool = False


def _layer_of(path: str, leaves: Mapping[str, Leaf]) -> _Layer | None:
    """The kind of layer, from Flax's parameter names and the shapes beside it; None where they leave it open.

    Dense: a 2-dimensional ``kernel``. Embed: a 2-dimensional ``embedding``, one scale per row, for lookup and tied
    attention alike. Conv: a ``kernel`` of 3 to 5 dimensions in a module with "conv" in its name; stored in its own axis
    order, which is the one a convolution reads fast. Any other ``kernel`` with a ``bias``, which has the shape of the
    outputs: those are the kernel's last axes, or (a stack) its first one and its last ones. Attention: the kernels of
    ``query``, ``key``, ``value`` and ``out``.
    """
    *modules, name = path.split("/")
    shape = tuple(leaves[path].shape)
    ndim = len(shape)
    if name == "embedding" and ndim == 2:
        return _Layer((-1,))
    if name != "kernel":
        return None
    if ndim == 2:
        return _Layer((-2,))
    if 3 <= ndim <= 5 and modules and "conv" in modules[-1].lower():
        return _Layer(tuple(range(-ndim, -1)), contraction_minor=False)
    bias = leaves.get("/".join([*modules, "bias"]))
    if ndim > 2 and bias is not None and hasattr(bias, "shape"):
        return _beside(shape, tuple(bias.shape))
    return _attention(modules, leaves) if ndim == 3 and modules else None


def _beside(shape: tuple[int, ...], bias: tuple[int, ...]) -> _Layer | None:
    """The kind of a kernel with a bias of this shape: outputs last, or stacked; None if it is neither, or may be both.

    A bias of one dimension leaves open whether its kernel is a convolution's; the axes are the same.
    """
    outputs = 0 < len(bias) < len(shape) and shape[-len(bias) :] == bias
    inner = bias[1:]
    stacked = bool(inner) and shape[0] == bias[0] and len(inner) < len(shape) - 1 and shape[-len(inner) :] == inner
    if outputs == stacked:
        return None
    if outputs:
        return _Layer(tuple(range(-len(shape), -len(bias))))
    return _Layer(tuple(range(1 - len(shape), -len(inner))), stacked=1)


def _attention(modules: Sequence[str], leaves: Mapping[str, Leaf]) -> _Layer | None:
    """The kernels [features, heads, channels] and [heads, channels, features] of an attention without biases."""
    found = {}
    for part in ("query", "key", "value", "out"):
        leaf = leaves.get("/".join([*modules[:-1], part, "kernel"]))
        if leaf is None or len(leaf.shape) != 3:
            return None
        found[part] = tuple(leaf.shape)
    query, key, value, out = found.values()
    if modules[-1] not in found or query[1:] != key[1:] or value[1:] != out[:2]:
        return None
    if len({shape[0] for shape in found.values()}) == 1:  # as many heads as features, or layers of a stack
        return None
    return _Layer((-3, -2) if modules[-1] == "out" else (-3,))


def _assign(leaves: Mapping[str, Leaf], rules: Sequence[Rule]) -> dict[str, tuple[QuantSpec, _Layer]]:
    """path -> (weight spec, layer) for every leaf that a rule quantizes; checks the rules."""
    function = "quantize_params"
    rules = check_rules(function, rules)
    assigned: dict[str, tuple[QuantSpec, _Layer]] = {}
    refusals = Refusals(function)
    used = [False] * len(rules)
    for path, leaf in leaves.items():
        won = False
        for i, rule in enumerate(rules):
            if not rule.matches(path):
                continue
            layer = None
            if rule.spec is not None and is_float(leaf):
                layer = _Layer(rule.reduce_axes) if rule.reduce_axes else _layer_of(path, leaves)
                if layer is None and path.split("/")[-1] == "kernel" and not won:
                    won = used[i] = True
                    with refusals.gather():
                        raise quant_error(
                            function,
                            "neither name nor shape says which axes this kernel contracts",
                            todo="Pass a plan: make_plan(fn, params, *args, rules=rules) finds them in it. Or "
                            f"write Rule({rule.pattern!r}, spec, reduce_axes=(...)), counted from the end",
                            path=path,
                            shape=leaf.shape,
                        )
            used[i] = used[i] or rule.spec is None or layer is not None
            if not won and layer is not None and rule.spec is not None and rule.spec.weight is not None:
                with refusals.gather():
                    spec = _fitted(path, leaf, rule, layer)
                    if spec is not None:
                        assigned[path] = (spec, layer)
            won = won or rule.spec is None or layer is not None
    for rule, hit in zip(rules, used, strict=True):
        if not hit:
            weights = [p for p, leaf in leaves.items() if is_float(leaf) and _layer_of(p, leaves)]
            todo = f"Nearest weights: {nearest(rule.pattern, weights or leaves)}. For a parameter that is not named as "
            todo += "Flax names it, give the rule reduce_axes"
            with refusals.gather():
                raise quant_error(function, "a rule matches no weight", todo=todo, pattern=rule.pattern)
    refusals.close()
    return assigned


def _axes(path: str, shape: tuple[int, ...], layer: _Layer) -> tuple[int, ...]:
    try:
        return negative_axes(layer.reduce_axes, len(shape), function="quantize_params", shape=shape)
    except QuantError as error:
        raise quant_error("quantize_params", str(error), todo="Correct the rule", path=path) from None


def _fitted(path: str, leaf: Leaf, rule: Rule, layer: _Layer) -> QuantSpec | None:
    """The weight's spec for a layer of this shape; None: it stays in float."""
    assert rule.spec is not None
    shape = tuple(leaf.shape)
    weight = OpSpec(rule.spec.weight)
    spec, _ = fitted("quantize_params", path, rule, weight, shape[layer.stacked :], _axes(path, shape, layer))
    return None if spec is None else spec.weight


def _check_weight(path: str, leaf: Leaf, spec: QuantSpec, layer: _Layer) -> None:
    if isinstance(leaf, QTensor):
        todo = "Quantize the float params, or leave it out with Rule(pattern, None)"
        raise quant_error("quantize_params", "the weight is quantized already", todo=todo, path=path, weight=repr(leaf))
    shape = tuple(leaf.shape)
    if math.prod(shape) == 0:
        todo = "Leave it in float with Rule(pattern, None)"
        raise quant_error("quantize_params", "the weight is empty", todo=todo, path=path, shape=shape)
    axes = _axes(path, shape, layer)
    block_shape(shape[layer.stacked :], spec.granularity, axes, function="quantize_params", path=path)
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
        return
    if bad := not_finite(cast(jax.Array, leaf)):
        todo = "Find out why training produced them; a checkpoint with NaN or inf cannot be quantized"
        raise quant_error(
            "quantize_params", "a weight must be finite", todo=todo, path=path, nan_or_inf=bad, shape=shape
        )


def _check_stats(path: str, stats: PyTree) -> None:
    """Raises if what was collected of a weight's inputs holds a NaN, wherever a method could not tell: under vmap."""
    for leaf in jax.tree.leaves(stats):
        if is_float(leaf) and has_nan(leaf):
            todo = "Find the batch that holds NaN, or in which NaN arises"
            raise quant_error("quantize_params", "the statistics hold NaN", todo=todo, path=path)


def _quantized(
    path: str,
    leaf: Leaf,
    spec: QuantSpec,
    layer: _Layer,
    method: Callable[..., QTensor],
    stats: PyTree,
    layout: Layout,
) -> QTensor:
    """One weight, or each of a stack, by a method; a lookup, which has no inputs, to nearest if that looks at them."""

    def by(method: Callable[..., QTensor]) -> QTensor:
        def one(w: jax.Array, known: PyTree) -> QTensor:
            q = method(w, spec, reduce_axes=layer.reduce_axes, stats=known)
            if layout != "packed":
                return laid_out(q, layout, () if layer.lookup else None)  # rows are gathered as they are
            return q if layer.contraction_minor else q.store(())

        for _ in range(layer.stacked):
            one = jax.vmap(one)
        w = jnp.asarray(leaf)
        placed = explicit_of(w)
        if placed is None:
            return one(w, stats)
        like = jax.eval_shape(one, jax.ShapeDtypeStruct(w.shape, w.dtype), stats)
        return automatic(one, shardings(like, placed))(w, stats)

    try:
        return by(method)
    except QuantError as error:
        if isinstance(error, NeedsStatisticsError) and layer.lookup and stats is None:
            return by(rtn)
        raise QuantError(str(error), "quantize_params", path) from None


def by_steps(w: jax.Array, spec: QuantSpec, *, reduce_axes: tuple[int, ...], stats: PyTree) -> QTensor:
    """To nearest with a learned range."""
    scale, zero_point = learned_range(stats, spec)
    zero_point = None if zero_point is None else zero_point.astype(spec.type.code_dtype)
    return quantize(w, spec, reduce_axes=reduce_axes, scale=scale, zero_point=zero_point)


def quantize_params(
    params: Params,
    plan: Plan | Sequence[Rule],
    *,
    method: str | Callable[..., QTensor] = rtn,
    stats: Mapping[str, PyTree] | None = None,
    state: State | None = None,
    target: Platform | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Params:
    """Replaces the weights that rules name by `QTensor`s; the tree keeps its structure, the input is not changed.

    With a plan, all is settled. With rules, the axes that share a scale come from the kind of layer, by Flax's
    parameter names: the input features of a ``kernel`` of two dimensions, everything but the output features of a
    convolution's ``kernel``, each row of an ``embedding``. The output axes of a ``kernel`` with a
    ``bias`` are those of the bias (``DenseGeneral``, stacked layers); the same holds in an attention.
    Where names and shapes leave it open (``DenseGeneral`` without a bias, other libraries), pass a plan, or let the
    rule say it: ``Rule(pattern, spec, reduce_axes=(-3, -2))``. Parameters of no such kind (biases, norms) stay float.

    All weights are checked before the first is quantized, and all that is wrong with any is said at once.

    Args:
      params: a pytree of float arrays.
      plan: a `Plan` from `make_plan`, or rules: the first that matches a path wins, ``Rule(pattern, None)`` keeps what
        it matches in float.
      method: a quantizer ``(w, spec, *, reduce_axes, stats) -> QTensor``, or the name of one, such as ``"gptq"``; see
        `jaxquant.ptq`. One that looks at inputs rounds to nearest what a plan knows to be only looked up: it has none.
      stats: path -> what the method wants to know about the inputs of that weight.
      state: learned steps of weights, from `qat.learned_steps`; those weights are rounded to nearest with them, as the
        function that was trained has done. Ranges of activations in it stay for `quantized`.
      target: the platform that the codes will be read on, ``"cpu"``, ``"tpu"`` or ``"gpu"``; by default the one where
        the arrays are. It decides how codes lie in memory (`jaxquant.ops.lay_out`), and no value.
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
    method = quantizer("quantize_params", method)
    check_target("quantize_params", target)
    leaves, treedef = leaves_with_paths(params)
    if isinstance(plan, Plan):
        check_plan("quantize_params", plan, leaves)
        check_state("quantize_params", plan, state)
        assigned = {
            i.path: (i.spec.weight, _Layer(i.reduce_axes, i.contraction_minor, i.stacked, i.lookup))
            for i in plan.items
            if i.spec.weight is not None
        }
    else:
        if state is not None:
            todo = "Pass the plan that the state is for in the place of rules"
            raise quant_error("quantize_params", "state needs a plan", todo=todo, paths=tuple(state))
        assigned = _assign(leaves, plan)
    steps = {path: entry["weight"] for path, entry in (state or {}).items() if "weight" in entry}
    if steps and method is not rtn:
        todo = "Leave out method, or state"
        raise quant_error("quantize_params", "learned steps round to nearest", todo=todo, method=method)
    refusals = Refusals("quantize_params")
    for path, (spec, layer) in assigned.items():
        with refusals.gather():
            _check_weight(path, leaves[path], spec, layer)
            _check_stats(path, (stats or {}).get(path))
    refusals.close()
    known = {path: steps.get(path, (stats or {}).get(path)) for path in assigned}
    # Missing statistics should raise before a method has worked for long.
    for done, path in enumerate(sorted(assigned, key=lambda path: known[path] is not None), 1):
        layout = layout_for(target, leaves[path])
        by = by_steps if path in steps else method
        leaves[path] = _quantized(path, leaves[path], *assigned[path], by, known[path], layout)
        if progress is not None:
            jax.block_until_ready(leaves[path])
            progress(done, len(assigned))
    return jax.tree.unflatten(treedef, leaves.values())


def dequantize_params(params: Params) -> Params:
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

    def in_float(keys: tuple[object, ...], x: PyTree) -> PyTree:
        if not is_qtensor(x):
            return x
        placed = explicit_of(x.checked(path_of(keys)))
        return dequantize(x) if placed is None else automatic(dequantize, placed)(x)

    return jax.tree_util.tree_map_with_path(in_float, params, is_leaf=is_qtensor)

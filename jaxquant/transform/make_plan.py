"""`make_plan`: rules and a trace to a `Plan`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.granularity import PerTensor
from jaxquant.core.paths import Leaf, Params, nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.core.refusals import Refusals
from jaxquant.core.sizes import number
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.rules import OpRule, Rule, Stated
from jaxquant.transform.interpreter import Interpreter, Use
from jaxquant.transform.misfits import fitted
from jaxquant.transform.plan import UNUSED, Float, Item, Plan, Product, is_float
from jaxquant.transform.products import Products
from jaxquant.transform.trace import trace
from jaxquant.transform.weights import ABSENT, Weight, dims_of

__all__ = ["check_all_rules", "check_rules", "make_plan"]


def check_rules(function: str, rules: Iterable[Rule | OpRule]) -> tuple[Rule, ...]:
    """Rules for parameters as a tuple; raises if they are not a sequence of `Rule`."""
    rules = check_all_rules(function, rules)
    for rule in rules:
        if isinstance(rule, OpRule):
            todo = "Make a plan with it: make_plan traces the function whose products it names"
            rule_broken = "an OpRule is for products, and here are only parameters"
            raise quant_error(function, rule_broken, todo=todo, pattern=rule.pattern)
    return tuple(rule for rule in rules if isinstance(rule, Rule))


def check_all_rules(function: str, rules: Iterable[Rule | OpRule]) -> tuple[Rule | OpRule, ...]:
    """Rules as a tuple; raises if they are not a sequence of `Rule` and `OpRule`."""
    listed = tuple(rules) if isinstance(rules, Iterable) and not isinstance(rules, str) else None
    if listed is None or not all(isinstance(rule, Rule | OpRule) for rule in listed):
        todo = "Pass a list: [Rule(pattern, spec), ...]"
        raise quant_error(function, "rules must be a sequence of Rule", todo=todo, rules=repr(rules))
    return listed


def make_plan(
    fn: Callable[..., PyTree], params: Params, *args: PyTree, rules: Sequence[Rule | OpRule], **kwargs: PyTree
) -> Plan:
    """Which parameters of ``fn`` are quantized, by which operation and over which axes, according to rules.

    ``fn(params, *args, **kwargs)`` is traced (never run) and every parameter followed to the operations it reaches, so
    the contracted axes come from the trace. Works on `jax.ShapeDtypeStruct`s: no weight needs to be in memory.

    Args:
      fn: any JAX function whose argument 0 is a pytree of parameters: ``model.apply``, say.
      params: its parameters: arrays or shapes.
      *args, **kwargs: its further arguments: arrays or shapes, and anything static.
      rules: the first whose pattern is found in a parameter's path wins; ``Rule(pattern, None)`` keeps its
        matches in float. A parameter that no rule matches stays in float. Products of two activations stay in float
        too, unless an `OpRule` names them.

    Returns:
      A `Plan`: print it.

    Raises:
      QuantError: if a rule matches nothing that can be quantized, or a group size does not divide the contracted axes;
        the message names all rules and parameters of which that is so, with the nearest paths or sizes.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> params = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
      >>> print(jq.make_plan(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones(64),
      ...                    rules=[jq.Rule(".*", recipes.w8a16())]))
      path                                                bytes before           after
      --------------------------------------------------------------------------------
      w                                                          8,192           2,176
        dot_general [64, 32] over -2: w int8; ...
      b                                                            128             128
        [32] float32: added, not contracted
      --------------------------------------------------------------------------------
      total: 1 quantized (3.61x smaller)                         8,320           2,304
    """
    every = check_all_rules("make_plan", rules)
    rules = [rule for rule in every if isinstance(rule, Rule)]
    op_rules = [rule for rule in every if isinstance(rule, OpRule)]
    traced = trace("make_plan", fn, params, args, kwargs)
    products = Products(None) if op_rules else None
    interpreter = Interpreter(planning=True, products=products)
    weights = [
        Weight(path, None, None, dims_of(tuple(leaf.shape)), leaf.dtype) if _plannable(leaf) else ABSENT
        for path, leaf in traced.params.items()
    ]
    returned = interpreter.run(traced.jaxpr, [*weights, *[ABSENT] * len(traced.arrays)])
    uses: dict[str, list[Use]] = {path: [] for path in traced.params}
    for w in returned:
        if isinstance(w, Weight) and w.steps:
            interpreter.refuse(w, "return", f"returned by the function through a {w.steps[-1].name}")
    for use in interpreter.uses:
        uses[use.path].append(use)
    handed_on = {w.path for w in returned if isinstance(w, Weight) and not w.steps}
    matched = [False] * len(rules)
    items, floats, refusals = [], [], Refusals("make_plan")
    for path, leaf in traced.params.items():
        if not is_float(leaf) and not isinstance(leaf, QTensor):
            continue
        can = [use for use in uses[path] if use.reduce_axes is not None]
        hits = [i for i, rule in enumerate(rules) if rule.matches(path)]
        for i in hits:
            matched[i] = matched[i] or rules[i].spec is None or bool(can)
        shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype).name
        if not can:
            reasons = list(dict.fromkeys(use.reason for use in uses[path]))
            unused = "returned as it is" if path in handed_on else UNUSED if _plannable(leaf) else "empty"
            why = "; ".join(reasons) or unused
            floats.append(Float(path, shape, dtype, why))
        elif not hits:
            floats.append(Float(path, shape, dtype, "no rule matches"))
        elif rules[hits[0]].spec is None:
            floats.append(Float(path, shape, dtype, f"Rule({rules[hits[0]].pattern!r}, None)"))
        else:
            own = path in interpreter.own_derivatives
            with refusals.gather():
                found = _item(path, leaf, rules[hits[0]], uses[path], own_derivative=own)
                (items if isinstance(found, Item) else floats).append(found)
    for rule, hit in zip(rules, matched, strict=True):
        if not hit and not isinstance(rule, Stated):
            weights_seen = [p for p, u in uses.items() if any(use.reduce_axes is not None for use in u)]
            todo = f"Nearest parameters that can be quantized: {nearest(rule.pattern, weights_seen)}"
            if not weights_seen:
                todo = "None can be: that takes float arrays that enter a product, a convolution or a lookup"
            left = [f"{f.path} ({f.reason})" for f in floats if rule.matches(f.path)]
            if left:
                todo = f"It matches only what cannot be quantized: {', '.join(left[:3])}"
            with refusals.gather():
                raise quant_error("make_plan", "a rule matches no weight", todo=todo, pattern=rule.pattern)
    planned = () if products is None else _products(products, op_rules, refusals)
    refusals.close()
    return Plan(tuple(items), tuple(floats), planned)


def _products(found: Products, rules: Sequence[OpRule], refusals: Refusals) -> tuple[Product, ...]:
    """The products of two activations that rules ask for."""
    for rule in rules:
        if not any(rule.matches(name) for name in found.met):
            todo = f"Nearest products of two activations: {nearest(rule.pattern, found.met)}"
            if not found.met:
                todo = "The function has no products of two activations"
            with refusals.gather():
                raise quant_error("make_plan", "an OpRule matches no product", todo=todo, pattern=rule.pattern)
    products = []
    for name, (left, right) in found.met.items():
        spec = next((rule.spec for rule in rules if rule.matches(name)), None)
        if spec is not None:
            replaced = "in a function with a derivative rule of its own, which the derivative of its body replaces"
            note = replaced if name in found.own_derivatives else ""
            products.append(Product(name, (_sizes(left), _sizes(right)), spec, note))
    return tuple(products)


def _sizes(shape: tuple[int, ...]) -> tuple[int | str, ...]:
    """A shape, with the names of sizes that are symbols."""
    return tuple(str(n) if number(n) == math.inf else n for n in shape)


def _plannable(leaf: Leaf) -> bool:
    return is_float(leaf) and math.prod(leaf.shape) > 0


def _unlike(use: Use, main: Use, spec: OpSpec) -> str:
    """Why a use that shares the scales of another one runs on float values; nothing, if it runs on codes."""
    if use.stacked > main.stacked:
        return f"dequantized where a scan takes it layer by layer ({use.op}): its scales are those of the whole"
    if use.op == "take":
        return ""
    if use.reduce_axes != main.reduce_axes:
        return f"{use.op} over axes {use.reduce_axes} runs on float values: scales are shared over {main.reduce_axes}"
    if use.stacked < main.stacked and spec.act is not None and spec.act.static:
        return f"{use.op} of the whole stack runs on float values: static ranges are those of its layers"
    return ""


def _spec(path: str, spec: OpSpec, can: list[Use]) -> tuple[OpSpec, str]:
    """The part of a rule's spec that the uses of a parameter have a place for, and what to know of it."""
    note, others = "", [use.op for use in can if use.op not in ("dot_general", "take")]
    if all(use.op == "take" for use in can):  # indices are not quantized
        note = "only looked up: methods that look at inputs round it to nearest, since it has none"
        spec = OpSpec(spec.weight)
    elif spec.grad is not None and others:
        spec = dataclasses.replace(spec, grad=None)
        note = f"gradients stay in float: the backward pass of {others[0]} has no integer products"
    elif spec.outliers is not None and others:
        rule, todo = f"outliers are for products of matrices, not {others[0]}", "Give it a rule of its own with 'w8a8'"
        raise quant_error("make_plan", rule, todo=todo, path=path, outliers=spec.outliers)
    act = spec.act
    if act is not None and act.static and not isinstance(act.granularity, PerTensor) and not act.static_unit:
        raise quant_error(
            "make_plan",
            "a static activation has one range for the whole tensor",
            todo="Use granularity=PerTensor(), or static=False",
            path=path,
            granularity=act.granularity,
        )
    return spec, note


def _item(path: str, leaf: Leaf, rule: Rule, uses: list[Use], *, own_derivative: bool) -> Item | Float:
    """The plan of one parameter, or why it stays in float."""
    assert rule.spec is not None
    shape, dtype = tuple(leaf.shape), np.dtype(leaf.dtype).name
    can = [use for use in uses if use.reduce_axes is not None]
    cannot = list(dict.fromkeys(use.reason for use in uses if use.reduce_axes is None))
    if cannot and not rule.dequantize:
        todo = "; Rule(..., dequantize=True) quantizes it anyway"
        return Float(path, shape, dtype, f"also {', '.join(cannot)}{todo}")
    mixed = len({use.stacked for use in can}) > 1
    if mixed and not rule.dequantize:
        todo = "; Rule(..., dequantize=True) quantizes it anyway"
        return Float(path, shape, dtype, f"used both whole and layer by layer in a scan{todo}")
    main = max([use for use in can if use.op != "take"] or can, key=lambda use: use.stacked)
    assert main.reduce_axes is not None
    in_float = [f"dequantized where it is {reason}" for reason in cannot]
    in_float += [why for use in dict.fromkeys(can) if (why := _unlike(use, main, rule.spec))]
    notes = list(dict.fromkeys(use.note for use in can if use.note))
    if rule.reduce_axes is not None and tuple(sorted(rule.reduce_axes)) != main.reduce_axes:
        raise quant_error(
            "make_plan",
            "the rule's reduce_axes are not the axes that the function contracts",
            todo=f"Leave reduce_axes out, or give {main.reduce_axes}",
            path=path,
            reduce_axes=rule.reduce_axes,
        )
    if own_derivative:
        notes.append("enters a function with a derivative rule of its own, which the derivative of its body replaces")
    spec, own = _spec(path, rule.spec, can)
    spec, note = fitted("make_plan", path, rule, spec, shape[main.stacked :], main.reduce_axes)
    if spec is None:
        return Float(path, shape, dtype, note)
    notes += filter(None, (own, note))
    alike = (use for use in can if (use.reduce_axes, use.stacked) == (main.reduce_axes, main.stacked))
    most = max(number(use.rows) for use in alike)
    return Item(
        path,
        ", ".join(dict.fromkeys(use.op for use in can)),
        shape,
        dtype,
        main.reduce_axes,
        spec,
        main.stacked,
        main.contraction_minor,
        rule.dequantize and (mixed or bool(cannot)),
        tuple(in_float),
        tuple(notes),
        None if most == math.inf else int(most),
        main.window,
    )

"""Handlers of the primitives that hold jaxprs: jit, scan, while, cond, remat, custom derivatives.

`jax.shard_map` is in `jaxquant.transform.shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, primitives
from jax.sharding import Sharding

from jaxquant.core import views
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.transform.interpreter import Interpreter, Tally, handles, unsupported
from jaxquant.transform.primitives import body_of
from jaxquant.transform.weights import ABSENT, Absent, Joined, Value, Weight

__all__ = ["absent", "arrays_of", "floats", "inside"]


@handles(jax.jit, primitives.closed_call_p, primitives.call_p, joined=True)
def _jit(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Entered in place: the caller's own ``jit`` is around all of it. Shardings it names become constraints."""
    p = eqn.params
    values = _placed(interpreter, values, p.get("in_shardings", ()))
    results = interpreter.run_in_place(body_of(eqn), values)
    return _placed(interpreter, results, p.get("out_shardings", ()))


def _placed(interpreter: Interpreter, values: list[Value], shardings: Iterable[object]) -> list[Value]:
    if interpreter.planning or not any(isinstance(s, Sharding) for s in shardings):
        return values
    return [
        lax.with_sharding_constraint(v, s) if isinstance(s, Sharding) and not isinstance(v, Weight | Joined) else v
        for v, s in zip(values, shardings, strict=True)
    ]


@handles(jax.custom_jvp, jax.custom_vjp, joined=True)
def _custom_derivative(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    """Entered in place: gradients are those of the quantized body, not the custom rule's."""
    products = interpreter.products
    before = set() if products is None else set(products.met)
    if interpreter.planning:
        interpreter.own_derivatives.update(v.path for v in _weights(values))
    results = interpreter.run_in_place(body_of(eqn), values)
    if products is not None:
        products.own_derivatives |= set(products.met) - before
    return results


def _weights(values: Iterable[Value]) -> list[Weight]:
    """The weights among values, those in joined ones too."""
    every = (v.parts if isinstance(v, Joined) else (v,) for v in values)
    return [part for parts in every for part in parts if isinstance(part, Weight)]


# -- weights across the boundary of an inner trace ---------------------------------------------------------------------
#
# A weight enters as its leaf (all arrays of a QTensor) and its state; inside, it is put together again.


def arrays_of(value: Value) -> PyTree:
    """The arrays of a value that enter the inner trace, as a pytree."""
    if isinstance(value, Joined):
        return [arrays_of(part) for part in value.parts]
    return (value.leaf, value.state) if isinstance(value, Weight) else value


def inside(outer: Value, arrays: PyTree) -> Value:
    """The value on the inside."""
    if isinstance(outer, Joined):
        parts = tuple(inside(part, a) for part, a in zip(outer.parts, arrays, strict=True))
        return dataclasses.replace(outer, parts=parts)
    if not isinstance(outer, Weight):
        return arrays
    leaf, state = arrays
    return dataclasses.replace(outer, leaf=leaf, state=state)


def handed_on(results: list[Value], given: list[Value]) -> dict[int, int]:
    """Which results are weights that came in, unchanged: NNX hands a module's parameters out of every transform."""
    return {
        i: j
        for i, r in enumerate(results)
        if isinstance(r, Weight)
        for j in range(len(given) - 1, -1, -1)
        if r is given[j]
    }


def _together(passed: dict[int, int], given: list[Value], rest: Iterable[Value], count: int) -> list[Value]:
    """All results: values that were passed through come from outside, the others from ``rest``."""
    others = iter(rest)
    return [given[passed[i]] if i in passed else next(others) for i in range(count)]


def _without(passed: Iterable[int], results: list[Value]) -> list[Value]:
    return [r for i, r in enumerate(results) if i not in passed]


def floats(interpreter: Interpreter, results: list[Value], op: str) -> list[Value]:
    """Results of an inner trace: a weight that is returned from it is a use in float."""
    return [interpreter.float_of(r, f"the result of {op}") if isinstance(r, Weight) else r for r in results]


def absent(interpreter: Interpreter, results: list[Value], op: str) -> list[Value]:
    """Planning: the same."""
    for r in results:
        if isinstance(r, Weight):
            interpreter.refuse(r, op, f"handed out of {op} as a result")
    return [ABSENT] * len(results)


def _entering(interpreter: Interpreter, w: Weight, op: str) -> jax.Array | Absent:
    """A weight that cannot go in as one: absent while planning, else in float."""
    if interpreter.planning:
        interpreter.refuse(w, op, f"changed from one step of a {op} to the next")
        return ABSENT
    return interpreter.float_of(w, f"the carry of {op}")


@handles(jax.checkpoint, joined=True)
def _remat(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    closed, p = body_of(eqn), eqn.params
    count = len(eqn.outvars)
    if interpreter.planning:
        results = interpreter.run(closed, values)
        passed = handed_on(results, values)
        return _together(passed, values, absent(interpreter, _without(passed, results), "remat"), count)
    passed: dict[int, int] = {}

    def body(arrays: list[PyTree]) -> tuple[list[Value], dict[str, Tally]]:
        inner, given = interpreter.child(), [inside(v, a) for v, a in zip(values, arrays, strict=True)]
        results = inner.run(closed, given)
        passed.update(handed_on(results, given))
        return floats(interpreter, _without(passed, results), "remat"), inner.stats

    rest, stats = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])([arrays_of(v) for v in values])
    interpreter.add_stats(stats)
    return _together(passed, values, rest, count)


# -- loops -------------------------------------------------------------------------------------------------------------


def _abstract_run(body: ClosedJaxpr, before: int, carry: list[Value]) -> list[Value]:
    """The body's results when it is planned with nothing but the weights of the carry."""
    known = [c if isinstance(c, Weight) else ABSENT for c in carry]
    after = [ABSENT] * (len(body.jaxpr.invars) - before - len(carry))
    return Interpreter(planning=True).run(body, [*[ABSENT] * before, *known, *after])


def _whole(interpreter: Interpreter, values: list[Value]) -> list[Value]:
    return [interpreter.whole(v) if isinstance(v, Joined) else v for v in values]


class _Carry:
    """The carry of a loop: weights that the body hands on unchanged are constants of it, and stay outside."""

    def __init__(self, interpreter: Interpreter, op: str, carry: list[Value], body: ClosedJaxpr, before: int):
        carry = _whole(interpreter, carry)
        weights = any(isinstance(c, Weight) for c in carry)
        returned = _abstract_run(body, before, carry) if weights else carry
        self.fixed = [isinstance(c, Weight) and r is c for c, r in zip(carry, returned, strict=False)]
        self.values = [
            _entering(interpreter, c, op) if isinstance(c, Weight) and not f else c
            for c, f in zip(carry, self.fixed, strict=True)
        ]

    @property
    def start(self) -> list[Value]:
        """The part that moves."""
        return self.moving(self.values)

    def moving(self, values: list[Value]) -> list[Value]:
        """The part of the body's results that moves."""
        return [v for v, f in zip(values, self.fixed, strict=True) if not f]

    def full(self, moving: Iterable[Value]) -> list[Value]:
        """The whole carry, constants put back."""
        moving = iter(moving)
        return [v if f else next(moving) for v, f in zip(self.values, self.fixed, strict=True)]


def _layer(interpreter: Interpreter, w: Weight) -> jax.Array | Weight | Absent:
    """One layer of a stacked weight, whose first axis a scan takes. Steps so far must leave that axis alone."""
    moved = next((step for step in w.steps if step.layer is None), None)
    if moved is not None:
        if interpreter.planning:
            interpreter.refuse(w, "scan", f"stacked, but its first axis goes through a {moved.name} before the scan")
            return ABSENT
        return interpreter.float_of(w, f"{moved.name} before scan")
    if not interpreter.planning and not interpreter.by_layer(w):
        return interpreter.float_of(w, "a scan over its layers")
    steps = tuple(step.layer() for step in w.steps if step.layer is not None)
    leaf = views.by_layer(w.leaf) if type(w.leaf) is QTensor else w.leaf
    return dataclasses.replace(w, leaf=leaf, dims=w.dims[1:], stacked=w.stacked + 1, steps=steps)


def _apart(value: Value) -> Value:
    """A value whose weight, a layer of a stack itself, has codes of its own."""
    if isinstance(value, Weight) and type(value.leaf) is QTensor:
        return dataclasses.replace(value, leaf=value.leaf.apart())
    return value


def _without_stack(value: Value) -> Value:
    """The arrays that a scan slices: all but codes that kernels find in a stack.

    Scales, which kernels find there too, are sliced as well: they may have a gradient. XLA drops a slice of no use.
    """
    if isinstance(value, Weight) and type(value.leaf) is QTensor and value.leaf.stays_in_stack:
        return dataclasses.replace(value, leaf=value.leaf.replace(codes=None))
    return value


def _in_stack(layer: Value, stack: QTensor | None, index: jax.Array | None) -> Value:
    """A layer of weights, with the codes that `_without_stack` has left where they are, in ``stack``."""
    if stack is None or index is None or not isinstance(layer, Weight):
        return layer
    assert isinstance(layer.leaf, QTensor)
    return dataclasses.replace(layer, leaf=layer.leaf.layer_of(stack, index))


_Counted = tuple[jax.Array | None, list[Value]]
"""The carry of a scan: the index of the layer, if codes are left in their stack, and the values that move."""


@handles(primitives.scan_p, joined=True)
def _scan(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    p = eqn.params
    closed, n_consts, n_carry = p["jaxpr"], p["num_consts"], p["num_carry"]
    consts, stacks = values[:n_consts], _whole(interpreter, values[n_consts + n_carry :])
    carry = _Carry(interpreter, "scan", values[n_consts : n_consts + n_carry], closed, n_consts)
    xs = [_layer(interpreter, x) if isinstance(x, Weight) else x for x in map(_apart, stacks)]
    count = len(eqn.outvars) - n_carry
    if interpreter.planning:
        results = interpreter.run(closed, [*consts, *carry.values, *xs])
        moving = absent(interpreter, carry.moving(results[:n_carry]), "scan")
        passed = handed_on(results[n_carry:], xs)
        ys = absent(interpreter, _without(passed, results[n_carry:]), "scan")
        return carry.full(moving) + _together(passed, stacks, ys, count)
    passed: dict[int, int] = {}

    cut = [_without_stack(x) for x in xs]
    left = [
        lax.stop_gradient(x.leaf) if isinstance(x, Weight) and isinstance(x.leaf, QTensor) and c is not x else None
        for x, c in zip(xs, cut, strict=True)
    ]

    def body(state: _Counted, arrays: list[PyTree]) -> tuple[_Counted, tuple[list[Value], dict[str, Tally]]]:
        index, moving = state
        inner = interpreter.child()
        layers = [_in_stack(inside(x, a), w, index) for x, a, w in zip(xs, arrays, left, strict=True)]
        results = inner.run(closed, [*consts, *carry.full(moving), *layers])
        moving = floats(interpreter, carry.moving(results[:n_carry]), "scan")
        passed.update(handed_on(results[n_carry:], layers))
        after = None if index is None else index + (-1 if p["reverse"] else 1)
        return (after, moving), (floats(interpreter, _without(passed, results[n_carry:]), "scan"), inner.stats)

    # Counted, and not one of the arrays that are sliced: a slice of one number takes a TPU a microsecond.
    counted = any(w is not None for w in left)
    start = (jnp.int32(p["length"] - 1 if p["reverse"] else 0) if counted else None), carry.start
    how = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    (_, end), (ys, stats) = lax.scan(body, start, [arrays_of(x) for x in cut], **how)
    interpreter.add_stats(_unstack(interpreter, stats, [x.path for x in xs if isinstance(x, Weight)]))
    return carry.full(end) + _together(passed, stacks, ys, count)


def _unstack(interpreter: Interpreter, stats: dict[str, Tally], stacked: list[str]) -> dict[str, Tally]:
    """Statistics of a scan: one per layer for a stacked weight, merged over the steps for a constant one."""
    by_layer = {interpreter.key(path) for path in stacked if path in interpreter.items}

    def merged(key: str, tally: Tally) -> Tally:
        first = jax.tree.map(lambda a: a[0], tally)
        rest = jax.tree.map(lambda a: a[1:], tally)
        return lax.scan(lambda total, new: (interpreter.merged(key, total, new), None), first, rest)[0]

    return {key: tally if key in by_layer else merged(key, tally) for key, tally in stats.items()}


@handles(primitives.while_p, joined=True)
def _while(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    cond, body = p["cond_jaxpr"], p["body_jaxpr"]
    carry = _Carry(interpreter, "while", values[n_cond + n_body :], body, n_body)
    if interpreter.planning:
        interpreter.run(cond, [*cond_consts, *carry.values])
        results = interpreter.run(body, [*body_consts, *carry.values])
        return carry.full(absent(interpreter, carry.moving(results), "while"))

    def test(state: tuple[list[Value], dict[str, Tally]]) -> Value:
        return interpreter.child().run(cond, [*cond_consts, *carry.full(state[0])])[0]

    def step(state: list[Value]) -> tuple[list[Value], dict[str, Tally]]:
        inner = interpreter.child()
        if interpreter.collect is not None:  # a condition has no results but one: look at its inputs from here
            inner.run(cond, [*cond_consts, *carry.full(state)])
        results = inner.run(body, [*body_consts, *carry.full(state)])
        return floats(interpreter, carry.moving(results), "while"), inner.stats

    def counted(state: tuple[list[Value], dict[str, Tally]]) -> tuple[list[Value], dict[str, Tally]]:
        moving, new = step(state[0])
        return moving, {path: interpreter.merged(path, total, new[path]) for path, total in state[1].items()}

    empty = {} if interpreter.collect is None else _empty(jax.eval_shape(step, carry.start)[1])
    end, stats = lax.while_loop(test, counted, (carry.start, empty))
    interpreter.add_stats(stats)
    return carry.full(end)


def _empty(like: dict[str, Tally]) -> dict[str, Tally]:
    return {path: Tally.none(tally) for path, tally in like.items()}


Branch = Callable[[], tuple[list[Value], dict[str, Tally]]]


# -- branches ----------------------------------------------------------------------------------------------------------


@handles(primitives.cond_p, joined=True)
def _cond(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    index, *operands = values
    if isinstance(index, Weight):
        return unsupported(interpreter, eqn, values)
    branches = eqn.params["branches"]
    # A weight that every branch hands on; found without computing, so that all branches agree.
    known: list[Value] = [v if isinstance(v, Weight | Joined) else ABSENT for v in operands]
    kept = [handed_on(Interpreter(planning=True).run(branch, known), known).items() for branch in branches]
    passed = dict(functools.reduce(lambda a, b: a & b, [set(items) for items in kept]))
    count = len(eqn.outvars)
    if interpreter.planning:
        for branch in branches:
            absent(interpreter, _without(passed, interpreter.run(branch, operands)), "cond")
        return _together(passed, operands, [ABSENT] * count, count)

    def branch_of(closed: ClosedJaxpr) -> Branch:
        def branch() -> tuple[list[Value], dict[str, Tally]]:
            inner = interpreter.child()
            return floats(interpreter, _without(passed, inner.run(closed, operands)), "cond"), inner.stats

        return branch

    chosen = [branch_of(branch) for branch in branches]
    if interpreter.collect is not None:
        shapes: dict[str, Tally] = {}
        for branch in chosen:
            shapes.update(jax.eval_shape(branch)[1])
        chosen = [functools.partial(_padded, branch, shapes) for branch in chosen]
    results, stats = lax.switch(index, chosen)
    interpreter.add_stats(stats)
    return _together(passed, operands, results, count)


def _padded(branch: Branch, shapes: dict[str, Tally]) -> tuple[list[Value], dict[str, Tally]]:
    """A branch that returns the statistics of all branches; the statistics of other branches are empty."""
    results, stats = branch()
    return results, {**_empty(shapes), **{path: tally.certain() for path, tally in stats.items()}}

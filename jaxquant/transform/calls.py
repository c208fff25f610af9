"""Handlers of the primitives that hold jaxprs: jit, scan, while, cond, remat, custom derivatives, shard_map."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr

from jaxquant.transform import primitives
from jaxquant.transform.interpreter import ABSENT, Interpreter, handles, unsupported
from jaxquant.transform.primitives import named, used_by
from jaxquant.transform.weights import Weight

__all__: list[str] = []

_public = functools.partial(functools.partial, named)


def _traced(fn: Any) -> Any:
    return functools.partial(used_by, fn, (3,))


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


@handles(_traced(primitives.jit_call), _public("closed_call_p"), _public("call_p"))
def _jit(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    """Entered in place: the caller's own ``jit`` is around all of it."""
    return interpreter.run(_closed(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))), values)


@handles(_traced(primitives.with_custom_jvp), _traced(primitives.with_custom_vjp))
def _custom_derivative(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    """Entered in place: with a weight inside, gradients are those of the quantized body, not the custom rule's."""
    return interpreter.run(_closed(eqn.params["call_jaxpr"]), values)


# -- weights across the boundary of an inner trace
# ---------------------------------------------------------------------------
#
# A weight enters as its leaf (all arrays of a QTensor) and its state; inside, it is put together again.


def _arrays(value: Any) -> Any:
    """What of a value crosses: a pytree of arrays."""
    return (value.leaf, value.state) if isinstance(value, Weight) else value


def _inside(outer: Any, arrays: Any) -> Any:
    """The value on the inside."""
    if not isinstance(outer, Weight):
        return arrays
    leaf, state = arrays
    return dataclasses.replace(outer, leaf=leaf, state=state)


def _floats(interpreter: Interpreter, results: list[Any], op: str) -> list[Any]:
    """Results of an inner trace: a weight that is returned from it is a use in float."""
    return [interpreter.float_of(r, f"the result of {op}") if isinstance(r, Weight) else r for r in results]


def _absent(interpreter: Interpreter, results: list[Any], op: str) -> list[Any]:
    """Planning: the same."""
    for r in results:
        if isinstance(r, Weight):
            interpreter.refuse(r, op, f"it is a result of {op}")
    return [ABSENT] * len(results)


@handles(_traced(primitives.checkpointed))
def _remat(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    closed, p = _closed(eqn.params["jaxpr"]), eqn.params
    if interpreter.planning:
        return _absent(interpreter, interpreter.run(closed, values), "remat")

    def body(arrays: list[Any]) -> Any:
        inner = interpreter.child()
        results = inner.run(closed, [_inside(v, a) for v, a in zip(values, arrays, strict=True)])
        return _floats(interpreter, results, "remat"), inner.stats

    results, stats = jax.checkpoint(body, prevent_cse=p["prevent_cse"], policy=p["policy"])(
        [_arrays(v) for v in values]
    )
    interpreter.add_stats(stats)
    return results


def _layer(interpreter: Interpreter, w: Weight) -> Any:
    """One layer of a stacked weight, whose first axis a scan takes. Steps so far must not have moved that axis."""
    if any(step.name != "convert_element_type" for step in w.steps):
        if interpreter.planning:
            interpreter.refuse(w, "scan", f"it is stacked, and goes through {w.steps[-1].name} before a scan takes it")
            return ABSENT
        return interpreter.float_of(w, f"{w.steps[-1].name} before scan")
    return dataclasses.replace(w, dims=w.dims[1:], stacked=w.stacked + 1)


@handles(_public("scan_p"))
def _scan(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    closed, n_consts, n_carry = p["jaxpr"], p["num_consts"], p["num_carry"]
    consts, carry, xs = values[:n_consts], values[n_consts : n_consts + n_carry], values[n_consts + n_carry :]
    body_jaxpr = closed.jaxpr
    # A weight that the body hands on unchanged is a constant of the loop.
    fixed = [
        isinstance(c, Weight) and body_jaxpr.invars[n_consts + i] is body_jaxpr.outvars[i] for i, c in enumerate(carry)
    ]
    if any(isinstance(c, Weight) and not f for c, f in zip(carry, fixed, strict=True)):
        return unsupported(interpreter, eqn, values)
    xs = [_layer(interpreter, x) if isinstance(x, Weight) else x for x in xs]
    if interpreter.planning:
        results = interpreter.run(closed, [*consts, *carry, *xs])
        _absent(interpreter, results[n_carry:], "scan")
        return [c if f else ABSENT for c, f in zip(carry, fixed, strict=True)] + [ABSENT] * (len(results) - n_carry)

    def body(state: list[Any], arrays: list[Any]) -> Any:
        inner, moving = interpreter.child(), iter(state)
        full = [c if f else next(moving) for c, f in zip(carry, fixed, strict=True)]
        layers = [_inside(x, a) for x, a in zip(xs, arrays, strict=True)]
        results = inner.run(closed, [*consts, *full, *layers])
        out = [r for r, f in zip(results[:n_carry], fixed, strict=True) if not f]
        return _floats(interpreter, out, "scan"), (_floats(interpreter, results[n_carry:], "scan"), inner.stats)

    start = [c for c, f in zip(carry, fixed, strict=True) if not f]
    end, (ys, stats) = lax.scan(
        body, start, [_arrays(x) for x in xs], length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    interpreter.add_stats(_unstack(interpreter, stats, {x.path for x in xs if isinstance(x, Weight)}))
    moving = iter(end)
    return [c if f else next(moving) for c, f in zip(carry, fixed, strict=True)] + list(ys)


def _unstack(interpreter: Interpreter, stats: dict[str, Any], stacked: set[str]) -> dict[str, Any]:
    """Statistics of a scan: one per layer for a stacked weight, merged over the steps for a constant one."""

    def merged(path: str, value: Any) -> Any:
        first = jax.tree.map(lambda a: a[0], value)
        rest = jax.tree.map(lambda a: a[1:], value)
        return lax.scan(lambda total, new: (interpreter.merged(path, total, new), None), first, rest)[0]

    return {path: value if path in stacked else merged(path, value) for path, value in stats.items()}


@handles(_public("while_p"))
def _while(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts, carry = values[:n_cond], values[n_cond : n_cond + n_body], values[n_cond + n_body :]
    cond, body = p["cond_jaxpr"], p["body_jaxpr"]
    fixed = [
        isinstance(c, Weight) and body.jaxpr.invars[n_body + i] is body.jaxpr.outvars[i] for i, c in enumerate(carry)
    ]
    if (
        any(isinstance(c, Weight) and not f for c, f in zip(carry, fixed, strict=True))
        or interpreter.collect is not None
    ):
        return unsupported(interpreter, eqn, values)
    if interpreter.planning:
        interpreter.run(cond, [*cond_consts, *carry])
        interpreter.run(body, [*body_consts, *carry])
        return [c if f else ABSENT for c, f in zip(carry, fixed, strict=True)]

    def full(state: list[Any]) -> list[Any]:
        moving = iter(state)
        return [c if f else next(moving) for c, f in zip(carry, fixed, strict=True)]

    def step(state: list[Any]) -> list[Any]:
        results = interpreter.run(body, [*body_consts, *full(state)])
        return _floats(interpreter, [r for r, f in zip(results, fixed, strict=True) if not f], "while")

    def test(state: list[Any]) -> Any:
        return interpreter.run(cond, [*cond_consts, *full(state)])[0]

    return full(lax.while_loop(test, step, [c for c, f in zip(carry, fixed, strict=True) if not f]))


@handles(_public("cond_p"))
def _cond(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    index, *operands = values
    if isinstance(index, Weight) or interpreter.collect is not None:
        return unsupported(interpreter, eqn, values)
    branches = eqn.params["branches"]
    if interpreter.planning:
        results = [interpreter.run(branch, operands) for branch in branches]
        for branch_results in results:
            _absent(interpreter, branch_results, "cond")
        return [ABSENT] * len(eqn.outvars)

    def branch_of(closed: ClosedJaxpr) -> Any:
        return lambda: _floats(interpreter, interpreter.child().run(closed, operands), "cond")

    chosen = [branch_of(branch) for branch in branches]
    if jnp.issubdtype(jnp.asarray(index).dtype, jnp.bool_):
        return list(lax.cond(index, chosen[1], chosen[0]))
    return list(lax.switch(index, chosen))

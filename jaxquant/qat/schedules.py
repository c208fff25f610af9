"""Schedules of precision in training: pure functions of the step, which may be traced."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params
from jaxquant.core.qtypes import QTYPES, qtype_of
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import quantized

__all__ = ["Stage", "scheduled", "to_nearest", "with_bits"]

Stage = Plan | tuple[Plan, PyTree] | None
"""The precision from some step on: float (None), a plan, or a plan and its state."""


def _starts(function: str, stages: Mapping[int, Stage]) -> list[int]:
    """The first steps of the stages, in order; raises if the schedule is invalid."""
    todo = "Write for example {0: None, 1000: plan}"
    if not isinstance(stages, Mapping) or not stages:
        raise quant_error(function, "a schedule is a dict of first steps and stages", todo=todo, stages=stages)
    for start, stage in stages.items():
        try:
            whole = not isinstance(start, bool) and operator.index(start) >= 0
        except TypeError:
            whole = False
        if not whole:
            raise quant_error(function, "a stage starts at a step, an integer from 0 on", todo=todo, start=start)
        plan = stage[0] if isinstance(stage, tuple) and len(stage) == 2 else stage
        if plan is not None and not isinstance(plan, Plan):
            todo = "Use a plan, (plan, state), or None for float"
            raise quant_error(function, "a stage is a plan, (plan, state) or None", todo=todo, start=start, stage=stage)
    starts = sorted(stages)
    if starts[0] != 0:
        raise quant_error(function, "a schedule starts at step 0", todo=f"Add {{0: None}}: float until {starts[0]}")
    return starts


def scheduled(fn: Callable[..., PyTree], stages: Mapping[int, Stage]) -> Callable[..., PyTree]:
    """``fn`` in a precision that depends on the step, such as float first, then eight bits, two at the end.

        fn'(step, params, ...) = quantized(fn, *stage)(params, ...)       the last stage that starts at or before step

    Under `jax.jit` all stages are compiled, and one of them runs. The schedule has no state, so a run that is resumed
    at step n continues as if it had not stopped.

    Args:
      fn: the function that the plans were made of.
      stages: first step -> stage from that step on: None for float, a plan, or a plan and its state (learned steps,
        which train if the dict is made within the differentiated function). The first stage starts at 0.

    Returns:
      A function ``(step, params, *args, **kwargs)``; ``step`` is an integer, or a traced one.

    Raises:
      QuantError: if the schedule has no stage at 0, a start that is not a step, or a stage of another kind; when
        called, as `quantized`, or if ``step`` is not an integer, or is below 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}, jnp.ones((2, 8))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.OpSpec(jq.QuantSpec("int2")))])
      >>> run = jax.jit(qat.scheduled(fn, {0: None, 100: qat.with_bits(plan, weight=4), 300: plan}))
      >>> bool((run(99, params, x) == fn(params, x)).all()), bool((run(100, params, x) == fn(params, x)).all())
      (True, False)
    """
    starts = _starts("scheduled", stages)

    def stage(start: int) -> Callable[..., PyTree]:
        how = stages[start]
        if how is None:
            return fn
        return quantized(fn, *how) if isinstance(how, tuple) else quantized(fn, how)

    def run(step: int | jax.Array, params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        integer = not isinstance(step, bool) and jnp.issubdtype(jnp.result_type(step), jnp.integer)
        if not integer or jnp.shape(step) != ():
            raise quant_error("scheduled", "step must be an integer", todo="Count steps in int32", step=step)
        if not isinstance(step, jax.core.Tracer):
            if step < 0:
                raise quant_error("scheduled", "steps count from 0", todo="Count from 0", step=int(step))
            return stage(max(start for start in starts if start <= step))(params, *args, **kwargs)
        place = jnp.searchsorted(jnp.asarray(starts, jnp.int32), jnp.asarray(step, jnp.int32), side="right") - 1
        branches = [lambda start=start: stage(start)(params, *args, **kwargs) for start in starts]
        return jax.lax.switch(place, branches)

    return run


def with_bits(plan: Plan, *, weight: int | None = None, act: int | None = None) -> Plan:
    """The plan with other integer widths for weights or activations, for example for an earlier stage with more bits.

    Args:
      plan: from `make_plan`.
      weight, act: bits; None: as planned.

    Returns:
      A new plan. Number types other than integers stay unchanged.

    Raises:
      QuantError: if there is no integer type of so many bits.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat, recipes
      >>> plan = jq.make_plan(lambda p, x: x @ p["w"], {"w": jnp.ones((8, 4))}, jnp.ones((2, 8)),
      ...                     rules=[jq.Rule("w", recipes.w4a8(None))])
      >>> qat.with_bits(plan, weight=8)["w"].spec.weight.qtype
      'int8'
    """

    def changed(spec: QuantSpec | None, bits: int | None) -> QuantSpec | None:
        if spec is None or bits is None or qtype_of(spec.qtype).kind != "int":
            return spec
        name = f"{'' if qtype_of(spec.qtype).signed else 'u'}int{bits}"
        if name not in QTYPES:
            raise quant_error("with_bits", "there is no integer type of so many bits", todo="Use 2 to 8", bits=bits)
        return dataclasses.replace(spec, qtype=name)

    def item(item: Item) -> Item:
        s = item.spec
        return dataclasses.replace(
            item, spec=dataclasses.replace(s, weight=changed(s.weight, weight), act=changed(s.act, act))
        )

    return dataclasses.replace(plan, items=tuple(map(item, plan.items)))


def to_nearest(plan: Plan) -> Plan:
    """The plan with weights and activations rounded to nearest: to evaluate and to freeze what trained stochastically.

    Args:
      plan: from `make_plan`.

    Returns:
      A new plan; how gradients are rounded stays.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}, jnp.ones((2, 8))
      >>> spec = jq.OpSpec(jq.QuantSpec("int4", rounding="stochastic"))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", spec)])
      >>> y = jq.quantized(fn, plan, key=jax.random.key(0))(params, x)  # a step of training
      >>> qparams = jq.quantize_params(params, qat.to_nearest(plan))
    """

    def nearest(spec: QuantSpec | None) -> QuantSpec | None:
        return None if spec is None else dataclasses.replace(spec, rounding="nearest")

    def item(item: Item) -> Item:
        s = item.spec
        return dataclasses.replace(item, spec=dataclasses.replace(s, weight=nearest(s.weight), act=nearest(s.act)))

    return dataclasses.replace(plan, items=tuple(map(item, plan.items)))

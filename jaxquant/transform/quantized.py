"""`quantized`: a function of params to the same function in low precision."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.finite import is_concrete
from jaxquant.core.learned import check_entry
from jaxquant.core.paths import Leaf, Params, nearest
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.refusals import Refusals
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree, State
from jaxquant.ops.operands import random_key
from jaxquant.transform.interpreter import Interpreter, Tally
from jaxquant.transform.plan import Item, Plan, is_float
from jaxquant.transform.products import Products
from jaxquant.transform.stated import StatedPlan
from jaxquant.transform.statistics import Inputs, Range
from jaxquant.transform.trace import Traced, trace
from jaxquant.transform.weights import Value, Weight, as_array, dims_of

__all__ = ["check_plan", "check_state", "quantized", "quantized_and_seen", "steps_shape", "weights_of"]


def check_plan(function: str, plan: Plan, params: Mapping[str, Leaf]) -> None:
    """Raises if the plan is for other parameters: all mismatches at once."""
    if isinstance(plan, StatedPlan):
        todo = "Make it one: plan.plan_for(fn, params, *args)"
        raise quant_error(function, "the plan is not yet one of a function", todo=todo, plan=type(plan).__name__)
    wrong = []
    for item in plan.items:
        leaf = params.get(item.path)
        if isinstance(leaf, QTensor):
            leaf.checked(item.path)
        if leaf is None:
            wrong.append(f"{item.path} is missing (nearest: {nearest(item.path, params)})")
        elif not hasattr(leaf, "shape") or tuple(leaf.shape) != item.shape:
            got = f"has shape {tuple(leaf.shape)}" if hasattr(leaf, "shape") else f"is {leaf!r}"
            wrong.append(f"{item.path} {got}, planned {item.shape}")
        elif isinstance(leaf, QTensor):
            w = item.spec.weight
            if w is None:  # the plan has no spec of the weight: its leaf decides
                continue
            if leaf.qtype != w.qtype or leaf.symmetric != w.symmetric:
                wrong.append(f"{item.path} is {leaf!r}, planned {w!r}")
            elif tuple(leaf.scale.shape) != item.scale_shape:
                has = f"{leaf!r}, scales of shape {tuple(leaf.scale.shape)}"
                shared = f"{w!r} over axes {item.reduce_axes}, scales of shape {item.scale_shape}"
                wrong.append(f"{item.path} is {has}, planned {shared}")
    if wrong:
        todo = "Make the plan from these params, or quantize the float ones with it"
        raise quant_error(function, f"params and plan do not agree: {'; '.join(wrong)}", todo=todo)


def weights_of(traced: Traced, plan: Plan | None, state: Mapping[str, PyTree] | None) -> list[Value]:
    """The inputs of the trace, planned parameters and QTensors as `Weight`s.

    Where products of two activations are planned, the other parameters too: their products are none of those.
    """
    planned = set() if plan is None else set(plan.by_path)
    if plan is not None and plan.products:
        planned |= {path for path, leaf in traced.params.items() if is_float(leaf)}
    values: list[Value] = []
    for path, leaf in traced.params.items():
        if isinstance(leaf, QTensor) or path in planned:
            entry = (state or {}).get(path)
            values.append(Weight(path, cast(Operand, leaf), entry, dims_of(tuple(leaf.shape)), leaf.dtype))
        else:
            values.append(cast(jax.Array, leaf))
    return [*values, *traced.arrays]


@runtime_checkable
class Planned(Protocol):
    """A model that knows how it runs: what `jaxquant.io.load_model` and `quantize_model` return."""

    @property
    def plan(self) -> Plan | StatedPlan | None:
        """The plan."""

    @property
    def state(self) -> State | None:
        """Static ranges and learned steps of the plan."""


def quantized(
    fn: Callable[..., PyTree],
    plan: Plan | StatedPlan | Planned | None = None,
    state: State | None = None,
    *,
    precision: jax.lax.PrecisionLike = None,
    key: jax.Array | None = None,
) -> Callable[..., PyTree]:
    """``fn`` in low precision: a function with ``fn``'s own signature, as `jax.vmap` makes one.

    ``fn(params, ...)`` is traced to a jaxpr and evaluated; wherever a dot_general, a convolution, an embedding lookup
    or a ragged_dot meets a planned weight, the quantized operation runs instead. The leaf says what happens: a float
    leaf trains (quantization-aware, straight-through gradients), a `QTensor` leaf runs on its codes; their forward
    values agree. Everything else runs unchanged. Composes with jit, grad, vmap, scan, remat and shard_map,
    outside and inside; wrap it in `jax.jit`; otherwise each call traces again.

    In training the backward pass evaluates norms and activation functions before quantized products again, and
    quantizes weights again (`jax.checkpoint`). Layers that are scanned need less memory for it.

    Args:
      fn: any JAX function whose argument 0 is a pytree of parameters.
      plan: from `make_plan`, or a model that holds its plan and state, from `jaxquant.io.load_model`. A
        `StatedPlan`, which checkpoints of other libraries have, becomes the plan of ``fn`` when it is traced. None:
        QTensor leaves run weight-only, all else in float.
      state: path -> ``{"scale": .., "zero_point": ..}`` for the planned activations whose range is static, from
        `act_state`; or path -> ``{"weight": .., "act": ..}``, learned steps from `qat.learned_steps`, with which every
        range that is there takes the place of the one the spec would choose. Pass it as an argument of the function
        that is differentiated to train it.
      precision: of the quantized operations; None: each operation's own. See `jaxquant.ops.dot_general`.
      key: a random key for the specs with ``rounding="stochastic"``, a new one for each step of training. Each
        weight, its activation and its gradient round with a noise of their own (layers of a scan share it). Needed
        wherever an activation or a float weight is rounded so; for gradients only where they are taken. One key, one
        result. `jaxquant.qat.to_nearest` has the plan for evaluation.

    Returns:
      A function ``(params, *args, **kwargs)`` with the results of ``fn``.

    Raises:
      QuantError: when called with params that do not fit the plan, without the state that a static spec needs, without
        the key that stochastic rounding needs, or with a QTensor that reaches an operation without a quantized form.

    Gradient: straight-through with respect to float leaves and inputs; with respect to the scales of QTensors; that of
      the papers with respect to learned steps (`qat.learned_steps`); of every order, in forward and reverse mode.
      Custom derivative rules of functions that a planned weight enters are replaced by the derivative of their body.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"])
      >>> params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.w8a8())])
      >>> qparams = jq.quantize_params(params, plan)
      >>> run = jax.jit(jq.quantized(fn, plan))
      >>> bool(jnp.allclose(run(qparams, x), run(params, x)))
      True
    """

    if isinstance(plan, Planned):
        if state is not None:
            todo = "Leave state out, or pass model.plan and a state of your own"
            raise quant_error("quantized", "the model has a state already", todo=todo, state=tuple(state))
        plan, state = plan.plan, plan.state
    if plan is not None and not isinstance(plan, Plan | StatedPlan):
        todo = "Make one from rules: jq.make_plan(fn, params, *args, rules=rules)"
        raise quant_error("quantized", "plan must be a Plan or None", todo=todo, plan=plan)
    if state and plan is None:
        todo = "Pass the plan that the state is for"
        raise quant_error("quantized", "state needs a plan", todo=todo, paths=tuple(state))
    stated = plan if isinstance(plan, StatedPlan) else None
    known = plan if isinstance(plan, Plan) else None
    key = _checked_key(known, key)

    @functools.wraps(fn)
    def run(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        plan, ranges = known, state
        if stated is not None:
            plan = stated.plan_for(fn, params, *args, **kwargs)
            ranges = stated.state_for(plan, state)
        interpreter = Interpreter(plan, precision=precision, rounding_key=key)
        return _run(interpreter, fn, ranges, params, args, kwargs)

    return run


def _checked_key(plan: Plan | None, key: jax.Array | None) -> jax.Array | None:
    """A key, typed; raises if it is none, or nothing is rounded with it."""
    if key is None:
        return None
    specs = [item.spec for item in plan.items] if plan is not None else []
    each = [spec for op in specs for spec in (op.weight, op.act, op.grad) if spec is not None]
    if not any(spec.rounding == "stochastic" for spec in each):
        todo = "Leave the key out, or plan weights, activations or gradients with rounding='stochastic'"
        raise quant_error("quantized", "nothing is rounded with a key", todo=todo)
    return random_key("quantized", key)


def _run(
    interpreter: Interpreter,
    fn: Callable[..., PyTree],
    state: State | None,
    params: Params,
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
) -> PyTree:
    """The function, evaluated by an interpreter, which notes what there is to be noted."""
    traced, plan = trace("quantized", fn, params, args, kwargs), interpreter.plan
    if plan is not None:
        check_plan("quantized", plan, traced.params)
        check_state("quantized", plan, state)
        _check_static(plan, state)
        if plan.products:
            interpreter.products = Products({p.name: p.spec for p in plan.products})
    results = interpreter.run(traced.jaxpr, weights_of(traced, plan, state))
    if interpreter.products is not None:
        _check_products(interpreter.products)
    return traced.rebuild([_returned(interpreter, r) if isinstance(r, Weight) else as_array(r) for r in results])


def quantized_and_seen(fn: Callable[..., PyTree], plan: Plan, state: State | None) -> Callable[..., PyTree]:
    """`quantized`, with path -> ``{"range": ..}``, what the observer of each activation has seen in this call."""
    ranges = {item.path: Range(item.spec.act.observer) for item in plan.items if item.spec.act is not None}

    def collected(item: Item, inputs: Callable[[], Inputs]) -> dict[str, Tally]:
        if item.path not in ranges:
            return {}
        rows = inputs().values
        return {item.path: Tally(ranges[item.path].of(jax.lax.stop_gradient(rows.values)), rows.seen())}

    @functools.wraps(fn)
    def run(params: Params, *args: PyTree, **kwargs: PyTree) -> PyTree:
        def merge(path: str, a: PyTree, b: PyTree) -> PyTree:
            return ranges[path].merge(a, b)

        interpreter = Interpreter(plan, collect=collected, merge=merge, observing=True)
        result = _run(interpreter, fn, state, params, args, kwargs)
        none = {path: ranges[path].observer.init((*plan[path].shape[: plan[path].stacked], 1)) for path in ranges}
        return result, {path: {"range": _seen(interpreter.stats.get(path), none[path])} for path in ranges}

    return run


def _seen(tally: Tally | None, none: PyTree) -> PyTree:
    """The state of an observer, or that of one that has seen nothing."""
    if tally is None:
        return none
    if tally.seen is None:
        return tally.value
    seen = tally.seen
    return jax.tree.map(
        lambda new, old: jnp.where(seen.reshape(seen.shape + (1,) * (new.ndim - seen.ndim)), new, old),
        tally.value,
        none,
    )


def _check_products(products: Products) -> None:
    """Raises if a planned product was not computed: names depend on the trace."""
    assert products.specs is not None
    missing = [name for name in products.specs if name not in products.met]
    if missing:
        todo = "Make the plan from the function and the kind of arguments that it runs with"
        raise quant_error("quantized", "planned products are not computed", todo=todo, products=tuple(missing))


def _returned(interpreter: Interpreter, weight: Weight) -> Operand:
    """A weight among the results: the leaf that was passed in, QTensor or not; a view of one is a use in float."""
    return weight.value() if not weight.steps else interpreter.float_of(weight, "the result of the function")


def _check_static(plan: Plan, state: State | None) -> None:
    """Raises if the state lacks what the plan needs."""
    needed = [i.path for i in plan.items if i.spec.act is not None and i.spec.act.static]
    missing = [path for path in needed if not {"scale", "act"} & set((state or {}).get(path, ()))]
    if missing:
        todo = (
            "Calibrate: pass state=jq.act_state(plan, jq.calibrate(fn, plan, params, batches)), or learn the ranges: "
        )
        todo += "state=jq.qat.learned_steps(fn, plan, params, batches)"
        raise quant_error("quantized", "static activation ranges are missing", todo=todo, paths=tuple(missing))


def check_state(function: str, plan: Plan, state: State | None) -> None:
    """Raises if the state holds what is not of the plan: all mismatches at once."""
    if not isinstance(state, Mapping | None):
        todo = "Pass what act_state or qat.learned_steps returned for this plan"
        raise quant_error(function, "state must be a dict by path", todo=todo, state=state)
    refusals = Refusals(function)
    for path, entry in (state or {}).items():
        with refusals.gather():
            _check_state_of(function, plan, path, entry)
    refusals.close()


def _check_state_of(function: str, plan: Plan, path: str, entry: PyTree) -> None:
    item, names = plan.get(path), set(entry) if isinstance(entry, Mapping) else set()
    if item is None or not names or not (names <= {"act", "weight"} or "scale" in names):
        todo = "Use what act_state or qat.learned_steps returned for this plan"
        raise quant_error(function, "state does not fit the plan", todo=todo, path=path, entry=type(entry).__name__)
    if "scale" in names:
        _check_range(function, path, entry, item.spec.act)
        return
    for operand in sorted(names):
        spec = getattr(item.spec, operand)
        if spec is None:
            todo = "Use what qat.learned_steps returned for this plan"
            raise quant_error(function, f"the plan quantizes no {operand} here", todo=todo, path=path)
        if spec.rounding != "nearest":
            todo = "Make the plan with rounding='nearest'"
            raise quant_error(function, "learned steps round to nearest", todo=todo, path=path, rounding=spec.rounding)
        check_entry(function, path, entry[operand], spec, steps_shape(item, operand))


def _check_range(function: str, path: str, entry: Mapping[str, PyTree], act: QuantSpec | None) -> None:
    """Raises unless an entry holds the static range of an activation; checks values that can be read."""
    if act is None or not act.static:
        todo = "Leave it out, or make the plan with static=True for this activation"
        raise quant_error(function, "the plan takes no static range here", todo=todo, path=path, act=act)
    names = ("scale",) if act.symmetric else ("scale", "zero_point")
    if tuple(sorted(entry)) != names:
        todo = "Use what act_state returned for this plan"
        got = tuple(sorted(entry))
        raise quant_error(function, f"a static range here has {' and '.join(names)}", todo=todo, path=path, entry=got)
    scale = entry["scale"]
    if not jnp.issubdtype(jnp.result_type(scale), jnp.floating):
        raise quant_error(function, "scale must be a float", todo="Cast it to float32", path=path, scale=scale)
    if is_concrete(scale) and not np.all((np.asarray(scale) > 0) & np.isfinite(np.asarray(scale))):
        rule, todo = "scale must be finite and above 0", "Calibrate again, on finite data"
        raise quant_error(function, rule, todo=todo, path=path, least=float(np.min(scale)))


def steps_shape(item: Item, operand: str) -> tuple[int, ...]:
    """The shape of the learned steps of a weight, or of its input."""
    if operand == "weight":
        return item.scale_shape
    spec = item.spec.act
    assert spec is not None
    groups = () if spec.group_size is None else (item.channels // spec.group_size,)
    return (*item.shape[: item.stacked], *groups)

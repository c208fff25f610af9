"""Learned steps: initial values of trained ranges, their labels for an optimizer, and their lower bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jaxquant.core.affine import encode, observed_range
from jaxquant.core.blocks import BlockView, block_shape
from jaxquant.core.errors import quant_error
from jaxquant.core.granularity import PerGroup
from jaxquant.core.learned import STEPS
from jaxquant.core.observers import MSE, AbsMean, Observer
from jaxquant.core.paths import Params, is_qtensor, leaves_with_paths, path_of
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.qtypes import qtype_of
from jaxquant.core.refusals import Refusals
from jaxquant.core.scale_zero_point import scale_zero_point
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.qat.leaves import trainable
from jaxquant.transform.calibrate import Calibration
from jaxquant.transform.masks import Mask
from jaxquant.transform.params import dequantize_params
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.statistics import Range, Statistic

__all__ = ["Method", "clamp_steps", "labels", "learned_steps"]

Method = Literal["lsq", "lsq+", "pact"]
"""The paper whose quantizer is learned."""

LearnedSteps: TypeAlias = dict[str, dict[str, jax.Array]]
"""``{"weight": {"scale": ..}, "act": {"scale": ..}}``: the learned arrays of a weight and of its activation."""

_Range: TypeAlias = tuple[jax.Array, jax.Array | None]
"""A scale and a zero point."""


@dataclasses.dataclass(frozen=True)
class _GroupRange(Statistic):
    """The states of an observer, one for each group of channels."""

    sees = "channels"
    observer: Observer
    groups: int

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> PyTree:
        rows = x.reshape(-1, self.groups, x.shape[-1] // self.groups)
        each = None if counted is None else jnp.broadcast_to(counted.reshape(-1, 1, 1), rows.shape)
        return self.observer.update(self.observer.init((1, self.groups, 1)), rows, (0, 2), each)

    def merge(self, a: PyTree, b: PyTree) -> PyTree:
        return self.observer.merge(a, b)


def _starts_at_mean(spec: QuantSpec, method: Method) -> bool:
    """Whether the step starts at LSQ's value, which trains to a better result than the least error at few bits."""
    few = spec.type.kind == "int" and spec.type.bits <= 3
    return spec.calibration is None and spec.symmetric and few and method != "pact"


def _calibrated(spec: QuantSpec, method: Method) -> QuantSpec:
    """The spec, with a default calibration if it names none."""
    if spec.calibration is not None:
        return spec
    info = qtype_of(spec.qtype)
    narrow = spec.type.qmin != info.qmin if info.kind == "int" and info.signed else spec.narrow_range
    calibration = AbsMean() if _starts_at_mean(spec, method) else MSE()
    return dataclasses.replace(spec, calibration=calibration, narrow_range=narrow)


def _step(lo: jax.Array, hi: jax.Array, spec: QuantSpec, method: Method) -> _Range:
    """Scale and zero point of a range; for a mean magnitude, LSQ's ``2 mean|x| / sqrt(qmax)``."""
    if not _starts_at_mean(spec, method):
        scale, zero_point = scale_zero_point(lo, hi, spec)
        assert isinstance(scale, jax.Array)  # by _check_spec
        return scale, zero_point
    return jnp.where(hi > 0, 2 * hi / math.sqrt(spec.type.qmax), jnp.ones_like(hi)), None


def learned_steps(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    batches: Iterable[PyTree],
    method: Method = "lsq",
    *,
    mask: Mask = None,
) -> dict[str, LearnedSteps]:
    """Initial values of trained ranges: the ``state`` from which `quantized` learns steps of weights and activations.


        state = qat.learned_steps(fn, plan, params, batches)
        loss = lambda params, state, x: objective(jq.quantized(fn, plan, state)(params, x))
        jax.grad(loss, argnums=(0, 1))                                     # trains both
        jq.quantize_params(params, plan, state=state)                      # freezes both
        jq.quantized(fn, plan, state)(qparams, x)                          # the trained model, in integers

    A range starts at the result of the spec's own ``calibration``: over each block of a weight, over all inputs of an
    activation. Without one, a symmetric range of up to three bits starts at LSQ's ``2 mean|x| / sqrt(qmax)`` (except
    for PACT), and all others at the least squared error. LSQ's start was better after training in three of four
    measured cases. A weight that a method has quantized keeps that method's range, from which training goes further: at
    two bits it starts closer to the float model, and ends closer. The weights that are trained are then its values.

        model = jq.quantize_model(fn, params, x, recipe=rules, method="gptq", batches=batches)
        state = qat.learned_steps(fn, model.plan, model.params, batches)
        params = jq.dequantize_params(model.params)                        # trained beside the state

    Args:
      fn: the function that was planned.
      plan: from `make_plan`. Every quantized operand gets learned steps: one per tensor, channel or group of a weight,
        as its spec says; one for an activation, for all tokens, or one for each group of channels. An activation may be
        static or not; with ``static=True`` running without the state is an error.
      params: its parameters, in float or as `quantize_params` returned them.
      batches: for each batch the tuple of fn's further arguments (a single array stands for a tuple of one), from which
        activations are calibrated. Ignored if only weights are quantized.
      method: ``"lsq"``: the step; ``"lsq+"``: the step, and the offset of asymmetric specs; ``"pact"``: the largest
        magnitude, whose gradient is that of clipping alone.
      mask: which rows of the batches count, as for `calibrate`.

    Returns:
      path -> ``{"weight": range, "act": range}``, with an entry for each quantized operand. Without its entry a dynamic
      activation keeps a range for each token, which is better for int8. A range is a dict of float32 arrays:
      ``scale``; ``scale`` and ``offset`` (of LSQ+, in real units); ``clip`` (of PACT); or for LSQ of an asymmetric spec
      ``scale`` and a constant ``zero_point``. Leading axes are those of stacked layers.

    Raises:
      QuantError: naming each path, if a number type prescribes the form of its scales, a spec is asymmetric under PACT,
        rounds stochastically or separates outliers, parameters do not fit the plan, a quantized weight has an order of
        its own or offsets, there are no batches, or no batch reaches a weight.

    Gradient: with respect to the ranges, through `quantized`: that of the papers, with LSQ's ``1 / sqrt(n qmax)``, n
      the number of weights that share the step, or of features of one row of an activation. `jaxquant.core.learned` has
      the formulas.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import qat
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)}, jnp.ones((2, 8))
      >>> spec = jq.OpSpec(jq.QuantSpec("int2"), jq.QuantSpec("uint4"))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", spec)])
      >>> state = qat.learned_steps(fn, plan, params, [x])
      >>> jax.tree.map(jnp.shape, state)
      {'w': {'act': {'scale': ()}, 'weight': {'scale': (1, 4)}}}
      >>> loss = lambda params, state: jnp.sum(jq.quantized(fn, plan, state)(params, x) ** 2)
      >>> grads, step_grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, state)
      >>> qparams = jq.quantize_params(params, plan, state=state)
      >>> bool((jq.quantized(fn, plan, state)(qparams, x) == jq.quantized(fn, plan, state)(params, x)).all())
      True

    Source: Esser et al. 2020, LSQ (arXiv:1902.08153); Bhalgat et al. 2020, LSQ+ (arXiv:2004.09576); Choi et al. 2018,
      PACT (arXiv:1805.06085).
    """
    function = "learned_steps"
    if method not in get_args(Method):
        todo = f"Use one of {', '.join(map(repr, get_args(Method)))}"
        raise quant_error(function, "unknown method", todo=todo, method=method)
    if not isinstance(plan, Plan):
        raise quant_error(function, "plan must be a Plan", todo="Pass what make_plan returned", plan=plan)
    leaves = leaves_with_paths(params)[0]
    check_plan(function, plan, leaves)
    refusals = Refusals(function)
    for item in plan.items:
        if item.spec.outliers is not None:
            with refusals.gather():
                rule, todo = "features with outliers have no steps", "Leave outliers out"
                raise quant_error(function, rule, todo=todo, path=item.path)
        for operand, spec in (("weight", item.spec.weight), ("activation", item.spec.act)):
            if spec is not None:
                with refusals.gather():
                    _check_spec(function, item, operand, spec, method)
        leaf = leaves[item.path]
        if is_qtensor(leaf) and (leaf.offset is not None or leaf.permutation is not None):
            with refusals.gather():
                rule = "the weight has a permutation or offsets"
                todo = "Use a method that keeps the order, and zero points"
                raise quant_error(function, rule, todo=todo, path=item.path, weight=repr(leaf))
    refusals.close()
    state: dict[str, LearnedSteps] = {}
    ranges = _act_ranges(fn, plan, params, batches, mask, method)
    for item in plan.items:
        entry = {}
        if item.spec.weight is not None:
            entry["weight"] = _entry(_weight_range(leaves[item.path], item, method), item.spec.weight, method)
        if item.spec.act is not None:
            if item.path not in ranges:
                todo = "Pass batches that reach every branch"
                raise quant_error(function, "no batch reaches this weight", todo=todo, path=item.path)
            spec = item.spec.act
            found = item.stack(lambda seen, spec=spec: _act_range(seen, spec, method))(ranges[item.path]["steps"])
            entry["act"] = _entry(found, spec, method)
        if entry:
            state[item.path] = entry
    return state


def _check_spec(function: str, item: Item, operand: str, spec: QuantSpec, method: Method) -> None:
    if spec.type.scale_format is not None or spec.two_level:
        todo = "Use an integer type, fp8 or a table, with scales in a float dtype"
        rule = f"the scales of this {operand} are not plain floats"
        raise quant_error(function, rule, todo=todo, path=item.path, qtype=spec.qtype, two_level=spec.two_level)
    if spec.rounding != "nearest":
        todo = "Use rounding='nearest'"
        raise quant_error(function, "learned steps round to nearest", todo=todo, path=item.path, rounding=spec.rounding)
    if not spec.symmetric and method == "pact":
        todo = "Use symmetric=True (of an unsigned type, after a ReLU), or method='lsq+'"
        raise quant_error(
            function, f"PACT clips symmetric ranges, and this {operand} has none", todo=todo, path=item.path
        )
    if operand == "activation" and isinstance(spec.granularity, PerGroup) and item.op != "dot_general":
        todo = "Use granularity=PerTensor()"
        raise quant_error(function, "steps per group are for dot_general", todo=todo, path=item.path, op=item.op)


def _weight_range(w: jax.Array | QTensor, item: Item, method: Method) -> _Range:
    """The range of a weight, of all layers of its stack: its own if it is quantized."""
    if is_qtensor(w):
        return scale_values(w.scale), w.zero_point
    return item.stack(lambda w: _float_range(w, item, method))(jnp.asarray(w))


def _float_range(w: jax.Array, item: Item, method: Method) -> _Range:
    spec = item.spec.weight
    assert spec is not None
    if _starts_at_mean(spec, method):
        view = BlockView(w.shape, block_shape(w.shape, spec.granularity, item.reduce_axes))
        mean = view.join_scale(jnp.mean(jnp.abs(view.split(w.astype(jnp.float32))), axis=view.axes, keepdims=True))
        return _step(-mean, mean, spec, method)
    found = encode(w, _calibrated(spec, method), item.reduce_axes)
    return scale_values(found.scale), found.zero_point


def _act_ranges(
    fn: Callable[..., PyTree], plan: Plan, params: Params, batches: Iterable[PyTree], mask: Mask, method: Method
) -> dict[str, dict[str, PyTree]]:
    """path -> the state of the observer of each activation."""
    acts = {item.path: _calibrated(item.spec.act, method) for item in plan.items if item.spec.act is not None}
    if not acts:
        return {}
    calibration = Calibration("learned_steps", fn, plan, {})
    for item in plan.items:
        spec = acts.get(item.path)
        calibration.wanted[item.path] = {} if spec is None else {"steps": _statistic(item, spec)}
    return calibration(dequantize_params(params), batches, mask)


def _statistic(item: Item, spec: QuantSpec) -> Statistic:
    if spec.group_size is None:
        return Range(spec.observer)
    return _GroupRange(spec.observer, item.channels // spec.group_size)


def _act_range(seen: PyTree, spec: QuantSpec, method: Method) -> _Range:
    lo, hi = observed_range(seen, _calibrated(spec, method))
    shape = () if spec.group_size is None else (lo.size,)
    return _step(lo.reshape(shape), hi.reshape(shape), spec, method)


def _entry(found: _Range, spec: QuantSpec, method: Method) -> dict[str, jax.Array]:
    """The learned arrays of a range."""
    scale = found[0].astype(jnp.float32)
    if method == "pact":
        return {"clip": scale * spec.type.qmax}
    if found[1] is None:
        return {"scale": scale}
    zero_point = found[1].astype(jnp.float32)
    other = {"offset": -zero_point * scale} if method == "lsq+" else {"zero_point": zero_point}
    return {"scale": scale, **other}


def _is_step(keys: jax.tree_util.KeyPath) -> bool:
    return path_of(keys).rpartition("/")[2] in STEPS


def clamp_steps(state: PyTree, least: float = 1e-6) -> PyTree:
    """The state with every scale and clip raised to ``least`` at least; call it after each update of the state.

    A step at or below 0 has no meaning, but an optimizer that takes long steps may produce one.

    Args:
      state: from `learned_steps`, or gradient-trained ranges of `act_state`.
      least: the smallest step, in real units; above 0.

    Returns:
      A new state; works under `jax.jit` too.

    Raises:
      QuantError: if ``least`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import qat
      >>> qat.clamp_steps({"w": {"weight": {"scale": jnp.array([0.5, -0.1])}}}, least=0.25)
      {'w': {'weight': {'scale': Array([0.5 , 0.25], dtype=float32)}}}
    """
    if not least > 0:
        raise quant_error("clamp_steps", "the least step must be above 0", todo="Use for example 1e-6", least=least)
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: jnp.maximum(x, jnp.asarray(least, x.dtype)) if _is_step(keys) else x, state
    )


def labels(params: Params, state: PyTree = None) -> PyTree:
    """Labels for `optax.multi_transform`: weights, steps with their own learning rate, and frozen leaves.

    Args:
      params: pytree of arrays and QTensors.
      state: learned steps, or None.

    Returns:
      ``"weights"`` for float leaves and ``"frozen"`` for integer leaves and QTensors, in the structure of ``params``.
      With a state, a pair of these labels and the state's, for an optimizer of ``(params, state)``: ``"steps"``, and
      ``"frozen"`` for constant zero points.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxquant import qat
      >>> params, state = {"w": jnp.ones((8, 4))}, {"w": {"weight": {"scale": jnp.ones((1, 4))}}}
      >>> qat.labels(params, state)
      ({'w': 'weights'}, {'w': {'weight': {'scale': 'steps'}}})
      >>> rates = {"weights": optax.adamw(1e-3), "steps": optax.adam(1e-4), "frozen": optax.set_to_zero()}
      >>> opt_state = optax.multi_transform(rates, qat.labels(params, state)).init((params, state))
    """
    of_params = jax.tree.map(lambda trains: "weights" if trains else "frozen", trainable(params))
    if state is None:
        return of_params

    def of(keys: jax.tree_util.KeyPath, x: jax.typing.ArrayLike) -> str:
        fixed = path_of(keys).endswith("zero_point") or not jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return "frozen" if fixed else "steps"

    return of_params, jax.tree_util.tree_map_with_path(of, state)

"""`calibrate`: statistics of the inputs of planned weights, over batches; `act_state`: static ranges from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxquant.core.affine import roundtrip, scale_zero_point
from jaxquant.core.errors import quant_error
from jaxquant.transform.batches import arguments
from jaxquant.transform.interpreter import Interpreter, Tally
from jaxquant.transform.paths import leaves_with_paths
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import check_plan, weights_of
from jaxquant.transform.statistics import ChannelAbsMax, ChannelMean, Inputs, Range, Statistic
from jaxquant.transform.trace import is_array, trace

__all__ = ["act_state", "calibrate", "merge_stats"]


def _wanted(item: Item, collect: Mapping[str, Statistic] | None) -> Mapping[str, Statistic]:
    """The statistics of one weight: those asked for, and the range that its activation spec needs."""
    own = {} if item.spec.act is None else {"range": Range(item.spec.act.observer)}
    if collect is not None:
        return {**collect, **own}
    return {"range": Range(), "absmax": ChannelAbsMax(), "mean": ChannelMean(), **own}


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static half of a call: its structure, and its leaves that are no arrays."""

    structure: Any
    static: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> tuple[_Call, list[Any]]:
        """A call in two halves."""
        flat, structure = jax.tree.flatten(args)
        return cls(structure, tuple(_ARRAY if is_array(x) else x for x in flat)), [x for x in flat if is_array(x)]

    def arguments(self, arrays: list[Any]) -> tuple[Any, ...]:
        """The call, put together."""
        new = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(new) if x is _ARRAY else x for x in self.static])


_ARRAY = object()


def calibrate(
    fn: Callable[..., Any],
    plan: Plan,
    params: Any,
    batches: Iterable[Any],
    *,
    collect: Mapping[str, Statistic] | None = None,
) -> dict[str, Any]:
    """Runs ``fn`` over batches and collects statistics of what goes into each planned weight.

    One jitted pass per batch, on the float params with float activations. Memory is that of the statistics, whatever
    the number of batches.

    Args:
      fn: the function that was planned.
      plan: from `make_plan`.
      params: its parameters. QTensors among them run quantized: what comes after them sees their errors.
      batches: for each batch the tuple of fn's further arguments (a single array stands for a tuple of one).
      collect: name -> `Statistic` from `jaxquant.statistics`, for every weight; ``{"gram": Gram()}`` for GPTQ. None:
        the range, the absmax and the mean of each channel. The range that an activation's spec needs is always
        collected.

    Returns:
      path -> name -> the statistic, a plain pytree; with leading axes where the weight is stacked under scan. A
      parameter that is only looked up (``take``) has no input and is not among them, and neither is one that no batch
      has reached, in a branch that was never taken.

    Raises:
      QuantError: if there are no batches, params do not fit the plan, a planned weight is inside of a shard_map, or a
        statistic of channels is asked for where only a part of a weight's channels meets an input.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}
      >>> plan = jq.make_plan(fn, params, jnp.ones((1, 4)), rules=[jq.Rule("w", recipes.w8a8(static=True))])
      >>> stats = jq.calibrate(fn, plan, params, [jnp.ones((2, 4)), -3 * jnp.ones((2, 4))])
      >>> stats["w"]["absmax"]
      Array([[3., 3., 3., 3.]], dtype=float32)
      >>> jq.act_state(plan, stats)["w"]["scale"]
      Array(0.02362205, dtype=float32)
    """
    wanted = {item.path: _wanted(item, collect) for item in plan.items}

    merge = functools.partial(_merge, wanted)

    def collected(item: Item, inputs: Inputs) -> Any:
        return {name: _of(item, name, statistic, inputs) for name, statistic in wanted[item.path].items()}

    @functools.partial(jax.jit, static_argnums=1)
    def one(arrays: list[Any], call: _Call) -> dict[str, Tally]:
        params, args = call.arguments(arrays)
        traced = trace("calibrate", fn, params, args, {})
        interpreter = Interpreter(plan, collect=collected, merge=merge)
        interpreter.run(traced.jaxpr, weights_of(traced, plan, None))
        return interpreter.stats

    @jax.jit
    def both(a: dict[str, Tally], b: dict[str, Tally]) -> dict[str, Tally]:
        shared = {path: a[path].merge(b[path], functools.partial(merge, path)) for path in a if path in b}
        return {**a, **b, **shared}

    check_plan("calibrate", plan, leaves_with_paths(params)[0])
    total = None
    for args in arguments("calibrate", batches, fn):
        call, arrays = _Call.of((params, args))
        stats = one(arrays, call)
        total = stats if total is None else both(total, stats)
    if total is None:
        todo = "Pass at least one; a generator is used up by one pass"
        raise quant_error("calibrate", "there are no batches", todo=todo)
    seen = {path: tally.seen is None or bool(tally.seen.all()) for path, tally in total.items()}
    return {path: tally.value for path, tally in total.items() if seen[path]}


def _merge(wanted: Mapping[str, Mapping[str, Statistic]], path: str, a: Any, b: Any) -> Any:
    return {name: statistic.merge(a[name], b[name]) for name, statistic in wanted[path].items()}


def merge_stats(
    plan: Plan, stats: Iterable[Mapping[str, Any]], *, collect: Mapping[str, Statistic] | None = None
) -> dict[str, Any]:
    """Statistics of several calibrations as if one had seen all their batches: those of several hosts, say.

    Hosts that calibrate on batches of their own exchange their statistics as any arrays: with
    `jax.experimental.multihost_utils.process_allgather`, or through files.

    Args:
      plan: the plan that was calibrated.
      stats: what `calibrate` returned, of each.
      collect: as it was for `calibrate`.

    Returns:
      path -> name -> the statistic. A weight that only some have reached is among them.

    Raises:
      QuantError: if there are none, or they hold other statistics than ``collect`` says.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(2)}
      >>> plan = jq.make_plan(fn, params, jnp.ones((1, 2)), rules=[jq.Rule("w", recipes.w8a8(static=True))])
      >>> hosts = [jq.calibrate(fn, plan, params, [i * jnp.ones((1, 2))]) for i in range(4)]
      >>> jq.merge_stats(plan, hosts)["w"]["absmax"]
      Array([[3., 3.]], dtype=float32)
    """
    wanted = {item.path: _wanted(item, collect) for item in plan.items}
    total: dict[str, Any] | None = None
    for one in stats:
        for path, entry in one.items():
            names = set(wanted.get(path, ()))
            if set(entry) != names:
                todo = "Pass the plan and the collect of the calibration"
                rule = "statistics are others than collected"
                got, expected = tuple(sorted(entry)), tuple(sorted(names))
                raise quant_error("merge_stats", rule, todo=todo, path=path, got=got, names=expected)
        if total is None:
            total = dict(one)
        else:
            shared = {path: _merge(wanted, path, total[path], one[path]) for path in total if path in one}
            total = {**total, **one, **shared}
    if total is None:
        raise quant_error("merge_stats", "there is nothing to merge", todo="Pass what calibrate returned, of each host")
    return total


def _of(item: Item, name: str, statistic: Statistic, inputs: Inputs) -> Any:
    x = inputs.seen_by(statistic)
    if x is None:
        rule = f"{name} needs whole {statistic.sees}, and a use of this weight has a part of them, or flipped ones"
        todo = "Keep the weight in float for this pass, or collect other statistics: collect={} for ranges alone"
        raise quant_error("calibrate", rule, todo=todo, path=item.path, shape=item.shape)
    return statistic.of(jax.lax.stop_gradient(x))


def act_state(plan: Plan, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Static activation ranges from calibration statistics: the ``state`` of `quantized`.

    Args:
      plan: the plan that was calibrated.
      stats: what `calibrate` returned.

    Returns:
      path -> ``{"scale": .., "zero_point": ..}`` (no zero point if symmetric) for every planned weight whose activation
      is static: scalars, with leading axes where the weight is stacked. A plain pytree: save it beside the params, or
      train the scales with Optax.

    Raises:
      QuantError: naming the paths whose statistics are missing.
    """
    static = [item for item in plan.items if item.spec.act is not None and item.spec.act.static]
    missing = tuple(item.path for item in static if "range" not in stats.get(item.path, {}))
    if missing:
        todo = "Run calibrate with this plan, over batches that reach every branch"
        raise quant_error("act_state", "there are no ranges for some static activations", todo=todo, paths=missing)
    state = {}
    for item in static:
        spec = item.spec.act
        assert spec is not None

        def ranges(observed: Any, spec: Any = spec) -> Any:
            lo, hi = spec.observer.result(observed, symmetric=spec.symmetric, roundtrip=roundtrip(spec))
            scale, zero_point = scale_zero_point(lo[0], hi[0], spec)
            return {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}

        state[item.path] = item.stack(ranges)(stats[item.path]["range"])
    return state

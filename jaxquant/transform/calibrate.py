"""`calibrate`: statistics of the inputs of planned weights, over batches; `act_state`: static ranges from them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from jaxquant.core.affine import observed_range
from jaxquant.core.errors import quant_error
from jaxquant.core.finite import is_concrete
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import Scale
from jaxquant.core.scale_zero_point import scale_zero_point
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree, Stats, TreeDef
from jaxquant.transform.interpreter import Interpreter, Misfit, Tally
from jaxquant.transform.kept import Kept
from jaxquant.transform.masks import Counted, Mask, with_masks
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.quantized import check_plan, weights_of
from jaxquant.transform.statistics import ChannelAbsMax, ChannelMean, Inputs, Range, Statistic
from jaxquant.transform.trace import is_array, trace

__all__ = ["Calibration", "Collect", "act_state", "calibrate", "merge_stats"]


Collect = Mapping[str, Statistic]


def _wanted(function: str, plan: Plan, collect: Collect | None) -> dict[str, Collect]:
    """path -> the statistics of one weight: those asked for, and the range that its activation spec needs."""
    if collect is None:
        collect = {"range": Range(), "absmax": ChannelAbsMax(), "mean": ChannelMean()}
    todo = 'Pass a dict of names and statistics, such as collect={"gram": jq.calibration.Gram()}'
    if not isinstance(collect, Mapping):
        raise quant_error(function, "collect must be a dict of statistics by name", todo=todo, collect=collect)
    for name, statistic in collect.items():
        if not isinstance(name, str) or not isinstance(statistic, Statistic):
            got: dict[str, Any] = {"name": name, "statistic": statistic}
            raise quant_error(function, "collect must hold names and statistics", todo=todo, **got)
    own = {i.path: {} if i.spec.act is None else {"range": Range(i.spec.act.observer)} for i in plan.items}
    return {path: {**collect, **ranges} for path, ranges in own.items()}


def _check_counts(function: str, wanted: Mapping[str, Collect]) -> None:
    """Raises if a statistic, of a user's own, knows nothing of masks."""
    for path, statistics in wanted.items():
        for name, statistic in statistics.items():
            parts = [statistic.of, *([statistic.observer.update] if isinstance(statistic, Range) else [])]
            if any("counted" not in inspect.signature(part).parameters for part in parts):
                todo = "Give its method an argument counted=None: which rows count"
                raise quant_error(function, f"{name} takes no mask", todo=todo, path=path, statistic=statistic)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static half of a call: its structure, and its leaves that are no arrays."""

    structure: TreeDef
    static: tuple[object, ...]

    @classmethod
    def of(cls, args: tuple[PyTree, ...]) -> tuple[_Call, list[jax.Array]]:
        """A call in two halves."""
        flat, structure = jax.tree.flatten(args)
        return cls(structure, tuple(_ARRAY if is_array(x) else x for x in flat)), [x for x in flat if is_array(x)]

    def arguments(self, arrays: list[jax.Array]) -> tuple[PyTree, ...]:
        """The call, put together."""
        new = iter(arrays)
        return jax.tree.unflatten(self.structure, [next(new) if x is _ARRAY else x for x in self.static])


_ARRAY = object()


_NEVER = 2**31 - 1


class _Found(NamedTuple):
    """Statistics by name, and the number of the first batch in which an input that counts was NaN or infinite."""

    statistics: dict[str, PyTree]
    broken: jax.Array


class Calibration:
    """The pass over one batch, compiled once for all sets of weights that it collects the inputs of.

    Args:
      function: who asks, for errors.
      fn, plan, collect: as for `calibrate`.
      stages: the paths that are collected at a time; None: all, always. Paths with equal statistics in different stages
        share one buffer, so the largest stage determines the memory.
    """

    def __init__(
        self,
        function: str,
        fn: Callable[..., PyTree],
        plan: Plan,
        collect: Collect | None,
        stages: Sequence[Sequence[str]] | None = None,
    ):
        self.function, self.fn, self.plan, self.stages = function, fn, plan, stages
        self.wanted = _wanted(function, plan, collect)
        self.keys = {path: path for path in self.wanted}
        self._known = {path: path for path in self.wanted}  # one of the paths of each key
        self._shared = stages is None
        self.one = jax.jit(self._one, static_argnums=1)
        self.both = jax.jit(self._both)

    def _one(
        self,
        arrays: list[jax.Array],
        call: _Call,
        mask: Counted,
        number: jax.Array | int,
        active: dict[str, jax.Array] | None,
    ) -> dict[str, Tally]:
        params, args = call.arguments(arrays)
        misfits: dict[str, str] = {}

        def collected(item: Item, inputs: Callable[[], Inputs]) -> dict[str, Tally]:
            try:
                tally = self._tally(item, inputs(), active)
            except Misfit as misfit:
                misfits.setdefault(item.path, str(misfit))
                return {}
            return {self.keys[item.path]: tally}

        traced = trace(self.function, self.fn, params, args, {})
        interpreter = Interpreter(self.plan, collect=collected, merge=self._merge, keys=self.keys, mask=mask)
        interpreter.run(traced.jaxpr, weights_of(traced, self.plan, None))
        if misfits:
            todo = "Keep the weight in float for this pass, or collect other statistics: collect={} for ranges alone"
            if mask is not None:
                todo = "Calibrate without a mask, on batches that hold no padding"
            whys = dict.fromkeys(misfits.values())
            rule = next(iter(whys)) if len(whys) == 1 else "; ".join(f"{p}: {why}" for p, why in misfits.items())
            raise quant_error(self.function, rule, todo=todo, path=", ".join(misfits))

        def numbered(tally: Tally) -> Tally:
            broken = jnp.where(tally.value.broken == _NEVER, _NEVER, number)
            return tally._replace(value=tally.value._replace(broken=broken))

        return {key: numbered(tally) for key, tally in interpreter.stats.items()}

    def _tally(self, item: Item, inputs: Inputs, active: dict[str, jax.Array] | None) -> Tally:
        def of() -> _Found:
            found = {name: _of(name, s, inputs) for name, s in self.wanted[item.path].items()}
            return _Found(found, jnp.where(inputs.values.broken(), 0, _NEVER))  # of which batch is said at the end

        seen = inputs.values.seen()
        if active is None:
            return Tally(of(), seen)
        now = active[item.path]
        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of))
        return Tally(jax.lax.cond(now, of, lambda: none), now if seen is None else now & seen)

    def _merge(self, key: str, a: _Found, b: _Found) -> _Found:
        merged = _merged(self.wanted[self._known[key]], a.statistics, b.statistics)
        return _Found(merged, jnp.minimum(a.broken, b.broken))

    def _both(self, a: dict[str, Tally], b: dict[str, Tally]) -> dict[str, Tally]:
        shared = {key: a[key].merge(b[key], functools.partial(self._merge, key)) for key in a if key in b}
        return {**a, **b, **shared}

    def _share(self, arrays: list[jax.Array], call: _Call, mask: Counted) -> None:
        """Gives what has the same statistics, and is never collected at one time, one key."""
        assert self.stages is not None
        every = {path: jnp.array(True) for path in self.wanted}
        tallies = jax.eval_shape(functools.partial(self._one, call=call), arrays, mask=mask, number=0, active=every)
        keys: dict[str, str] = {}
        for stage in self.stages:
            count: collections.Counter[str] = collections.Counter()
            for path in stage:
                if path in tallies:
                    kind = repr((jax.tree.map(lambda a: (a.shape, a.dtype), tallies[path]), self.wanted[path]))
                    keys[path] = f"{kind} {count[kind]}"
                    count[kind] += 1
        self.keys.update(keys)
        self._known = {key: path for path, key in self.keys.items()}
        self._shared = True

    def __call__(
        self, params: Params, batches: Iterable[PyTree], mask: Mask, paths: Sequence[str] | None = None
    ) -> dict[str, dict[str, PyTree]]:
        """path -> name -> statistic, over all batches; of these paths, if only a stage is collected."""
        if mask is not None:
            _check_counts(self.function, self.wanted)
        total, active = None, None
        if paths is not None:
            active = {path: jnp.array(path in paths) for path in self.wanted}
        for number, (args, counted) in enumerate(with_masks(self.function, batches, mask, self.fn)):
            call, arrays = _Call.of((params, args))
            if not self._shared:
                self._share(arrays, call, counted)
            stats = self.one(arrays, call, counted, jnp.int32(number), active)
            total = stats if total is None else self.both(total, stats)
        if total is None:
            todo = "Pass at least one; a generator is used up by one pass"
            raise quant_error(self.function, "there are no batches", todo=todo)
        named = {path: total[key] for path, key in self.keys.items() if key in total}
        if paths is not None:
            named = {path: tally for path, tally in named.items() if path in paths}
        return self._checked(named)

    def _checked(self, named: dict[str, Tally]) -> dict[str, dict[str, PyTree]]:
        """The statistics of each path; raises if a path has no inputs, or inputs that are NaN or infinite."""
        reached = {path: tally for path, tally in named.items() if tally.seen is None or _all(tally.seen)}
        broken = {p: int(jnp.min(t.value.broken)) for p, t in reached.items() if is_concrete(t.value.broken)}
        broken = tuple(f"{path} (batch {number})" for path, number in broken.items() if number != _NEVER)
        if broken:
            todo = "Find where they arise: the first path is the first that is used; a mask leaves out rows of padding"
            rule = f"inputs of planned weights hold NaN or inf: {', '.join(broken)}"
            raise quant_error(self.function, rule, todo=todo, weights=len(broken))
        return {path: tally.value.statistics for path, tally in reached.items()}


def _all(seen: jax.Array) -> bool:
    return not is_concrete(seen) or bool(seen.all())


def calibrate(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    batches: Iterable[PyTree],
    *,
    collect: Collect | None = None,
    mask: Mask = None,
) -> dict[str, dict[str, PyTree]]:
    """Runs ``fn`` over batches and collects statistics of the inputs of each planned weight.

    One jitted pass per batch, on the float params with float activations. Memory is that of the statistics, whatever
    the number of batches. A second call compiles nothing if fn is the same object, and plan, statistics and shapes are
    equal; as for `jax.jit`, what fn closes over is read when it is compiled.

    Args:
      fn: the function that was planned.
      plan: from `make_plan`.
      params: its parameters. QTensors among them run quantized: what comes after them sees their errors.
      batches: for each batch the tuple of fn's further arguments (a single array stands for a tuple of one).
      collect: name -> `Statistic` from `jaxquant.calibration`, for every weight; ``{"gram": Gram()}`` for GPTQ. None:
        the range, the absmax and the mean of each channel. The range that an activation's spec needs is always
        collected.
      mask: which rows count, where batches hold padding: a function of the batch's arguments, or an iterable with one
        array for each batch. A boolean array, True where there is data, whose axes are the first axes of every planned
        weight's input (``[batch]``, ``[batch, length]``), or all of them are its first one, in the same order
        (``x.reshape(-1, channels)``). Of a convolution, those windows count of which nothing is left out. Rows that do
        not count have no effect, whatever is in them.

    Returns:
      path -> name -> the statistic, a plain pytree; with leading axes where the weight is stacked under scan. A
      parameter that is only looked up (``take``) has no input and is not among them, and neither is one that no row
      has reached: in a branch that was never taken, in batches without rows or in which nothing counts. A batch without
      rows has no effect.

    Raises:
      QuantError: if there are no batches, collect is no dict of statistics, params do not fit the plan, or a planned
        weight is inside a shard_map. Also, naming all such weights: if an input that counts holds NaN or inf, a
        statistic of channels is asked for where only a part of a weight's channels meets an input, or the mask does not
        fit an input (in a scan over the length, say, or in a ragged_dot, which knows rows by expert).

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
    check_plan("calibrate", plan, leaves_with_paths(params)[0])
    key = plan, tuple(collect.items()) if isinstance(collect, Mapping) else collect
    calibration = _KEPT.get(fn, key, lambda fn: Calibration("calibrate", fn, plan, collect))
    return calibration(params, batches, mask)


_KEPT: Kept[Calibration] = Kept()


def _merged(wanted: Collect, a: Mapping[str, PyTree], b: Mapping[str, PyTree]) -> dict[str, PyTree]:
    return {name: statistic.merge(a[name], b[name]) for name, statistic in wanted.items()}


def merge_stats(
    plan: Plan, stats: Iterable[Stats], *, collect: Collect | None = None
) -> dict[str, Mapping[str, PyTree]]:
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
      >>> jq.calibration.merge_stats(plan, hosts)["w"]["absmax"]
      Array([[3., 3.]], dtype=float32)
    """
    wanted = _wanted("merge_stats", plan, collect)
    total: dict[str, Mapping[str, PyTree]] | None = None
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
            shared = {path: _merged(wanted[path], total[path], one[path]) for path in total if path in one}
            total = {**total, **one, **shared}
    if total is None:
        raise quant_error("merge_stats", "there is nothing to merge", todo="Pass what calibrate returned, of each host")
    return total


def _of(name: str, statistic: Statistic, inputs: Inputs) -> PyTree:
    rows = inputs.seen_by(statistic)
    if rows is None:
        whole = f"{name} needs whole {statistic.sees}"
        raise Misfit(f"{whole}, and a use of this weight has a part of them, or flipped ones")
    x = jax.lax.stop_gradient(rows.values)
    return statistic.of(x) if rows.counted is None else statistic.of(x, rows.counted)


def act_state(plan: Plan, stats: Stats) -> dict[str, dict[str, jax.Array]]:
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

        def ranges(observed: PyTree, spec: QuantSpec = spec) -> dict[str, Scale]:
            lo, hi = observed_range(observed, spec)
            scale, zero_point = scale_zero_point(lo[0], hi[0], spec)
            return {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}

        state[item.path] = item.stack(ranges)(stats[item.path]["range"])
    return state

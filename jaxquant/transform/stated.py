"""`StatedPlan`: how a checkpoint says that activations are quantized, before a function is known."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.granularity import PerChannel, PerGroup, PerTensor
from jaxquant.core.paths import Leaf, Params, leaves_with_paths, nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import qtype_of
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree, State
from jaxquant.rules import Stated
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.plan import UNUSED, Item, Plan

__all__ = ["StatedPlan", "described"]

_F = "StatedPlan"


@dataclasses.dataclass(frozen=True)
class StatedPlan:
    """For each weight, how its input is quantized; becomes a `Plan` when a function is traced.

    A checkpoint of another library names weights, and does not know the function that will use them. Each weight
    runs as its leaf says. ``quantized(fn, model)`` makes the plan whenever it traces ``fn``.

    Attributes:
      specs: path of a weight -> how its input is quantized, an `OpSpec` with ``act``.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.transform.stated import StatedPlan
      >>> fn, x = (lambda p, x: x @ p["w"]), jnp.ones((2, 32))
      >>> params = {"w": jq.quantize(jnp.ones((32, 16)), jq.QuantSpec("int8"), reduce_axes=(-2,))}
      >>> plan = StatedPlan({"w": jq.OpSpec(act=jq.QuantSpec("int8"))})
      >>> plan.plan_for(fn, params, x)["w"].spec
      OpSpec(weight=QuantSpec('int8'), act=QuantSpec('int8'))
      >>> bool((jq.quantized(fn, plan)(params, x) == fn({"w": params["w"].dequantize()}, x)).all())
      True
    """

    specs: Mapping[str, OpSpec]

    def __hash__(self) -> int:
        return hash(frozenset(self.specs.items()))

    def __str__(self) -> str:
        kinds: dict[OpSpec, int] = {}
        for spec in self.specs.values():
            kinds[spec] = kinds.get(spec, 0) + 1
        lines = [f"{n} weights with {spec!r}" for spec, n in kinds.items()]
        return "\n".join([*lines, "plan_for(fn, params, *args) gives the plan of a function"])

    def plan_for(self, fn: Callable[..., PyTree], params: Params, *args: PyTree, **kwargs: PyTree) -> Plan:
        """The plan of a function, to print or to save; arguments as for `make_plan`.

        Raises:
          QuantError: naming all weights that are not among the parameters, or that the function uses where the
            activation cannot be quantized so; and as `make_plan`. A weight that it does not use at all is no error.
        """
        leaves, _ = leaves_with_paths(params)
        missing = [
            f"{path} is no parameter (nearest: {nearest(path, leaves)})" for path in self.specs if path not in leaves
        ]
        if missing:
            todo = "Pass the params that were loaded; load with names= to call them as the function does"
            raise self._error("weights whose activations are quantized are missing", missing, todo)
        by_spec: dict[OpSpec, set[str]] = {}
        for path, spec in self.specs.items():
            by_spec.setdefault(spec, set()).add(path)
        rules = [Stated(frozenset(paths), spec) for spec, paths in by_spec.items()]
        plan = make_plan(fn, params, *args, rules=rules, **kwargs)
        wrong = [f"{f.path}: {f.reason}" for f in plan.floats if f.path in self.specs and f.reason != UNUSED]
        wrong += [f"{i.path}: {'; '.join(i.in_float)}" for i in plan.items if i.in_float]
        if wrong:
            todo = "Use these weights in products, or run the weights alone: leave the plan out"
            raise self._error("the function has no place for quantized activations", wrong, todo)
        return dataclasses.replace(plan, items=tuple(described(item, leaves[item.path]) for item in plan.items))

    def state_for(self, plan: Plan, state: State | None) -> dict[str, dict[str, jax.Array]]:
        """The static ranges of a plan that `plan_for` gave: one for each layer where the weight is a stack.

        Args:
          plan: of the function.
          state: path -> ``{"scale", "zero_point"}``, as the checkpoint has them: scalars, or one for each expert.

        Raises:
          QuantError: if a weight has several ranges and the function has a place for one.
        """
        found = {}
        for item in plan.items:
            if item.spec.act is None or not item.spec.act.static:
                continue
            entry, shape = (state or {}).get(item.path, {}), item.shape[: item.stacked]
            wrong = [
                f"{item.path} has {v.size} ranges, and its use {list(shape)}"
                for v in entry.values()
                if not _fits(v, shape)
            ]
            if wrong:
                todo = "Use the experts one by one, in a scan; or give them one range"
                raise self._error("static ranges do not fit how the function uses their weight", wrong, todo)
            found[item.path] = {name: _fitted(jnp.asarray(v), shape) for name, v in entry.items()}
        return found

    def _error(self, rule: str, wrong: list[str], todo: str) -> Exception:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        return quant_error(_F, f"{rule}: {'; '.join(wrong[:10])}{more}", todo=todo, weights=len(wrong))


def described(item: Item, leaf: Leaf) -> Item:
    """The item with the spec of its weight, where there is one that says what the leaf is."""
    if not isinstance(leaf, QTensor) or isinstance(leaf.scale, QTensor):
        return item
    if leaf.offset is not None or leaf.permutation is not None:
        return item
    if leaf.symmetric and not qtype_of(leaf.qtype).signed:
        return item
    length = item.channels // max(1, math.prod(leaf.scale.shape[axis] for axis in item.reduce_axes))
    for granularity in (PerChannel(), PerTensor(), PerGroup(length)):
        with contextlib.suppress(QuantError):
            own = QuantSpec(leaf.qtype, symmetric=leaf.symmetric, granularity=granularity)
            found = dataclasses.replace(item, spec=dataclasses.replace(item.spec, weight=own))
            if found.scale_shape == tuple(leaf.scale.shape):
                return found
    return item


def _fits(value: jax.Array, shape: tuple[int, ...]) -> bool:
    return value.size == 1 or (tuple(value.shape) == shape and bool(shape))


def _fitted(value: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return value if tuple(value.shape) == shape else jnp.broadcast_to(value.reshape(()), shape)

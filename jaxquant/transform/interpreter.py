"""One interpreter over the jaxpr of a function of params; planning, running and calibrating are three uses of it.

Runs of equations that no planned weight reaches are evaluated as they stand. An equation that a weight does reach goes
to the
handler of its primitive:

- a *view* (transpose, reshape, slice, cast ..) yields the weight seen through one more step
  (`jaxquant.transform.views`);
- an *operation* (dot_general, convolution, gather ..) is a use of the weight (`jaxquant.transform.operations`);
- a *call* (jit, scan, cond ..) is entered (`jaxquant.transform.calls`).

Any other primitive is a use that cannot be quantized: planning records it with its name, running dequantizes where the
plan allows that and raises where it does not.

To add a primitive, write one function ``(interpreter, equation, values) -> results`` in one of those files and register
it with `handles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.weights import Weight

__all__ = ["ABSENT", "Interpreter", "Use", "handles"]


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()
"""Stands for every value that is not a weight while planning, when nothing is computed."""

Handler = Callable[["Interpreter", Any, list[Any]], list[Any]]
_handlers: list[tuple[Callable[[], Any], Handler]] = []


def handles(*primitives: Callable[[], Any]) -> Callable[[Handler], Handler]:
    """Registers a handler for primitives, given as functions that return them (some need a trace to be found)."""

    def register(handler: Handler) -> Handler:
        _handlers.extend((primitive, handler) for primitive in primitives)
        return handler

    return register


@functools.cache
def _registry() -> dict[Any, Handler]:
    """Handlers by primitive. The package imports every module that registers some."""
    return {primitive(): handler for primitive, handler in _handlers}


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
      path: the parameter.
      op: the name of the primitive, or of the op that stands for it.
      reduce_axes: the axes of the parameter that share a scale for this use; None if it cannot be quantized.
      stacked: leading axes that scans have consumed.
      reason: why it cannot be quantized, if so.
      contraction_minor: how the codes should be stored.
    """

    path: str
    op: str
    reduce_axes: tuple[int, ...] | None
    stacked: int
    reason: str = ""
    contraction_minor: bool = True


class Interpreter:
    """Evaluates a jaxpr some of whose inputs are `Weight`s.

    Args:
      plan: what is quantized, or None: QTensors are, weight-only.
      precision: overrides the precision of quantized operations.
      planning: compute nothing, record uses.
      collect: ``(item, x) -> statistics`` of the [batch, rows, channels] input of a planned operation; None: collect
        nothing.
      merge: ``(path, a, b) -> statistics`` of two uses.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        *,
        precision: Any = None,
        planning: bool = False,
        collect: Callable[..., Any] | None = None,
        merge: Callable[[str, Any, Any], Any] | None = None,
    ):
        self.items: dict[str, Item] = {item.path: item for item in plan.items} if plan is not None else {}
        self.precision, self.planning = precision, planning
        self.collect, self.merge = collect, merge
        self.uses: list[Use] = []
        self.stats: dict[str, Any] = {}

    def child(self) -> Interpreter:
        """The interpreter of an inner trace: the same, with statistics of its own."""
        other = object.__new__(Interpreter)
        other.__dict__.update(self.__dict__)
        other.stats = {}
        return other

    def add_stats(self, stats: dict[str, Any]) -> None:
        """Takes over the statistics of an inner trace."""
        for path, value in stats.items():
            self.stats[path] = self.merged(path, self.stats[path], value) if path in self.stats else value

    def merged(self, path: str, a: Any, b: Any) -> Any:
        """Statistics of two uses of one parameter."""
        assert self.merge is not None
        return self.merge(path, a, b)

    # -- evaluation
    # -----------------------------------------------------------------------------------------------------
    def run(self, closed: ClosedJaxpr, args: list[Any]) -> list[Any]:
        """Values of the outputs; weights that are returned unchanged stay weights."""
        jaxpr, handlers = closed.jaxpr, _registry()
        consts = [ABSENT] * len(closed.consts) if self.planning else closed.consts
        env: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        if not self.planning and not any(isinstance(a, Weight) for a in args):
            return list(jaxpr_as_fun(closed)(*args))
        last_use = _last_uses(jaxpr)
        pending: list[int] = []

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else env[v]

        def flush() -> None:
            if pending:
                _evaluate([jaxpr.eqns[i] for i in pending], env, last_use, pending[-1])
                pending.clear()

        for i, eqn in enumerate(jaxpr.eqns):
            touched = any(isinstance(env.get(v), Weight) for v in eqn.invars if not isinstance(v, Literal))
            if not touched:
                if self.planning:
                    env.update((v, ABSENT) for v in eqn.outvars)
                else:
                    pending.append(i)
                continue
            flush()
            values = [read(v) for v in eqn.invars]
            handler = handlers.get(eqn.primitive, unsupported)
            with _scope(eqn):
                results = handler(self, eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        flush()
        return [read(v) for v in jaxpr.outvars]

    # -- uses
    # -----------------------------------------------------------------------------------------------------------
    def record(self, weight: Weight, op: str, contracted: tuple[int, ...], *, contraction_minor: bool = True) -> None:
        """Planning: a use that can be quantized, if whole axes of the parameter are contracted."""
        found = weight.split(contracted)
        reason = found if isinstance(found, str) else "" if found else "no axis is contracted"
        axes = None if isinstance(found, str) or not found else found
        self.uses.append(Use(weight.path, op, axes, weight.stacked, reason, contraction_minor))

    def refuse(self, weight: Weight, op: str, reason: str) -> None:
        """Planning: a use that cannot be quantized."""
        self.uses.append(Use(weight.path, op, None, weight.stacked, reason))

    def operand(self, weight: Weight) -> Any:
        """Running: the weight as an op's operand. Calibration runs float weights in float."""
        item = self.items.get(weight.path)
        if item is None or self.collect is not None:
            return weight.value()
        return weight.operand(item.spec.weight, item.reduce_axes)

    def float_of(self, weight: Weight, op: str) -> jax.Array:
        """Running: the weight in float, for a use that is not quantized.

        Raises for a QTensor, unless the plan allows it.
        """
        item = self.items.get(weight.path)
        if isinstance(weight.leaf, QTensor) and not (item is not None and item.dequantize):
            todo = "Keep it in float with Rule(pattern, None), or allow it with Rule(pattern, spec, dequantize=True)"
            raise quant_error(
                "quantized", f"a quantized weight reaches {op!r}, which has no quantized form", todo=todo,
                path=weight.path, weight=repr(weight.leaf),
            )  # fmt: skip
        return weight.real()


def unsupported(interpreter: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    """The handler of every other primitive."""
    op = str(eqn.primitive)
    if interpreter.planning:
        for value in values:
            if isinstance(value, Weight):
                interpreter.refuse(value, op, f"{op} has no quantized form")
        return [ABSENT] * len(eqn.outvars)
    return bind(eqn, [interpreter.float_of(v, op) if isinstance(v, Weight) else v for v in values])


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """One equation as it stands, on these values."""
    given = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    return list(_function([eqn], list(given), list(eqn.outvars))(*given.values()))


@functools.cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def _function(eqns: list[Any], invars: list[Var], outvars: list[Var]) -> Callable[..., Any]:
    """Equations as a function."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    jaxpr = _empty().replace(invars=invars, outvars=outvars, eqns=eqns, effects=effects)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))


def _evaluate(eqns: list[Any], env: dict[Var, Any], last_use: dict[Var, int], end: int) -> None:
    """A run of equations, all at once; only what is used after it is kept."""
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = list(dict.fromkeys(v for e in eqns for v in e.invars if not isinstance(v, Literal) and v not in made))
    kept = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) > end]
    values = _function(eqns, needed, kept)(*(env[v] for v in needed))
    env.update(zip(kept, values, strict=True))


def _last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """The last equation that reads each variable; past the end for outputs."""
    last: dict[Var, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((v, i) for v in eqn.invars if not isinstance(v, Literal))
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not isinstance(v, Literal))
    return last


def _scope(eqn: Any) -> Any:
    """The name stack of the original equation, for profiles and error messages."""
    name = str(eqn.source_info.name_stack)
    return jax.named_scope(name) if name else contextlib.nullcontext()

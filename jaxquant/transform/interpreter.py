"""One interpreter over the jaxpr of a function of params; planning, running and calibrating are three uses of it.

Runs of equations that no planned weight reaches are evaluated unchanged. An equation that a weight does reach goes
to the handler of its primitive:

- a *view* (transpose, reshape, slice, cast ..) yields the weight seen through one more step
  (`jaxquant.transform.weight_views`);
- an *operation* (dot_general, convolution, gather ..) is a use of the weight (`jaxquant.transform.operations`);
- a *call* (jit, scan, cond ..) is entered (`jaxquant.transform.calls`).

Any other primitive is a use that cannot be quantized: planning records it with its name, running dequantizes where the
plan allows that and raises where it does not.

Products of two activations are looked for only where a plan or its rules ask for some: then an equation that is one, or
holds one, counts as reached too.

To add a primitive, write one function ``(interpreter, equation, values) -> results`` in one of those files and register
it with `handles`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import Operand, QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.rowwise import Produced
from jaxquant.transform.analysis.rematerialized import Rematerialized, rematerialized
from jaxquant.transform.analysis.rows import Made, made_by_rows
from jaxquant.transform.backward_pass import handing_inputs
from jaxquant.transform.plan import Item, Plan
from jaxquant.transform.primitives import USES, inlined, used_by
from jaxquant.transform.products import Products, scoped
from jaxquant.transform.statistics import Inputs
from jaxquant.transform.weights import ABSENT, Absent, Joined, Value, Weight, as_array, trains

__all__ = ["Handler", "Interpreter", "Misfit", "Tally", "Use", "handler_of", "handles"]


Handler = Callable[["Interpreter", JaxprEqn, list[Value]], list[Value]]
Key = Primitive | Callable[..., Any]
_take_joined: set[Handler] = set()
_handlers: dict[Key, Handler] = {}


def handles(*keys: Key, joined: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler for primitives, given as such, or as functions of JAX of which `used_by` finds them.

    ``joined``: it takes `Joined` values as they are; of others, `jaxquant.transform.joined` makes weights before.
    """

    def register(handler: Handler) -> Handler:
        if joined:
            _take_joined.add(handler)
        _handlers.update(dict.fromkeys(keys, handler))
        return handler

    return register


@functools.cache
def _registry() -> Mapping[Key | None, Handler]:
    """Handlers by primitive. The package imports every module that registers some."""
    return {k if isinstance(k, Primitive) or k not in USES else used_by(k): handler for k, handler in _handlers.items()}


def handler_of(primitive: Key) -> Handler:
    """The handler of equations of this primitive that a weight reaches."""
    return _registry().get(primitive, unsupported)


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
      rows: rows of the activation, in a dot_general; a number or a symbol.
      window: of a convolution, as `jaxquant.ops.conv.Window` has it.
      note: what else to know of it.
    """

    path: str
    op: str
    reduce_axes: tuple[int, ...] | None
    stacked: int
    reason: str = ""
    contraction_minor: bool = True
    rows: int = 0
    window: tuple[int, ...] = ()
    note: str = ""


class Misfit(Exception):
    """Why the inputs of a weight cannot be collected; calibration gathers these and names them all."""


class Tally(NamedTuple):
    """Statistics of the inputs of one parameter, and whether there were any.

    Attributes:
      value: the statistics; arbitrary if there were no inputs.
      seen: whether there were inputs, as an array; None: there were. Branches, loops and masks decide it at run time.
    """

    value: PyTree
    seen: jax.Array | None = None

    def merge(self, other: Tally, merge: Callable[[PyTree, PyTree], PyTree]) -> Tally:
        """Both, of which each may be empty."""
        both = merge(self.value, other.value)
        if self.seen is None and other.seen is None:
            return Tally(both)
        mine, others = (jnp.array(True) if t.seen is None else t.seen for t in (self, other))

        def pick(merged: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
            here, there = (s.reshape(s.shape + (1,) * (merged.ndim - s.ndim)) for s in (mine, others))
            return jnp.where(here & there, merged, jnp.where(here, a, b))

        return Tally(jax.tree.map(pick, both, self.value, other.value), mine | others)

    @classmethod
    def none(cls, like: Tally) -> Tally:
        """Nothing seen, in the form of another (or of its shapes)."""
        return cls(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like.value), jnp.array(False))

    def certain(self) -> Tally:
        """The same with ``seen`` as an array, so that it has the form of one that is empty."""
        return self if self.seen is not None else Tally(self.value, jnp.array(True))


@dataclasses.dataclass
class Interpreter:
    """Evaluates a jaxpr some of whose inputs are `Weight`s. Its fields do not change; notes go into the last one.

    Attributes:
      plan: the plan, or None: QTensors run weight-only.
      precision: overrides the precision of quantized operations.
      planning: compute nothing, record uses.
      collect: ``(item, () -> inputs) -> {key: Tally}`` of a planned operation; None: collect nothing.
      merge: ``(key, a, b) -> statistics`` of two uses.
      keys: path -> the key under which its statistics go; None: each path is its own.
      mask: which rows of the inputs count, as `jaxquant.transform.masks` has it; None: all.
      products: products of two activations that are looked for; None: none are.
      observing: whether operations are quantized while statistics are collected; calibration runs in float.
      entering: ``(weight, x, channel axes of x) -> x``, applied to the input of each product with a planned weight.
      rounding_key: for stochastic rounding, or None.
      produced: the function of rows that makes the left operand of the product that runs, or None.
      scope: the name stack of the jaxpr that runs.
      uses: while planning, of every parameter.
      own_derivatives: paths that enter a function with a derivative rule of its own.
      stats: what was collected.
    """

    plan: Plan | None = None
    _: dataclasses.KW_ONLY
    precision: jax.lax.PrecisionLike = None
    planning: bool = False
    collect: Callable[[Item, Callable[[], Inputs]], dict[str, Tally]] | None = None
    merge: Callable[[str, PyTree, PyTree], PyTree] | None = None
    observing: bool = False
    keys: Mapping[str, str] | None = None
    mask: jax.Array | np.ndarray | None = None
    products: Products | None = None
    entering: Callable[[Weight, jax.Array, tuple[int, ...]], jax.Array] | None = None
    rounding_key: jax.Array | None = None
    produced: Produced | None = None
    scope: str = ""
    uses: list[Use] = dataclasses.field(default_factory=list)
    own_derivatives: set[str] = dataclasses.field(default_factory=set)
    stats: dict[str, Tally] = dataclasses.field(default_factory=dict)

    @property
    def calibrating(self) -> bool:
        """Whether the planned operations run in float, to be looked at."""
        return self.collect is not None and not self.observing

    @property
    def items(self) -> Mapping[str, Item]:
        """Path -> what is planned."""
        return {} if self.plan is None else self.plan.by_path

    def child(self) -> Interpreter:
        """The interpreter of an inner trace: the same, with statistics of its own."""
        return dataclasses.replace(self, stats={})

    def add_stats(self, stats: dict[str, Tally]) -> None:
        """Takes over statistics of an operation, or of an inner trace."""
        for key, tally in stats.items():
            self.stats[key] = self.merged(key, self.stats[key], tally) if key in self.stats else tally

    def merged(self, key: str, a: Tally, b: Tally) -> Tally:
        """Statistics of two uses of one parameter."""
        assert self.merge is not None
        return a.merge(b, functools.partial(self.merge, key))

    def key(self, path: str) -> str:
        """The key of a parameter's statistics."""
        return path if self.keys is None else self.keys[path]

    # -- evaluation ----------------------------------------------------------------------------------------------------
    def run(self, closed: ClosedJaxpr, args: list[Value]) -> list[Value]:
        """Values of the outputs; weights that are returned unchanged stay weights, joined ones are values."""
        return [self.whole(v) if isinstance(v, Joined) else v for v in self.run_in_place(closed, args)]

    def run_in_place(self, closed: ClosedJaxpr, args: list[Value]) -> list[Value]:
        """The same of a call whose equations might stand in the place of it: joined weights stay what they are."""
        jaxpr = closed.jaxpr
        consts = [ABSENT] * len(closed.consts) if self.planning else closed.consts
        env: dict[Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        if not self.planning and self.products is None and not any(isinstance(a, Weight | Joined) for a in args):
            return list(jaxpr_as_fun(closed)(*args))
        training = any(map(trains, args))
        made = self._made_by_rows(jaxpr, training)
        again = {how.equations[-1]: how for how in rematerialized(jaxpr, made)} if training else {}
        made = made if self._takes_ranges else {}
        parts = {i for how in again.values() for i in how.equations}
        last_use = {} if self.planning else _last_uses(jaxpr, made, again)
        pending: list[int] = []

        def read(v: Var | Literal) -> Value:
            return v.val if isinstance(v, Literal) else env[v]

        def flush() -> None:
            if pending:
                _evaluate([jaxpr.eqns[i] for i in pending], env, last_use, pending[-1])
                pending.clear()

        for i, eqn in enumerate(jaxpr.eqns):
            if i in again:
                flush()
                env[again[i].result] = self._rematerialized(jaxpr, again[i], [read(v) for v in again[i].inputs])
            if i in parts:
                continue
            touched = any(isinstance(env.get(v), Weight | Joined) for v in eqn.invars if not isinstance(v, Literal))
            if not touched and (self.products is None or not self.products.in_equation(eqn, self.scope)):
                if self.planning:
                    env.update((v, ABSENT) for v in eqn.outvars)
                else:
                    pending.append(i)
                continue
            flush()
            values = [read(v) for v in eqn.invars]
            handler = handler_of(eqn.primitive)
            if handler not in _take_joined and any(isinstance(v, Joined) for v in values):
                handler = handler_of(Joined)
            with self._entered(eqn) as inside:
                if i in made:
                    inside = dataclasses.replace(inside, produced=_produced(made[i], [read(v) for v in made[i].inputs]))
                results = handler(inside, eqn, values)
            env.update(zip(eqn.outvars, results, strict=True))
        flush()
        return [read(v) for v in jaxpr.outvars]

    def _made_by_rows(self, jaxpr: Jaxpr, training: bool) -> dict[int, Made]:
        """The functions of rows that make activations of products, for kernels or for the backward pass."""
        if self.planning or self.calibrating or not (training or self._takes_ranges):
            return {}
        return made_by_rows(jaxpr)

    @property
    def _takes_ranges(self) -> bool:
        """Whether activations are quantized by ranges of their own, which a kernel takes as it makes the values."""
        acts = (item.spec.act for item in self.items.values())
        return any(act is not None and not act.static for act in acts)

    def _rematerialized(self, jaxpr: Jaxpr, how: Rematerialized, inputs: list[Value]) -> Value:
        """The result of equations that the backward pass evaluates again."""
        closed = _jaxpr([jaxpr.eqns[i] for i in how.equations], list(how.inputs), [how.result])
        if any(isinstance(v, Weight | Joined) for v in inputs):
            return self.run_in_place(closed, inputs)[0]
        return handing_inputs(closed)(*map(as_array, inputs))[0]

    @contextlib.contextmanager
    def _entered(self, eqn: JaxprEqn) -> Iterator[Interpreter]:
        """In the scope of an equation, for profiles, error messages and names of products, and under its mesh."""
        own = str(eqn.source_info.name_stack)
        with eqn.ctx.manager, jax.named_scope(own) if own else contextlib.nullcontext():
            yield dataclasses.replace(self, scope=scoped(self.scope, own)) if own else self

    # -- uses ----------------------------------------------------------------------------------------------------------
    def record(
        self,
        weight: Weight,
        op: str,
        contracted: tuple[int, ...],
        *,
        contraction_minor: bool = True,
        rows: int = 0,
        window: tuple[int, ...] = (),
    ) -> None:
        """Planning: a use that can be quantized, if whole axes of the parameter are contracted."""
        found = weight.split(contracted)
        reason = found if isinstance(found, str) else "" if found else "no axis is contracted"
        axes = None if isinstance(found, str) or not found else found
        self.uses.append(Use(weight.path, op, axes, weight.stacked, reason, contraction_minor, rows, window))

    def refuse(self, weight: Weight, op: str, reason: str) -> None:
        """Planning: a use that cannot be quantized."""
        self.uses.append(Use(weight.path, op, None, weight.stacked, reason))

    def planned(self, weight: Weight, contracted: tuple[int, ...]) -> bool:
        """Running: whether this is a use that the plan quantizes, and not one that contracts other axes.

        A stack that is planned layer by layer may be used whole: its codes are the same. Only statistics and static
        ranges of activations, of which there is one for each layer, are those of the layers alone.
        """
        item = self.items.get(weight.path)
        if item is None:
            return True
        if weight.split(contracted) != item.reduce_axes:
            return False
        act = item.spec.act
        one_each = act is not None and (act.static or weight.steps_of("act") is not None)
        return weight.stacked == item.stacked or (self.collect is None and not one_each)

    def whole(self, joined: Joined) -> jax.Array | Absent:
        """Joined weights as one value: in float, for a use that is not quantized."""
        if self.planning:
            for part in joined.parts:
                if isinstance(part, Weight):
                    self.refuse(part, "concatenate", _REASONS["concatenate"])
            return ABSENT
        parts = [self.float_of(p, "'concatenate'") if isinstance(p, Weight) else as_array(p) for p in joined.parts]
        return jax.lax.concatenate(parts, joined.axis)

    def by_layer(self, weight: Weight) -> bool:
        """Running: whether layers of this stack are quantized one by one, so that a scan can take them so."""
        item = self.items.get(weight.path)
        return item is None or weight.stacked < item.stacked

    def operand(self, weight: Weight) -> Operand:
        """Running: the weight as an op's operand. Calibration runs float weights in float."""
        item = self.items.get(weight.path)
        if item is None or self.calibrating:
            return weight.value()
        key = None
        if not isinstance(weight.leaf, QTensor):
            key = self.rounding_key_of(weight.path, "weight", item.spec.weight)
        return weight.operand(item.spec.weight, item.reduce_axes, item.stacked, key)

    def rounding_key_of(self, path: str, operand: str, spec: QuantSpec | None) -> jax.Array | None:
        """The key that an operand of the forward pass is rounded with: one for each; None if it rounds to nearest."""
        if spec is None or spec.rounding == "nearest":
            return None
        if self.rounding_key is None:
            todo = "Pass quantized(..., key=jax.random.key(step)); to evaluate or to freeze, the plan of qat.to_nearest"
            rule = "stochastic rounding needs a key"
            raise quant_error("quantized", rule, todo=todo, path=path, operand=operand, key=None)
        return key_of(self.rounding_key, path, operand)

    def real(self, weight: Weight) -> jax.Array:
        """Running: the values of `operand` in float, differentiable."""
        value = self.operand(weight)
        return value.dequantize() if isinstance(value, QTensor) else value

    def float_of(self, weight: Weight, op: str) -> jax.Array:
        """Running: the weight in float, for a use that is not quantized.

        Raises for a QTensor, unless the plan allows it. A float leaf that trains is fake-quantized here too, so that
        both kinds of leaf compute the same.
        """
        item = self.items.get(weight.path)
        allowed = item is not None and item.dequantize
        if isinstance(weight.leaf, QTensor) and not allowed:
            todo = "Keep it in float with Rule(pattern, None), or allow it with Rule(pattern, spec, dequantize=True)"
            raise quant_error(
                "quantized", f"a quantized weight reaches {op}, which has no quantized form", todo=todo,
                path=weight.path, weight=repr(weight.leaf),
            )  # fmt: skip
        return self.real(weight) if allowed else weight.real()


def key_of(key: jax.Array, path: str, role: str = "") -> jax.Array:
    """A key of its own for each parameter, and for each part that it has in a product."""
    return jax.random.fold_in(key, zlib.crc32(f"{path}{role and ':'}{role}".encode("utf-8", "surrogatepass")))


_REASONS = {
    **dict.fromkeys(("add", "add_any", "sub"), "added, not contracted"),
    **dict.fromkeys(("mul", "div", "pow"), "multiplied elementwise, not contracted"),
    **dict.fromkeys(("max", "min", "clamp", "select_n"), "compared elementwise, not contracted"),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "integer_pow", "square", "sqrt", "rsqrt", "abs"),
                    "computed with (a norm, say) before it is used"),
    "broadcast_in_dim": "repeated (broadcast), not contracted",
    "concatenate": "joined with other arrays before it is used",
    "gather": "indexed in a way that is not a lookup of rows",
    "slice": "sliced with a stride",
    "convert_element_type": "cast to a type that holds no 16-bit floats",
    "dot_general": "multiplied with another parameter",
}  # fmt: skip


def unsupported(interpreter: Interpreter, eqn: JaxprEqn, values: list[Value], reason: str | None = None) -> list[Value]:
    """The handler of every other primitive."""
    op = str(eqn.primitive)
    if interpreter.planning:
        for value in values:
            if isinstance(value, Weight):
                why = reason or _REASONS.get(op, f"goes into {op}, which has no quantized form")
                interpreter.refuse(value, op, why)
        return [ABSENT] * len(eqn.outvars)
    return [*bind(eqn, [interpreter.float_of(v, repr(op)) if isinstance(v, Weight) else v for v in values])]


def bind(eqn: JaxprEqn, values: Sequence[Value]) -> list[jax.Array]:
    """Evaluates one equation on these values."""
    given = {v: x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)}
    return list(jaxpr_as_fun(_jaxpr([eqn], list(given), list(eqn.outvars)))(*given.values()))


@functools.cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def _jaxpr(eqns: list[JaxprEqn], invars: list[Var], outvars: list[Var]) -> ClosedJaxpr:
    """Equations as a jaxpr."""
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    return ClosedJaxpr(_empty().replace(invars=invars, outvars=outvars, eqns=eqns, effects=effects), ())


def _evaluate(eqns: list[JaxprEqn], env: dict[Var, Value], last_use: dict[Var, int], end: int) -> None:
    """A run of equations, all at once; only what is used after it is kept."""
    made = {v for eqn in eqns for v in eqn.outvars}
    needed = list(dict.fromkeys(v for e in eqns for v in e.invars if not isinstance(v, Literal) and v not in made))
    kept = [v for eqn in eqns for v in eqn.outvars if last_use.get(v, -1) > end]
    values = inlined(_jaxpr(eqns, needed, kept))(*(env[v] for v in needed))
    env.update(zip(kept, values, strict=True))


def _produced(made: Made, inputs: list[Value]) -> Produced | None:
    """The function of rows that makes an operand; None if an input is a weight that the plan quantizes."""
    if any(isinstance(v, Weight | Joined) for v in inputs):
        return None
    return Produced(tuple(jnp.asarray(as_array(v)) for v in inputs), made.function)


def _last_uses(jaxpr: Jaxpr, made: Mapping[int, Made], again: Mapping[int, Rematerialized]) -> dict[Var, int]:
    """The last equation that reads each variable, or what its operand is made of; past the end for outputs."""
    last: dict[Var, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        last.update((v, i) for v in eqn.invars if not isinstance(v, Literal))
        last.update((v, i) for how in (made.get(i), again.get(i)) if how is not None for v in how.inputs)
    last.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not isinstance(v, Literal))
    return last

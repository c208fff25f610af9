"""The primitives that the transformation treats, as objects.

Most have a public name in `jax.extend.core.primitives`. Some have none, or one that changed between versions of JAX;
those are read off a use of the function that makes them (`used_by`), which holds on every version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun, primitives
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxquant.core.types import PyTree

__all__ = [
    "USES",
    "automatic",
    "body_of",
    "closed",
    "dtype_of",
    "inlined",
    "is_call",
    "marked_varying",
    "reshard",
    "shape_of",
    "used_by",
    "varying_axes",
]

T = TypeVar("T")


def _of_sharding(name: str) -> Callable[..., Any]:
    """A function of `jax.sharding`, which older versions had elsewhere."""
    if hasattr(jax.sharding, name):
        return getattr(jax.sharding, name)
    return getattr(importlib.import_module("jax.experimental.shard"), name)


reshard = _of_sharding("reshard")


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Inside of a shard_map that checks: the mesh axes along which devices hold different values of ``x``."""
    aval: Any = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # the older and the newer name


def marked_varying(x: jax.Array, names: Iterable[str]) -> jax.Array:
    """``x`` as one whose values may differ along these mesh axes too."""
    missing = tuple(sorted(set(names) - varying_axes(x)))
    if not missing:
        return x
    if hasattr(lax, "pcast"):
        return lax.pcast(x, missing, to="varying")
    return getattr(lax, "pvary")(x, missing)  # noqa: B009  (its older name)


# -- uses of the functions whose primitives have no public name --------------------------------------------------------


@jax.custom_vjp
def _with_custom_vjp(x):
    return jnp.sin(x)


_with_custom_vjp.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (g,))


@jax.custom_jvp
def _with_custom_jvp(x):
    return jnp.sin(x)


_with_custom_jvp.defjvp(lambda p, t: (jnp.sin(p[0]), t[0]))


def _by_device(x):
    mesh = AbstractMesh((1,), ("i",))  # which needs no devices
    marked = functools.partial(marked_varying, names=("i",))
    return jax.shard_map(marked, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec("i"))(x)


def _resharded(x):
    mesh = AbstractMesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    return reshard(x, NamedSharding(mesh, PartitionSpec("i")))


USES: dict[Callable[..., Any], Callable[[jax.Array], PyTree]] = {
    checkpoint_name: lambda x: checkpoint_name(x, "x"),
    jax.checkpoint: lambda x: jax.checkpoint(jnp.sin)(x),
    jax.custom_jvp: _with_custom_jvp,
    jax.custom_vjp: _with_custom_vjp,
    jax.jit: lambda x: jax.jit(jnp.sin)(x),
    jax.shard_map: _by_device,
    jnp.stack: lambda x: jnp.stack([x, x]),
    jnp.unstack: jnp.unstack,
    lax.composite: lambda x: lax.composite(jnp.sin, name="jaxquant.sin")(x),
    lax.optimization_barrier: lax.optimization_barrier,
    lax.ragged_dot: lambda x: lax.ragged_dot(x[None], jnp.ones((2, 4, 3)), jnp.ones(2, int)),
    lax.split: lambda x: lax.split(x, (2, 2)),
    lax.stop_gradient: lax.stop_gradient,
    marked_varying: _by_device,
    reshard: _resharded,
}
"""A function -> a use of it, of an array [4]."""


@functools.cache
def _traced_uses() -> tuple[dict[Callable[..., Any], JaxprEqn], type]:
    """The equation that makes the result of each use, from one trace of all; and the type of the values of a trace.

    They are kept for the whole process, so they must not depend on the place of the first call. Meshes and traces
    belong to a thread, so this trace has a thread of its own; and it is made with `jax.jit`.
    """
    kinds: list[type] = []

    def every(x):
        kinds.append(type(x))
        return [jax.tree.leaves(use(x))[0] for use in USES.values()]

    def trace() -> Jaxpr:
        with jax.disable_jit(False):
            return jax.make_jaxpr(every)(jax.ShapeDtypeStruct((4,), jnp.float32)).jaxpr

    with ThreadPoolExecutor(1) as outside:
        jaxpr = outside.submit(trace).result()
    made_by: dict[object, JaxprEqn] = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    uses = {fn: made_by[v] for fn, v in zip(USES, jaxpr.outvars, strict=True)}
    uses[marked_varying] = uses[jax.shard_map].params["jaxpr"].eqns[0]
    return uses, kinds[0]


def used_by(fn: Callable[..., PyTree]) -> Primitive | None:
    """The primitive that a function traces to: one of JAX, or `marked_varying`.

    None for `jax.numpy.stack` and `jax.numpy.unstack` on versions where these trace to other functions' primitives.
    """
    primitive = _traced_uses()[0][fn].primitive
    own = fn not in (jnp.stack, jnp.unstack) or str(primitive) == fn.__name__
    return primitive if own else None


def inlined(closed: ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """`jax.extend.core.jaxpr_as_fun`, and where the results only go into another jaxpr, without a bind per equation.

    A ``jit`` that is to be inlined puts its equations into the outer jaxpr as they are.
    """
    jaxpr = closed.jaxpr
    uses, kind = _traced_uses()
    eqn = uses[jax.jit]
    one = {"in_shardings", "in_layouts", "donated_invars", "out_shardings", "out_layouts"}
    sizes = {name: len(jaxpr.outvars if name.startswith("out") else jaxpr.invars) for name in one}
    own = {name: value[:1] * sizes[name] if name in one else value for name, value in eqn.params.items()}
    if "ctx_mesh" in own:  # the mesh that is set here, and not where the equation was made
        own["ctx_mesh"] = jax.sharding.get_abstract_mesh()
    call = eqn.replace(params={**own, "jaxpr": closed, "inline": True}, invars=jaxpr.invars, outvars=jaxpr.outvars)
    outer = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=[call]), ()))
    plain = jaxpr_as_fun(closed)

    def run(*args: jax.Array) -> list[jax.Array]:
        return list((outer if not jaxpr.effects and all(type(a) is kind for a in args) else plain)(*args))

    return run


def shape_of(v: Var | Literal) -> tuple[int, ...]:
    """The shape of an operand or a result of an equation."""
    return tuple(cast(ShapedArray, v.aval).shape)


def dtype_of(v: Var | Literal) -> np.dtype:
    """The dtype of an operand or a result of an equation."""
    return cast(ShapedArray, v.aval).dtype


def closed(jaxpr: Jaxpr | ClosedJaxpr) -> ClosedJaxpr:
    """A jaxpr that may have no constants of its own, closed."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


@functools.cache
def _bodies() -> dict[Primitive | None, str]:
    """Primitives that call a jaxpr once on their operands -> the parameter that holds it."""
    found = {used_by(fn): "jaxpr" for fn in (jax.jit, jax.checkpoint, lax.composite)}
    found |= {used_by(fn): "call_jaxpr" for fn in (jax.custom_vjp, jax.custom_jvp)}
    return {**found, primitives.closed_call_p: "call_jaxpr", primitives.call_p: "call_jaxpr"}


def is_call(eqn: JaxprEqn) -> bool:
    """Whether an equation calls a jaxpr once, on its operands."""
    return eqn.primitive in _bodies()


def body_of(eqn: JaxprEqn) -> ClosedJaxpr:
    """The jaxpr that a call holds."""
    return closed(eqn.params[_bodies()[eqn.primitive]])


def automatic(fn: Callable[..., T], out_sharding: PyTree) -> Callable[..., T]:
    """``fn`` with automatic axes in the place of the mesh's explicit ones, and results that are placed as given."""
    return _of_sharding("auto_axes")(fn, out_sharding=out_sharding)

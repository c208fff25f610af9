"""The primitives that the transformation treats, as objects.

Most have a public name in `jax.extend.core.primitives`. Some have none, or one that changed between versions of JAX;
those are read off a function that is known to use them, which holds on every version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun, primitives
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

__all__ = [
    "automatic",
    "body_of",
    "closed",
    "explicit_sharding",
    "is_call",
    "marked_varying",
    "named",
    "public",
    "pvary_p",
    "ragged_dot_p",
    "reshard_p",
    "shard_map_p",
    "stack_p",
    "unstack_p",
    "used_by",
    "varying_axes",
]


def named(name: str) -> Any:
    """A primitive that has a public name on every supported version."""
    return getattr(primitives, name)


def public(name: str) -> Callable[[], Any]:
    """`named`, when it is asked for."""
    return functools.partial(named, name)


def _traced(fn: Callable[..., Any], *args: Any) -> Jaxpr:
    """The jaxpr of a function of shapes, by a trace of its own: outside of any mesh or trace, and with `jax.jit`.

    The result is kept for the whole process, so it must not depend on the place of the first call. Meshes and traces
    belong to a thread.
    """

    def trace() -> Jaxpr:
        with jax.disable_jit(False):
            return jax.make_jaxpr(fn)(*args).jaxpr

    with ThreadPoolExecutor(1) as outside:
        return outside.submit(trace).result()


def _floats(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@functools.cache
def used_by(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """The primitive of the only equation that ``fn`` traces to, on float32 arguments of the given shapes."""
    (eqn,) = _traced(fn, *_floats(*shapes)).eqns
    return eqn.primitive


def jit_call(x):
    return jax.jit(jnp.sin)(x)


@functools.cache
def _jit_equation() -> Any:
    """An equation of `jax.jit`, and the type of values while a jaxpr is made of a function."""
    kinds: list[type] = []

    def fn(x):
        kinds.append(type(x))
        return jit_call(x)

    (eqn,) = _traced(fn, *_floats((3,))).eqns
    return eqn, kinds[0]


def inlined(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """`jax.extend.core.jaxpr_as_fun`, and where the results only go into another jaxpr, without a bind per equation.

    A ``jit`` that is to be inlined puts its equations into the outer jaxpr as they are.
    """
    jaxpr = closed.jaxpr
    eqn, kind = _jit_equation()
    one = {"in_shardings", "in_layouts", "donated_invars", "out_shardings", "out_layouts"}
    sizes = {name: len(jaxpr.outvars if name.startswith("out") else jaxpr.invars) for name in one}
    own = {name: value[:1] * sizes[name] if name in one else value for name, value in eqn.params.items()}
    if "ctx_mesh" in own:  # the mesh that is set here, and not where the equation was made
        own["ctx_mesh"] = jax.sharding.get_abstract_mesh()
    call = eqn.replace(params={**own, "jaxpr": closed, "inline": True}, invars=jaxpr.invars, outvars=jaxpr.outvars)
    outer = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(eqns=[call]), ()))
    plain = jaxpr_as_fun(closed)

    def run(*args: Any) -> list[Any]:
        return list((outer if not jaxpr.effects and all(type(a) is kind for a in args) else plain)(*args))

    return run


def checkpointed(x):
    return jax.checkpoint(jnp.sin)(x)


@jax.custom_vjp
def with_custom_vjp(x):
    return jnp.sin(x)


with_custom_vjp.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (g,))


@jax.custom_jvp
def with_custom_jvp(x):
    return jnp.sin(x)


with_custom_jvp.defjvp(lambda p, t: (jnp.sin(p[0]), t[0]))


def as_a_unit(x):
    return lax.composite(jnp.sin, name="jaxquant.sin")(x)


def closed(jaxpr: Any) -> ClosedJaxpr:
    """A jaxpr that may have no constants of its own, closed."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


@functools.cache
def _bodies() -> dict[Any, str]:
    """Primitives that call a jaxpr once on their operands -> the parameter that holds it."""
    examples = {jit_call: "jaxpr", checkpointed: "jaxpr", as_a_unit: "jaxpr"}
    derivatives = dict.fromkeys((with_custom_vjp, with_custom_jvp), "call_jaxpr")
    found = {used_by(fn, (3,)): name for fn, name in (examples | derivatives).items()}
    return {**found, named("closed_call_p"): "call_jaxpr", named("call_p"): "call_jaxpr"}


def is_call(eqn: JaxprEqn) -> bool:
    """Whether an equation calls a jaxpr once, on its operands."""
    return eqn.primitive in _bodies()


def body_of(eqn: JaxprEqn) -> ClosedJaxpr:
    """The jaxpr that a call holds."""
    return closed(eqn.params[_bodies()[eqn.primitive]])


@functools.cache
def ragged_dot_p() -> Any:
    """The primitive of `jax.lax.ragged_dot`."""
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    return _traced(lax.ragged_dot, *_floats((4, 8), (2, 8, 3)), sizes).eqns[-1].primitive


def stopped(x):
    return lax.stop_gradient(x)


def with_name(x):
    return checkpoint_name(x, "x")


def in_halves(x):
    return lax.split(x, (2, 2))


def _newer(name: str, fn: Callable[..., Any]) -> Any:
    """The primitive of this name that newer versions trace ``fn`` to; None where there is none."""
    last = _traced(fn, *_floats((2, 2))).eqns[-1].primitive
    return last if str(last) == name else None


def stack_p() -> Any:
    """The primitive of `jax.numpy.stack`; None where that is new axes and a concatenation."""
    return _newer("stack", lambda x: jnp.stack([x, x]))


def unstack_p() -> Any:
    """The primitive of `jax.numpy.unstack`; None where that is slices and reshapes."""
    return _newer("unstack", jnp.unstack)


def behind_barrier(x):
    return lax.optimization_barrier(x)


@functools.cache
def _manual() -> Any:
    """The equation of a shard_map, on a mesh that needs no devices."""
    by_row = PartitionSpec("i")
    mesh = AbstractMesh((1,), ("i",))
    add = jax.shard_map(jnp.add, mesh=mesh, in_specs=(PartitionSpec(), by_row), out_specs=by_row)
    return _traced(add, *_floats((3,), (3,))).eqns[0]


def _of_sharding(name: str) -> Callable[..., Any]:
    """A function of `jax.sharding`, which older versions had elsewhere."""
    if hasattr(jax.sharding, name):
        return getattr(jax.sharding, name)
    return getattr(importlib.import_module("jax.experimental.shard"), name)


def automatic(fn: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
    """``fn`` with automatic axes in the place of the mesh's explicit ones, and results that are placed as given."""
    return _of_sharding("auto_axes")(fn, out_sharding=out_sharding)


def reshard_p() -> Any:
    """The primitive of `jax.sharding.reshard`."""
    mesh = AbstractMesh((1,), ("i",), axis_types=(AxisType.Explicit,))
    return used_by(lambda x: _of_sharding("reshard")(x, NamedSharding(mesh, PartitionSpec("i"))), (3,))


def explicit_sharding(aval: Any) -> NamedSharding | None:
    """The sharding that is part of a type, where the mesh has explicit axes; else None."""
    sharding = getattr(aval, "sharding", None)
    explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in (sharding.mesh.axis_types or ())
    return sharding if explicit else None


def shard_map_p() -> Any:
    """The primitive of `jax.shard_map`."""
    return _manual().primitive


def pvary_p() -> Any:
    """The primitive, inside a shard_map, that marks a replicated value as varying over devices."""
    return _manual().params["jaxpr"].eqns[0].primitive


def varying_axes(x: Any) -> frozenset[str]:
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

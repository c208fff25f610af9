"""The primitives that the transformation treats, as objects.

Most have a public name in `jax.extend.core.primitives`. Some have none, or one that changed between versions of JAX;
those are read off a function that is known to use them, which holds on every version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun, primitives
from jax.sharding import AbstractMesh, PartitionSpec

__all__ = [
    "marked_varying",
    "named",
    "pvary_p",
    "ragged_dot_p",
    "shard_map_p",
    "stack_p",
    "unstack_p",
    "used_by",
    "varying_axes",
]


def named(name: str) -> Any:
    """A primitive that has a public name on every supported version."""
    return getattr(primitives, name)


@functools.cache
def used_by(fn: Callable[..., Any], *shapes: tuple[int, ...]) -> Any:
    """The primitive of the only equation that ``fn`` traces to, on float32 arguments of the given shapes."""
    (eqn,) = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr.eqns
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

    (eqn,) = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3,), jnp.float32)).jaxpr.eqns
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


@functools.cache
def ragged_dot_p() -> Any:
    """The primitive of `jax.lax.ragged_dot`."""
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    arrays = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8), (2, 8, 3)))
    return jax.make_jaxpr(lax.ragged_dot)(*arrays, sizes).jaxpr.eqns[-1].primitive


def stopped(x):
    return lax.stop_gradient(x)


def with_name(x):
    return checkpoint_name(x, "x")


def in_halves(x):
    return lax.split(x, (2, 2))


def _newer(name: str, fn: Callable[..., Any]) -> Any:
    """The primitive of this name that newer versions trace ``fn`` to; None where there is none."""
    last = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((2, 2), jnp.float32)).jaxpr.eqns[-1].primitive
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
    return jax.make_jaxpr(add)(*[jax.ShapeDtypeStruct((3,), jnp.float32)] * 2).jaxpr.eqns[0]


def shard_map_p() -> Any:
    """The primitive of `jax.shard_map`."""
    return _manual().primitive


def pvary_p() -> Any:
    """The primitive by which a value that is equal on all devices meets one that is not, inside of a shard_map."""
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

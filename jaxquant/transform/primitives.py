"""The primitives that the transformation treats, as objects.

Most have a public name in `jax.extend.core.primitives`. Some have none, or one that changed between versions of JAX;
those are read off a function that is known to use them, which holds on every version.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

__all__ = ["named", "ragged_dot_p", "used_by"]


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

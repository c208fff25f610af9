"""`with_derivatives`: a value that is computed one way, with the derivatives of another.

`jax.custom_jvp` does not serve for that: inside a `jax.lax.scan` JAX uses its rule for first derivatives alone.
Second derivatives go through the body of the function, where rounding has derivative 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

__all__ = ["with_derivatives"]

_Value = TypeVar("_Value")
_Tangent = jax.Array | ad.Zero
_p = Primitive("with_derivatives")


def _bound(value: jax.Array, of: jax.Array) -> jax.Array:
    return cast(jax.Array, _p.bind(value, of))


def with_derivatives(value: jax.Array, of: jax.Array) -> jax.Array:
    """``value``, with the derivatives of ``of``, of every order and in both modes.

    A compiled program that takes none never computes ``of``.

    Args:
      value: an array; itself it counts as constant.
      of: of the same shape and dtype.
    """
    return _bound(lax.stop_gradient(value), of)


def _jvp(primals: Sequence[jax.Array], tangents: Sequence[_Tangent]) -> tuple[jax.Array, _Tangent]:
    return _bound(*primals), tangents[1]


def _batch(args: Sequence[jax.Array], dims: Sequence[int | None]) -> tuple[jax.Array, int]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    value, of = (cast(Any, batching.bdim_at_front(x, d, size)) for x, d in zip(args, dims, strict=True))
    return _bound(value, of), 0


def _value(value: _Value, of: _Value) -> _Value:
    del of
    return value


_p.def_impl(_value)
_p.def_abstract_eval(_value)
ad.primitive_jvps[_p] = _jvp
batching.primitive_batchers[_p] = _batch
mlir.register_lowering(_p, mlir.lower_fun(_value, multiple_results=False))

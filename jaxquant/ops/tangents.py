"""Derivatives of a product: a primitive for its linear tangent map, which defines its own transpose.

`jax.custom_vjp` has no forward mode, and second derivatives go through the bodies of its rules, where rounding has
derivative 0. In a scan, second derivatives go through the bodies of `jax.custom_jvp` too (`jaxquant.core.derivatives`).
JAX also derives the transpose of its tangents: the backward pass would keep real values instead of codes, and could not
multiply integers.

So the result is one equation of a primitive, whose other arguments serve derivatives only. Its tangent is one equation
of another primitive, ``dy = L(operands) d(operands)``, which knows

- how to compute it: forwards as the tangent of the float product, transposed by `Rule.back` from the residuals;
- how it depends on the operands: as the tangent of the float product does, which JAX can differentiate to every order.

The operands are inputs of the equation only for its own derivatives. A program that takes first derivatives does not
read them, so the compiled program does not keep them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxquant.core.by_platform import unmapped
from jaxquant.core.jitted import jitted
from jaxquant.core.types import PyTree, TreeDef

__all__ = ["KEPT", "Rule", "straight_through"]

KEPT = "kept by a quantized product"
"""The name of the arrays that a `Rule` keeps, for policies of `jax.checkpoint`."""


class Rule(Protocol):
    """A function of operands (pytrees) with the derivatives of a reference function. Hashable."""

    def keep(self, *operands: PyTree) -> tuple[jax.Array, PyTree]:
        """The result, and the residuals that the backward pass needs beside the operands: a pytree of arrays.

        It is given what is ``beside`` the operands too, after them.
        """
        ...

    def reference(self, *operands: PyTree) -> jax.Array:
        """The result up to rounding, in arithmetic that JAX differentiates."""
        ...

    def again(self, *operands: PyTree) -> jax.Array:
        """`reference` in arithmetic whose gradient JAX differentiates in both modes, for second derivatives."""
        ...

    def back(self, kept: PyTree, operands: tuple[PyTree, ...], g: jax.Array) -> tuple[PyTree, ...]:
        """The gradient with respect to each operand, from the residuals and the gradient of the result."""
        ...


T = TypeVar("T")
Leaves = Sequence[jax.Array]
_Tangents = Sequence[jax.Array | ad.Zero]
_Dims = Sequence[int | None]
_Shapes = tuple[ShapedArray, ...]


class _Map(Protocol):
    """A linear map from tangents of leaves of the operands to that of the result. Hashable."""

    def along(self, places: tuple[int, ...]) -> _Map:
        """Of these leaves."""
        ...

    def transpose(self) -> _Map:
        """From cotangents to cotangents."""
        ...

    def fast(self, kept: Leaves, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map as a compiled program computes it."""
        ...

    def plain(self, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map of the reference, differentiable in the operands too."""
        ...


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """The linear map from tangents of some leaves of the operands to that of the result, or its transpose.

    Attributes:
      rule: whose tangent it is.
      kept, operands: the tree structures of the residuals and of the operands.
      places: the leaves of the operands that have tangents.
      transposed: whether it is the transpose.
    """

    rule: Rule
    kept: TreeDef
    operands: TreeDef
    places: tuple[int, ...]
    transposed: bool = False

    def along(self, places: tuple[int, ...]) -> _Tangent:
        """Of these leaves."""
        return dataclasses.replace(self, places=places)

    def transpose(self) -> _Tangent:
        """From cotangents to cotangents."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def fast(self, kept: Leaves, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map as a compiled program computes it."""
        if not self.transposed:
            return self._plain(self.rule.reference, operands, tangents)
        whole = jax.tree.unflatten(self.operands, operands)
        found = self.rule.back(jax.tree.unflatten(self.kept, kept), whole, *tangents)
        leaves = self.operands.flatten_up_to(found)
        return [jnp.zeros_like(operands[i]) if leaves[i] is None else leaves[i] for i in self.places]

    def plain(self, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map of the reference, differentiable in the operands too."""
        return self._plain(self.rule.again, operands, tangents)

    def _plain(self, of: Callable[..., jax.Array], operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        def reference(*leaves: jax.Array) -> jax.Array:
            changed = dict(zip(self.places, leaves, strict=True))
            return of(*jax.tree.unflatten(self.operands, [changed.get(i, x) for i, x in enumerate(operands)]))

        at = [operands[i] for i in self.places]
        if self.transposed:
            return list(jax.vjp(reference, *at)[1](*tangents))
        return [jax.jvp(reference, at, list(tangents))[1]]


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A map under `jax.vmap`.

    Attributes:
      inner: the map of one example.
      kept, operands, tangents: the axis of the examples in each leaf; None: the same for all.
      results: likewise; None: summed over the examples, as for the gradient of an operand that they share.
    """

    inner: _Map
    kept: tuple[int | None, ...]
    operands: tuple[int | None, ...]
    tangents: tuple[int | None, ...]
    results: tuple[int | None, ...]

    def along(self, places: tuple[int, ...]) -> _Batched:
        """Of these leaves, whose tangents are batched as they are."""
        return dataclasses.replace(
            self, inner=self.inner.along(places), tangents=tuple(self.operands[i] for i in places)
        )

    def transpose(self) -> _Batched:
        """From cotangents to cotangents."""
        inner = self.inner.transpose()
        return dataclasses.replace(self, inner=inner, tangents=self.results, results=self.tangents)

    def fast(self, kept: Leaves, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map as a compiled program computes it."""
        axes = list(self.kept), list(self.operands), list(self.tangents)
        return self._summed(jax.vmap(self.inner.fast, axes, self._axes)(list(kept), list(operands), list(tangents)))

    def plain(self, operands: Leaves, tangents: Leaves) -> list[jax.Array]:
        """The map of the reference."""
        axes = list(self.operands), list(self.tangents)
        return self._summed(jax.vmap(self.inner.plain, axes, self._axes)(list(operands), list(tangents)))

    @property
    def _axes(self) -> list[int]:
        return [axis or 0 for axis in self.results]

    def _summed(self, results: list[jax.Array]) -> list[jax.Array]:
        return [jnp.sum(r, axis=0) if axis is None else r for r, axis in zip(results, self.results, strict=True)]


# -- the primitive -----------------------------------------------------------------------------------------------------
#
# Its arguments are the leaves of the residuals, of the operands, and the tangents; ``sizes`` counts the first two.

_tangent_p = Primitive("straight_through_tangent")
_tangent_p.multiple_results = True


def _split(args: Sequence[T], sizes: tuple[int, int]) -> tuple[list[T], list[T], list[T]]:
    first, second = sizes
    return list(args[:first]), list(args[first : first + second]), list(args[first + second :])


def _fast(*args: jax.Array, of: _Map, sizes: tuple[int, int], results: _Shapes) -> list[jax.Array]:
    del results
    return of.fast(*_split(args, sizes))


@functools.partial(jax.jit, static_argnames=("of", "sizes"))
def _compiled(*args: jax.Array, of: _Map, sizes: tuple[int, int]) -> list[jax.Array]:
    return of.fast(*_split(args, sizes))


@_tangent_p.def_impl
def _run(*args: jax.Array, of: _Map, sizes: tuple[int, int], results: _Shapes) -> list[jax.Array]:
    del results
    return _compiled(*args, of=of, sizes=sizes)


@_tangent_p.def_abstract_eval
def _shapes(*args: jax.Array, of: _Map, sizes: tuple[int, int], results: _Shapes) -> _Shapes:
    del args, of, sizes
    return results


def _jvp(
    primals: Leaves, tangents: _Tangents, *, of: _Map, sizes: tuple[int, int], results: _Shapes
) -> tuple[list[jax.Array], list[jax.Array]]:
    kept, operands, given = _split(primals, sizes)
    _, moved, added = _split(tangents, sizes)
    out = _tangent_p.bind(*primals, of=of, sizes=sizes, results=results)
    terms = []
    if any(type(t) is not ad.Zero for t in added):
        added = [ad.instantiate_zeros(t) for t in added]
        terms.append(_tangent_p.bind(*kept, *operands, *added, of=of, sizes=sizes, results=results))
    places = [i for i, t in enumerate(moved) if type(t) is not ad.Zero]
    if places:

        def plain(*leaves: jax.Array) -> list[jax.Array]:
            changed = dict(zip(places, leaves, strict=True))
            return of.plain([changed.get(i, x) for i, x in enumerate(operands)], given)

        terms.append(jax.jvp(plain, [operands[i] for i in places], [moved[i] for i in places])[1])
    return out, [functools.reduce(jnp.add, term) for term in zip(*terms, strict=True)]


def _transpose(
    cotangents: _Tangents, *args: jax.Array, of: _Map, sizes: tuple[int, int], results: _Shapes
) -> list[jax.Array | None]:
    kept, operands, given = _split(args, sizes)
    g = [ad.instantiate_zeros(c) for c in cotangents]
    unknown = [ad.is_undefined_primal(x) for x in given]
    shapes = tuple(x.aval if u else jax.typeof(x) for x, u in zip(given, unknown, strict=True))
    found = _tangent_p.bind(*kept, *operands, *g, of=of.transpose(), sizes=sizes, results=shapes)
    return [*[None] * sum(sizes), *(c if u else None for c, u in zip(found, unknown, strict=True))]


def _batch(
    args: Leaves, dims: _Dims, *, of: _Map, sizes: tuple[int, int], results: _Shapes
) -> tuple[list[jax.Array], tuple[int, ...]]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    axes = (0,) * len(results)
    kept, operands, given = map(tuple, _split(dims, sizes))
    of = _Batched(of, kept, operands, given, axes)
    out = _tangent_p.bind(*args, of=of, sizes=sizes, results=tuple(unmapped(size, 0, r) for r in results))
    return out, axes


ad.primitive_jvps[_tangent_p] = _jvp
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, mlir.lower_fun(_fast, multiple_results=True))


# The arguments of the next one are the result, arrays that were kept, and the leaves of the operands.

_result_p = Primitive("straight_through_result")


def _result_jvp(
    primals: Leaves, tangents: _Tangents, *, of: _Map, sizes: tuple[int, int]
) -> tuple[jax.Array, jax.Array | ad.Zero]:
    """The result and the arrays that were kept count as constants, also where JAX has zeros for their tangents."""
    moved = tangents[1 + sizes[0] :]
    out = _result_p.bind(*primals, of=of, sizes=sizes)
    shape, places = jax.typeof(out), tuple(i for i, t in enumerate(moved) if _moves(t))
    if not places:
        return out, tangents[0]
    given = [moved[i] for i in places]
    (dy,) = _tangent_p.bind(*primals[1:], *given, of=of.along(places), sizes=sizes, results=(shape,))
    return out, dy


def _moves(tangent: jax.Array | ad.Zero) -> bool:
    return not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0


def _result_batch(args: Leaves, dims: _Dims, *, of: _Map, sizes: tuple[int, int]) -> tuple[jax.Array, int]:
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    kept, operands, _ = map(tuple, _split(dims[1:], sizes))
    value = batching.bdim_at_front(args[0], dims[0], size)
    return _result_p.bind(value, *args[1:], of=_Batched(of, kept, operands, (), (0,)), sizes=sizes), 0


_result_p.def_impl(lambda value, *args, of, sizes: value)
_result_p.def_abstract_eval(lambda value, *args, of, sizes: value)
ad.primitive_jvps[_result_p] = _result_jvp
batching.primitive_batchers[_result_p] = _result_batch
mlir.register_lowering(_result_p, mlir.lower_fun(lambda value, *args, of, sizes: value, multiple_results=False))


# -- functions ---------------------------------------------------------------------------------------------------------


def _keep(rule: Rule, operands: tuple[PyTree, ...], beside: tuple[PyTree, ...]) -> jax.Array:
    leaves, tree = jax.tree.flatten(operands)
    out, kept = rule.keep(*lax.stop_gradient((*operands, *beside)))
    arrays, kept_tree = jax.tree.flatten(kept)
    named = [checkpoint_name(array, KEPT) for array in arrays]
    sizes = len(arrays), len(leaves)
    return _result_p.bind(lax.stop_gradient(out), *named, *leaves, of=_Tangent(rule, kept_tree, tree, ()), sizes=sizes)


_jit = jitted(static_argnums=0)(_keep)


def straight_through(rule: Rule, *operands: PyTree, beside: tuple[PyTree, ...] = ()) -> jax.Array:
    """The result of a `Rule`'s ``keep``, with the derivatives of its ``reference``, of every order, in both modes.

    Args:
      rule: the rule.
      operands: of its functions.
      beside: what its ``keep`` alone is given too: arrays that lead to the same result, and have no derivative here.
    """
    return _jit(rule, operands, beside)

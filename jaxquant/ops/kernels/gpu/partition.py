"""Kernels on several devices: how `jax.jit` partitions their operands.

XLA's partitioner would gather the operands of a kernel that it does not know. A sharding rule tells it which axes of
operands and results are partitioned alike, so that each device computes its own part.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxquant.core.types import PyTree

__all__ = ["partitioned"]

_Axes = tuple[Sequence[str], tuple[int, ...]]
"""The letters of the axes of an array, and its shape."""

_Mesh = Mesh | AbstractMesh

_Parts = Mapping[str, tuple[str, ...]]
"""For each letter, the axes of the mesh that partition it."""


def partitioned(
    local: Callable[[Mapping[str, int], Collection[int]], Callable[..., PyTree]],
    arguments: Sequence[jax.Array],
    axes: tuple[Sequence[str], Sequence[str]],
    pieces: Mapping[str, int],
    summed: str = "",
    unmoved: Collection[int] = (),
) -> PyTree:
    """A function of arrays, computed on the devices that hold its arguments.

    Where an axis of the mesh partitions several axes, results take precedence, then arguments in their order.

    Args:
      local: maps the number of parts of each axis, and the places of arguments to do without, to the function of the
        parts.
      arguments: the arguments of the function.
      axes: of the arguments and of the results: a letter for each axis. Axes with the same letter are partitioned
        alike, and ``_`` is not partitioned.
      pieces: for each letter, a number that the number of parts has to divide.
      summed: the letters of summed axes: partial results are added, in their own dtype.
      unmoved: places of arguments that are never moved between devices: the function does without those whose parts do
        not lie as the other arguments' and the results'.
    """
    given, made = axes
    whole = local({}, ())
    results = jax.tree.leaves(jax.eval_shape(whole, *arguments))

    def of_results(mesh: _Mesh, found: _Parts) -> NamedSharding | tuple[NamedSharding, ...]:
        each = _shardings(mesh, found, made)
        return tuple(each) if len(each) > 1 else each[0]

    def infer(mesh: _Mesh, args: Sequence[jax.ShapeDtypeStruct], out: PyTree) -> PyTree:
        del out
        return of_results(mesh, _parts(mesh, list(zip(given, args, strict=True)), pieces))

    def partition(mesh: _Mesh, args: Sequence[jax.ShapeDtypeStruct], out: PyTree) -> tuple[Any, ...]:
        arrays = [*zip(made, jax.tree.leaves(out), strict=True), *zip(given, args, strict=True)]
        found = _parts(mesh, arrays, pieces)
        needed: list[Any] = _shardings(mesh, found, given)
        lying: list[Any] = [argument.sharding for argument in args]
        without = [i for i in unmoved if not lying[i].is_equivalent_to(needed[i], len(args[i].shape))]
        for i in without:
            needed[i] = lying[i]
        cuts = {letter: math.prod(mesh.shape[name] for name in names) for letter, names in found.items()}
        one, over = local(cuts, without), tuple(name for letter in summed for name in found.get(letter, ()))

        def lower(*parts: jax.Array) -> PyTree:
            out = one(*parts)
            return lax.psum(out, over) if over else out

        return mesh, lower, of_results(mesh, found), tuple(needed)

    rule, sizes = _rule(
        [(g, v.shape) for g, v in zip(given, arguments, strict=True)],
        [(m, v.shape) for m, v in zip(made, results, strict=True)],
        pieces,
    )
    fn = custom_partitioning(lambda *args: whole(*args))
    # Older JAX takes no factor sizes: its partitioner calls the functions only.
    takes_sizes = "factor_sizes" in inspect.signature(custom_partitioning.def_partition).parameters
    by_rule: dict[str, Any] = {"sharding_rule": rule, **sizes} if takes_sizes else {}
    fn.def_partition(partition, infer_sharding_from_operands=infer, **by_rule)
    return fn(*arguments)


def _parts(
    mesh: _Mesh, arrays: Sequence[tuple[str, jax.ShapeDtypeStruct]], pieces: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """The axes of the mesh that partition each letter of arrays, of which the first take precedence."""
    found: dict[str, tuple[str, ...]] = {}
    for letters, array in arrays:
        for letter, names in zip(letters, getattr(array.sharding, "spec", ()), strict=False):
            names = (names,) if isinstance(names, str) else tuple(names or ())
            used = {name for others in found.values() for name in others}
            parts = math.prod(mesh.shape[name] for name in names)
            if letter not in found and not used & set(names) and parts > 1 and pieces.get(letter, 1) % parts == 0:
                found[letter] = names
    return found


def _shardings(mesh: _Mesh, found: _Parts, arrays: Sequence[str]) -> list[NamedSharding]:
    """The shardings of arrays with these letters."""
    return [NamedSharding(mesh, PartitionSpec(*map(found.get, letters))) for letters in arrays]


def _rule(given: Sequence[_Axes], made: Sequence[_Axes], pieces: Mapping[str, int]) -> tuple[str, dict[str, Any]]:
    """The rule in JAX's notation: an axis has one factor for its pieces, and one for the elements of a piece."""
    sizes: dict[str, Any] = {}
    alone = iter(range(1000))

    def factor(letter: str, size: int) -> str:
        if letter == "_" or letter not in pieces:
            return f"alone{next(alone)}"
        if size == pieces[letter]:
            return letter
        inner = f"{letter}{size // pieces[letter]}"
        sizes[inner] = size // pieces[letter]
        return f"({letter} {inner})"

    def sides(arrays: Sequence[_Axes]) -> str:
        return ", ".join(" ".join(map(factor, letters, shape)) for letters, shape in arrays)

    return f"{sides(given)} -> {sides(made)}", sizes

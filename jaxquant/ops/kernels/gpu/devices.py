"""A product of a stored weight on several devices and under `jax.vmap`: what its arguments are and how they are cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.ops.kernels.gpu.partition import partitioned
from jaxquant.ops.kernels.gpu.product import Weight
from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["Arguments", "Letters", "Mapped", "Name", "named", "on_devices"]


class Name(NamedTuple):
    """Which argument of a product an array is.

    Attributes:
      of: the name of the argument.
      stacked: whether it is that array of a weight for a whole stack of layers.
    """

    of: str
    stacked: bool = False


Arguments = Mapping[Name, jax.Array]
"""The arguments of a product."""


class Letters(NamedTuple):
    """Letters of the axes of arguments and results: those with the same letter are cut alike, and ``_`` is not cut.

    Attributes:
      own: of the arguments beside the weight, by their names. K is k and N is n.
      weight, stack: of the axes in front of K and N, in the arrays of a weight and in those of a stack.
      result: of the result.
      summed: the axes over which the results of devices are added.
    """

    own: Mapping[str, str]
    weight: str
    stack: str
    result: str
    summed: str

    def of(self, name: Name, how: Decoding, shape: tuple[int, ...]) -> str:
        """Of an argument."""
        return self.own.get(name.of) or _of_weight(name, self.stack if name.stacked else self.weight, how, shape)

    def pieces(self, how: Decoding, given: Arguments) -> dict[str, int]:
        """The number of pieces that an axis can be cut into, of each axis with more than one."""
        own = [(self.own[name.of], v.shape) for name, v in given.items() if name.of in self.own]
        sizes = {letter: n for letters, shape in own for letter, n in zip(letters, shape, strict=True)}
        return {letter: n for letter, n in (sizes | _pieces_of_weight(how)).items() if letter != "_" and n > 1}


class Mapped(NamedTuple):
    """The arguments of a product under `jax.vmap`.

    Attributes:
      size: of the mapped axis.
      of: the arguments.
      has: whether they have the mapped axis, in front.
    """

    size: int
    of: Arguments
    has: Mapping[Name, bool]

    def every(self, name: Name) -> jax.Array:
        """An argument with the mapped axis in front."""
        v = self.of[name]
        return v if self.has[name] else jnp.broadcast_to(v[None], (self.size, *v.shape))


def named(given: Mapping[str, jax.Array | None], stack: Weight | None) -> dict[Name, jax.Array]:
    """The arguments that there are, and the arrays of a stack."""
    stacks = {} if stack is None else stack._asdict()
    every = {Name(name): v for name, v in given.items()} | {Name(name, True): v for name, v in stacks.items()}
    return {name: v for name, v in every.items() if v is not None}


def on_devices(
    given: Arguments,
    how: Decoding,
    letters: Letters,
    one: Callable[[Arguments, Weight, Decoding], jax.Array],
    mapped: Callable[[Mapped, Callable[[Arguments], jax.Array]], jax.Array],
) -> jax.Array:
    """A product on the devices that hold its arguments, under `jax.vmap` too.

    Args:
      given: the arguments.
      how: how the weight is stored.
      letters: of the axes.
      one: the product on one device, by the arguments that are there, its weight, and how that is stored. A stack whose
        parts do not lie as the product needs them is not among them: XLA moves the parts of the layer instead.
      mapped: the product under `jax.vmap`, with the mapped axis in front, by a product of longer arguments. Neither
        function closes over arrays: they would outlive their trace in the rules.
    """
    names = list(given)
    stacked = [i for i, name in enumerate(names) if name.stacked]

    def local(cuts: Mapping[str, int], without: Collection[int]) -> Callable[..., jax.Array]:
        part = _part_of(how, cuts)

        def run(*arrays: jax.Array) -> jax.Array:
            of = {name: v for i, (name, v) in enumerate(zip(names, arrays, strict=True)) if i not in without}
            return one(of, *_weight_of(of, part))

        return run

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> jax.Array:
        of = dict(zip(names, arrays, strict=True))
        axes = [letters.of(name, how, v.shape) for name, v in of.items()], [letters.result]
        return partitioned(local, arrays, axes, letters.pieces(how, of), letters.summed, stacked)

    def rule(size: int, has: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        of = Mapped(size, dict(zip(names, arrays, strict=True)), dict(zip(names, has, strict=True)))
        return mapped(of, lambda longer: call(*(longer[name] for name in names))), True

    call.def_vmap(rule)
    return call(*given.values())


def _weight_of(arrays: Arguments, how: Decoding) -> tuple[Weight, Decoding]:
    """The arrays of a weight, those of a stack if they are among the arguments, and how they are stored."""
    stacked = frozenset(name.of for name in arrays if name.stacked)
    w = Weight._make(arrays.get(Name(name, name in stacked)) for name in Weight._fields)
    return w, dataclasses.replace(how, stacked=stacked)


def _part_of(how: Decoding, cuts: Mapping[str, int]) -> Decoding:
    """How one of the parts of a weight is stored, by the number of parts of K and N."""
    k = cuts.get("k", 1)
    groups = how.groups // k if how.groups > 1 else 1
    return dataclasses.replace(how, length=how.length // k, columns=how.columns // cuts.get("n", 1), groups=groups)


def _of_weight(name: Name, lead: str, how: Decoding, shape: tuple[int, ...]) -> str:
    """Letters of the axes of one of the arrays of a weight, with those in front; axes of size 1 are not partitioned."""
    letters = lead + {"table": "_", "columns": "n"}.get(name.of, "nk" if how.k_last else "kn")
    return letters if name.of == "codes" else "".join(c if n > 1 else "_" for c, n in zip(letters, shape, strict=True))


def _pieces_of_weight(how: Decoding) -> dict[str, int]:
    """The number of pieces that the axes of a weight can be partitioned into: whole groups and whole bytes."""
    small = how.stored == "nibbles"
    k = how.groups if how.groups > 1 else how.length // (2 if small and how.k_last else 1)
    if how.scales == "nibbles" and how.k_last:
        k = k // 2 if k % 2 == 0 else 1
    halves = not how.k_last and how.columns % 2 == 0 and (small or how.scales == "nibbles")
    n = how.columns // 2 if halves else 1 if how.scales == "nibbles" and not how.k_last else how.columns
    return {"k": k, "n": n}

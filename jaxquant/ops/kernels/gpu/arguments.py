"""The arguments of a kernel on several devices: their names, and how the arrays of a weight can be partitioned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxquant.ops.kernels.gpu.product import Weight
from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["Name", "letters_of", "named", "part_of", "pieces_of", "several", "weight_of"]


class Name(NamedTuple):
    """Which argument of a product an array is.

    Attributes:
      of: the name of the argument.
      stacked: whether it is that array of a weight for a whole stack of layers.
    """

    of: str
    stacked: bool = False


def named(given: Mapping[str, jax.Array | None], stack: Weight | None) -> dict[Name, jax.Array]:
    """The arguments that there are, and the arrays of a stack."""
    stacks = {} if stack is None else stack._asdict()
    every = {Name(name): v for name, v in given.items()} | {Name(name, True): v for name, v in stacks.items()}
    return {name: v for name, v in every.items() if v is not None}


def weight_of(arrays: Mapping[Name, jax.Array], how: Decoding) -> tuple[Weight, Decoding]:
    """The arrays of a weight, those of a stack if they are among the arguments, and how they are stored."""
    stacked = frozenset(name.of for name in arrays if name.stacked)
    w = Weight._make(arrays.get(Name(name, name in stacked)) for name in Weight._fields)
    return w, dataclasses.replace(how, stacked=stacked)


def part_of(how: Decoding, cuts: Mapping[str, int]) -> Decoding:
    """How one of the parts of a weight is stored, by the number of parts of K and N."""
    k = cuts.get("k", 1)
    groups = how.groups // k if how.groups > 1 else 1
    return dataclasses.replace(how, length=how.length // k, columns=how.columns // cuts.get("n", 1), groups=groups)


def letters_of(name: Name, lead: str, how: Decoding, shape: tuple[int, ...]) -> str:
    """Letters of the axes of one of the arrays of a weight, with those in front; axes of size 1 are not partitioned."""
    letters = lead + {"table": "_", "columns": "n"}.get(name.of, "nk" if how.k_last else "kn")
    return letters if name.of == "codes" else "".join(c if n > 1 else "_" for c, n in zip(letters, shape, strict=True))


def pieces_of(how: Decoding) -> dict[str, int]:
    """The number of pieces that the axes of a weight can be partitioned into: whole groups and whole bytes."""
    small = how.stored == "nibbles"
    k = how.groups if how.groups > 1 else how.length // (2 if small and how.k_last else 1)
    if how.scales == "nibbles" and how.k_last:
        k = k // 2 if k % 2 == 0 else 1
    halves = not how.k_last and how.columns % 2 == 0 and (small or how.scales == "nibbles")
    n = how.columns // 2 if halves else 1 if how.scales == "nibbles" and not how.k_last else how.columns
    return {"k": k, "n": n}


def several(pieces: Mapping[str, int]) -> dict[str, int]:
    """The axes that can be partitioned."""
    return {letter: size for letter, size in pieces.items() if size > 1}

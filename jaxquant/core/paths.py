"""Parameter trees as ordered ``path -> leaf``: ``"params/encoder/Dense_0/kernel"``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeAlias, TypeGuard, cast

import jax
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree, TreeDef

__all__ = ["Leaf", "Params", "folded", "is_qtensor", "key_of", "leaves_with_paths", "nearest", "path_of"]

Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct | QTensor
"""A parameter: an array or its shape, quantized or not."""

Params: TypeAlias = PyTree
"""A pytree of parameters."""


_Place = tuple[tuple[str, ...], tuple[str, ...], Hashable]
"""The parts of a path before a number and after it, and the entry that has to be equal."""


def is_qtensor(x: object) -> TypeGuard[QTensor]:
    """For ``is_leaf=``: a QTensor is one leaf."""
    return isinstance(x, QTensor)


def key_of(entry: object) -> Hashable:
    """The key itself of an entry of a key path of `jax.tree_util`; the kinds of entries call it by different names."""
    return next((getattr(entry, field) for field in ("key", "name", "idx") if hasattr(entry, field)), str(entry))


def path_of(keys: Iterable[object]) -> str:
    """A key path of `jax.tree_util` with ``/`` between its names."""
    return "/".join(str(key_of(entry)) for entry in keys)


def leaves_with_paths(tree: Params) -> tuple[dict[str, Any], TreeDef]:
    """Leaves by path, in tree order, and the treedef; QTensors are leaves."""
    leaves, treedef = cast(
        tuple[list[tuple[tuple[object, ...], Any]], TreeDef],
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor),
    )
    by_path = {path_of(keys): leaf for keys, leaf in leaves}
    if len(by_path) < len(leaves):
        paths = [path_of(keys) for keys, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        todo = "Rename one, so that rules can tell them apart"
        raise quant_error("params", "two parameters have one path", todo=todo, path=twice)
    return by_path, treedef


def nearest(name: str, names: Iterable[str]) -> str:
    """Up to three of ``names`` that resemble ``name``, for an error message."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    return ", ".join(map(repr, close)) if close else "no candidates"


def _in_runs(numbers: list[str]) -> str:
    """Numbers in order, three or more that follow one another as ``0..31``; a tree has 10 before 2."""
    if any(n != str(int(n)) for n in numbers):  # with zeros in front: as they are
        return ",".join(numbers)
    runs: list[list[int]] = []
    for n in sorted(map(int, numbers)):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)


def folded(entries: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Groups paths that differ in one number and have equal entries, such as repeated layers.

    Args:
      entries: path -> what has to be equal.

    Returns:
      Label -> the paths it is for, in the order of the first of each. A label is a path, or one with ``{0..31}`` (or
      ``{0,2,5..9}``) in place of the number, where three or more are alike.

    Example:
      >>> folded({"layers_0/w": 4, "layers_1/w": 4, "layers_2/w": 4, "head": 8})
      {'layers_{0..2}/w': ['layers_0/w', 'layers_1/w', 'layers_2/w'], 'head': ['head']}
    """
    alike: dict[_Place, list[str]] = {}
    places: dict[str, list[_Place]] = {}
    for path, value in entries.items():
        parts = re.split(r"(\d+)", path)
        places[path] = [(tuple(parts[:i]), tuple(parts[i + 1 :]), value) for i in range(1, len(parts), 2)]
        for place in places[path]:
            alike.setdefault(place, []).append(path)
    found: dict[str, list[str]] = {}
    done: set[str] = set()
    for path in entries:
        if path in done:
            continue
        place = max(places[path], key=lambda place: len(alike[place]), default=None)
        members = [] if place is None else [p for p in alike[place] if p not in done]
        if place is None or len(members) < 3:
            found[path] = [path]
            continue
        before, after, _ = place
        numbers = [p.removeprefix("".join(before)).removesuffix("".join(after)) for p in members]
        found[f"{''.join(before)}{{{_in_runs(numbers)}}}{''.join(after)}"] = members
        done.update(members)
    return found

"""Parameter trees as ordered ``path -> leaf``: ``"params/encoder/Dense_0/kernel"``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import jax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor

__all__ = ["is_qtensor", "key_of", "leaves_with_paths", "nearest", "path_of"]


def is_qtensor(x: Any) -> bool:
    """For ``is_leaf=``: a QTensor is one leaf."""
    return isinstance(x, QTensor)


def key_of(entry: Any) -> Any:
    """The key itself of an entry of a key path of `jax.tree_util`; the kinds of entries call it by different names."""
    return next((getattr(entry, field) for field in ("key", "name", "idx") if hasattr(entry, field)), str(entry))


def path_of(keys: Iterable[Any]) -> str:
    """A key path of `jax.tree_util` with ``/`` between its names."""
    return "/".join(str(key_of(entry)) for entry in keys)


def leaves_with_paths(tree: Any) -> tuple[dict[str, Any], Any]:
    """Leaves by path, in tree order, and the treedef; QTensors are leaves."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
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

"""Fits a saved tree to a template, and reports all differences at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp

from jaxquant.core.errors import QuantError, printable
from jaxquant.core.paths import is_qtensor, key_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree, Shaped, TreeDef

__all__ = ["fit"]

_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
_NEAREST = 20  # most names for which the nearest one is looked up, since this is slow


def fit(saved: PyTree, like: PyTree, error: Callable[..., QuantError]) -> tuple[list[Shaped], TreeDef]:
    """The leaves of ``saved`` in the order of ``like``, and the treedef of ``like``, QTensors being leaves of both.

    A leaf fits if it has the template's logical shape and kind of dtype (float, integer, ...); the width may differ. A
    saved QTensor fits a float leaf; a QTensor in the template requires a QTensor of the same number type.

    Args:
      saved: a tree whose leaves have shape and dtype.
      like: the template. Its keys must match, but containers may differ (a list, and a dict with keys "0", "1").
      error: makes the exception from ``rule, todo=..., **got``.
    """
    have = dict(_leaves(saved)[0])
    wanted, treedef = _leaves(like)
    missing = [path for path, _ in wanted if path not in have]
    known = {path for path, _ in wanted}
    unexpected = [path for path in have if path not in known]
    problems = [(path, f"missing{_nearest(path, unexpected, i)}") for i, path in enumerate(missing)]
    problems += [(path, f"unexpected{_nearest(path, missing, i)}") for i, path in enumerate(unexpected)]
    for path, leaf in wanted:
        if path in have and not _fits(have[path], leaf):
            problems.append((path, f"saved as {_describe(have[path])}, wanted {_describe(leaf)}"))
    if problems:
        lines = "".join(f"\n  {_shown(path)}: {problem}" for path, problem in sorted(problems))
        raise error(
            f"the file does not fit the template like={lines}\n",
            todo="Rename or reshape the leaves of one of the two, or load without like",
            missing=len(missing),
            unexpected=len(unexpected),
            misfits=len(problems) - len(missing) - len(unexpected),
        )
    return [have[path] for path, _ in wanted], treedef


def _leaves(tree: PyTree) -> tuple[list[tuple[tuple[str, ...], Shaped]], TreeDef]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_qtensor)
    return [(tuple(str(key_of(entry)) for entry in path), leaf) for path, leaf in leaves], treedef


def _shown(path: tuple[str, ...]) -> str:
    return printable("/".join(path)) or "(the whole tree)"


def _nearest(path: tuple[str, ...], others: Collection[tuple[str, ...]], count: int) -> str:
    near = difflib.get_close_matches(_shown(path), map(_shown, others), n=1) if count < _NEAREST else []
    return f" (nearest: {near[0]})" if near else ""


def _fits(saved: Shaped, wanted: Shaped) -> bool:
    if getattr(wanted, "shape", None) != saved.shape:
        return False
    if isinstance(wanted, QTensor):
        return isinstance(saved, QTensor) and saved.qtype == wanted.qtype
    return any(jnp.issubdtype(saved.dtype, kind) and jnp.issubdtype(wanted.dtype, kind) for kind in _KINDS)


def _describe(leaf: Shaped) -> str:
    if not hasattr(leaf, "shape"):
        return type(leaf).__qualname__
    return f"{leaf.qtype if isinstance(leaf, QTensor) else leaf.dtype}{list(leaf.shape)}"

"""A function of params, traced to a jaxpr with one input per parameter and per array argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import Leaf, Params, is_qtensor, leaves_with_paths
from jaxquant.core.qtensor import Operand
from jaxquant.core.types import PyTree
from jaxquant.ops.shardings import explicit_of

__all__ = ["Traced", "is_array", "trace"]


@dataclasses.dataclass(frozen=True)
class Traced:
    """The result of `trace`.

    Attributes:
      jaxpr: inputs are the parameters in tree order, then the array arguments.
      params: path -> leaf.
      arrays: the array arguments, or their shapes.
      rebuild: turns the outputs of the jaxpr into the function's results.
    """

    jaxpr: ClosedJaxpr
    params: dict[str, Leaf]
    arrays: list[jax.Array]
    rebuild: Callable[[Sequence[Operand]], PyTree]


def is_array(x: object) -> bool:
    """Whether a leaf is an array (or the shape of one), and so an input of the trace."""
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _abstract(path: str, leaf: Leaf) -> Leaf:
    """The float array that a QTensor stands for, on a mesh of explicit axes where its codes are; any other leaf."""
    if not is_qtensor(leaf):
        return leaf
    leaf.checked(path)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=explicit_of(leaf))


def _called(params: Params, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> str:
    """A call in words: the arguments' types, and shapes of arrays."""

    def said(x: PyTree) -> str:
        if is_array(x):
            return f"{np.dtype(x.dtype).name if isinstance(x.dtype, np.dtype) else x.dtype}{list(x.shape)}"
        leaves = jax.tree.leaves(x)
        if len(leaves) == 1 and leaves[0] is x:
            return repr(x)[:40]
        return f"{type(x).__name__} of {len(leaves)} {'leaf' if len(leaves) == 1 else 'leaves'}"

    words = [said(params), *map(said, args), *(f"{name}={said(x)}" for name, x in kwargs.items())]
    return f"fn({', '.join(words)})"


def trace(
    function: str, fn: Callable[..., PyTree], params: Params, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> Traced:
    """Traces ``fn(params, *args, **kwargs)``.

    Arrays among the arguments become inputs; everything else (flags, strings, None, Python numbers) is a constant of
    the trace, as written. A QTensor is traced as the float array it stands for. An error of the function's own gets a
    note of how it was called.
    """
    leaves, treedef = leaves_with_paths(params)
    known = [path for path, leaf in leaves.items() if is_array(leaf) or is_qtensor(leaf)]
    if not known:
        todo = "Params are argument 0 of the function, as in jax.grad"
        raise quant_error(function, "params hold no arrays", todo=todo, params=type(params).__name__)
    flat, structure = jax.tree.flatten((args, kwargs))
    where = [i for i, x in enumerate(flat) if is_array(x)]
    out: dict[str, PyTree] = {}

    def flat_fn(weights: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        filled = dict(leaves)
        filled.update(zip(known, weights, strict=True))
        values = list(flat)
        for i, x in zip(where, arrays, strict=True):
            values[i] = x
        new_args, new_kwargs = jax.tree.unflatten(structure, values)
        try:
            result = fn(jax.tree.unflatten(treedef, filled.values()), *new_args, **new_kwargs)
        except QuantError:
            raise
        except Exception as error:  # of the user's own function, which does not say how it was called
            note = f"jaxquant: fn raised this when {function} called it as {_called(params, args, kwargs)}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            raise
        results, out["tree"] = jax.tree.flatten(result)
        out["static"] = [None if is_array(r) else r for r in results]  # None is no leaf
        return [r for r in results if is_array(r)]

    arrays = [flat[i] for i in where]
    with jax.disable_jit(False):  # else scans are unrolled: a plan, and its state by layer, are of scans in any setting
        jaxpr = jax.make_jaxpr(flat_fn)([_abstract(p, leaves[p]) for p in known], arrays)

    def rebuild(outs: Sequence[Operand]) -> PyTree:
        arrays = iter(outs)
        return jax.tree.unflatten(out["tree"], [next(arrays) if r is None else r for r in out["static"]])

    return Traced(jaxpr, {p: leaves[p] for p in known}, arrays, rebuild)

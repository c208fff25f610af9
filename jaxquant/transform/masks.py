"""Which rows of a batch count: masks of padding, for calibration and for losses.

A mask says of every place of a batch whether it holds data. It is a boolean array whose axes are the first axes of the
arrays that it is about: ``[batch]`` or ``[batch, length]``. Where such an array has one axis for all of them
(``x.reshape(-1, channels)``), the mask is taken in the same order, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import leaves_with_paths
from jaxquant.core.types import PyTree
from jaxquant.transform.batches import arguments
from jaxquant.transform.plan import is_float

__all__ = ["Counted", "Mask", "along", "masked", "with_masks"]

Counted = jax.Array | np.ndarray | None
"""The mask of one batch; None: all counts."""

Mask = Callable[..., jax.Array | np.ndarray] | Iterable[jax.Array | np.ndarray] | None
"""A function of a batch's arguments, or one array for each batch; None: all counts."""


def with_masks(
    function: str, batches: Iterable[PyTree], mask: Mask, fn: Callable[..., PyTree] | None = None
) -> Iterator[tuple[tuple[PyTree, ...], Counted]]:
    """The arguments of each batch, with its mask or None.

    Raises:
      QuantError: if a mask is no boolean array with axes, or there are more or fewer masks than batches.
    """
    if mask is None or callable(mask):
        for number, args in enumerate(arguments(function, batches, fn)):
            yield args, None if mask is None else _checked(function, number, mask(*args))
        return
    if hasattr(mask, "shape"):
        todo = "Pass a function of the batch's arguments, or a list with one array for each batch"
        raise quant_error(function, "there must be one mask for each batch", todo=todo, mask=mask)
    given, missing, count = iter(mask), object(), 0
    todo = "Pass one boolean array for each batch, or a function of the batch's arguments"
    for number, args in enumerate(arguments(function, batches, fn)):
        one = next(given, missing)
        if one is missing:
            raise quant_error(function, "there are fewer masks than batches", todo=todo, masks=number)
        count = number + 1
        yield args, _checked(function, number, one)
    if next(given, missing) is not missing:
        raise quant_error(function, "there are more masks than batches", todo=todo, batches=count)


def _checked(function: str, number: int, mask: PyTree) -> jax.Array | np.ndarray:
    if not hasattr(mask, "dtype") or mask.dtype != jnp.bool_ or not mask.ndim:
        todo = "Pass True where there is data, for example attention_mask != 0 or tokens != pad"
        rule = "a mask must be a boolean array with the first axes of the activations"
        raise quant_error(function, rule, todo=todo, mask=mask, batch=number)
    return mask


def along(mask: jax.Array | np.ndarray, shape: tuple[int, ...]) -> jax.Array | None:
    """The mask with as many axes as an array of this shape, 1 long behind its own; None if it does not fit."""
    lead = tuple(mask.shape)
    if shape[: len(lead)] != lead:
        lead = (math.prod(lead),)
        if shape[:1] != lead:
            return None
    return jnp.reshape(mask, lead + (1,) * (len(shape) - len(lead)))


def masked(function: str, mask: Counted, *trees: PyTree) -> tuple[PyTree, ...]:
    """Trees of one structure, with 0 in their float arrays wherever the mask is False; unchanged without a mask.

    Raises:
      QuantError: naming all arrays that the mask does not fit.
    """
    if mask is None:
        return trees
    wrong = [
        f"{path or 'the output'} has shape {tuple(leaf.shape)}"
        for path, leaf in leaves_with_paths(trees[0])[0].items()
        if is_float(leaf) and along(mask, tuple(leaf.shape)) is None
    ]
    if wrong:
        todo = "Leave the mask out, or pass a function that returns only outputs with its axes"
        rule = f"outputs do not begin with the axes of the mask: {'; '.join(wrong)}"
        raise quant_error(function, rule, todo=todo, mask=tuple(mask.shape))

    def only(x: PyTree) -> PyTree:
        here = along(mask, tuple(x.shape)) if is_float(x) else None
        return x if here is None else jnp.where(here, x, jnp.zeros_like(x))

    return tuple(jax.tree.map(only, tree) for tree in trees)

"""The batches on which a function runs."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping

from jaxquant.core.errors import quant_error
from jaxquant.core.types import PyTree

__all__ = ["arguments"]

_TODO = (
    "Pass a list of batches, each the tuple of the function's further arguments, or a single array: [x], [(x, y), ..]"
)


def arguments(
    function: str, batches: Iterable[PyTree], fn: Callable[..., PyTree] | None = None
) -> Iterator[tuple[PyTree, ...]]:
    """The arguments that each batch stands for: a tuple, a list, or one argument by itself.

    Args:
      function: who asks, for errors.
      batches: an iterable of batches; not a batch.
      fn: the function of params that takes them.

    Raises:
      QuantError: at once, if ``batches`` is an array, a dict or no iterable; and in its turn for a batch that has too
        many or too few arguments for ``fn``.

    Example:
      >>> from jaxquant.transform.batches import arguments
      >>> list(arguments("calibrate", [1, (2, 3)]))
      [(1,), (2, 3)]
    """
    alone = hasattr(batches, "shape") or isinstance(batches, Mapping | str | bytes)
    if alone or not isinstance(batches, Iterable):
        raise quant_error(
            function, "this is a batch, or no batch, where batches are asked for", todo=_TODO, batches=batches
        )
    signature: inspect.Signature | None = None
    if fn is not None:
        with contextlib.suppress(TypeError, ValueError):  # of something that does not tell
            signature = inspect.signature(fn)
    return _each(function, batches, signature)


def _each(
    function: str, batches: Iterable[PyTree], signature: inspect.Signature | None
) -> Iterator[tuple[PyTree, ...]]:
    for number, batch in enumerate(batches):
        args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if signature is not None:
            try:
                signature.bind(None, *args)
            except TypeError as error:
                rule = f"the function does not take the arguments of a batch ({error})"
                raise quant_error(function, rule, todo=_TODO, batch=number, arguments=len(args)) from None
        yield args

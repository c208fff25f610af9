"""`give_back`: memory that was freed goes back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


@functools.cache
def _trim() -> Callable[[int], int] | None:
    """The function of the C library; None where it has none, or none is loaded under this name."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back() -> None:
    """Returns the pages of freed arrays to the system; without effect but in glibc.

    glibc keeps blocks of up to 32 MB that were freed, for later ones. After large arrays of several sizes, made in
    several threads, that comes to more than the arrays in use. A call takes milliseconds: make it between pieces of
    work whose arrays are as large, not between small ones.
    """
    trim = _trim()
    if trim is not None:
        trim(0)

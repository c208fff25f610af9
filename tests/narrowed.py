"""What types leave open and a test settles: a value that is there, and a call that must be refused."""

from typing import Any, TypeVar

import jaxquant

T = TypeVar("T")

untyped: Any = jaxquant
"""`jaxquant` without its types: a type checker accepts the wrong arguments that a test passes on purpose."""


def present(value: T | None) -> T:
    """The value of something optional; fails if it is None."""
    assert value is not None
    return value


def instance(kind: type[T], value: object) -> T:
    """The value of something that may be of several kinds; fails if it is of another."""
    assert isinstance(value, kind)
    return value

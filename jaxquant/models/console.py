"""Shared by the commands: text without control characters, and errors without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import click

from jaxquant.core.errors import QuantError, printable

__all__ = ["refusals", "shown"]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Refused input ends the program with its message and code 1, not with a traceback."""
    try:
        yield
    except (OSError, QuantError) as error:
        raise click.ClickException(shown(str(error))) from error


def shown(text: str) -> str:
    """A text whose lines and tabs stay, and that no terminal acts on."""
    return "".join(c if c in "\n\t" else printable(c) for c in text)

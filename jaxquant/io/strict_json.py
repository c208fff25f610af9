"""JSON from untrusted files."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

__all__ = ["Json", "parse"]

Json: TypeAlias = Any
"""A value of JSON: text, a number, a bool, None, or a list or dict of such."""


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A dict; raises for two equal keys, of which readers could pick different ones."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return result


def _constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse(text: bytes | str) -> Json:
    """The value of a JSON text; ValueError with the reason for anything else.

    Stricter than `json.loads`: UTF-8 only, no key twice in one object, no NaN or Infinity, and a ValueError for nesting
    that is too deep for the stack.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None

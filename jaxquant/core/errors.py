"""The one exception of the package, and the one form of its messages."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

__all__ = ["QuantError", "printable", "quant_error"]


class QuantError(ValueError):
    """Raised for every input that jaxquant refuses.

    The message always has the form
    ``<function>[ at <path>]: <rule broken>; got <name>=<value>, shape=(..). <What to do>.``

    Attributes:
      text: the message without its place.
      function: the public function or class that refuses; None where several errors are one.
      path: the parameter's path, where there is one.

    Example:
      >>> import jaxquant as jq
      >>> try:
      ...     jq.QuantSpec("int9")
      ... except jq.QuantError as error:
      ...     print(str(error).split(";")[0])
      QuantSpec: unknown number type
    """

    def __init__(self, text: str, function: str | None = None, path: str | None = None):
        self.text, self.function, self.path = text, function, path
        place = function if path is None else f"{function} at {printable(path)}"
        super().__init__(text if function is None else f"{place}: {text}")

    def at(self, path: str) -> QuantError:
        """The same error with the path of the parameter, which the function that raised it did not know."""
        return type(self)(self.text, self.function, path)


def printable(text: str) -> str:
    r"""Text with an escape for every unprintable character, since names in files are not trusted.

    A terminal acts on some characters (ESC, C1 codes, carriage returns, directions of writing) and would show a name
    with a line feed as two lines. Printable characters, the backslash included, are unchanged.

    Example:
      >>> from jaxquant.core.errors import printable
      >>> print(printable("a\x1b[2J\nproblem: none"))
      a\x1b[2J\nproblem: none
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _lines(text: str) -> str:
    """Several lines of text, each made printable."""
    return "\n".join(map(printable, text.split("\n")))


def _show(value: Any) -> str:
    if isinstance(value, np.dtype | type(None) | bool | int | float | str | tuple):
        text = repr(cast(object, value)) if not isinstance(value, np.dtype) else value.name
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        text = f"{np.dtype(value.dtype).name}{list(value.shape)}"
    else:
        text = printable(repr(value))
    return text if len(text) <= 200 else text[:197] + "..."


def quant_error(
    function: str,
    rule: str,
    *,
    todo: str,
    path: str | None = None,
    shape: tuple[int, ...] | None = None,
    **got: object,
) -> QuantError:
    """Builds (does not raise) a `QuantError` in the form its docstring gives.

    Args:
      function: the public function or class that refuses.
      rule: the rule that is broken, as a statement. It may have several lines; names in it go through `printable`.
      todo: what the user can do about it, without the closing full stop.
      path: the parameter's path, where there is one.
      shape: the shape of the offending array, where there is one.
      **got: the offending values by the name the user knows them under.
    """
    values = [f"{name}={_show(value)}" for name, value in got.items()]
    if shape is not None:
        values.append(f"shape={tuple(shape)}")
    what = f"; got {', '.join(values)}" if values else ""
    return QuantError(f"{_lines(rule)}{what}. {_lines(todo)}.", function, path)

"""`Refusals`: the errors of many parameters as one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from jaxquant.core.errors import QuantError
from jaxquant.core.paths import folded

__all__ = ["Refusals"]


class Refusals:
    """Errors of a function that looks at many parameters, so that one run names all that it refuses.

    Example:
      >>> from jaxquant.core.errors import QuantError, quant_error
      >>> refusals = Refusals("make_plan")
      >>> for path in ("a", "layers.0.w", "layers.1.w", "layers.2.w"):
      ...     with refusals.gather():
      ...         raise quant_error("make_plan", "it is too long", todo="Cut it", path=path)
      >>> try:
      ...     refusals.close()
      ... except QuantError as error:
      ...     print(error)
      make_plan: 4 things are refused.
        make_plan at a: it is too long. Cut it.
        make_plan at layers.{0..2}.w: it is too long. Cut it.
    """

    def __init__(self, function: str):
        self.function = function
        self.errors: list[QuantError] = []

    @contextlib.contextmanager
    def gather(self) -> Generator[None]:
        """Keeps a `QuantError` that is raised inside."""
        try:
            yield
        except QuantError as error:
            self.errors.append(error)

    def close(self) -> None:
        """Raises the kept errors: a single one unchanged, several as one."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            lines = [f"{self.function}: {len(self.errors)} things are refused.", *map(str, _folded(self.errors))]
            raise QuantError("\n  ".join(lines))


def _folded(errors: list[QuantError]) -> list[QuantError]:
    """The errors: equal ones of repeated layers become one."""
    by_path = {error.path: error for error in errors if error.path is not None}
    alike = folded({path: (error.function, error.text) for path, error in by_path.items()})
    of_path = {paths[0]: label for label, paths in alike.items()}
    rest = {path for paths in alike.values() for path in paths[1:]}
    return [e if e.path is None else e.at(of_path.get(e.path, e.path)) for e in errors if e.path not in rest]

"""Products of two activations, which have names and no parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, primitives

from jaxquant.core.specs import OpSpec
from jaxquant.transform.primitives import dtype_of

__all__ = ["Products", "product_name", "scoped"]


@dataclasses.dataclass
class Products:
    """Products of two activations: the planned ones, and the ones met so far.

    Attributes:
      specs: name -> spec; None while planning: every product is looked for.
      met: name -> shapes of the operands, where it was met first.
      own_derivatives: names of products inside a function with a derivative rule of its own.
    """

    specs: dict[str, OpSpec] | None
    met: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    own_derivatives: set[str] = dataclasses.field(default_factory=set)
    _holding: dict[tuple[int, str], bool] = dataclasses.field(default_factory=dict)

    def wanted(self, name: str) -> bool:
        """Whether a product of this name is one of them."""
        return self.specs is None or name in self.specs

    def in_equation(self, eqn: JaxprEqn, scope: str) -> bool:
        """Whether an equation in this scope is one of them, or holds one."""
        scope = scoped(scope, str(eqn.source_info.name_stack))
        if eqn.primitive is primitives.dot_general_p:
            return jnp.issubdtype(dtype_of(eqn.outvars[0]), jnp.floating) and self.wanted(product_name(scope))
        return any(self._in_jaxpr(jaxpr, scope) for jaxpr in _jaxprs_of(eqn))

    def _in_jaxpr(self, jaxpr: Jaxpr, scope: str) -> bool:
        key = id(jaxpr), scope
        if key not in self._holding:
            self._holding[key] = any(self.in_equation(eqn, scope) for eqn in jaxpr.eqns)
        return self._holding[key]


def scoped(scope: str, own: str) -> str:
    """The scope of an equation: that of the jaxpr it is in, and its own name stack."""
    return f"{scope}/{own}" if scope and own else scope or own


def product_name(scope: str) -> str:
    """The name of a product of two activations in this scope."""
    return f"{scope}/dot_general" if scope else "dot_general"


def _jaxprs_of(eqn: JaxprEqn) -> Iterator[Jaxpr]:
    for value in eqn.params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, Jaxpr):
                yield x

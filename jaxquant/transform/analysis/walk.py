"""`Walk`: evaluates a jaxpr on descriptions of its values instead of the values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Primitive, Var, primitives
from jax.typing import ArrayLike

from jaxquant.transform.primitives import body_of, is_call

__all__ = ["Rule", "Walk"]

V = TypeVar("V")
Rule = Callable[[Any, JaxprEqn, list[V]], list[V]]
"""``(analysis, equation, values of the operands) -> values of the results``."""


class Walk(Generic[V]):
    """An analysis of the values of a jaxpr. It enters calls, the bodies of scans, and the branches of conds.

    Attributes:
      rules: by primitive.
      constant: ``x ->`` the value of a constant.
      carried, layer: the description in one step of a scan, of a carried value and of a scanned one.
      again: ``(carried value at the first step, after it) ->`` the carried value at the end.
      stacked: ``(result of one step, length) ->`` the stacked results.
      either: ``(index, a result of each branch) ->`` the result of a cond, whichever branch runs.
    """

    rules: Mapping[Primitive | None, Rule[V]]
    constant: Callable[[ArrayLike], V]
    carried: Callable[[V], V]
    layer: Callable[[V], V]
    again: Callable[[V, V], V]
    stacked: Callable[[V, int], V]
    either: Callable[[V, list[V]], V]

    def other(self, eqn: JaxprEqn, values: list[V]) -> list[V]:
        """The rule of a primitive that has none."""
        raise NotImplementedError

    def read(self, value: V) -> V:
        """A value as an equation reads it."""
        return value

    def run(self, jaxpr: ClosedJaxpr, inputs: list[V]) -> list[V]:
        """The values of the results."""
        env: dict[Var, V] = dict(zip(jaxpr.jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.jaxpr.constvars, map(self.constant, jaxpr.consts), strict=True))

        def read(v: Var | Literal) -> V:
            return self.constant(v.val) if isinstance(v, Literal) else self.read(env[v])

        for eqn in jaxpr.jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, values: list[V]) -> list[V]:
        """The values of an equation's results."""
        if is_call(eqn):
            return self.run(body_of(eqn), values)
        if eqn.primitive is primitives.scan_p:
            return self.scan(eqn, values)
        return self.cond(eqn, values) if eqn.primitive is primitives.cond_p else self.simple(eqn, values)

    def simple(self, eqn: JaxprEqn, values: list[V]) -> list[V]:
        """The same of an equation that is not entered."""
        rule = self.rules.get(eqn.primitive)
        return self.other(eqn, values) if rule is None else rule(self, eqn, values)

    def cond(self, eqn: JaxprEqn, values: list[V]) -> list[V]:
        """The same of a cond."""
        index, *operands = values
        branches = [self.run(branch, operands) for branch in eqn.params["branches"]]
        return [self.either(index, list(results)) for results in zip(*branches, strict=True)]

    def scan(self, eqn: JaxprEqn, values: list[V]) -> list[V]:
        """The same of a scan."""
        first, length = eqn.params["num_consts"], eqn.params["length"]
        carry = [self.carried(value) for value in values[first : first + eqn.params["num_carry"]]]
        stacks = values[first + len(carry) :]
        layers = [self.layer(stack) for stack in stacks]
        results = self.run(eqn.params["jaxpr"], [*values[:first], *carry, *layers])
        last = [self.again(*step) for step in zip(carry, results[: len(carry)], strict=True)]
        whole = {id(layer): stack for layer, stack in zip(layers, stacks, strict=True)}  # if each step hands it on
        return [*last, *(whole.get(id(r)) or self.stacked(r, length) for r in results[len(carry) :])]

"""Activations that the backward pass computes again instead of being handed what their derivative needs.

A product keeps the codes of its activation. The norm or the gated activation function before it would keep several
arrays of floats for its derivative, all of which follow from the function's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, primitives

from jaxquant.ops.rowwise import REDUCTIONS, RowFunction
from jaxquant.transform.analysis.rows import Made, is_operation
from jaxquant.transform.primitives import dtype_of, shape_of

__all__ = ["Rematerialized", "rematerialized"]

_SUMS = primitives.add_p, primitives.sub_p
_BY_RESULT = primitives.exp_p, primitives.tanh_p, primitives.logistic_p, primitives.rsqrt_p, primitives.sqrt_p
_BY_OPERANDS = primitives.mul_p, primitives.div_p
_BY_OPERAND = primitives.square_p, primitives.integer_pow_p


class Rematerialized(NamedTuple):
    """Equations of a jaxpr that compute one value, which alone is used by others.

    Attributes:
      equations: their places, in order.
      inputs: the variables that they read.
      result: the variable of the value.
    """

    equations: tuple[int, ...]
    inputs: tuple[Var, ...]
    result: Var


def rematerialized(jaxpr: Jaxpr, made: Mapping[int, Made]) -> list[Rematerialized]:
    """The equations of each function of rows that hands less to the backward pass if it hands its inputs alone.

    Args:
      jaxpr: the jaxpr.
      made: how operands of its products are made, as `jaxquant.transform.analysis.rows.made_by_rows` has it.
    """
    roots = {v: how for i, how in made.items() if isinstance(v := jaxpr.eqns[i].invars[0], Var)}
    if not roots:
        return []
    graph = _Graph(jaxpr)
    found = {v: graph.rematerialized(v, how.inputs) for v, how in roots.items()}

    return [how for v, how in found.items() if how is not None and _keeps_more(roots[v].function, how)]


def _keeps_more(function: RowFunction, how: Rematerialized) -> bool:
    """Whether the derivative of a function reads as many arrays as are its inputs, often in wider floats, or more."""
    read = _read_by_derivative(function)
    whole = math.prod(shape_of(how.result))
    inputs = sum(math.prod(shape_of(v)) == whole for v in how.inputs)
    result = len(function.inputs) + len(function.steps) - 1
    return inputs < len(read) or (inputs == len(read) and result not in read)


class _Graph:
    """Who makes and who reads each value of a jaxpr; its results are read by an equation past the end."""

    def __init__(self, jaxpr: Jaxpr):
        self.equations = jaxpr.eqns
        self.maker = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
        self.readers: dict[Var, set[int]] = {v: {len(jaxpr.eqns)} for v in jaxpr.outvars if isinstance(v, Var)}
        for i, eqn in enumerate(jaxpr.eqns):
            for v in _read(eqn):
                self.readers.setdefault(v, set()).add(i)

    def rematerialized(self, result: Var, inputs: Iterable[Var]) -> Rematerialized | None:
        """The equations between inputs and a result; None if anything else reads what they make on the way."""
        known, places, needed = set(inputs), set[int](), [result]
        while needed:
            v = needed.pop()
            place = self.maker.get(v)
            if v in known or place is None or not is_operation(self.equations[place]):
                known.add(v)
            elif place not in places:
                places.add(place)
                needed += _read(self.equations[place])
        for place in sorted(places):  # in which a sum takes the place of its operands
            if self._is_sum_of(known, place, places):
                places.remove(place)
                known.add(self.equations[place].outvars[0])
        equations = tuple(sorted(places))
        own = [v for i in equations for v in self.equations[i].outvars]
        if [v for v in own if self.readers.get(v, set()) - places] != [result]:
            return None
        read = dict.fromkeys(v for i in equations for v in _read(self.equations[i]))
        return Rematerialized(equations, tuple(v for v in read if v not in own), result)

    def _is_sum_of(self, known: set[Var], place: int, places: set[int]) -> bool:
        """Whether an equation adds known arrays that no other equation of these places reads, to a smaller one."""
        eqn = self.equations[place]
        operands = set(_read(eqn))
        alone = operands <= known and all(self.readers[v] & places == {place} for v in operands)
        return eqn.primitive in _SUMS and alone and _bytes(eqn.outvars) < _bytes(operands)


def _read_by_derivative(function: RowFunction) -> set[int]:
    """The places of the matrices of the activation's size that the derivative of a function reads; not of masks."""
    whole = {i for i, form in enumerate(function.inputs) if form == "rows"}
    read = set[int]()
    for place, step in enumerate(function.steps, len(function.inputs)):
        values = [at for at in step.operands if isinstance(at, int)]
        matrices = whole.intersection(values)
        if matrices and step.primitive not in REDUCTIONS:
            whole.add(place)
        if step.primitive in _BY_RESULT:
            read |= {place} & whole
        elif step.primitive in _BY_OPERAND or (step.primitive in _BY_OPERANDS and len(values) > 1):
            read |= matrices
    return read


def _read(eqn: JaxprEqn) -> list[Var]:
    return [v for v in eqn.invars if not isinstance(v, Literal)]


def _bytes(variables: Iterable[Var]) -> int:
    return sum(math.prod(shape_of(v)) * dtype_of(v).itemsize for v in variables)

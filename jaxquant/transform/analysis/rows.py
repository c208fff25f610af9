"""Activations that are computed a row at a time before a product, as a norm or a gated activation function is.

`made_by_rows` finds for each ``dot_general`` of a jaxpr the operations that make its left operand, back to results that
something else uses too. A kernel that quantizes the operand can compute them itself.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, primitives

from jaxquant.ops.rowwise import ELEMENTWISE, REDUCTIONS, Form, RowFunction, Step
from jaxquant.transform.primitives import body_of, dtype_of, is_call, shape_of

__all__ = ["Made", "is_operation", "made_by_rows"]

_FEWEST = 32  # rows: XLA keeps fewer on the chip
_FLOATS = jnp.dtype("bfloat16"), jnp.dtype("float32")  # with one range
_MOST = 3  # inputs with as many numbers as the result: a kernel has blocks of all in memory
_STEPS = 48  # a kernel has them for each of its pieces
_RESHAPES = primitives.reshape_p, primitives.squeeze_p
_KEEPING = *_RESHAPES, primitives.convert_element_type_p, primitives.broadcast_in_dim_p  # the values stay what they are

_Name = Hashable  # of a value: its variable, or within a call the place of the call and the variable


class Made(NamedTuple):
    """How an operand is made: the function, and the variables that hold its inputs."""

    function: RowFunction
    inputs: tuple[Var, ...]


@dataclasses.dataclass
class _Node:
    """An equation, with names of its operands, numbers for literals, and the name of its first result."""

    eqn: JaxprEqn
    operands: list[_Name | float]
    result: _Name


def made_by_rows(jaxpr: Jaxpr) -> dict[int, Made]:
    """For products, by the places of their equations, how a function of rows makes the left operand; not for others."""
    products = [(i, eqn.invars[0]) for i, eqn in enumerate(jaxpr.eqns) if _multiplies_rows(eqn)]
    if not products:
        return {}
    nodes: list[_Node] = []
    names: dict[Var, _Name] = {}
    _flatten(jaxpr, names, nodes)
    graph = _Graph(nodes, {name: v for v, name in names.items()}, _results(jaxpr, names))
    made = {v: graph.made(names.get(v, v), v) for v in dict.fromkeys(v for _, v in products if isinstance(v, Var))}
    found = ((i, made.get(v)) for i, v in products if isinstance(v, Var))
    return {i: how for i, how in found if how is not None}


def _results(jaxpr: Jaxpr, names: dict[Var, _Name]) -> list[_Name]:
    return [names.get(v, v) for v in jaxpr.outvars if isinstance(v, Var)]


def _multiplies_rows(eqn: JaxprEqn) -> bool:
    if eqn.primitive is not primitives.dot_general_p:
        return False
    contract, batch = eqn.params["dimension_numbers"]
    return not batch[0] and tuple(contract[0]) == (len(shape_of(eqn.invars[0])) - 1,)


def _flatten(jaxpr: Jaxpr, names: dict[Var, _Name], nodes: list[_Node], within: _Name = None) -> None:
    """Appends the equations of a jaxpr; calls of functions that consist of operations are entered."""

    def name(v: Var) -> _Name:
        return names.setdefault(v, v if within is None else (within, v))

    for eqn in jaxpr.eqns:
        operands = [_number(v) if isinstance(v, Literal) else name(v) for v in eqn.invars]
        if _is_call_of_operations(eqn):
            body = body_of(eqn).jaxpr
            inner: dict[Var, _Name] = dict(zip(body.invars, operands, strict=True))
            _flatten(body, inner, nodes, (within, len(nodes)))
            for out, v in zip(eqn.outvars, body.outvars, strict=True):
                names[out] = inner[v]
        else:
            nodes.append(_Node(eqn, operands, name(eqn.outvars[0]) if eqn.outvars else None))


def _number(v: Literal) -> float:
    """A number of an operation, or NaN where no operation takes it."""
    return float(v.val) if jnp.ndim(v.val) == 0 and jnp.issubdtype(dtype_of(v), jnp.floating) else math.nan


def _is_call_of_operations(eqn: JaxprEqn) -> bool:
    if not is_call(eqn):
        return False
    body = body_of(eqn)
    own = all(isinstance(v, Var) and v not in body.jaxpr.invars for v in body.jaxpr.outvars)
    numbers = all(isinstance(v, Var) or shape_of(v) == () for v in eqn.invars)
    return own and numbers and not body.consts and all(map(is_operation, body.jaxpr.eqns))


def is_operation(eqn: JaxprEqn) -> bool:
    """Whether a kernel may compute an equation: one result and operands in floats, of known sizes."""
    if _is_call_of_operations(eqn):
        return True
    if eqn.primitive not in (*ELEMENTWISE, *REDUCTIONS, *_KEEPING):
        return False
    every = [*eqn.invars, *eqn.outvars]
    sized = all(isinstance(n, int) and (n == 1 or isinstance(v, Var)) for v in every for n in shape_of(v))
    return sized and all(dtype_of(v) in _FLOATS for v in every)


class _Graph:
    """Who makes and who uses each value.

    Attributes:
      nodes: equations, in order.
      variables: the variable of the jaxpr itself for each name that has one.
      maker: the place of the node that makes a value.
      users: the places of the nodes that use it; -1 is the jaxpr's result.
    """

    def __init__(self, nodes: list[_Node], variables: dict[_Name, Var], results: Sequence[_Name]):
        self.nodes, self.variables = nodes, variables
        self.maker = {node.result: i for i, node in enumerate(nodes) if is_operation(node.eqn)}
        self.users: dict[_Name, list[int]] = {name: [-1] for name in results}
        for i, node in enumerate(nodes):
            for name in node.operands:
                self.users.setdefault(name, []).append(i)

    def made(self, root: _Name, like: Var) -> Made | None:
        """How a function of rows makes a value; None if none does, or if not only products of rows use it."""
        shape = shape_of(like)
        if not all(isinstance(n, int) for n in shape) or dtype_of(like) not in _FLOATS:
            return None
        k, m = shape[-1], math.prod(shape[:-1])
        alone = all(i >= 0 and _multiplies_rows(self.nodes[i].eqn) for i in self.users[root])
        if m < _FEWEST or k < 2 or root not in self.maker or not alone:
            return None
        forms: dict[_Name, Form] = {root: "rows"}
        chosen: dict[int, _Node] = {}
        steps = 0
        inputs: list[_Name] = []
        queue = [-self.maker[root]]  # the last first: all users of a value have been looked at before it
        while queue:
            place = -heapq.heappop(queue)
            node = self.nodes[place]
            needed = _needed(node.eqn, forms[node.result], m, k)
            if needed is None or (node.result != root and not all(i in chosen for i in self.users[node.result])):
                inputs.append(node.result)
                continue
            chosen[place] = node
            steps += node.eqn.primitive not in _KEEPING
            if steps > _STEPS:
                return None
            for name, form in zip(node.operands, needed, strict=True):
                if isinstance(name, float):
                    continue
                if name not in forms and name in self.maker:
                    heapq.heappush(queue, -self.maker[name])
                elif name not in forms:
                    inputs.append(name)
                if forms.setdefault(name, form) != form:
                    return None
        return self._function(list(chosen.values())[::-1], inputs, forms)

    def _function(self, chosen: list[_Node], inputs: list[_Name], forms: dict[_Name, Form]) -> Made | None:
        """The function that these nodes are."""
        places: dict[_Name, int | str] = {name: i for i, name in enumerate(inputs)}
        steps: list[Step] = []
        for node in chosen:
            operands = tuple(name.hex() if isinstance(name, float) else places[name] for name in node.operands)
            if node.eqn.primitive in _KEEPING:
                places[node.result] = operands[0]
                continue
            places[node.result] = len(inputs) + len(steps)
            steps.append(Step(node.eqn.primitive, operands, node.eqn.params.get("y")))
        variables = [self.variables.get(name, name) for name in inputs]
        own = all(isinstance(v, Var) for v in variables)
        whole = sum(forms[name] == "rows" for name in inputs)
        if not own or not steps or not 1 <= whole <= _MOST:
            return None
        found = tuple(v for v in variables if isinstance(v, Var))
        return Made(RowFunction(tuple(forms[name] for name in inputs), tuple(steps)), found)


def _needed(eqn: JaxprEqn, form: Form, m: int, k: int) -> list[Form] | None:
    """The forms that operands must have for a result of this form; None if no row function can compute it."""
    shape, result = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    every: list[Form | None]
    if eqn.primitive in ELEMENTWISE:  # which repeat axes of size 1
        shapes = map(shape_of, eqn.invars)
        every = [_repeated(shape, range(len(shape)), result, form, m, k) for shape in shapes]
    elif eqn.primitive in REDUCTIONS:
        along = tuple(eqn.params["axes"]) == (len(shape) - 1,)
        every = ["rows" if form == "row" and along and shape[-1] == k else None]
    elif eqn.primitive is primitives.broadcast_in_dim_p:
        every = [_repeated(shape, eqn.params["broadcast_dimensions"], result, form, m, k)]
    else:
        every = [None if form == "rows" and shape[-1:] != (k,) else form]
    found: list[Form] = [form for form in every if form is not None]
    return found if len(found) == len(every) else None


def _repeated(
    shape: tuple[int, ...], axes: Sequence[int], result: tuple[int, ...], form: Form, m: int, k: int
) -> Form | None:
    """The form of an array that is repeated along axes to a result of a form."""
    size, to = math.prod(shape), [axis for n, axis in zip(shape, axes, strict=True) if n > 1]
    if size == 1:
        return "scalar"
    if form != "rows":
        return form if size == math.prod(result) else None
    last = len(result) - 1
    if to == [last]:
        return "column"
    if last not in to:
        return "row" if size == m else None
    return "rows" if size == m * k else None

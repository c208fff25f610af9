"""`biases`: the parameter that is added to the product with a planned weight, by a function's trace.

Each value (`jaxquant.transform.analysis.walk`) is a parameter, or the product of an input with a planned weight, seen
through reshapes and casts; or unknown.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

from jax.extend.core import JaxprEqn, Primitive
from jax.extend.core import primitives as p
from jax.typing import ArrayLike

from jaxquant.core.paths import Params
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.transform.analysis.equations import traced_for
from jaxquant.transform.analysis.walk import Rule, Walk
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.primitives import shape_of

__all__ = ["biases"]


def biases(fn: Callable[..., PyTree], plan: Plan, params: Params, *args: PyTree, **kwargs: PyTree) -> dict[str, str]:
    """Which parameter is added to the product with each planned weight, and to nothing else.

    Found from the trace: the result of a weight's product, reshaped or cast, plus a parameter, reshaped, repeated or
    cast, that has one number for each output and no other use.

    Args:
      fn: a function of params; traced, never run.
      plan: its plan.
      params: its parameters: arrays or shapes.
      *args, **kwargs: its further arguments.

    Returns:
      Path of the weight -> path of its bias, for the weights that have one.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn, params = lambda p, x: x @ p["w"] + p["b"], {"w": jnp.ones((4, 3)), "b": jnp.zeros((1, 3))}
      >>> plan = jq.make_plan(fn, params, jnp.ones((2, 4)), rules=[jq.Rule("w", recipes.w8a16())])
      >>> jq.invariances.biases(fn, plan, params, jnp.ones((2, 4)))
      {'w': 'b'}
    """
    traced = traced_for("biases", fn, plan, params, args, kwargs)
    known = [is_float(leaf) and not isinstance(leaf, QTensor) for leaf in traced.params.values()]
    inputs = [_Seen(path) if k else None for path, k in zip(traced.params, known, strict=True)]
    found = _Additions(plan)
    for value in found.run(traced.jaxpr, [*inputs, *[None] * len(traced.arrays)]):
        found.count(value)
    out = {}
    for item in plan.items:
        added = found.added.get(item.path, set())
        if len(added) == 1 and found.uses[item.path] == 1:
            (path,) = added
            if found.uses[path] == 1 and math.prod(traced.params[path].shape) == math.prod(item.shape) // item.channels:
                out[item.path] = path
    return out


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A parameter, seen through views: nothing but reshapes, casts and repetitions of it.

    Attributes:
      path: which.
    """

    path: str


class _Outputs(_Seen):
    """The product of an input with a planned weight, its outputs on the last axes; seen through views."""


_Value = _Seen | None


class _Additions(Walk[_Value]):
    """The parameters that are added to products.

    Attributes:
      added: path of a weight -> paths of the parameters that are added to its product.
      uses: how often each parameter is used.
    """

    def __init__(self, plan: Plan):
        self.plan, self.rules = plan, _rules()
        self.added: dict[str, set[str]] = {}
        self.uses: dict[str, int] = {}

    def count(self, *values: _Value) -> None:
        """Counts a use of each parameter among the values, in an operation with an unknown result."""
        for value in values:
            if type(value) is _Seen:
                self.uses[value.path] = self.uses.get(value.path, 0) + 1

    def constant(self, x: ArrayLike) -> _Value:
        return None

    def other(self, eqn: JaxprEqn, values: list[_Value]) -> list[_Value]:
        self.count(*values)
        return [None] * len(eqn.outvars)

    def carried(self, value: _Value) -> _Value:
        self.count(value)

    def layer(self, value: _Value) -> _Value:
        return None if value is None else dataclasses.replace(value)

    def again(self, before: _Value, after: _Value) -> _Value:
        self.count(after)

    def stacked(self, value: _Value, length: int) -> _Value:
        self.count(value)

    def either(self, index: _Value, results: list[_Value]) -> _Value:
        self.count(index, *results)

    def view(self, eqn: JaxprEqn, values: list[_Value]) -> list[_Value]:
        """The same numbers in another shape."""
        return values if values[0] is not None and self._kept(eqn, values[0]) else self.other(eqn, values)

    def _kept(self, eqn: JaxprEqn, value: _Seen) -> bool:
        """Whether a view keeps what is known: the outputs, and what is added to them, must stay on the last axes."""
        shape, weight = shape_of(eqn.outvars[0]), type(value) is _Seen and value.path in self.plan
        if eqn.primitive is p.transpose_p:
            return weight and len(shape) == 2
        if weight:
            return True
        before = shape_of(eqn.invars[0])
        if eqn.primitive is p.broadcast_in_dim_p:
            long = [i for i, n in zip(eqn.params["broadcast_dimensions"], before, strict=True) if n > 1]
            if long != list(range(len(shape) - len(long), len(shape))):
                return False
        size = math.prod(before)
        if isinstance(value, _Outputs):
            item = self.plan[value.path]
            size = math.prod(item.shape[item.stacked :]) // item.channels
        return size in [math.prod(shape[i:]) for i in range(len(shape))] and (shape[-1] != 1 or size == 1)

    def dot(self, eqn: JaxprEqn, values: list[_Value]) -> list[_Value]:
        """A product whose outputs are the last axes: with a planned weight on the right, and no batch axes."""
        left, right = values
        self.count(left, right)
        if left is not None or type(right) is not _Seen or right.path not in self.plan:
            return [None]
        return [None if eqn.params["dimension_numbers"][1][1] else _Outputs(right.path)]

    def add(self, eqn: JaxprEqn, values: list[_Value]) -> list[_Value]:
        """A product, plus a parameter."""
        for outputs, bias in (values, values[::-1]):
            if isinstance(outputs, _Outputs) and type(bias) is _Seen:
                self.added.setdefault(outputs.path, set()).add(bias.path)
        return self.other(eqn, values)


@functools.cache
def _rules() -> dict[Primitive | None, Rule[_Value]]:
    views = (p.reshape_p, p.squeeze_p, p.broadcast_in_dim_p, p.convert_element_type_p, p.copy_p, p.transpose_p)
    return {
        **dict.fromkeys(views, _Additions.view),
        p.dot_general_p: _Additions.dot,
        **dict.fromkeys((p.add_p, p.add_jaxvals_p), _Additions.add),
    }

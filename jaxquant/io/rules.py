"""Which float tensors of a checkpoint get which rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp

from jaxquant.core.errors import QuantError
from jaxquant.core.specs import Rule
from jaxquant.io.safetensors import TensorSpec
from jaxquant.transform.paths import nearest

__all__ = ["assign"]


def assign(
    tensors: Mapping[str, TensorSpec], rules: Sequence[Rule], error: Callable[..., QuantError]
) -> dict[str, Rule]:
    """The rule of each weight that one quantizes: the first that matches its name.

    A weight is a tensor of floats of 16 bits or more: a matrix whose name ends in "weight", or anything that a rule
    gives ``reduce_axes`` for. A rule that keeps tensors in float may name any of them.

    Raises:
      QuantError: made by ``error``, with all rules that match nothing.
    """
    floats = {
        name: spec.shape
        for name, spec in tensors.items()
        if jnp.issubdtype(spec.dtype, jnp.floating) and spec.dtype.itemsize > 1
    }
    assigned: dict[str, Rule] = {}
    used: set[int] = set()
    for name, shape in floats.items():
        for i, rule in enumerate(rules):
            if not rule.matches(name):
                continue
            if rule.spec is not None and rule.reduce_axes is None and not (len(shape) == 2 and name.endswith("weight")):
                continue  # biases and norms stay in float
            used.add(i)
            if rule.spec is not None and rule.spec.weight is not None:
                assigned[name] = rule
            break
    idle = tuple(rule.pattern for i, rule in enumerate(rules) if i not in used)
    if idle:
        todo = f"Nearest weights: {nearest(idle[0], floats)}"
        raise error("a rule matches no weight", todo=todo, pattern=idle[0] if len(idle) == 1 else idle)
    return assigned

"""`wrap`: any Linen model in low precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params
from jaxquant.core.types import PyTree, State
from jaxquant.rules import OpRule, Rule
from jaxquant.transform.make_plan import check_all_rules, make_plan
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import quantized

__all__ = ["Wrapped", "wrap"]


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A Linen model in low precision; made by `wrap`.

    Attributes:
      model: the model itself, unchanged.
      rules: which of its parameters are quantized, and how.
      state: static activation ranges, from `jaxquant.act_state`.
    """

    model: nn.Module
    rules: tuple[Rule | OpRule, ...]
    state: State | None = None

    def init(self, rngs: PyTree, *args: PyTree, **kwargs: Any) -> Params:
        """The model's own ``init``: its tree and its values."""
        return self.model.init(rngs, *args, **kwargs)

    def plan(self, variables: Params, *args: PyTree, **kwargs: Any) -> Plan:
        """The plan of ``apply`` with these arguments (arrays or shapes); see `jaxquant.make_plan`."""
        return make_plan(self.model.apply, variables, *args, rules=self.rules, **kwargs)

    def apply(self, variables: Params, *args: PyTree, **kwargs: Any) -> PyTree:
        """The model's own ``apply`` in low precision: float weights train, QTensors run."""
        plan = self.plan(variables, *args, **kwargs)
        return quantized(self.model.apply, plan, self.state)(variables, *args, **kwargs)


def wrap(model: nn.Module, rules: Sequence[Rule | OpRule], *, state: State | None = None) -> Wrapped:
    """Any Linen model in low precision: its own code, transformed by `jaxquant.quantized` at each ``apply``.

    Products are found in the trace, so raw ``x @ w``, einsum, tied embeddings and scanned stacks count as well as
    ``nn.Dense``. Use ``apply`` inside `jax.jit`: otherwise each call traces the model again.

    Args:
      model: a Linen module; it is not changed.
      rules: searched in the paths of the variables, such as ``"params/encoder/Dense_0/kernel"``; see
        `jaxquant.make_plan`.
      state: static activation ranges, where rules have static specs.

    Returns:
      A `Wrapped` with ``init``, ``apply`` and ``plan``.

    Raises:
      QuantError: if rules are no rules; ``plan`` and ``apply`` as `jaxquant.make_plan` and `jaxquant.quantized`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> qmodel = jq.linen.wrap(nn.Dense(3), [jq.Rule("kernel", recipes.w8a8())])
      >>> x = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
      >>> variables = qmodel.init(jax.random.key(0), x)
      >>> frozen = jq.quantize_params(variables, qmodel.plan(variables, x))
      >>> bool(jnp.allclose(qmodel.apply(variables, x), qmodel.apply(frozen, x)))
      True
    """
    if not isinstance(model, nn.Module):
        todo = "For NNX use jq.nnx.wrap, for other functions jq.quantized"
        raise quant_error("wrap", "the model must be a Linen module", todo=todo, model=type(model).__name__)
    return Wrapped(model, check_all_rules("wrap", rules), state)

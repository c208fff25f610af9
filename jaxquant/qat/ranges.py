"""Static ranges of activations, updated in training: each step returns its statistics of activations beside its result.

    ranges = jq.calibrate(fn, plan, params, [first])                      # initial ranges
    ...                                                                   # in the step, differentiated in params:
    y, seen = qat.observed(fn, plan, jq.act_state(plan, ranges))(params, x)
    ranges = qat.update_ranges(plan, ranges, seen, frozen=step >= 1000)   # constant from step 1000 on

With ``calibration=observers.EMA(.99)`` in the activation's spec they are moving averages. There is no hidden state:
ranges are a plain pytree, which the training loop carries, saves and shards.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.types import PyTree, State, Stats
from jaxquant.transform.calibrate import merge_stats
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import quantized_and_seen

__all__ = ["observed", "update_ranges"]


def observed(
    fn: Callable[..., PyTree], plan: Plan, state: State | None = None
) -> Callable[..., tuple[PyTree, dict[str, PyTree]]]:
    """`quantized`, with the observed range of each activation: ``fn'(params, ...) = (result, seen)``.

    Args:
      fn: the function that was planned.
      plan: from `make_plan`; each activation's ``calibration`` observes it before it is quantized.
      state: as for `quantized`.

    Returns:
      A function ``(params, *args, **kwargs)`` that returns the results of ``fn``, and path -> ``{"range": ..}``, the
      observers' states from this call in the form of `calibrate`. No gradient flows through these states.

    Raises:
      QuantError: when called, as `quantized`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import observers, qat
      >>> act = jq.QuantSpec("int8", granularity=jq.PerTensor(), static=True, calibration=observers.EMA(0.5))
      >>> fn, params, x = lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, jnp.ones((2, 4))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.OpSpec(None, act))])
      >>> ranges = jq.calibrate(fn, plan, params, [x], collect={})
      >>> y, seen = jax.jit(qat.observed(fn, plan, jq.act_state(plan, ranges)))(params, 3 * x)
      >>> ranges = qat.update_ranges(plan, ranges, seen)
      >>> print(round(127 * float(jq.act_state(plan, ranges)["w"]["scale"]), 3))  # (1 + 2 * 3) / 3
      2.333
    """
    if not isinstance(plan, Plan):
        raise quant_error("observed", "plan must be a Plan", todo="Pass what make_plan returned", plan=plan)
    return quantized_and_seen(fn, plan, state)


def update_ranges(plan: Plan, ranges: Stats, seen: Stats, *, frozen: bool | jax.Array = False) -> dict[str, PyTree]:
    """The ranges updated by the statistics of a step, or unchanged once they are frozen.

    Args:
      plan: the plan that was observed.
      ranges: path -> ``{"range": ..}``, from `calibrate` with ``collect={}`` or of the step before.
      seen: from `observed`.
      frozen: whether to leave them unchanged: a bool, or a traced one such as ``step >= 1000``.

    Returns:
      The new ranges, of the same structure; `jaxquant.act_state` turns them into a state.

    Raises:
      QuantError: if either holds other statistics than the plan's ranges.
    """
    merged = merge_stats(plan, [ranges, seen], collect={})
    return jax.tree.map(lambda old, new: jnp.where(frozen, old, new), ranges, {path: merged[path] for path in ranges})

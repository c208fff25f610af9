"""Ways to compare a function with its quantized self, shared by the tests of the transformation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import recipes

SPECS = {
    "int8": recipes.w8a16(),
    "int4": recipes.w4a16(8),
    "w8a8": recipes.w8a8(),
    "static": recipes.w8a8(static=True),
}
EVERYTHING = functools.partial(jq.Rule, ".*")


def unequal(shape: tuple[int, ...], seed: int = 0, size: float = 1.0) -> jax.Array:
    """Normal values with a magnitude of its own for every index of every axis, so that a wrong axis shows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * size
    for axis, n in enumerate(shape):
        spread = 2.0 ** rng.uniform(-1, 1, n)
        x = x * spread.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jax.device_put(np.asarray(x, np.float32))


def randomized(tree: Any, seed: int = 0) -> Any:
    """The tree with unequal values of moderate size in its float leaves; statistics stay positive."""
    leaves, structure = jax.tree.flatten(tree)
    new = [
        unequal(x.shape, seed + i, 0.5 / max(1, np.prod(x.shape[:-1])) ** 0.5)
        if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 1
        else x
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, new)


def close(actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
    """All leaves agree to ``tolerance``, relative to the largest magnitude of the expected leaf.

    ``floor``: or to this part of the largest of all leaves. The gradient of a key's bias, say, is 0 but for rounding.
    """
    largest = max((float(np.max(np.abs(e), initial=0)) for e in jax.tree.leaves(expected)), default=0.0)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(
            a, e, rtol=0, atol=tolerance * max(np.max(np.abs(e), initial=0), floor * largest, 1e-30)
        )


def planned(fn: Callable[..., Any], params: Any, *args: Any, spec: str = "int8", rules: Any = None, **kwargs: Any):
    """The plan, the quantized params and the state (None unless ranges are static)."""
    plan = jq.make_plan(fn, params, *args, rules=rules or [EVERYTHING(SPECS[spec])], **kwargs)
    state = None
    if any(item.spec.act is not None and item.spec.act.static for item in plan.items):
        bound = functools.partial(fn, **kwargs) if kwargs else fn
        state = jq.act_state(plan, jq.calibrate(bound, plan, params, [args]))
    return plan, jq.quantize_params(params, plan), state


def check(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    spec: str = "int8",
    expect: dict[str, tuple[int, ...]] | None = None,
    rules: Any = None,
    tolerance: float = 1e-4,
    grad: bool = True,
    **kwargs: Any,
) -> jq.Plan:
    """Quantized leaves, float leaves and the float function on dequantized leaves agree; so do gradients.

    Args:
      fn, params, args, kwargs: the function and what it is called with.
      spec: one of `SPECS`, for all parameters, unless ``rules`` are given.
      expect: path -> reduce_axes of everything that must be quantized, and nothing else.
      rules: of the plan.
      tolerance: of weight-only results.
      grad: whether to compare gradients, which must be those of the float function at the dequantized weights.
    """
    plan, qparams, state = planned(fn, params, *args, spec=spec, rules=rules, **kwargs)
    if expect is not None:
        assert {item.path: item.reduce_axes for item in plan.items} == expect, str(plan)
    real = functools.partial(fn, **kwargs)
    run = functools.partial(jq.quantized(fn, plan, state, precision="highest"), **kwargs)
    weight_only = all(item.spec.act is None for item in plan.items)

    @jax.jit
    def everything(params: Any, qparams: Any) -> Any:
        got, same, frozen = run(qparams, *args), run(params, *args), jq.dequantize_params(qparams)
        if not weight_only:
            return got, same, None, None, None
        gradients = (_gradient(run, params, args, got), _gradient(real, frozen, args, got)) if grad else (None, None)
        return got, same, real(frozen, *args), *gradients

    got, same, expected, slope, expected_slope = everything(params, qparams)
    close(same, got, 1e-5)
    if weight_only:
        close(got, expected, tolerance)
        close(slope, expected_slope, 10 * tolerance, floor=0.01)
    return plan


def _gradient(fn: Callable[..., Any], params: Any, args: Any, like: Any) -> Any:
    """The gradient of a sum of the results with unequal weights."""
    weights = [unequal(y.shape, i) for i, y in enumerate(jax.tree.leaves(like))]

    def loss(p: Any) -> jax.Array:
        total: Any = sum(jnp.sum(c * y) for c, y in zip(weights, jax.tree.leaves(fn(p, *args)), strict=True))
        return total

    return jax.grad(loss, allow_int=True)(params)

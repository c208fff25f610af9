"""Five frameworks, four models, five ways to quantize: the same call serves them all.

The fast run takes one cell of each framework, each model and each way; ``--slow`` takes all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax_settings import optax_promotes
from transform_cases import SPECS, check, close
from transform_models import KEEP, MODELS, WEIGHTS

import jaxquant as jq
from jaxquant import OpSpec, recipes

pytestmark = pytest.mark.every

WAYS = [*SPECS, "qat"]
FAST = {
    ("plain", "transformer", "int4"),
    ("linen", "cnn", "w8a8"),
    ("nnx", "mlp", "qat"),
    ("haiku", "mlp", "static"),
    ("equinox", "moe", "int8"),
}
CELLS = [
    pytest.param(
        *model,
        way,
        marks=[optax_promotes] * (way == "qat") + [pytest.mark.slow] * ((*model, way) not in FAST),
    )
    for model in MODELS
    for way in WAYS
]


def rules(framework, model, spec):
    if (framework, model) == ("equinox", "cnn") and spec.weight.group_size:
        # Its kernels are [out, in, 3, 3], and groups end on the boundary of an axis.
        by_nine = OpSpec(dataclasses.replace(spec.weight, granularity=jq.PerGroup(9)), spec.act)
        return [jq.Rule("head", spec), jq.Rule(".*", by_nine)]
    return [*KEEP[model], jq.Rule(".*", spec)]


@pytest.mark.parametrize("framework, model, way", CELLS)
def test_cell(framework, model, way):
    fn, params, x = MODELS[framework, model]()
    if way == "qat":
        trains(fn, params, x, rules(framework, model, recipes.w4a8(8)))
    else:
        plan = check(fn, params, x, rules=rules(framework, model, SPECS[way]))
        assert len(plan) == WEIGHTS[model], str(plan)


def trains(fn, params, x, rules):
    """Float params take Adam steps through the quantized function, towards what params twice as large compute."""
    plan = jq.make_plan(fn, params, x, rules=rules)
    apply, tx = jq.quantized(fn, plan), optax.adam(2e-3)
    target = fn(jax.tree.map(lambda p: 2 * p, params), x)
    scale = jnp.mean((fn(params, x) - target) ** 2)
    loss = lambda p: jnp.mean((apply(p, x) - target) ** 2) / scale  # noqa: E731

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p, state):
        value, slope = jax.value_and_grad(loss)(p)
        updates, state = tx.update(slope, state, p)
        return optax.apply_updates(p, updates), state, value

    p, losses = jax.tree.map(jnp.copy, params), []
    state = tx.init(p)
    for _ in range(12):
        p, state, value = step(p, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0], losses
    run = jax.jit(apply)
    close(run(p, x), run(jq.quantize_params(p, plan), x), 1e-5)

"""`update_params`: arithmetic on the values of quantized weights, against NumPy on what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from narrowed import untyped

import jaxquant as jq
from jaxquant import QuantError, recipes

RNG = np.random.default_rng(0)
FLOAT = {"w": jnp.asarray(RNG.normal(size=(32, 8)) * np.exp2(np.arange(8) / 2), jnp.float32), "b": jnp.ones(8)}
X = jax.device_put(np.asarray(RNG.normal(size=(2, 32)), jnp.float32))
SPECS = {"int8": recipes.w8a8(), "int4": recipes.w4a16(16), "nf4": recipes.nf4(16), "fp8": recipes.fp8()}


def model(p, x):
    return x @ p["w"] + p["b"][None]


def prepared(name):
    plan = jq.make_plan(model, FLOAT, X, rules=[jq.Rule("w", SPECS[name])])
    return plan, jq.quantize_params(FLOAT, plan)


def largest(x):
    """Of each group of 16 rows (or 32: the largest of two groups is the larger bound)."""
    return np.repeat(np.abs(x).reshape(-1, 16, 8).max(1), 16, axis=0).max(0)


STEP = {"int8": 1 / 127, "int4": 1 / 7, "nf4": 0.31, "fp8": 32 / 448}


@pytest.mark.every
@pytest.mark.parametrize("name", SPECS)
def test_averages_and_steps(name):
    plan, q = prepared(name)
    old, new = np.asarray(q["w"].dequantize()), RNG.normal(size=(32, 8)).astype(np.float32)
    other = {"w": jnp.asarray(new), "b": 3 * jnp.ones(8)}
    for fn, want, bias in (
        (optax.apply_updates, old + new, 4),
        (lambda a, b: optax.incremental_update(b, a, 0.25), 0.75 * old + 0.25 * new, 1.5),
    ):
        for run in (jq.qat.update_params, jax.jit(jq.qat.update_params, static_argnums=(0, 1))):
            got = run(fn, plan, q, other)
            assert isinstance(got["w"], jq.QTensor)
            off = np.abs(np.asarray(got["w"].dequantize()) - want)
            assert np.all(off <= largest(want) * STEP[name] * 0.51)
            np.testing.assert_allclose(got["b"], bias)
    twice = jq.qat.update_params(lambda a, b: jax.tree.map(jnp.add, a, b), plan, q, q)
    np.testing.assert_allclose(twice["w"].dequantize(), 2 * old, rtol=1e-5, atol=largest(old).max() * STEP[name] / 2)
    np.testing.assert_array_equal(q["w"].dequantize(), old)


def test_what_stands_for_no_values():
    plan, q = prepared("int8")
    gradients = jax.grad(lambda p: jq.quantized(model, plan)(p, X).sum(), allow_int=True)(q)
    halves = jax.tree.map(lambda a: a.astype(jnp.float32) * 0.5, q)
    nothing = {"w": jax.tree.map(lambda a: None, q["w"]), "b": jnp.ones(8)}
    for tree in (gradients, halves, nothing):
        with pytest.raises(QuantError, match=r"update_params at w: the leaves of this QTensor are no codes and scales"):
            jq.qat.update_params(optax.apply_updates, plan, q, tree)
    with pytest.raises(QuantError, match="the plan does not quantize this QTensor"):
        jq.qat.update_params(lambda p: p, plan, {**q, "b": q["w"]})
    with pytest.raises(QuantError, match="plan must be a Plan"):
        untyped.qat.update_params(lambda p: p, [jq.Rule("w", SPECS["int8"])], q)

"""Biases, found from the trace, that keep the mean of the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec

RNG = np.random.default_rng(0)
COLLECT = {"mean": jq.calibration.ChannelMean()}


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = draw(32, 6) + 3 * draw(1, 6)


def plan_of(fn, params, rules="w"):
    return jq.make_plan(fn, params, X, rules=[jq.Rule(rules, OpSpec(QuantSpec("int2")))])


def test_the_mean_is_kept():
    params = {"w": draw(5, 6), "b": draw(5)}

    @jax.jit
    def fn(p, x):
        y = x @ p["w"].T
        return jnp.reshape(y, (4, 8, 5)) + p["b"].reshape(1, 1, 5)

    plan = plan_of(fn, params)
    found = jq.invariances.biases(fn, plan, params, X)
    assert found == {"w": "b"}
    qparams = jq.quantize_params(params, plan)
    corrected = jq.invariances.correct_bias(
        params, qparams, plan, found, jq.calibrate(fn, plan, params, [X], collect=COLLECT)
    )
    mean = lambda p: np.asarray(fn(jq.dequantize_params(p), X)).mean((0, 1))  # noqa: E731
    assert np.abs(mean(qparams) - mean(params)).max() > 0.1
    np.testing.assert_allclose(mean(corrected), mean(params), atol=1e-4)
    assert corrected["w"] is qparams["w"]


def test_layers_of_a_stack():
    params = {"w": draw(2, 6, 6), "b": draw(2, 1, 6)}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w["w"] + w["b"], None), x, p)[0]

    plan = plan_of(fn, params)
    found = jq.invariances.biases(fn, plan, params, X)
    assert found == {"w": "b"}
    qparams = jq.quantize_params(params, plan)
    stats = jq.calibrate(fn, plan, params, [X], collect=COLLECT)
    corrected = jq.invariances.correct_bias(params, qparams, plan, found, stats)
    mean = X.mean(0) @ (params["w"][0] - np.asarray(qparams["w"].dequantize()[0]))
    np.testing.assert_allclose(corrected["b"][0, 0] - params["b"][0, 0], mean, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: x @ p["w"],
        lambda p, x: x @ p["w"] + p["b"] + jnp.sum(p["b"]),  # used twice
        lambda p, x: jax.nn.relu(x @ p["w"]) + p["b"],
        lambda p, x: x @ p["w"] + x @ p["w"] + p["b"],
        lambda p, x: (x @ p["w"] + p["b"], p["b"]),
        lambda p, x: x @ p["w"] + jax.lax.cond(x[0, 0] > 0, lambda: p["b"], lambda: 2 * p["b"]),
        lambda p, x: x @ p["w"] + p["one"],  # one number for all outputs
        lambda p, x: x[:6] @ p["w"] + p["b"].T,  # along the rows, which are as many
        lambda p, x: (x[:6] @ p["w"]).T + p["b"],
    ],
)
def test_what_is_no_bias(fn):
    params = {"w": draw(6, 6), "b": draw(1, 6), "one": draw(1, 1)}
    assert jq.invariances.biases(fn, plan_of(fn, params), params, X) == {}


def test_without_means():
    params = {"w": draw(6, 5), "b": draw(1, 5)}
    fn = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    plan = plan_of(fn, params)
    with pytest.raises(jq.QuantError, match="correct_bias at w: there is no mean of the inputs"):
        jq.invariances.correct_bias(params, params, plan, {"w": "b"}, {})

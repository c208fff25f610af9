"""A model in training and its frozen self: one order of the arithmetic, so that they agree to the last bit on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_cases import unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, qat

X = unequal((5, 64), 3, 0.5)
PARAMS = {"a": unequal((64, 32), 1, 0.3), "b": unequal((32, 10), 2, 0.3)}
A8 = QuantSpec("int8")


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def grouped(qtype, **kwargs):
    return QuantSpec(qtype, granularity="per_group", group_size=16, **kwargs)


SCHEMES = {
    "w4 in groups, a8": OpSpec(grouped("int4"), A8),
    "w4, a8": OpSpec(QuantSpec("int4"), A8),
    "w2 asymmetric in groups, a4": OpSpec(grouped("uint2", symmetric=False), QuantSpec("uint4", symmetric=False)),
    "w3 in groups": OpSpec(grouped("int3")),
    "w8, a8 in groups": OpSpec(QuantSpec("int8"), grouped("int8")),
    "two levels": OpSpec(grouped("int4", two_level=True), A8),
    "fp8": OpSpec(QuantSpec("float8_e4m3fn"), QuantSpec("float8_e4m3fn")),
    "nf4": OpSpec(grouped("nf4")),
    "w2 without 0, a8": OpSpec(grouped("quaternary"), A8),
}


@pytest.mark.parametrize("rows", [5, 1])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_frozen_model_is_the_trained_one_to_the_last_bit(scheme, rows):
    plan = jq.make_plan(mlp, PARAMS, X[:rows], rules=[Rule(".*", SCHEMES[scheme])])
    run = jax.jit(jq.quantized(mlp, plan))
    np.testing.assert_array_equal(run(jq.quantize_params(PARAMS, plan), X[:rows]), run(PARAMS, X[:rows]))


@pytest.mark.parametrize("scheme", ["w4 in groups, a8", "w4, a8"])
def test_with_learned_steps_too(scheme):
    spec = SCHEMES[scheme]
    assert spec.weight is not None
    quick = dataclasses.replace(spec.weight, calibration=jq.observers.AbsMax())  # it matters not where they start
    act = QuantSpec("int8", calibration=jq.observers.AbsMax())
    plan = jq.make_plan(mlp, PARAMS, X, rules=[Rule(".*", OpSpec(quick, act))])
    state = qat.learned_steps(mlp, plan, PARAMS, [X])
    run = jax.jit(lambda params, state: jq.quantized(mlp, plan, state)(params, X))
    state = jax.tree.map(lambda s: s * jnp.float32(0.9), state)
    np.testing.assert_array_equal(run(jq.quantize_params(PARAMS, plan, state=state), state), run(PARAMS, state))

"""Quantization in turns: the order is that of use, and each weight sees the errors of those before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan
from narrowed import present
from ptq_cases import inputs, weight

import jaxquant as jq
from jaxquant.ptq import descend, gptq, rtn

X = inputs(64, 16) / 20
PARAMS = {
    "c": weight(16, 64) / 8,
    "a": weight(16, 16, seed=2) / 8,
    "b": weight(16, 16, seed=3) / 8,
    "bias": jnp.ones(64),
}
SPEC = jq.OpSpec(jq.QuantSpec("int2", symmetric=False))


def fn(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"] + p["bias"][None]


PLAN = jq.make_plan(fn, PARAMS, X, rules=[jq.Rule("^[abc]$", SPEC)])


def test_each_weight_in_the_order_of_use():
    seen, last, told = [], [], []
    batches = iter([X, 2 * X])
    q = jq.calibration.quantize_sequentially(
        fn, PLAN, PARAMS, batches, on_stage=lambda p, s: (seen.append(s), last.append(p)),
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert seen == [("a",), ("b",), ("c",)]
    assert not isinstance(PARAMS["a"], jq.QTensor)
    params = dict(PARAMS)
    for name in "abc":  # the definition, by hand
        stats = jq.calibrate(fn, PLAN, params, [X, 2 * X], collect={"gram": jq.calibration.Gram()})
        one = gptq(PARAMS[name], present(SPEC.weight), reduce_axes=(-2,), stats=stats[name])
        np.testing.assert_array_equal(q[name].dequantize(), one.dequantize())
        params[name] = one.dequantize()
    assert last[-1] is q
    assert not isinstance(last[0]["b"], jq.QTensor)


def test_makes_up_for_errors_that_were_made_before():
    stats = jq.calibrate(fn, PLAN, PARAMS, [X], collect={"gram": jq.calibration.Gram()})
    apart = jq.quantize_params(PARAMS, PLAN, method=descend, stats=stats)
    turns = jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, [X], method=descend)
    np.testing.assert_array_equal(turns["a"].dequantize(), apart["a"].dequantize())
    y = jnp.tanh(jnp.tanh(X @ turns["a"].dequantize()) @ turns["b"].dequantize())  # what the last weight really sees
    error = lambda q: float(jnp.linalg.norm(y @ (PARAMS["c"] - q.dequantize())))  # noqa: E731
    assert error(turns["c"]) < error(apart["c"])


def test_stages_and_going_on():
    seen = []
    half = jq.calibration.quantize_sequentially(
        fn, PLAN, PARAMS, [X], stages=["[ab]", "c"], method=rtn, on_stage=lambda p, s: seen.append((s, p))
    )
    assert [s for s, _ in seen] == [("a", "b"), ("c",)]
    again = jq.calibration.quantize_sequentially(fn, PLAN, seen[0][1], [X], stages=["[ab]", "c"], method=rtn)
    jax.tree.map(np.testing.assert_array_equal, again, half)


@makes_nan
def test_refusals():
    with pytest.raises(jq.QuantError, match="quantize_sequentially: there are no batches"):
        jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, [])
    with pytest.raises(jq.QuantError, match="at c: a planned weight is in no stage"):
        jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, [X], stages=["[ab]"])
    with pytest.raises(jq.QuantError, match="a stage has no planned weight"):
        jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, [X], stages=["[abc]", "d"])
    with pytest.raises(jq.QuantError, match=r"inputs of planned weights hold NaN or inf: a \(batch 0\)"):
        jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, [X.at[0, 0].set(jnp.nan)])

"""Leaves that are not what their plan says; and leaves that no data is known of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import untyped
from transform_cases import close, unequal

import jaxquant as jq
from jaxquant import recipes

PARAMS = {"table": unequal((20, 32), 1), "kernel": unequal((32, 16), 2)}
IDS = jnp.arange(12)
INT8 = jq.QuantSpec("int8")


def fn(p, ids):
    return p["table"][ids] @ p["kernel"]


def plan_of(spec, pattern="kernel"):
    return jq.make_plan(fn, PARAMS, IDS, rules=[jq.Rule(pattern, spec)])


OTHERS = {
    "over the other axis": (recipes.w8a8(), INT8, (-1,)),
    "per tensor": (recipes.w8a16(), jq.QuantSpec("int8", granularity="per_tensor"), (-2,)),
    "per channel": (recipes.w4a16(16), jq.QuantSpec("int4"), (-2,)),
    "other groups": (recipes.w4a16(16), recipes.w4a16(8).weight, (-2,)),
    "another type": (recipes.w8a16(), jq.QuantSpec("int4"), (-2,)),
    "with zero points": (recipes.w8a16(), jq.QuantSpec("int8", symmetric=False), (-2,)),
    "groups over the other axis": (recipes.mxfp4(), jq.QuantSpec("mxfp4"), (-2,)),
}


@pytest.mark.every
@pytest.mark.parametrize("name", OTHERS)
def test_a_leaf_that_is_not_the_plans(name):
    """It raises wherever a plan is used, says what both are, and runs on its own scales without the plan."""
    planned, spec, axes = OTHERS[name]
    if name == "groups over the other axis":
        params, f, axes = {"kernel": unequal((32, 32), 3)}, lambda p, x: x @ p["kernel"], (-1,)
        plan, x = jq.make_plan(f, params, jnp.ones((2, 32)), rules=[jq.Rule("", planned)]), unequal((2, 32), 4)
    else:
        params, f, plan, x = PARAMS, fn, plan_of(planned), IDS
    leaf = jq.quantize(params["kernel"], spec, reduce_axes=axes)
    given = {**params, "kernel": leaf}
    for call in (
        lambda: jq.quantized(f, plan)(given, x),
        lambda: jax.jit(jq.quantized(f, plan))(given, x),
        lambda: jq.calibrate(f, plan, given, [x]),
    ):
        with pytest.raises(jq.QuantError, match=r"kernel is QTensor\(.*planned QuantSpec\(.*\. Make the plan"):
            call()
    got = jax.jit(jq.quantized(f, precision="highest"))(given, x)
    close(got, f({**params, "kernel": leaf.dequantize()}, x), 1e-5)


@pytest.mark.every
def test_leaves_that_are_the_plans():
    """However they were made: double quantized, permuted, stored in another order."""
    plan = plan_of(recipes.w4a16(16))
    leaf = jq.quantize_params(PARAMS, plan)["kernel"]
    for other in (leaf, leaf.store(()), jax.eval_shape(lambda: leaf)):
        jax.eval_shape(jq.quantized(fn, plan), {**PARAMS, "kernel": other}, IDS)


METHODS = [jq.ptq.gptq, jq.ptq.clipped, jq.ptq.descend, jq.ptq.autoround, functools.partial(jq.ptq.gptq, clip="gram")]


@pytest.mark.parametrize("method", METHODS, ids=["gptq", "clipped", "descend", "autoround", "configured"])
def test_a_lookup_has_no_inputs(method):
    """It is rounded to nearest, and the plan says so before."""
    plan = plan_of(recipes.w4a16(16), "kernel|table")
    assert "round it to nearest" in plan["table"].note
    assert "round it to nearest" not in plan["kernel"].note
    stats = jq.calibrate(fn, plan, PARAMS, [IDS], collect={"gram": jq.calibration.Gram()})
    q = jq.quantize_params(PARAMS, plan, method=method, stats=stats)
    group = np.asarray(PARAMS["table"]).reshape(20, 2, 16)
    step = np.maximum(group.max(-1, keepdims=True) / 7.5, -group.min(-1, keepdims=True) / 8.5)
    nearest = np.clip(np.rint(group / step), -8, 7) * step
    assert np.abs(np.asarray(q["table"].dequantize()).reshape(group.shape) - nearest).max() <= 1e-6
    assert np.any(
        np.asarray(q["kernel"].dequantize()) != np.asarray(jq.quantize_params(PARAMS, plan)["kernel"].dequantize())
    )


@pytest.mark.every
def test_missing_statistics_are_named():
    plan = plan_of(recipes.w4a16(16), "kernel|table")
    with pytest.raises(jq.QuantError, match=r"quantize_params at kernel: gptq: needs the Gram matrix"):
        jq.quantize_params(PARAMS, plan, method=jq.ptq.gptq)
    with pytest.raises(jq.QuantError, match=r"method must be a quantizer; got method=3"):
        untyped.quantize_params(PARAMS, plan, method=3)
    done = []

    def method(w, spec, *, reduce_axes, stats):
        done.append(w.shape)
        return (jq.ptq.gptq if w.shape == (32, 16) else jq.ptq.rtn)(w, spec, reduce_axes=reduce_axes, stats=stats)

    known = {"table": jnp.zeros(1)}
    with pytest.raises(jq.QuantError, match=r"at kernel: gptq: needs"):
        jq.quantize_params(PARAMS, plan, method=method, stats=known)
    assert done == [(32, 16)]  # before any work on those that have theirs

"""How often methods compile: once for each shape, not for each weight."""

import contextlib
import gc
import weakref
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import needs_jit
from transform_cases import unequal

import jaxquant as jq
from jaxquant import observers, ops, recipes
from jaxquant.core.arithmetic import sums
from jaxquant.transform import statistics

X = unequal((16, 8), 7, 0.5)
COLLECT = {"gram": statistics.Gram(), "mean": statistics.ChannelMean(), "absmax": statistics.ChannelAbsMax()}


@contextlib.contextmanager
def compilations():
    """A list that grows by one with each program that XLA compiles."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        if hasattr(jax.monitoring, "unregister_event_duration_listener"):
            jax.monitoring.unregister_event_duration_listener(listen)
        else:  # jax 0.6
            jax.monitoring.clear_event_listeners()


def chain(count, features):
    """A chain of weights of one shape, its plan and statistics."""

    def fn(p, x):
        x = x @ jnp.eye(8, features)
        for i in range(count):
            x = (jnp.tanh(x) * p[f"g{i}"][None]) @ p[f"w{i}"]
        return x

    params = {f"w{i}": unequal((features, features), i + 1, 0.3) for i in range(count)}
    params |= {f"g{i}": jnp.ones(features) for i in range(count)}
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule("w", recipes.w4a16(4))])
    return fn, params, plan, jq.calibrate(fn, plan, params, [X], collect=COLLECT)


def method(name):
    quantizer = getattr(jq.ptq, name)
    return lambda fn, params, plan, stats: jq.quantize_params(params, plan, method=quantizer, stats=stats)


WAYS = {
    "awq_bases": lambda fn, params, plan, stats: jq.invariances.awq_bases(params, plan, stats),
    "smooth_bases": lambda fn, params, plan, stats: jq.invariances.smooth_bases(params, plan, stats),
    "awq": lambda fn, params, plan, stats: jq.invariances.awq(
        params, plan, jq.invariances.scale_pairs(fn, plan, params, X), stats
    ),
    "smoothquant": lambda fn, params, plan, stats: jq.invariances.smoothquant(
        params, plan, jq.invariances.scale_pairs(fn, plan, params, X), stats
    ),
    "sequential": lambda fn, params, plan, stats: jq.calibration.quantize_sequentially(fn, plan, params, [X, X]),
    **{name: method(name) for name in ("rtn", "gptq", "clipped", "hqq", "autoround", "descend")},
}
SIZES = {name: 4 * (i + 3) for i, name in enumerate(WAYS)}  # a shape of its own, so that nothing is compiled before


@pytest.mark.parametrize("way", [w if w in ("awq_bases", "sequential") else pytest.param(w, marks=pytest.mark.slow)
                                 for w in WAYS])  # fmt: skip
@needs_jit
def test_four_weights_are_compiled_as_two_are(way):
    """A chain of four has no more programs than a chain of two, but for those of the function itself."""
    chains = [chain(count, SIZES[way]) for count in (2, 4)]
    counts = []
    for one in chains:
        with compilations() as found:
            jax.block_until_ready(jax.tree.leaves(WAYS[way](*one)))
        counts.append(len(found))
    assert counts[0] > 0
    # The pass over the function, and what adds up batches, is one program for each function.
    assert counts[1] <= (2 if way == "sequential" else 0), counts


@pytest.mark.parametrize("stages", [None, pytest.param(["w[01]", "w"], marks=pytest.mark.slow)])
def test_results_do_not_share(stages):
    """What shares its place is never collected at one time: as with a plan of each stage alone."""
    fn, params, plan, _ = chain(4, 8)
    got = jq.calibration.quantize_sequentially(fn, plan, params, [X, -2 * X], stages=stages)
    want: dict[str, Any] = dict(params)
    for names in [["w0", "w1"], ["w2", "w3"]] if stages else [[f"w{i}"] for i in range(4)]:
        part = jq.Plan(tuple(item for item in plan.items if item.path in names))
        floats = jq.dequantize_params(want)
        stats = jq.calibrate(fn, part, floats, [X, -2 * X], collect={"gram": statistics.Gram()})
        made = jq.quantize_params(floats, part, method=jq.ptq.gptq, stats=stats)
        want |= {name: made[name] for name in names}
    for path in plan:
        assert jnp.array_equal(got[path].codes, want[path].codes)


def ranges():
    """Of two activations, by a search in a loop."""
    act = jq.QuantSpec("int8", granularity="per_tensor", static=True, calibration=observers.Entropy())
    params = {"a": unequal((8, 8), 1), "b": unequal((8, 8), 2)}
    rules = [jq.Rule("", jq.OpSpec(jq.QuantSpec("int8"), act))]
    plan = jq.make_plan(lambda p, x: (x @ p["a"]) @ p["b"], params, X, rules=rules)
    return lambda: jq.act_state(plan, {path: {"range": act.observer.init((1,))} for path in plan})


def beside_outliers():
    w = unequal((8, 8), 1)
    return lambda: ops.dot_general(X, w, (((1,), (0,)), ((), ())), spec=recipes.llm_int8())


@pytest.mark.every
@pytest.mark.parametrize("made", [ranges, pytest.param(beside_outliers, marks=pytest.mark.slow),
                                  lambda: lambda: sums(X, X, axes=(0,))])  # fmt: skip
def test_a_second_call_outside_of_jit_compiles_nothing(made):
    """A loop or a choice by itself is a new program for JAX at each call: it must stand in one that is kept."""
    call = made()
    jax.block_until_ready(call())
    with compilations() as found:
        jax.block_until_ready(call())
    assert not found


@needs_jit
def test_calls_outside_of_jit_are_few_programs():
    """An operation of JAX by itself is a program; packing codes takes a dozen."""
    q = jq.quantize(unequal((12, 24), 1), jq.QuantSpec("int4", granularity=jq.PerGroup(8)), reduce_axes=(-1,))
    with compilations() as found:
        jax.block_until_ready(q.store((-2,)))
    assert len(found) <= 1
    rows = jax.device_put(np.asarray([3, -1, 2], np.int32))
    with compilations() as found:
        jax.block_until_ready(ops.take(q, rows, 0))
    assert len(found) <= 3


@needs_jit
def test_a_second_calibration_compiles_nothing():
    model = Scaled(2.0)
    params = {"w": unequal((8, 20), 1, 0.3)}
    plan = jq.make_plan(model.apply, params, X, rules=[jq.Rule("w", recipes.w8a8(static=True))])

    def count(fn, plan, params, batches, **more):
        with compilations() as found:
            jax.block_until_ready(jq.calibrate(fn, plan, params, batches, **more))
        return len(found)

    assert count(model.apply, plan, params, [X, X]) > 0
    twice = jq.Plan.from_json(plan.to_json())  # an equal one
    assert count(model.apply, twice, jax.tree.map(lambda w: 2 * w, params), [3 * X] * 3) == 0
    stats = jq.calibrate(model.apply, plan, params, [3 * X])
    reference = 2 * 3 * np.abs(np.asarray(X)).max(0)
    np.testing.assert_array_equal(stats["w"]["absmax"][0], reference)  # of these batches, not of those before
    assert count(model.apply, plan, params, [X[:3]]) > 0  # another shape
    assert count(model.apply, plan, params, [X], collect={}) > 0  # other statistics
    assert count(model.apply, plan, params, [X], collect={}) == 0
    other = jq.make_plan(model.apply, params, X, rules=[jq.Rule("w", recipes.w4a16(4))])
    assert count(model.apply, other, params, [X]) > 0  # another plan


@pytest.mark.usefixtures("quick_collections")
def test_a_calibration_does_not_keep_a_function_alive_and_is_not_of_another():
    params = {"w": unequal((8, 20), 1, 0.3)}
    found = []
    for gain in (2.0, 5.0):  # functions at one address, one after the other
        model = Scaled(gain)
        plan = jq.make_plan(model.apply, params, X, rules=[jq.Rule("w", recipes.w8a16())])
        stats = jq.calibrate(model.apply, plan, params, [X])
        found.append(np.asarray(stats["w"]["absmax"][0] / np.abs(np.asarray(X)).max(0)))
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
    np.testing.assert_allclose(np.stack(found), np.broadcast_to([[2.0], [5.0]], (2, 8)), rtol=1e-6)


class Scaled:
    def __init__(self, gain):
        self.gain = gain

    def apply(self, p, x):
        return (x * self.gain) @ p["w"]

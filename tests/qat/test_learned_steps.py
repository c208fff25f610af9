"""Learned steps: the published gradients, training under every transformation, and freezing without a change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax_settings import optax_promotes
from transform_cases import unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, qat

X = unequal((6, 16), 3, 0.5)
W = unequal((16, 5), 1, 0.4)
PARAMS = {"w": W}
WIDE = {"w": unequal((32, 5), 1, 0.4)}


def Q(qtype: str, **kwargs: Any) -> QuantSpec:
    """A spec whose range is quick to find: it matters where steps go, not where they start."""
    plain = kwargs.get("symmetric", True) and not qtype.startswith("u")
    return QuantSpec(qtype, calibration=jq.observers.AbsMax() if plain else jq.observers.MinMax(), **kwargs)


def product(p, x):
    return x @ p["w"]


def planned(weight, act=None, fn=product, params=PARAMS, x=X):
    return jq.make_plan(fn, params, x, rules=[Rule(".*", OpSpec(weight, act))])


def gradients(plan, params, state, x, cotangent, fn=product):
    run = lambda p, s, x: jnp.sum(jq.quantized(fn, plan, s)(p, x) * cotangent)  # noqa: E731
    return jax.jit(jax.grad(run, argnums=(0, 1, 2)))(params, state, x)


def lsq(v, step, lo, hi, g):
    """Gradients in a value and in its step, as the paper writes them (equations 3 and 5), in NumPy."""
    r = v / step
    inside = (r > lo) & (r < hi)
    slope = np.where(r <= lo, lo, np.where(r >= hi, hi, np.round(r) - r))
    return np.where(inside, g, 0), slope * g


GRAINS = {
    "tensor": (Q("int3", granularity="per_tensor"), (1, 1)),
    "channel": (Q("int3"), (1, 5)),
    "group": (Q("int3", granularity="per_group", group_size=4), (4, 5)),
}


def blocks_summed(x, shape):
    """Sums over blocks: to ``shape``."""
    for axis, n in enumerate(shape):
        x = np.stack([part.sum(axis, keepdims=True) for part in np.split(x, n, axis)], axis).reshape(
            *x.shape[:axis], n, *x.shape[axis + 1 :]
        )
    return x


@pytest.mark.parametrize("grain", GRAINS)
def test_the_gradient_of_a_weight_is_the_papers(grain):
    spec, shape = GRAINS[grain]
    plan = planned(spec)
    state = qat.learned_steps(product, plan, PARAMS, [], "lsq")
    assert jax.tree.map(jnp.shape, state) == {"w": {"weight": {"scale": shape}}}
    state = jax.tree.map(lambda s: 0.7 * s, state)  # so that something is clipped
    cotangent = unequal((6, 5), 9)
    dw, ds, _ = gradients(plan, PARAMS, state, X, cotangent)
    step = np.asarray(state["w"]["weight"]["scale"], np.float64)
    whole = np.repeat(np.repeat(step, 16 // shape[0], 0), 5 // shape[1], 1)
    g = np.asarray(X, np.float64).T @ np.asarray(cotangent, np.float64)
    want_w, want_s = lsq(np.asarray(W, np.float64), whole, -4, 3, g)
    assert 0 < (want_w == 0).sum() < want_w.size
    n = W.size / step.size
    np.testing.assert_allclose(dw["w"], want_w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        ds["w"]["weight"]["scale"], blocks_summed(want_s, shape) / np.sqrt(n * 3), rtol=1e-4, atol=1e-5
    )


def test_the_gradient_of_an_activation_is_the_papers():
    """n is the number of features of a row: whatever the batch, a step has one rate."""
    plan = planned(None, Q("int4", granularity="per_tensor"))
    state = qat.learned_steps(product, plan, PARAMS, [X])
    state = jax.tree.map(lambda s: 0.6 * s, state)
    cotangent = unequal((6, 5), 9)
    _, ds, dx = gradients(plan, PARAMS, state, X, cotangent)
    g = np.asarray(cotangent, np.float64) @ np.asarray(W, np.float64).T
    want_x, want_s = lsq(np.asarray(X, np.float64), float(state["w"]["act"]["scale"]), -8, 7, g)
    assert (want_x == 0).any()
    np.testing.assert_allclose(dx, want_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ds["w"]["act"]["scale"], want_s.sum() / np.sqrt(16 * 7), rtol=1e-4)


def test_an_element_on_the_end_of_its_range_is_outside():
    """Where the published intervals are open, as `fake_quant` of a range that is given has them closed."""
    plan, params = planned(Q("int4", granularity="per_tensor")), {"w": jnp.full((16, 5), 3.5, jnp.float32)}
    state = {"w": {"weight": {"scale": jnp.full((1, 1), 0.5)}}}
    dw, ds, _ = gradients(plan, params, state, jnp.ones((1, 16)), jnp.ones((1, 5)))
    np.testing.assert_array_equal(dw["w"], 0)
    np.testing.assert_allclose(ds["w"]["weight"]["scale"], 7 * 80 / np.sqrt(80 * 7), rtol=1e-6)


def test_the_gradient_of_an_offset_is_that_of_lsq_plus():
    """Equations 4 to 6: the step has round(r) - r inside and n or p outside, the offset 0 inside and 1 outside."""
    x = jax.nn.silu(4 * X) * 2
    plan = planned(None, Q("uint3", symmetric=False, granularity="per_tensor"))
    state = qat.learned_steps(product, plan, PARAMS, [x], "lsq+")
    assert set(state["w"]["act"]) == {"scale", "offset"}
    step = np.float64(state["w"]["act"]["scale"]) * 0.5
    offset = -2 * step  # on the grid, so that rounding it changes nothing
    state = {"w": {"act": {"scale": jnp.float32(step), "offset": jnp.float32(offset)}}}
    cotangent = unequal((6, 5), 9)
    _, ds, dx = gradients(plan, PARAMS, state, x, cotangent)
    g, r = np.asarray(cotangent, np.float64) @ np.asarray(W, np.float64).T, (np.asarray(x, np.float64) - offset) / step
    inside = (r > 0) & (r < 7)
    assert 0 < inside.sum() < inside.size
    factor = 1 / np.sqrt(16 * 7)
    slope = np.where(r <= 0, 0, np.where(r >= 7, 7, np.round(r) - r))
    np.testing.assert_allclose(dx, np.where(inside, g, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ds["w"]["act"]["scale"], (slope * g).sum() * factor, rtol=1e-3)
    np.testing.assert_allclose(ds["w"]["act"]["offset"], np.where(inside, 0, g).sum() * factor, rtol=1e-3)


def test_the_gradient_of_a_clip_is_that_of_pact():
    """1 from the clip on, 0 below; no gradient scale."""
    x = jax.nn.relu(X)
    plan = planned(None, Q("uint2", granularity="per_tensor"))
    state = jax.tree.map(lambda a: 0.5 * a, qat.learned_steps(product, plan, PARAMS, [x], "pact"))
    clip = float(state["w"]["act"]["clip"])
    cotangent = unequal((6, 5), 9)
    _, ds, dx = gradients(plan, PARAMS, state, x, cotangent)
    g = np.asarray(cotangent, np.float64) @ np.asarray(W, np.float64).T
    above = np.asarray(x) >= clip
    assert 0 < above.sum() < above.size
    np.testing.assert_allclose(ds["w"]["act"]["clip"], g[above].sum(), rtol=1e-4)
    np.testing.assert_allclose(dx, np.where(above | (np.asarray(x) <= 0), 0, g), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_where_codes_do_not_change_differences_are_the_gradient(method):
    """Far outside of its range the output is linear in the step, and finite differences are exact."""
    plan = planned(Q("int2", granularity="per_tensor"))
    params = {"w": jnp.asarray(np.where(np.arange(80).reshape(16, 5) % 2, 3.0, -4.0), jnp.float32)}
    name = {"lsq": "scale", "pact": "clip"}[method]
    state = {"w": {"weight": {name: jnp.full((1, 1), 0.25)}}}
    cotangent = unequal((6, 5), 9)
    f = jax.jit(lambda s: jnp.sum(jq.quantized(product, plan, s)(params, X) * cotangent))
    h = 1 / 64
    moved = [f(jax.tree.map(lambda v, d=d: v + d, state)) for d in (h, -h)]
    factor = 1 / np.sqrt(80 * 1) if method == "lsq" else 1
    _, ds, _ = gradients(plan, params, state, X, cotangent)
    np.testing.assert_allclose(
        ds["w"]["weight"][name][0, 0], (moved[0] - moved[1]) / (2 * h) * factor, rtol=1e-4, atol=1e-4
    )


# -- freezing ----------------------------------------------------------------------------------------------------------

MIXED = {
    "w4 channel": (Q("int4"), None),
    "w2 tensor, a8": (Q("int2", granularity="per_tensor"), Q("int8", granularity="per_tensor")),
    "w4 group, a8 static": (
        Q("int4", granularity="per_group", group_size=4),
        Q("int8", granularity="per_tensor", static=True),
    ),
    "w8, a4 group": (Q("int8"), Q("int4", granularity="per_group", group_size=8)),
    "w3 asymmetric, a uint4": (Q("uint3", symmetric=False), Q("uint4", symmetric=False)),
    "fp8": (Q("float8_e4m3fn"), Q("float8_e4m3fn")),
    "w2 without 0": (Q("quaternary", granularity="per_group", group_size=8), Q("int8")),
    "nf4 in bfloat16": (Q("nf4", granularity="per_group", group_size=8, scale_dtype="bfloat16"), None),
}


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


LAYERS = {"a": unequal((16, 16), 1, 0.3), "b": unequal((16, 5), 2, 0.3)}


def trained(plan, state, fn=mlp, params=LAYERS, x=X):
    """Some steps of both, compiled."""

    @jax.jit
    def step(params, state):
        loss = lambda p, s: jnp.mean((jq.quantized(fn, plan, s)(p, x) - fn(LAYERS, x)) ** 2)  # noqa: E731
        grads = jax.grad(loss, argnums=(0, 1))(params, state)
        params, state = jax.tree.map(lambda v, g: v - 0.01 * g, (params, state), grads)
        return params, qat.clamp_steps(state)

    start = state
    for _ in range(3):
        params, state = step(params, state)
    moved = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True)]
    assert any(moved)
    return params, state


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact"])
@pytest.mark.parametrize("mix", MIXED)
def test_the_frozen_model_computes_what_was_trained(mix, method):
    weight, act = MIXED[mix]
    if method == "pact" and not weight.symmetric:
        method = "lsq"
    rules = [Rule(".*", OpSpec(weight, act))]
    plan = jq.make_plan(mlp, LAYERS, X, rules=rules)
    params, state = trained(plan, qat.learned_steps(mlp, plan, LAYERS, [X], method))
    frozen = jq.quantize_params(params, plan, state=state)
    run = jax.jit(lambda p: jq.quantized(mlp, plan, state)(p, X))
    np.testing.assert_allclose(run(frozen), run(params), rtol=2e-6, atol=2e-6)
    assert all(isinstance(frozen[name], jq.QTensor) for name in frozen)


def test_codes_and_values_of_the_frozen_weight_are_those_in_training():
    plan = planned(Q("int3", granularity="per_group", group_size=4))
    state = qat.learned_steps(product, plan, PARAMS, [])
    eye = jnp.eye(16, dtype=W.dtype)
    inside = jax.jit(lambda p: jq.quantized(product, plan, state)(p, eye))(PARAMS)
    np.testing.assert_array_equal(inside, jq.quantize_params(PARAMS, plan, state=state)["w"].dequantize())


# -- transformations ---------------------------------------------------------------------------------------------------

STACK = {"w": unequal((3, 16, 16), 1, 0.2)}


def stacked(p, x):
    return lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]


def unrolled(p, x):
    for w in p["w"]:
        x = jnp.tanh(x @ w)
    return x


def test_layers_of_a_scan_have_steps_of_their_own():
    spec = OpSpec(Q("int3"), Q("int4", granularity="per_tensor"))
    plan = jq.make_plan(stacked, STACK, X, rules=[Rule(".*", spec)])
    state = qat.learned_steps(stacked, plan, STACK, [X])
    assert jax.tree.map(jnp.shape, state)["w"] == {"act": {"scale": (3,)}, "weight": {"scale": (3, 1, 16)}}
    each = [{"w": STACK["w"][i]} for i in range(3)]
    layer = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    x, want = X, []
    for p in each:
        one = jq.make_plan(layer, p, x, rules=[Rule(".*", spec)])
        want.append(qat.learned_steps(layer, one, p, [x])["w"])
        x = layer(p, x)
    for i, entry in enumerate(want):
        np.testing.assert_allclose(state["w"]["weight"]["scale"][i], entry["weight"]["scale"], rtol=1e-6)
        np.testing.assert_allclose(state["w"]["act"]["scale"][i], entry["act"]["scale"], rtol=1e-5)
    run = lambda p, s: jnp.sum(jq.quantized(stacked, plan, s)(p, X) ** 2)  # noqa: E731
    loss, (dp, ds) = jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(STACK, state)

    def by_hand(p, s):
        x = X
        one = jq.make_plan(layer, each[0], X, rules=[Rule(".*", spec)])
        for i in range(3):
            at = jax.tree.map(lambda v, i=i: v[i], (p, s))
            x = jq.quantized(layer, one, at[1])(at[0], x)
        return jnp.sum(x**2)

    want_loss, (want_p, want_s) = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1)))(STACK, state)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), (dp, ds), (want_p, want_s))


def test_vmap_over_members_of_an_ensemble():
    plan = planned(Q("int2"), Q("int4", granularity="per_tensor"))
    members = {"w": jnp.stack([W, 2 * W])}
    states = [qat.learned_steps(product, plan, {"w": w}, [X]) for w in members["w"]]
    together = jax.tree.map(lambda *s: jnp.stack(s), *states)
    f = lambda p, s: jnp.sum(jq.quantized(product, plan, s)(p, X) ** 2)  # noqa: E731
    got = jax.jit(jax.vmap(jax.grad(f, argnums=(0, 1))))(members, together)
    one = jax.jit(jax.grad(f, argnums=(0, 1)))
    for i, state in enumerate(states):
        want = one({"w": members["w"][i]}, state)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5), got, want)


def conv(p, x):
    y = lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(jax.nn.relu(y), axis=(1, 2)) @ p["dense"]


def experts(p, x):
    return lax.ragged_dot(x, p["experts"], jnp.array([4, 2], jnp.int32))


KINDS = {
    "convolution": (
        conv,
        {"conv": unequal((3, 3, 2, 4), 1, 0.3), "dense": unequal((4, 3), 2, 0.3)},
        unequal((2, 6, 6, 2), 3),
        (1, 1, 1, 4),
    ),
    "experts": (experts, {"experts": unequal((2, 16, 5), 1, 0.4)}, X, (2, 1, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [Q("int2"), None], ids=["both", "activation alone"])
def test_other_operations_learn_and_freeze(kind, weight):
    fn, params, x, shape = KINDS[kind]
    plan = jq.make_plan(fn, params, x, rules=[Rule(".*", OpSpec(weight, Q("int4", granularity="per_tensor")))])
    state = qat.learned_steps(fn, plan, params, [x])
    assert weight is None or next(iter(state.values()))["weight"]["scale"].shape == shape
    f = jax.jit(jq.quantized(fn, plan, state))
    run = lambda p, s: jnp.sum(jq.quantized(fn, plan, s)(p, x) ** 2)  # noqa: E731
    grads = jax.jit(jax.grad(run, argnums=1))(params, state)
    assert all(bool(jnp.all(jnp.isfinite(g))) and bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))
    assert not np.array_equal(f(params, x), fn(params, x))
    frozen = jq.quantize_params(params, plan, state=state)
    np.testing.assert_allclose(f(frozen, x), f(params, x), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_steps_learn_beside_gradients_that_are_quantized(rounding):
    plan = jq.make_plan(
        product, PARAMS, X, rules=[Rule("w", OpSpec(Q("int8"), Q("int8"), QuantSpec("int8", rounding=rounding)))]
    )
    state = qat.learned_steps(product, plan, PARAMS, [X])
    key = {"key": jax.random.key(0)} if rounding == "stochastic" else {}
    f = lambda p, s, **key: jnp.sum(jq.quantized(product, plan, s, **key)(p, X) ** 2)  # noqa: E731
    got = jax.jit(jax.grad(lambda p, s: f(p, s, **key), argnums=(0, 1)))(PARAMS, state)
    plain = jq.make_plan(product, PARAMS, X, rules=[Rule("w", OpSpec(Q("int8"), Q("int8")))])
    run = lambda p, s: jnp.sum(jq.quantized(product, plain, s)(p, X) ** 2)  # noqa: E731
    want = jax.jit(jax.grad(run, argnums=(0, 1)))(PARAMS, state)
    np.testing.assert_allclose(got[0]["w"], want[0]["w"], rtol=0, atol=0.03 * float(jnp.max(jnp.abs(want[0]["w"]))))
    assert bool(jnp.any(got[1]["w"]["act"]["scale"] != 0))


# -- where steps start, and refusals -----------------------------------------------------------------------------------


def test_steps_start_where_the_calibration_of_the_spec_has_them():
    for calibration in (jq.observers.AbsMax(), jq.observers.MSE()):
        spec = QuantSpec("int4", granularity="per_tensor", calibration=calibration)
        plan = planned(spec, QuantSpec("int8", granularity="per_tensor", static=True, calibration=calibration))
        state = qat.learned_steps(product, plan, PARAMS, [X])
        static = jq.act_state(plan, jq.calibrate(product, plan, PARAMS, [X]))
        np.testing.assert_allclose(state["w"]["act"]["scale"], static["w"]["scale"], rtol=1e-6)
        want = jq.quantize_params(PARAMS, plan)["w"].scale
        np.testing.assert_allclose(state["w"]["weight"]["scale"], want, rtol=1e-6)


@pytest.mark.parametrize("qtype, qmax", [("int2", 1), ("int3", 3)])
def test_few_bits_start_where_lsq_has_them(qtype, qmax):
    plan = planned(QuantSpec(qtype), QuantSpec("uint3", granularity="per_tensor"))
    entry = qat.learned_steps(product, plan, PARAMS, [X[:2], X[2:]])["w"]
    mean = np.abs(np.asarray(W, np.float64)).mean(0, keepdims=True)
    np.testing.assert_allclose(entry["weight"]["scale"], 2 * mean / np.sqrt(qmax), rtol=1e-6)
    np.testing.assert_allclose(entry["act"]["scale"], 2 * np.abs(np.asarray(X)).mean() / np.sqrt(7), rtol=1e-6)


@pytest.mark.parametrize("qtype", ["int2", "quaternary", "uint4"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_method_that_has_quantized_the_weight_is_where_training_starts(qtype, stacked):
    fn = (lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]) if stacked else product
    params = {"w": unequal((3, 16, 16), 2, 0.3)} if stacked else PARAMS
    spec = QuantSpec(qtype, granularity="per_group", group_size=4, symmetric=not qtype.startswith("u"))
    rules = [Rule("w", OpSpec(spec, QuantSpec("int8", granularity="per_tensor")))]
    model = jq.quantize_model(fn, params, X, recipe=rules, method="gptq", batches=[X])
    weights = jq.dequantize_params(model.params)
    state = qat.learned_steps(fn, model.plan, model.params, [X])
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(
        jnp.shape, qat.learned_steps(fn, model.plan, params, [X])
    )  # as from float weights
    frozen = jq.dequantize_params(jq.quantize_params(weights, model.plan, state=state))
    np.testing.assert_allclose(frozen["w"], weights["w"], rtol=1e-6)
    assert not np.allclose(frozen["w"], jq.dequantize_params(jq.quantize_params(params, model.plan))["w"])
    run = lambda s: jnp.sum(jq.quantized(fn, model.plan, s)(weights, X) ** 2)  # noqa: E731
    assert all(bool(jnp.any(g)) for g in jax.tree.leaves(jax.jit(jax.grad(run))(state)["w"]["weight"]["scale"]))


def test_groups_of_channels_are_calibrated_apart():
    x = jnp.concatenate([X[:, :8], 10 * X[:, 8:]], axis=1)
    spec = QuantSpec("int8", granularity="per_group", group_size=8, calibration=jq.observers.AbsMax())
    plan = planned(QuantSpec("int8"), spec, x=x)
    state = qat.learned_steps(product, plan, PARAMS, [x])
    want = np.abs(np.asarray(x)).reshape(6, 2, 8).max((0, 2)) / 127
    np.testing.assert_allclose(state["w"]["act"]["scale"], want, rtol=1e-6)


def test_the_state_is_saved_and_loaded(tmp_path):
    plan = planned(QuantSpec("int4"), QuantSpec("uint4", symmetric=False))
    state = qat.learned_steps(product, plan, PARAMS, [X], "lsq+")
    jq.io.save(tmp_path / "m.safetensors", jq.quantize_params(PARAMS, plan, state=state), plan=plan, state=state)
    loaded = jq.io.load_model(tmp_path / "m.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded.state, state)
    want = jq.quantized(product, plan, state)(jq.quantize_params(PARAMS, plan, state=state), X)
    np.testing.assert_array_equal(jq.quantized(product, loaded.plan, loaded.state)(loaded.params, X), want)


@optax_promotes
def test_labels_and_positive_steps():
    plan = planned(QuantSpec("int2"), QuantSpec("uint4", symmetric=False))
    state = qat.learned_steps(product, plan, PARAMS, [X])
    labels = qat.labels(PARAMS, state)
    assert labels[1]["w"]["act"] == {"scale": "steps", "zero_point": "frozen"}
    tx = optax.multi_transform(
        {"weights": optax.adamw(1e-3), "steps": optax.sgd(1e3), "frozen": optax.set_to_zero()}, labels
    )
    both: Any = (PARAMS, state)
    f = lambda both: jnp.sum(jq.quantized(product, plan, both[1])(both[0], X) ** 2)  # noqa: E731
    updates, _ = tx.update(jax.grad(f)(both), tx.init(both), both)
    moved: Any = optax.apply_updates(both, updates)
    state = moved[1]
    assert min(float(jnp.min(s)) for s in jax.tree.leaves(state)) < 0
    with pytest.raises(jq.QuantError, match=r"^quantized at w: scale must be above 0; .*clamp_steps"):
        jq.quantized(product, plan, state)(PARAMS, X)
    with pytest.raises(jq.QuantError, match=r"^quantize_params at w: scale must be above 0; .*clamp_steps"):
        jq.quantize_params(PARAMS, plan, state=state)
    state = qat.clamp_steps(state, 1e-3)
    assert bool(jnp.isfinite(jq.quantized(product, plan, state)(PARAMS, X)).all())
    with pytest.raises(jq.QuantError, match=r"^clamp_steps: the least step must be above 0"):
        qat.clamp_steps(state, 0.0)


A8 = QuantSpec("int8", granularity="per_tensor", static=True)
STATE = {"w": {"weight": {"scale": jnp.ones((1, 5))}}}


def reordered(plan):
    """The quantized weight, with an order of its own."""
    q = jq.quantize_params(PARAMS, plan)["w"]
    return {"w": q.replace(permutation=jnp.arange(16, dtype=jnp.int32)[:, None])}


REFUSED = {
    "a missing state": (
        lambda: jq.quantized(product, planned(None, A8))(PARAMS, X),
        r"^quantized: static activation ranges are missing; got paths=\('w',\)\. .*learned_steps",
    ),
    "another method": (
        lambda: qat.learned_steps(product, planned(QuantSpec("int4")), PARAMS, [], "lqs"),  # type: ignore[arg-type]
        "^learned_steps: unknown method; got method='lqs'. Use one of 'lsq', 'lsq\\+', 'pact'",
    ),
    "no batches": (
        lambda: qat.learned_steps(product, planned(None, A8), PARAMS, []),
        "^learned_steps: there are no batches",
    ),
    "a weight in another order": (
        lambda: qat.learned_steps(product, plan := planned(QuantSpec("int4")), reordered(plan), []),
        "^learned_steps at w: the weight has a permutation or offsets",
    ),
    "a quantized weight of another type": (
        lambda: qat.learned_steps(
            product, planned(QuantSpec("int4")), jq.quantize_params(PARAMS, planned(QuantSpec("int2"))), []
        ),
        "^learned_steps: params and plan do not agree: w is",
    ),
    "scales that are powers of two": (
        lambda: qat.learned_steps(
            product, planned(QuantSpec("mxfp8"), params=WIDE, x=unequal((6, 32), 3, 0.5)), WIDE, []
        ),
        "^learned_steps at w: the scales of this weight are not plain floats",
    ),
    "pact of an asymmetric range": (
        lambda: qat.learned_steps(product, planned(QuantSpec("uint4", symmetric=False)), PARAMS, [], "pact"),
        "^learned_steps at w: PACT clips symmetric ranges",
    ),
    "a plan without acts": (
        lambda: jq.quantized(product, planned(QuantSpec("int4")), {"w": {"act": {"scale": jnp.ones(())}}})(PARAMS, X),
        "^quantized at w: the plan quantizes no act",
    ),
    "another shape": (
        lambda: jq.quantized(product, planned(QuantSpec("int4", granularity="per_tensor")), STATE)(PARAMS, X),
        r"^quantized at w: scale must be floats, one for each step",
    ),
    "integers": (
        lambda: jq.quantized(
            product, planned(QuantSpec("int4")), {"w": {"weight": {"scale": jnp.ones((1, 5), jnp.int32)}}}
        )(PARAMS, X),
        r"^quantized at w: scale must be floats",
    ),
    "NaN": (
        lambda: jq.quantized(
            product, planned(QuantSpec("int4")), {"w": {"weight": {"scale": jnp.full((1, 5), jnp.nan)}}}
        )(PARAMS, X),
        r"^quantized at w: scale must be finite",
    ),
    "an offset without a zero point": (
        lambda: jq.quantized(
            product,
            planned(QuantSpec("int4")),
            {"w": {"weight": {"scale": jnp.ones((1, 5)), "offset": jnp.ones((1, 5))}}},
        )(PARAMS, X),
        r"^quantized at w: an entry of the state is no learned range",
    ),
    "a method beside steps": (
        lambda: jq.quantize_params(PARAMS, planned(QuantSpec("int4")), state=STATE, method=jq.ptq.hqq),
        "^quantize_params: learned steps round to nearest",
    ),
    "rules beside steps": (
        lambda: jq.quantize_params(PARAMS, [Rule("w", OpSpec(QuantSpec("int4")), (-2,))], state=STATE),
        "^quantize_params: state needs a plan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(jq.QuantError, match=message):
        call()


def test_integer_leaves_take_no_part():
    params = {"w": W, "count": jnp.arange(3)}
    plan = jq.make_plan(lambda p, x: x @ p["w"], params, X, rules=[Rule("w", OpSpec(QuantSpec("int4")))])
    state = qat.learned_steps(lambda p, x: x @ p["w"], plan, params, [])
    assert set(state) == {"w"}
    assert qat.labels(params, state)[0] == {"w": "weights", "count": "frozen"}
    with pytest.raises(jq.QuantError, match=r"^check_trainable at count"):
        qat.check_trainable(params)

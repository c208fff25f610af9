"""Statistics of the inputs of weights: through every call, over batches, with their place in the tree."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from transform_cases import EVERYTHING, SPECS, close, unequal

import jaxquant as jq
from jaxquant.transform import statistics

X = unequal((4, 8), 7, 0.5)
PAIR = {"a": unequal((8, 8), 1, 0.3), "b": unequal((8, 8), 2, 0.3)}
STACK = {"w": unequal((3, 8, 8), 1, 0.3)}
ALL = {"gram": statistics.Gram(), "absmax": statistics.ChannelAbsMax(), "range": statistics.Range()}


def gathered(fn, params, batches, spec="int8"):
    plan = jq.make_plan(fn, params, batches[0], rules=[EVERYTHING(SPECS[spec])])
    return plan, jq.calibrate(fn, plan, params, batches, collect=ALL)


def expected(inputs):
    """The same statistics of the inputs themselves, as rows."""
    x = np.concatenate([np.asarray(v, np.float64) for v in inputs])
    return {"gram": x.T @ x, "absmax": np.abs(x).max(0), "rows": len(x), "low": x.min(), "high": x.max()}


def agrees(stats, inputs):
    want = expected(inputs)
    close(stats["gram"]["gram"][0], want["gram"], 1e-5)
    close(stats["absmax"][0], want["absmax"], 1e-6)
    assert float(stats["gram"]["rows"]) == want["rows"]
    hi, lo = jax.tree.leaves(stats["range"])
    assert (float(lo[0]), float(hi[0])) == (min(want["low"], 0), max(want["high"], 0))


def plain(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


WRAPPED = {
    "plain": plain,
    "jit": lambda p, x: jax.jit(plain)(p, x),
    "remat": lambda p, x: jax.checkpoint(plain)(p, x),
    "cond": lambda p, x: lax.cond(jnp.sum(x) < jnp.inf, lambda: plain(p, x), lambda: 2 * plain(p, x * 9)),
    "while": lambda p, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, plain(p, x)), (0, 0 * x))[1],
    "scan": lambda p, x: lax.scan(lambda c, x: (c, plain(p, x)), 0, x.reshape(2, 2, 8))[1].reshape(4, 8),
    "value of a gradient": lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"]))(x),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_through_calls(name):
    batches = [X, -2 * X]
    _, stats = gathered(WRAPPED[name], PAIR, batches)
    agrees(stats["a"], batches)
    if name != "value of a gradient":  # which does not need the product with b
        agrees(stats["b"], [jnp.tanh(x @ PAIR["a"]) for x in batches])


def test_stacked():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    _, stats = gathered(fn, STACK, [X, 3 * X])
    inputs = [[X, 3 * X]]
    for i in range(2):
        inputs.append([jnp.tanh(x @ STACK["w"][i]) for x in inputs[-1]])
    for i in range(3):
        agrees(jax.tree.map(lambda a, i=i: a[i], stats["w"]), inputs[i])
    plan, stats = gathered(fn, STACK, [X], "static")
    assert jq.act_state(plan, stats)["w"]["scale"].shape == (3,)


def test_a_weight_used_twice_sees_both():
    _, stats = gathered(lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"] + 0 * x @ p["b"], PAIR, [X])
    agrees(stats["a"], [X, jnp.tanh(X @ PAIR["a"])])


def branches(p, x):
    return lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: jnp.tanh(x) @ p["b"])


def test_each_branch_counts_when_it_is_taken():
    up, down = jnp.abs(X), -jnp.abs(X)
    _, stats = gathered(branches, PAIR, [up, down, 2 * down])
    agrees(stats["a"], [up])
    agrees(stats["b"], [jnp.tanh(down), jnp.tanh(2 * down)])


def test_a_branch_that_is_never_taken_has_no_statistics():
    plan, stats = gathered(branches, PAIR, [jnp.abs(X)], "static")
    assert set(stats) == {"a"}
    with pytest.raises(
        jq.QuantError, match=r"act_state: there are no ranges for some .*paths=\('b',\)\. Run calibrate"
    ):
        jq.act_state(plan, stats)


def test_branches_in_a_loop():
    def fn(p, x):
        def body(i, x):
            return lax.cond(i % 2 == 0, lambda: jnp.tanh(x @ p["a"]), lambda: jnp.sin(x @ p["b"]))

        return lax.fori_loop(0, 3, body, x)

    _, stats = gathered(fn, PAIR, [X])
    one = jnp.tanh(X @ PAIR["a"])
    two = jnp.sin(one @ PAIR["b"])
    agrees(stats["b"], [one])
    agrees(stats["a"], [X, two])


def test_a_loop_that_does_not_run():
    def fn(p, x):
        return lax.while_loop(lambda c: c[0] < 0, lambda c: (c[0] + 1, c[1] @ p["a"]), (0, x))[1] @ p["b"]

    _, stats = gathered(fn, PAIR, [X])
    assert set(stats) == {"b"}


def test_the_condition_of_a_loop_is_seen():
    def fn(p, x):
        return lax.while_loop(lambda c: jnp.max(jnp.abs(c @ p["a"])) > 1e-3, lambda c: 0.1 * c, x) @ p["b"]

    _, stats = gathered(fn, PAIR, [X])
    close(stats["a"]["absmax"][0], jnp.max(jnp.abs(X), 0), 1e-6)


def test_channels_are_in_the_order_of_the_weight():
    """A weight of two contracted axes, cut from one, contracted in the other order."""

    def fn(p, x):
        return (
            jnp.tensordot(x.reshape(4, 2, 4), p["a"].reshape(2, 4, 8).transpose(1, 0, 2), ((2, 1), (0, 1))) + x @ p["b"]
        )

    _, stats = gathered(fn, PAIR, [X])
    agrees(stats["a"], [X])


def test_static_arguments_and_odd_params():
    """Batches with flags, params with None, integers, keys and functions among the leaves."""
    params = {**PAIR, "n": 3, "none": None, "key": jax.random.key(0), "ids": jnp.arange(3), "fn": jnp.tanh}

    def fn(p, x, mode, *, scale=1.0):
        jax.random.normal(p["key"], (2,))
        y = p["fn"](scale * x @ p["a"]) if mode == "on" else x
        return {"y": y @ p["b"], "mode": mode, "n": p["n"], "nothing": None}

    rules = [EVERYTHING(SPECS["static"])]
    plan = jq.make_plan(fn, params, X, "on", rules=rules, scale=2.0)
    assert {item.path for item in plan.items} == {"a", "b"}
    state = jq.act_state(plan, jq.calibrate(functools.partial(fn, scale=2.0), plan, params, [(X, "on"), (-X, "on")]))
    qparams = jq.quantize_params(params, plan)
    out = jq.quantized(fn, plan, state)(qparams, X, "on", scale=2.0)
    assert (out["mode"], out["n"], out["nothing"]) == ("on", 3, None)
    close(out["y"], fn(params, X, "on", scale=2.0)["y"], 0.03)
    close(jq.quantized(fn, plan, state)(params, X, "on", scale=2.0)["y"], out["y"], 1e-5)


def columns_of(stats):
    return np.asarray(stats["gram"]["gram"], np.float64)


KERNELS = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (3, 2, 4, 6), {}),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (6, 4, 3, 2), {}),
    "strides, padding, dilations": (
        ("NHWC", "HWIO", "NHWC"),
        (2, 2, 4, 6),
        {"window_strides": (2, 1), "padding": ((1, 0), (2, 1)), "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    ),
    "groups": (("NHWC", "HWIO", "NHWC"), (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": (("NHWC", "HWIO", "NHWC"), (3, 3, 1, 4), {"feature_group_count": 4}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_gram_of_a_convolution(name):
    """An output is its weights times its column, so the outputs' sum of squares is theirs in the Gram matrix."""
    numbers, shape, how = KERNELS[name]
    how = {"window_strides": (1, 1), "padding": "SAME", **how}
    x = unequal((2, 4, 5, 6) if numbers[0] == "NCHW" else (2, 5, 6, 4), 3, 0.5)
    params = {"w": unequal(shape, 4, 0.3)}
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **how)  # noqa: E731
    _, stats = gathered(fn, params, [x, 2 * x])
    gram, out = columns_of(stats["w"]), numbers[1].index("O")
    y = np.moveaxis(
        np.asarray(jnp.concatenate([fn(params, x), fn(params, 2 * x)]), np.float64), numbers[2].index("C"), -1
    )
    w = np.moveaxis(np.asarray(params["w"], np.float64), out, 0).reshape(gram.shape[0], -1, gram.shape[-1])
    squares = np.einsum("gok,gkl,gpl->gop", w, gram, w)
    rows = y.reshape(-1, gram.shape[0], w.shape[1])
    close(squares, np.einsum("rgo,rgp->gop", rows, rows), 1e-5)
    assert float(stats["w"]["gram"]["rows"]) == len(rows)
    assert stats["w"]["absmax"].shape == (1, 4)


def test_gram_of_experts():
    x, sizes = unequal((7, 8), 3, 0.5), jnp.array([3, 0, 4], jnp.int32)
    params = {"w": unequal((3, 8, 5), 4, 0.3)}
    _, stats = gathered(lambda p, x: lax.ragged_dot(x, p["w"], sizes), params, [x])
    parts = [x[:3], x[:0], x[3:]]
    close(columns_of(stats["w"]), np.stack([np.asarray(v, np.float64).T @ np.asarray(v) for v in parts]), 1e-6)


def test_parts_of_channels_are_refused():
    """Ranges can do without channels; what is said of each channel cannot."""
    halves = lambda p, x: x[:, :4] @ p["a"][:4] + x[:, 4:] @ p["a"][4:]  # noqa: E731
    plan = jq.make_plan(halves, PAIR, X, rules=[EVERYTHING(SPECS["static"])])
    with pytest.raises(jq.QuantError, match="calibrate at a: absmax needs whole channels"):
        jq.calibrate(halves, plan, PAIR, [X])
    state = jq.act_state(plan, jq.calibrate(halves, plan, PAIR, [X], collect={}))
    close(state["a"]["scale"], jnp.max(jnp.abs(X)) / 127, 1e-6)
    turned = lambda p, x: lax.conv_transpose(  # noqa: E731
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )
    params, x = {"w": unequal((3, 3, 4, 8), 1)}, unequal((1, 5, 5, 8), 2)
    with pytest.raises(jq.QuantError, match="at w: gram needs whole columns"):
        gathered(turned, params, [x])


@pytest.mark.parametrize(
    "observer",
    [
        None,
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in (jq.observers.Percentile(99.0), jq.observers.MSE(), jq.observers.Entropy())
        ),
    ],
    ids=str,
)
def test_statistics_of_several_hosts(observer):
    """Each calibrates on batches of its own; merged, that is one calibration on all of them."""

    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
        return lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: x @ p["b"])

    params = {**STACK, **PAIR}
    act = jq.QuantSpec("int8", granularity="per_tensor", static=True, calibration=observer)
    spec = jq.OpSpec(jq.QuantSpec("int8"), act)
    batches = [X, -2 * X, 3 * X]
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule(".*", spec)])
    collect = {"gram": statistics.Gram(), "mean": statistics.ChannelMean()}
    whole = jq.calibrate(fn, plan, params, batches, collect=collect)
    hosts = [jq.calibrate(fn, plan, params, [x], collect=collect) for x in batches]
    assert any(set(h) != set(whole) for h in hosts)  # a host may not have reached a branch
    merged = jq.calibration.merge_stats(plan, hosts, collect=collect)
    assert set(merged) == set(whole)
    for path in whole:
        close(merged[path], whole[path], 1e-6)
    close(jq.act_state(plan, merged), jq.act_state(plan, whole), 1e-6)


def test_merging_refuses_other_statistics():
    plan, stats = gathered(plain, PAIR, [X])
    with pytest.raises(jq.QuantError, match=r"merge_stats at a: .*names=\('absmax', 'mean', 'range'\)"):
        jq.calibration.merge_stats(plan, [stats, stats])
    with pytest.raises(jq.QuantError, match="merge_stats: there is nothing to merge"):
        jq.calibration.merge_stats(plan, [])


def test_the_float_beside_nvfp4_blocks_is_static():
    """It comes from the state, and the fp8 scales from the array: the values of NumPy, in training and after it."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 32), (32, 16)))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    spec = jq.OpSpec(act=jq.QuantSpec("nvfp4", static=True))
    plan = jq.make_plan(fn, {"w": w}, x, rules=[jq.Rule(".*", spec)])
    state = jq.act_state(plan, jq.calibrate(fn, plan, {"w": w}, [x]))
    np.testing.assert_allclose(state["w"]["scale"], np.abs(x).max() / (6 * 448), rtol=1e-6)

    def wanted(x, unit):
        blocks = x.reshape(8, 2, 16)
        local = np.minimum(np.abs(blocks).max(-1, keepdims=True) / 6 / unit, 448)
        scale = local.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * unit
        return (np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scale).reshape(
            8, 32
        )

    for unit in (state["w"]["scale"], jnp.float32(2e-4)):  # the second one saturates
        run = jq.quantized(fn, plan, {"w": {"scale": unit}})
        np.testing.assert_allclose(run({"w": w}, x), wanted(x, np.float32(unit)) @ w, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda x: jq.quantized(fn, plan, state)({"w": w}, x).sum())(x)
    np.testing.assert_allclose(np.median(np.abs(np.asarray(gradient) / w.sum(-1))), 1, rtol=1e-5)  # straight through
    layer = jq.linen.QuantDense(4, spec=spec)
    variables = layer.init(jax.random.key(0), x)
    y, seen = layer.apply(variables, x, mutable=["quant"])
    np.testing.assert_array_equal(layer.apply({**variables, **seen}, x), y)

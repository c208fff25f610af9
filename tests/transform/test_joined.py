"""Weights that are joined before they are used: each is quantized on its own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transform_cases import check, close, planned, randomized, unequal

import jaxquant as jq
from jaxquant import recipes

X = unequal((4, 16), 9, 0.5)
PAIR = {"a": unequal((16, 8), 1, 0.3), "b": unequal((16, 24), 2, 0.3)}
TALL = {"a": unequal((8, 16), 1, 0.3), "b": unequal((8, 16), 2, 0.3)}
STACK = {"a": unequal((4, 16, 8), 1, 0.3), "b": unequal((2, 16, 8), 2, 0.3)}
CONV = {"a": unequal((3, 4, 8), 1, 0.3), "b": unequal((3, 4, 8), 2, 0.3)}
BOTH = {"a": (-2,), "b": (-2,)}
conv = functools.partial(
    lax.conv_general_dilated, window_strides=(1,), padding="SAME", dimension_numbers=("NWC", "WIO", "NWC")
)


def side_by_side(p):
    return jnp.concatenate([p["a"], p["b"]], axis=-1)


@jax.jit
def in_a_jit(p):
    return side_by_side(p).T


CASES = {
    "outputs": (lambda p, x: x @ side_by_side(p), PAIR, X, BOTH),
    "outputs, on the left": (lambda p, x: jnp.einsum("kn,bk->nb", side_by_side(p), x), PAIR, X, BOTH),
    "inputs": (lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]), TALL, X, BOTH),
    "batches": (
        lambda p, x: jnp.einsum("ebk,ekn->ebn", x.reshape(6, 2, 16), jnp.concatenate([p["a"], p["b"]])),
        STACK, unequal((12, 16), 8, 0.5), BOTH,
    ),
    "stacked": (lambda p, x: jnp.einsum("bk,ekn->ebn", x[:, :8], jnp.stack([p["a"], p["b"]])), TALL, X, BOTH),
    "unstacked": (lambda p, x: sum(x @ w for w in jnp.unstack(p["a"])), {"a": STACK["a"]}, X, {"a": (-2,)}),
    "unstacked, the last axis": (
        lambda p, x: sum(x @ w for w in jnp.unstack(p["a"], axis=2)), {"a": STACK["a"].transpose(1, 2, 0)}, X,
        {"a": (-3,)},
    ),
    "transposed and cast": (
        lambda p, x: lax.dot_general(x, in_a_jit(p).astype(jnp.float32), (((1,), (1,)), ((), ()))), PAIR, X, BOTH,
    ),
    "reshaped": (
        lambda p, x: jnp.einsum("bij,ijn->bn", x.reshape(4, 2, 8), side_by_side(p).reshape(2, 8, 32)), PAIR, X, BOTH,
    ),
    "joined twice": (lambda p, x: x @ jnp.concatenate([side_by_side(p), 2 * jnp.eye(16)], -1), PAIR, X, BOTH),
    "taken apart again": (
        lambda p, x: [x @ w for w in jnp.split(jnp.concatenate([p["a"].T, p["b"].T]).T, [8], 1)], PAIR, X, BOTH,
    ),
    "before a scan": (
        lambda p, x: (lambda w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0])(
            jnp.concatenate([p["a"], p["b"]])
        ), TALL, X, BOTH,
    ),
    "in a branch": (
        lambda p, x: (lambda w: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: 2 * x @ w))(side_by_side(p)),
        PAIR, X, BOTH,
    ),
    "rematerialized": (lambda p, x: jax.checkpoint(lambda w: jnp.tanh(x @ w))(side_by_side(p)), PAIR, X, BOTH),
    "features of a convolution": (
        lambda p, x: conv(x.reshape(4, 4, 4), side_by_side(p)), CONV, X, {"a": (-3, -2), "b": (-3, -2)},
    ),
    "inputs of a convolution": (
        lambda p, x: conv(x.reshape(4, 2, 8), jnp.concatenate([p["a"], p["b"]], 1)), CONV, X,
        {"a": (-3, -2), "b": (-3, -2)},
    ),
}  # fmt: skip


APART = ("taken apart again", "unstacked", "unstacked, the last axis")


@pytest.mark.parametrize("name", CASES)
def test_joined(name):
    """Codes, training and the float function on dequantized leaves agree, and so do gradients."""
    fn, params, x, expect = CASES[name]
    plan = check(fn, params, x, expect=expect)
    assert ("multiplied one after the other" in plan["a"].note) == (name not in APART)


@pytest.mark.every
@pytest.mark.parametrize("name", CASES)
def test_plans_and_shapes(name):
    """Of every form; nothing is compiled."""
    fn, params, x, expect = CASES[name]
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w8a16())])
    assert {item.path: item.reduce_axes for item in plan.items} == expect
    run = jq.quantized(fn, plan)
    want = jax.eval_shape(fn, params, x)
    assert jax.eval_shape(run, params, x) == want
    assert jax.eval_shape(lambda p, x: run(jq.quantize_params(p, plan), x), params, x) == want


@pytest.mark.every
def test_each_has_its_own_spec_and_statistics():
    """Types that differ; one in float; integers on both sides; statistics of each by itself."""
    fn = CASES["inputs"][0]
    rules = [jq.Rule("a", recipes.w8a8()), jq.Rule("b", recipes.w4a16(4))]
    plan, q, _ = planned(fn, TALL, X, rules=rules)
    got = jax.jit(jq.quantized(fn, plan, precision="highest"))(q, X)
    x = np.asarray(X, np.float32)
    step = np.abs(x[:, :8]).max(-1, keepdims=True) / np.float32(127)
    left = np.rint(x[:, :8] / step) * step  # W8A8 sees its own half of the input
    close(got, left @ np.asarray(q["a"].dequantize()) + x[:, 8:] @ np.asarray(q["b"].dequantize()), 1e-5)
    stats = jq.calibrate(fn, plan, TALL, [X])
    np.testing.assert_array_equal(stats["a"]["absmax"][0], np.abs(x[:, :8]).max(0))
    np.testing.assert_array_equal(stats["b"]["absmax"][0], np.abs(x[:, 8:]).max(0))
    check(fn, TALL, X, rules=[jq.Rule("a", recipes.w8a16())], expect={"a": (-2,)})


@pytest.mark.every
def test_what_has_no_form_by_parts():
    """A lookup in joined tables stays in float, with the reason; codes there raise."""
    fn = lambda p, ids: jnp.concatenate([p["a"], p["b"]])[ids] @ p["a"].T  # noqa: E731
    ids = jnp.array([3, 9, 15])
    plan = jq.make_plan(fn, TALL, ids, rules=[jq.Rule("a", recipes.w8a16())])
    assert not plan.items
    reasons = {left.path: left.reason for left in plan.floats}
    assert reasons["a"].startswith("also joined with other arrays before it is used; Rule(..., dequantize=True)")
    assert reasons["b"] == "joined with other arrays before it is used"
    q = {**TALL, "b": jq.quantize(TALL["b"], jq.QuantSpec("int8"), reduce_axes=(-2,))}
    with pytest.raises(jq.QuantError, match=r"quantized at b: a quantized weight reaches 'concatenate'"):
        jq.quantized(fn)(q, ids)


@pytest.mark.every
def test_allowed_on_values():
    fn = lambda p, x: jnp.tanh(side_by_side(p)).sum() + x @ p["a"] @ p["a"].T @ p["b"]  # noqa: E731
    rules = [jq.Rule(".", recipes.w8a16(), dequantize=True)]
    plan = check(fn, PAIR, X, rules=rules, expect=BOTH)
    assert "dequantized where it is joined with other arrays before it is used" in plan["a"].note


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell], ids=lambda cell: cell.__name__)
def test_recurrent_cells(cell):
    """Flax's own layers, one of which joins its kernels."""
    model, x = nn.RNN(cell(8)), unequal((2, 3, 16), 3, 0.5)
    params = randomized(jax.jit(model.init)(jax.random.key(0), x))
    plan = check(model.apply, params, x, rules=[jq.Rule("kernel", recipes.w8a16())], tolerance=1e-3)
    assert len(plan) == (6 if cell is nn.GRUCell else 8)
    assert all(item.reduce_axes == (-2,) for item in plan.items)

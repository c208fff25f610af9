"""One weight at several stackings: whole, and layer by layer in a scan. Its scales are those of one of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transform_cases import check, close, unequal

import jaxquant as jq

SQUARE = {"w": unequal((4, 4), 1)}
STACK = {"w": unequal((3, 4, 4), 2)}
X = unequal((2, 4), 3)
TENSOR = jq.OpSpec(weight=jq.QuantSpec("int8", granularity="per_tensor"))
CHANNEL = jq.OpSpec(weight=jq.QuantSpec("int8"))
SINGLES = jq.OpSpec(weight=jq.QuantSpec("int4", granularity="per_group", group_size=1))
PAIRS = jq.OpSpec(weight=jq.QuantSpec("uint4", symmetric=False, granularity="per_group", group_size=2))
STATIC = jq.OpSpec(weight=CHANNEL.weight, act=jq.QuantSpec("int8", granularity="per_tensor", static=True))


def rounded(w, axes):
    """Symmetric int8 with one scale for all of ``axes``, in numpy."""
    w = np.asarray(w, np.float32)
    scale = np.max(np.abs(w), axis=axes, keepdims=True) / np.float32(127)
    return np.rint(w / scale) * scale


def tanh_by_layer(c, w):
    return lax.scan(lambda c, v: (c + jnp.tanh(v).reshape((1,) * (c.ndim - v.ndim) + v.shape), None), c, w)[0]


def products(p, x):
    return jnp.einsum("bk,ekn->ebn", x, p["w"])


def whole_norm(p, x):
    """Products by layer; a norm of the whole."""
    return lax.scan(lambda c, v: (c @ v, None), x, p["w"])[0] + jnp.sum(jnp.tanh(p["w"]))


def whole_product(p, x):
    """A product of the whole; something else by layer."""
    return tanh_by_layer(jnp.zeros((4, 4)), p["w"]).sum() + products(p, x)


CASES = {
    "row by row": (lambda p, x: tanh_by_layer(x @ p["w"], p["w"]), SQUARE, SINGLES, 0),
    "lookup and rows": (lambda p, x: tanh_by_layer(x, p["w"]) + jnp.take(p["w"], 1, axis=1)[None], SQUARE, CHANNEL, 0),
    "stopped": (lambda p, x: tanh_by_layer(x, lax.stop_gradient(p["w"])) + x @ p["w"], SQUARE, CHANNEL, 0),
    "two in one": (
        lambda p, x: lax.scan(lambda c, v: (tanh_by_layer(c, v), None), x, p["w"])[0] + products(p, x).sum(0),
        STACK, TENSOR, 0,
    ),
    "in a branch": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: tanh_by_layer(x, p["w"]), lambda: x) + x @ p["w"], SQUARE, PAIRS, 0,
    ),
    "norm, per tensor": (whole_norm, STACK, TENSOR, 1),
    "norm, per group": (whole_norm, STACK, PAIRS, 1),
    "product, per tensor": (whole_product, STACK, TENSOR, 0),
    "product, per channel": (whole_product, STACK, CHANNEL, 0),
    "both are products": (
        lambda p, x: lax.scan(lambda c, v: (c @ v, None), x, p["w"])[0] + products(p, x).sum(0),
        STACK, TENSOR, 1,
    ),
    "products over other axes": (
        lambda p, x: lax.scan(lambda c, v: (c @ v, None), x, p["w"])[0] + jnp.einsum("bn,ekn->ebk", x, p["w"]).sum(0),
        STACK, TENSOR, 1,
    ),
    "tied, and a slice": (
        lambda p, x: x @ p["w"].T + p["w"][jnp.array([0, 2])] + jnp.tanh(p["w"][:2]), SQUARE, PAIRS, 0,
    ),
    "over both axes": (lambda p, x: x @ p["w"] + x @ p["w"].T + jnp.tanh(p["w"])[:2], SQUARE, PAIRS, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_set_of_scales(name):
    """Frozen codes, a leaf in training and the float function on the dequantized leaf agree, and so do gradients."""
    fn, params, spec, stacked = CASES[name]
    plan = check(fn, params, X, rules=[jq.Rule("w", spec, dequantize=True)])
    assert plan["w"].stacked == stacked
    assert plan["w"].dequantize


@pytest.mark.every
@pytest.mark.parametrize(("fn", "axes"), [(whole_norm, (-2, -1)), (whole_product, (-3, -2, -1))])
def test_the_scales_are_those_of_the_plan(fn, axes):
    """In training too: values by hand, of a weight with one scale for each layer, or one for the stack."""
    plan = jq.make_plan(fn, STACK, X, rules=[jq.Rule("w", TENSOR, dequantize=True)])
    expected = fn({"w": jnp.asarray(rounded(STACK["w"], axes))}, X)
    close(jax.jit(jq.quantized(fn, plan, precision="highest"))(STACK, X), expected, 1e-5)


def test_static_ranges_are_those_of_the_layers():
    """A product of the whole stack then runs on values, and its inputs do not count."""

    def fn(p, x):
        layers = lax.scan(lambda c, v: (jnp.tanh(c @ v), None), x, p["w"])[0]
        return layers + products(p, 100 * x).sum(0)

    plan = check(fn, STACK, X, rules=[jq.Rule("w", STATIC, dequantize=True)])
    assert "dot_general of the whole stack runs on float values" in plan["w"].note
    state = jq.act_state(plan, jq.calibrate(fn, plan, STACK, [X]))
    layers, ranges = np.asarray(X), []
    for w in np.asarray(STACK["w"]):
        ranges.append(np.abs(layers).max() / 127)
        layers = np.tanh(layers @ w)
    np.testing.assert_allclose(state["w"]["scale"], ranges, rtol=1e-5)


def test_a_plan_of_another_function():
    """A whole weight has no layers with scales of their own."""
    plan = jq.make_plan(lambda p, x: x @ p["w"], SQUARE, X, rules=[jq.Rule("w", CHANNEL)])
    run = jq.quantized(lambda p, x: tanh_by_layer(x @ p["w"], p["w"]), plan)
    with pytest.raises(jq.QuantError, match=r"quantized at w: .* a scan over its layers, .*dequantize=True"):
        run(jq.quantize_params(SQUARE, plan), X)


@pytest.mark.parametrize("spec", [TENSOR, SINGLES, PAIRS, CHANNEL], ids=str)
@pytest.mark.parametrize("axes", [(-1,), (-2,)], ids=str)
def test_a_scan_over_a_leaf_without_a_plan(spec, axes):
    """However its codes lie and its scales are shared."""
    q = jq.quantize(SQUARE["w"], spec.weight, reduce_axes=axes)
    fn = lambda p, x: lax.scan(lambda c, v: (c @ (v[None] * jnp.eye(4, dtype=c.dtype)), None), x, p)[0]  # noqa: E731
    rows = lambda p, x: lax.scan(lambda c, v: (c + jnp.einsum("bk,k->b", x, v), None), jnp.zeros(2), p)[0]  # noqa: E731
    close(jax.jit(jq.quantized(rows, precision="highest"))(q, X), rows(q.dequantize(), X), 1e-5)
    with pytest.raises(jq.QuantError, match="a quantized weight reaches"):
        jq.quantized(fn)(q, X)

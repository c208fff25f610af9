"""Parameters that pass through a function: handed in and out of loops, branches and transforms, as NNX does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from transform_cases import check, planned, unequal

import jaxquant as jq

X = unequal((4, 16), 7, 0.3)
SQUARE = {"w": unequal((16, 16), 1, 0.3)}
STACK = {"w": unequal((3, 16, 16), 1, 0.3)}


def through_remat(p, x):
    y, w = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))(x, p["w"])
    return y @ w


def through_scan(p, x):
    y, stack = lax.scan(lambda x, w: (jnp.tanh(x @ w), w), x, p["w"])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), y, stack, reverse=True)[0]


def through_carry(p, x):
    block = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))
    (y, w), _ = lax.scan(lambda c, _: (block(*c), None), (x, p["w"]), None, length=2)
    return y @ w


def through_cond(p, x):
    y, w = lax.cond(jnp.sum(x) > 0, lambda w: (x @ w, w), lambda w: (x @ w + 1, w), p["w"])
    return y @ w


def through_jit(p, x):
    y, w = jax.jit(lambda w: (x @ w, w))(p["w"])
    return y @ w


@pytest.mark.parametrize(
    "fn, params",
    [
        (through_remat, SQUARE),
        (through_scan, STACK),
        (through_carry, SQUARE),
        (through_cond, SQUARE),
        (through_jit, SQUARE),
    ],
)
def test_handed_on(fn, params):
    check(fn, params, X, expect={"w": (-2,)})


def test_a_scan_stays_one_without_jit():
    """What is planned and calibrated in one setting runs in the other: JAX unrolls scans where it compiles nothing."""
    layers = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    rules = [jq.Rule("w", jq.recipes.w8a8(static=True))]
    plan = jq.make_plan(layers, STACK, X, rules=rules)
    with jax.disable_jit():
        assert jq.make_plan(layers, STACK, X, rules=rules) == plan
        state = jq.act_state(plan, jq.calibrate(layers, plan, STACK, [X]))
        assert state["w"]["scale"].shape == (3,)
        qparams = jq.quantize_params(STACK, plan)
        got = jq.quantized(layers, plan, state)(qparams, X)
    np.testing.assert_allclose(got, jax.jit(jq.quantized(layers, plan, state))(qparams, X), rtol=1e-5, atol=1e-6)


def test_returned_as_it_is():
    """Returned params come back as they were given, QTensors too; a view of one is a use in float."""
    fn = lambda p, x: (x @ p["w"], p)  # noqa: E731
    plan, qparams, _ = planned(fn, SQUARE, X)
    _, same = jax.jit(jq.quantized(fn, plan))(qparams, X)
    assert isinstance(same["w"], jq.QTensor)
    np.testing.assert_array_equal(same["w"].codes, qparams["w"].codes)
    plan = jq.make_plan(lambda p, x: (x @ p["w"], p["w"].T), SQUARE, X, rules=[jq.Rule("w", None)])
    assert plan.floats[0].reason == "Rule('w', None)"


def changing(p, x):
    return lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.9), None), (x, p["w"]), None, length=2)[0][0]


def while_changing(p, x):
    step = lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2] * 0.9)  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 2, step, (0, x, p["w"]))[1]


def chosen(p, x):
    return x @ lax.cond(jnp.sum(x) > 0, lambda: p["w"], lambda: p["v"])


def stacked_by_scan(p, x):
    return jnp.sum(lax.scan(lambda x, _: (x, p["w"]), x, None, length=2)[1], 0)


def halves_of_stack(p, x):
    return lax.scan(lambda x, w: (x @ w, None), x, p["w"][1:])[0] @ p["w"][0]


def whole_and_by_layer(p, x):
    y = lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
    return y + jnp.einsum("bk,lkn->lbn", x, p["w"])[0]


REFUSED = {
    "added": (lambda p, x: x[:1] + p["w"], SQUARE, "added, not contracted"),
    "scaled": (lambda p, x: x @ (2 * p["w"]), SQUARE, "multiplied elementwise, not contracted"),
    "norm": (
        lambda p, x: x @ (p["w"] / jnp.sqrt(jnp.sum(p["w"] ** 2, 0, keepdims=True))),
        SQUARE,
        "computed with (a norm, say) before it is used; multiplied elementwise, not contracted",
    ),
    "broadcast": (
        lambda p, x: jnp.broadcast_to(p["w"], (4, 16, 16)).sum(0),
        SQUARE,
        "repeated (broadcast), not contracted",
    ),
    "joined": (
        lambda p, x: x @ jnp.tanh(jnp.concatenate([p["w"], p["w"]], 1)),
        SQUARE,
        "joined with other arrays before it is used",
    ),
    "sorted": (lambda p, x: x @ jnp.sort(p["w"]), SQUARE, "goes into sort, which has no quantized form"),
    "two parameters": (lambda p, x: x @ (p["w"] @ p["w"]), SQUARE, "multiplied with another parameter"),
    "not contracted": (lambda p, x: jnp.einsum("ab,cd->abcd", x, p["w"]), SQUARE, "no axis is contracted"),
    "a part": (
        lambda p, x: jnp.einsum("bi,ijn->bjn", x[:, :4], p["w"].reshape(4, 4, 16)),
        SQUARE,
        "only a part of axis -2 is contracted",
    ),
    "not used": (lambda p, x: x, SQUARE, "not used"),
    "input of a convolution": (
        lambda p, x: lax.conv_general_dilated(
            p["w"][None], x[None], (1,), "SAME", dimension_numbers=("NWC", "OWI", "NWC")
        ),
        SQUARE,
        "goes into conv_general_dilated, which has no quantized form",
    ),
    "input of experts": (
        lambda p, x: lax.ragged_dot(p["w"], x[:, :, None] * x[:, None], jnp.array([4, 4, 4, 4], jnp.int32)),
        SQUARE,
        "goes into ragged_dot",
    ),
    "returned": (lambda p, x: p["w"], SQUARE, "returned as it is"),
    "returned transposed": (lambda p, x: p["w"].T, SQUARE, "returned by the function through a transpose"),
    "empty": (lambda p, x: x[:, :0] @ p["w"], {"w": jnp.zeros((0, 4))}, "empty"),
    "integers": (lambda p, x: x @ p["w"].astype(jnp.int32), SQUARE, "cast to a type that holds no 16-bit floats"),
    "carry": (changing, SQUARE, "changed from one step of a scan to the next"),
    "while carry": (while_changing, SQUARE, "changed from one step of a while to the next"),
    "scan result": (stacked_by_scan, SQUARE, "handed out of scan as a result"),
    "chosen": (chosen, {**SQUARE, "v": SQUARE["w"]}, "handed out of cond as a result"),
    "stack cut": (halves_of_stack, STACK, "stacked, but its first axis goes through a slice before the scan"),
    "whole and by layer": (whole_and_by_layer, STACK, "used both whole and layer by layer in a scan"),
    "index of a branch": (lambda p, x: lax.cond(p["w"][0, 0] > 0, lambda: x, lambda: 2 * x), SQUARE, "goes into gt"),
    "bad lookup": (lambda p, x: p["w"].at[jnp.array([0, 1]), jnp.array([1, 2])].get(), SQUARE, "indexed in a way that"),
    "condition of values": (lambda p, x: jnp.where(p["w"] > 0, x[:1], 0.0), SQUARE, "goes into gt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reasons(name):
    """What happens to the parameter, in the plan; and a QTensor there raises."""
    fn, params, reason = REFUSED[name]
    allowing = {**params, "other": jnp.ones((16, 2))}
    rules = [jq.Rule(".*", jq.recipes.w8a16())]

    def with_other(p, x):
        return fn({k: v for k, v in p.items() if k != "other"}, x), x @ p["other"]

    plan = jq.make_plan(with_other, allowing, X, rules=rules)
    found = {left.path: left.reason for left in plan.floats}
    assert reason in found["w"], found
    assert reason in " ".join(str(plan).split())
    if name not in ("not used", "returned", "empty", "not contracted", "a part", "whole and by layer"):
        q = {**allowing, "w": jq.quantize(params["w"], jq.QuantSpec("int8"), reduce_axes=(-2,))}
        with pytest.raises(jq.QuantError, match=r"quantized at w: a quantized weight reaches .*dequantize=True"):
            jq.quantized(with_other)(q, X)
    if name in ("stack cut", "whole and by layer"):  # it has a use that could be quantized
        return
    with pytest.raises(jq.QuantError, match=r"make_plan: a rule matches no weight; got pattern='w'\. It matches only"):
        jq.make_plan(with_other, allowing, X, rules=[jq.Rule("w", rules[0].spec), jq.Rule("other", None)])


def test_dequantize_where_a_rule_allows_it():
    """Both kinds of leaf compute with the dequantized weight there, and the plan says so."""
    fn = lambda p, x: x @ p["w"] + 0.1 * jnp.sum(p["w"] ** 2)  # noqa: E731
    rules = [jq.Rule("w", jq.recipes.w4a16(8), dequantize=True)]
    plan = check(fn, SQUARE, X, rules=rules, expect={"w": (-2,)})
    assert "w: dequantized where it is computed with (a norm, say) before it is used" in " ".join(str(plan).split())

"""Products of two activations: off by default, quantized where an `OpRule` names them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import untyped
from transform_cases import close, unequal
from transform_models import MODELS

import jaxquant as jq
from jaxquant import ops, recipes

INT8 = recipes.w8a8()
SCORES, VALUES = "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"
X = unequal((2, 5, 3, 8), 1)
P = {"q": unequal((8, 8), 2, 0.3), "k": unequal((8, 8), 3, 0.3), "v": unequal((8, 8), 4, 0.3)}


def heads(p, x):
    return x @ p["q"], x @ p["k"], x @ p["v"]


def attention(p, x, einsum=jnp.einsum):
    q, k, v = heads(p, x)
    return einsum(VALUES, jax.nn.softmax(einsum(SCORES, q, k)), v)


def by_hand(p, x):
    """What the rules should make of it."""
    return attention(p, x, lambda s, a, b: ops.einsum(s, a, b, spec=INT8))


def test_off_by_default():
    plan = jq.make_plan(attention, P, X, rules=[jq.Rule(".*", INT8)])
    assert plan.products == ()
    assert list(plan) == ["k", "q", "v"]


def test_the_named_ones_run_quantized():
    both = jq.make_plan(attention, P, X, rules=[jq.OpRule("->", INT8)])
    assert [p.name for p in both.products] == [f"{SCORES}/dot_general", f"{VALUES}/dot_general"]
    assert both.products[0].shapes == ((2, 5, 3, 8), (2, 5, 3, 8))
    got = jax.jit(jq.quantized(attention, both))(P, X)
    close(got, jax.jit(by_hand)(P, X), 1e-6)
    assert np.max(np.abs(got - attention(P, X))) > 1e-4  # it does something
    scores = jq.make_plan(attention, P, X, rules=[jq.OpRule(SCORES, INT8), jq.OpRule("->", None)])
    assert [p.name for p in scores.products] == [f"{SCORES}/dot_general"]
    one = lambda s, a, b: ops.einsum(s, a, b, spec=INT8) if s == SCORES else jnp.einsum(s, a, b)  # noqa: E731
    close(jax.jit(jq.quantized(attention, scores))(P, X), jax.jit(lambda p, x: attention(p, x, one))(P, X), 1e-6)


def test_with_weights_and_gradients():
    plan = jq.make_plan(attention, P, X, rules=[jq.Rule("q|v", recipes.w8a16()), jq.OpRule("->", INT8)])
    assert len(plan) == 2
    run = jq.quantized(attention, plan, precision="highest")
    qparams = jq.quantize_params(P, plan)
    frozen = jq.dequantize_params(qparams)
    trained = jax.jit(run)(P, X)
    close(trained, jax.jit(run)(qparams, X), 1e-5)
    close(trained, jax.jit(by_hand)(frozen, X), 1e-4)
    slope = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(run(p, X)))))(P)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(by_hand(p, X)))))(frozen)
    close(slope, expected, 1e-3)


CALLS = {
    "jit": lambda p, x: jax.jit(attention)(p, x),
    "remat": lambda p, x: jax.checkpoint(lambda x: attention(p, x))(x),
    "scan": lambda p, x: lax.scan(lambda x, _: (attention(p, x), None), x, None, length=2)[0],
    "while": lambda p, x: lax.fori_loop(0, 2, lambda i, x: attention(p, x), x),
    "cond": lambda p, x: lax.cond(jnp.sum(x) > 0, lambda: attention(p, x), lambda: 2 * attention(p, x)),
    "named": lambda p, x: jax.named_scope("attn")(lambda: attention(p, x))(),
    "vmap": lambda p, x: jax.vmap(lambda x: attention(p, x[None])[0])(x),
    "no weights": lambda p, x: jnp.einsum("bqhd,bkhd->bhqk", x, jax.jit(lambda: 2 * x)()) * jnp.sum(p["q"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_inside_of_calls(name):
    fn = CALLS[name]
    plan = jq.make_plan(fn, P, X, rules=[jq.OpRule("->", INT8)])
    assert len(plan.products) == (1 if name == "no weights" else 2), str(plan)
    assert all(("attn/" in p.name) == (name == "named") for p in plan.products)
    spied = lambda s, a, b: ops.einsum(s, a, b, spec=INT8)  # noqa: E731
    expected = {
        "scan": lambda: by_hand(P, by_hand(P, X)),
        "while": lambda: by_hand(P, by_hand(P, X)),
        "cond": lambda: by_hand(P, X) * jnp.where(jnp.sum(X) > 0, 1, 2),
        "no weights": lambda: spied(SCORES, X, 2 * X) * jnp.sum(P["q"]),
    }.get(name, lambda: by_hand(P, X))
    close(jax.jit(jq.quantized(fn, plan))(P, X), jax.jit(expected)(), 2e-3 if name in ("scan", "while") else 1e-5)


@pytest.mark.parametrize("model", [m for m in MODELS if m[1] == "transformer"], ids="-".join)
def test_attention_of_models(model):
    """Scores and values of a scanned, rematerialized stack, under the names that the frameworks give."""
    fn, params, x = MODELS[model]()
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", INT8), jq.OpRule("b.hd", INT8)])
    assert len(plan.products) == 2
    qparams = jq.quantize_params(params, plan)
    run = jax.jit(jq.quantized(fn, plan))
    close(run(qparams, x), run(params, x), 1e-5)
    close(run(qparams, x), fn(params, x), 0.1)


def test_plan_says_so():
    plan = jq.make_plan(attention, P, X, rules=[jq.OpRule(SCORES, INT8)])
    assert f"{SCORES}/dot_general product" in " ".join(str(plan).split())
    assert "int8 x int8" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan
    rule = jq.OpRule("a", INT8)
    assert jq.OpRule.from_json(rule.to_json()) == rule


def test_replaced_derivatives_are_noted():
    @jax.custom_vjp
    def own(q, k):
        return jnp.einsum("qd,kd->qk", q, k)

    own.defvjp(lambda q, k: (own(q, k), None), lambda _, g: (g, g))
    fn = lambda p, x: own(x @ p["q"], x)  # noqa: E731
    plan = jq.make_plan(fn, P, X[0, 0], rules=[jq.OpRule("qd", INT8)])
    assert "derivative rule of its own" in " ".join(str(plan).split())


def test_refusals():
    with pytest.raises(jq.QuantError, match=r"OpRule matches no product.*bqhd"):
        jq.make_plan(attention, P, X, rules=[jq.OpRule("bqhd->", INT8)])
    with pytest.raises(jq.QuantError, match="has no products"):
        jq.make_plan(lambda p, x: x @ p["q"], P, X, rules=[jq.OpRule(".*", INT8)])
    with pytest.raises(jq.QuantError, match="only parameters"):
        untyped.quantize_params(P, [jq.OpRule(".*", INT8)])
    with pytest.raises(jq.QuantError, match="both operands"):
        jq.OpRule(".*", recipes.w8a16())
    with pytest.raises(jq.QuantError, match="dynamic"):
        jq.OpRule(".*", recipes.w8a8(static=True))
    plan = jq.make_plan(attention, P, X, rules=[jq.OpRule(SCORES, INT8)])
    with pytest.raises(jq.QuantError, match="planned products are not computed"):
        jq.quantized(lambda p, x: x @ p["q"], plan)(P, X)

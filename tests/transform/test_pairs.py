"""Scales that move between parameters: found from the trace, and moving them changes nothing."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snippets

import jaxquant as jq
from jaxquant import recipes


def filled(shapes):
    """Parameters of these shapes, with channels of unequal magnitude; made without compiling anything."""
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(1.0, 0.5, s.shape) * np.exp(np.arange(s.shape[-1]) / s.shape[-1])  # noqa: E731
    return jax.tree.map(lambda s: np.asarray(draw(s), s.dtype), shapes)


def parameters(model, x):
    with jax.numpy_rank_promotion("allow"):
        return filled(jax.eval_shape(model.init, jax.random.key(0), x)["params"])


def pairs_of(fn, params, *args, rules="kernel"):
    """The pairs as text; each is shown to preserve the function, with scales over two orders of magnitude."""
    plan = jq.make_plan(fn, params, *args, rules=[jq.Rule(rules, recipes.w8a8())])
    pairs = jq.invariances.scale_pairs(fn, plan, params, *args)
    moved = params
    for i, pair in enumerate(pairs):
        scale = jnp.exp(jax.random.normal(jax.random.key(i), (*pair.stack, pair.channels)))
        moved = jq.invariances.rescale(moved, pair, scale)
    run = jax.jit(fn)
    expected = run(params, *args)
    np.testing.assert_allclose(run(moved, *args), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    return {str(pair).rpartition(" (")[0] for pair in pairs}


def dense(*shapes):
    return filled({f"{'abcdef'[i]}_kernel": jax.ShapeDtypeStruct(s, np.float32) for i, s in enumerate(shapes)})


def test_norms_give_to_all_that_read_them():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(name="norm")(x)
            return (
                nn.Dense(8, name="q")(y) + nn.Dense(8, name="k")(y) + nn.Dense(8, name="v")(nn.RMSNorm(name="rms")(x))
            )

    model, x = Block(), jax.random.normal(jax.random.key(9), (3, 4))
    with jax.numpy_rank_promotion("allow"):
        params = parameters(model, x)
        found = pairs_of(lambda p, x: model.apply({"params": p}, x), params, x)
    assert found == {
        "norm/bias[-1]^-1, norm/scale[-1]^-1 -> k/kernel[-2], q/kernel[-2]",
        "rms/scale[-1]^-1 -> v/kernel[-2]",
    }


def test_a_residual_keeps_its_scale():
    params = dense((4, 4), (4, 4))

    def fn(p, x):
        y = jax.nn.relu(x @ p["a_kernel"])
        return y @ p["b_kernel"] + y

    assert pairs_of(fn, params, jnp.ones((2, 4))) == set()


@pytest.mark.parametrize(
    "between, passes",
    [
        (jax.nn.relu, True),
        (jax.nn.leaky_relu, True),
        (lambda y: jnp.where(y > 0, y, 0.1 * y), True),
        (lambda y: jnp.abs(y)[:, ::1].astype(jnp.float32) * 3.0, True),
        (lambda y: jnp.maximum(y, 1.0), False),
        (lambda y: y + 1.0, False),
        (jax.nn.gelu, False),
        (lambda y: y * y, False),
        (lambda y: y[:, ::-1], False),
        (lambda y: jnp.cumsum(y, axis=1), False),
        (lambda y: jnp.cumsum(y, axis=0), True),
        (lambda y: y / jnp.sum(jnp.abs(y), axis=1, keepdims=True), False),
        (lambda y: jnp.sort(y, axis=0), False),
        (lambda y: jnp.concatenate([y, y]), True),
        (lambda y: jax.lax.cond(y[0, 0] > 1, lambda y: y, lambda y: 2 * y, y), False),
        (lambda y: jax.lax.cond(jnp.bool_(True), jnp.zeros_like, lambda y: 2 * y, y), True),
        (lambda y: jax.lax.cond(jnp.bool_(True), lambda y: y, lambda y: y + 1, y), False),
        (lambda y: jax.lax.cond(jnp.bool_(True), lambda y: y, jnp.ones_like, y), False),
        (lambda y: jax.lax.switch(jnp.int32(1), [jnp.negative, jax.nn.relu, jnp.abs], y), True),
        (jax.checkpoint(jax.nn.relu), True),
        (lambda y: y.reshape(2, 3, 2).transpose(2, 1, 0).reshape(6, 2).T, False),
        (lambda y: y.reshape(2, 2, 3).transpose(1, 2, 0).reshape(6, 2).T, True),
    ],
)
def test_what_a_scale_passes(between, passes):
    params, x = dense((4, 6), (6, 3)), jax.random.normal(jax.random.key(8), (2, 4))
    found = pairs_of(lambda p, x: between(x @ p["a_kernel"]) @ p["b_kernel"], params, x)
    assert found == ({"a_kernel[-1]^-1 -> b_kernel[-2]"} if passes else set())


def test_gates_and_values():
    """A gated layer scales where it is linear; attention gives the scale of its values to the projection."""

    def fn(p, x):
        q, k, v = (jnp.reshape(x @ p[f"{n}_kernel"], (5, 2, 3)) for n in "abc")
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k))
        y = jnp.einsum("hqk,khd->qhd", weights, v).reshape(5, 6) @ p["d_kernel"]
        return (jax.nn.silu(y @ p["e_kernel"]) * (y @ p["e_up"])) @ p["f_kernel"]

    params = dense((6, 6), (6, 6), (6, 6), (6, 6), (6, 4), (4, 2))
    params["e_up"] = params["e_kernel"] + 1.0
    found = pairs_of(fn, params, jax.random.normal(jax.random.key(8), (5, 6)), rules="_")
    assert found == {
        "c_kernel[-1]^-1 -> d_kernel[-2]",
        "d_kernel[-1]^-1 -> e_kernel[-2], e_up[-2]",
        "e_up[-1]^-1 -> f_kernel[-2]",
    }


def test_convolutions():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3), name="first")(x)), (2, 2), (2, 2))
            return nn.Conv(3, (3, 3), name="second")(x)

    model, x = Net(), jax.random.normal(jax.random.key(9), (1, 6, 6, 2))
    with jax.numpy_rank_promotion("allow"):
        params = parameters(model, x)
        found = pairs_of(lambda p, x: model.apply({"params": p}, x), params, x)
    assert found == {"first/bias[-1]^-1, first/kernel[-1]^-1 -> second/kernel[-2]"}


def test_stacks_are_scaled_layer_by_layer():
    params = dense((2, 4, 6), (2, 6, 4))

    def fn(p, x):
        layer = lambda x, w: (jax.nn.relu(x @ w["a_kernel"]) @ w["b_kernel"], None)  # noqa: E731
        return jax.lax.scan(layer, x, p)[0]

    assert pairs_of(fn, params, jnp.ones((2, 4))) == {"a_kernel[-1]^-1 -> b_kernel[-2]"}


def experts(p, x, share):
    """Experts one after another read one input, those that no row has chosen not at all."""
    y = x * p["gain"]

    def add(total, expert):
        share, w = expert
        one = lambda y: jax.nn.relu(jnp.where(share[:, None] == 0, 0, y) @ w["up"]) @ w["down"] * share[:, None]  # noqa: E731
        return total + jax.lax.cond(jnp.any(share != 0), one, jnp.zeros_like, y), None

    return jax.lax.scan(add, jnp.zeros_like(x), (share, p["experts"]))[0]


def test_layers_that_read_one_input_share_its_scale():
    shapes = {"gain": (1, 4), "experts": {"up": (3, 4, 6), "down": (3, 6, 4)}}
    params = filled(
        jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple)
    )
    x, share = jax.random.normal(jax.random.key(8), (5, 4)), jnp.array([[0.5, 0, 1, 0, 0], [0.5, 1, 0, 0, 2], [0] * 5])
    assert pairs_of(experts, params, x, share, rules="up|down") == {
        "experts/up[-1]^-1 -> experts/down[-2]",
        "gain[-1]^-1 -> experts/up[-2]",
    }


def test_a_transformer_in_a_scan(monkeypatch):
    monkeypatch.syspath_prepend(str(snippets.ROOT / "examples"))
    import plain_transformer

    model = plain_transformer.Transformer(vocabulary=16, width=8, layers=3, context=8)
    tokens = jnp.arange(8)[None]
    with jax.numpy_rank_promotion("allow"):
        params = parameters(model, tokens)
        found = pairs_of(lambda p, t: model.apply({"params": p}, t), params, tokens, rules="qkv|kernel|embedding")
    sys.modules.pop("plain_transformer", None)
    assert found == {
        "blocks/LayerNorm_0/bias[-1]^-1, blocks/LayerNorm_0/scale[-1]^-1 -> blocks/qkv[-2]",
        "blocks/LayerNorm_1/bias[-1]^-1, blocks/LayerNorm_1/scale[-1]^-1 -> blocks/up/kernel[-2]",
    }


def test_used_whole_and_by_layer():
    params = {"w": jnp.ones((2, 3, 3)), "v": jnp.ones((3, 3))}

    def fn(p, x):
        x, _ = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w) @ p["v"], None), x, p["w"])
        return x + p["w"].sum()

    plan = jq.make_plan(fn, params, jnp.ones((2, 3)), rules=[jq.Rule("v", recipes.w8a8())])
    assert jq.invariances.scale_pairs(fn, plan, params, jnp.ones((2, 3))) == ()


def test_a_parameter_that_a_branch_returns_is_left_alone():
    """It could be used whole after it was used layer by layer, which no one scale serves."""
    params = dense((4, 6), (4, 6), (6, 3))

    def fn(p, x):
        w = jax.lax.cond(x[0, 0] > 0, lambda: p["a_kernel"], lambda: p["b_kernel"])
        return jax.nn.relu(x @ w) @ p["c_kernel"]

    assert pairs_of(fn, params, jnp.ones((2, 4)), rules="c_kernel") == set()


def test_a_scale_of_the_wrong_shape():
    params = dense((4, 6), (6, 3))
    fn = lambda p, x: (x @ p["a_kernel"]) @ p["b_kernel"]  # noqa: E731
    plan = jq.make_plan(fn, params, jnp.ones((2, 4)), rules=[jq.Rule("b", recipes.w8a8())])
    (pair,) = jq.invariances.scale_pairs(fn, plan, params, jnp.ones((2, 4)))
    with pytest.raises(jq.QuantError, match=r"rescale: the scale does not fit the pair; got shape=\(3,\)"):
        jq.invariances.rescale(params, pair, jnp.ones(3))

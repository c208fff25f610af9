"""Orthogonal matrices that move between parameters: found from the trace, and moving them changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_files import GOLDEN
from narrowed import present

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec
from jaxquant.ptq.bases import Orthogonal, orthogonal
from jaxquant.transform.learning import cayley

RNG = np.random.default_rng(0)
INT4 = OpSpec(QuantSpec("int4"))


def arrays(**shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def groups_of(fn, params, *args, rules="."):
    """The groups as text; random matrices in all of them are shown to preserve the function."""
    plan = jq.make_plan(fn, params, *args, rules=[jq.Rule(rules, INT4)])
    groups = jq.invariances.rotation_groups(fn, plan, params, *args)
    if not groups:
        return set()
    moved = params
    for group in groups:
        moved = jq.invariances.rotate(
            moved, group, jnp.asarray(np.linalg.qr(RNG.normal(size=(group.size,) * 2))[0], jnp.float32)
        )
    expected = fn(params, *args)
    np.testing.assert_allclose(fn(moved, *args), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))
    return {str(group).rpartition(" (")[0] for group in groups}


X, AB = jax.device_put(np.asarray(RNG.normal(size=(2, 4)), jnp.float32)), arrays(a=(4, 8), b=(8, 6), c=(1, 8))
CHAIN = {"a[-1] -> b[-2]"}


def normed(y):
    return y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)


@pytest.mark.every
@pytest.mark.parametrize(
    "between, passes",
    [
        (lambda y: y * 3.0 - 0.0 + y, True),
        (normed, True),
        (lambda y: y * jax.lax.rsqrt(jnp.einsum("...i,...i->...", y, y)[:, None]), True),
        (lambda y: jnp.where(jnp.arange(2)[:, None] > 0, y, 0.0), True),
        (lambda y: jnp.cumsum(y, axis=0), True),
        (lambda y: jnp.concatenate([y, 2 * y]), True),
        (lambda y: y[::-1].astype(jnp.float32)[:1], True),
        (lambda y: jax.lax.dynamic_update_slice(jnp.zeros((3, 8), y.dtype), y, (1, 0)), True),
        (jax.checkpoint(normed), True),
        (lambda y: jax.lax.cond(jnp.sum(X) > 0, lambda y: 2 * y, jnp.zeros_like, y), True),
        (lambda y: jax.lax.cond(jnp.sum(X) > 0, lambda y: 2 * y, jax.nn.relu, y), False),
        (lambda y: jax.nn.softmax(y @ y.T) @ y, True),
        (jax.nn.relu, False),
        (lambda y: y * y, False),
        (lambda y: y + 1.0, False),
        (lambda y: y - jnp.mean(y, axis=-1, keepdims=True), False),
        (lambda y: y * jnp.arange(8.0)[None], False),
        (lambda y: y[:, ::-1], False),
        (lambda y: jnp.where(jnp.arange(8)[None] > 3, y, 0.0), False),
        (lambda y: jnp.cumsum(y, axis=1), False),
        (lambda y: jnp.concatenate([y[:, :4], y[:, 4:]], axis=1), False),
        (lambda y: jax.lax.cond(y[0, 0] > 0, lambda y: y, lambda y: 2 * y, y), False),
        (lambda y: y / y[:, :1], False),
        (lambda y: jax.lax.dynamic_update_slice(jnp.ones((3, 8), y.dtype), y, (1, 0)), False),
        (lambda y: y * jnp.sum(y * y, axis=0, keepdims=True), False),
    ],
)
def test_what_a_matrix_passes(between, passes):
    found = groups_of(lambda p, x: between(x @ p["a"]) @ p["b"], AB, X)
    assert found == (CHAIN if passes else set())


def test_biases_turn_along_and_gains_stop_it_unless_they_are_one():
    fn = lambda p, x: (normed(x @ p["a"] + p["c"]) * p["g"]) @ p["b"]  # noqa: E731
    assert groups_of(fn, {**AB, "g": np.full((1, 8), 2.0, np.float32)}, X) == {"a[-1], c[-1] -> b[-2]"}
    params = {**AB, "g": np.exp(AB["c"])}
    assert groups_of(fn, params, X) == set()
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule("b", INT4)])
    folded = jq.invariances.fold_gains(params, jq.invariances.scale_pairs(fn, plan, params, X))
    np.testing.assert_array_equal(folded["g"], np.ones((1, 8)))
    np.testing.assert_allclose(fn(folded, X), fn(params, X), rtol=1e-5, atol=1e-5)
    assert groups_of(fn, folded, X) == {"a[-1], c[-1] -> b[-2]"}


def test_heads_are_turned_one_by_one():
    def fn(p, x):
        y = jnp.transpose((x @ p["a"]).reshape(2, 2, 4), (1, 0, 2))
        y = jnp.repeat(y, 2, axis=0) * jnp.arange(1.0, 5.0)[:, None, None]  # shared by two heads each
        return jnp.transpose(y, (1, 0, 2)).reshape(2, 16) @ p["b"]

    params = {"a": AB["a"], "b": RNG.normal(size=(16, 3)).astype(np.float32)}
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule("b", INT4)])
    assert [group.size for group in jq.invariances.rotation_groups(fn, plan, params, X)] == [4]
    assert groups_of(fn, params, X) == CHAIN


def decoder(p, tokens):
    """A stack of attention and gated layers around a residual stream, scanned."""

    def layer(x, w):
        y = normed(x) * w["gain"][None]
        q, k = (jnp.cos(y @ w[name]) for name in ("q", "k"))  # no basis may pass
        v = (y @ w["v"]).reshape(-1, 2, 4)
        heads = jnp.einsum("ts,shd->thd", jax.nn.softmax(q @ k.T), v).reshape(-1, 8)
        x = x + heads @ w["o"]
        y = normed(x)
        return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(layer, p["table"][tokens], p["layers"])
    return normed(x) @ p["head"]


SHAPES = dict(
    q=(8, 4), k=(8, 4), v=(8, 8), o=(8, 8), gate=(8, 6), up=(8, 6), down=(6, 8), gain=(8,)
)  # fmt: skip


def stacked_decoder():
    layers = arrays(**{name: (2, *shape) for name, shape in SHAPES.items()})
    return {**arrays(table=(10, 8), head=(8, 10)), "layers": layers}


def test_the_residual_stream_of_a_scanned_decoder():
    params, tokens = stacked_decoder(), jnp.arange(5)
    fn = jax.jit(decoder)
    plan = jq.make_plan(decoder, params, tokens, rules=[jq.Rule("head|layers/[^g]|gate", INT4)])
    pairs = jq.invariances.scale_pairs(decoder, plan, params, tokens)
    folded = jq.invariances.fold_gains(params, pairs)
    residual, values = jq.invariances.rotation_groups(decoder, plan, folded, tokens)
    if residual.size != 8:
        residual, values = values, residual
    turned = {f"layers/{name}" for name in ("q", "k", "v", "gate", "up")}
    assert {path for path, _ in residual.sinks} == {*turned, "head"}
    assert {path for path, _ in residual.others} == {"table", "layers/o", "layers/down"}
    assert (values.sinks, values.others, values.size) == ((("layers/o", -2),), (("layers/v", -1),), 4)
    moved = folded
    for group in (residual, values):
        moved = jq.invariances.rotate(moved, group, group.random(jax.random.key(3)))
    assert not np.allclose(moved["table"], params["table"], atol=0.1)
    expected = fn(params, tokens)
    np.testing.assert_allclose(fn(moved, tokens), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_a_llama():
    model, ids = jq.models.load(GOLDEN / "base"), jnp.arange(12)[None]
    fn = jax.jit(lambda params, ids: jq.models.logits(model.config, params, ids))
    with jax.numpy_rank_promotion("allow"):
        plan = jq.make_plan(fn, model.params, ids, rules=[jq.Rule("proj.weight|lm_head", INT4)])
        folded = jq.invariances.fold_gains(model.params, jq.invariances.scale_pairs(fn, plan, model.params, ids))
        groups = jq.invariances.rotation_groups(fn, plan, folded, ids)
        assert sorted(group.size for group in groups) == [32, 32, 128]
        moved = folded
        for i, group in enumerate(groups):
            moved = jq.invariances.rotate(moved, group, group.random(jax.random.key(i)))
        expected = fn(model.params, ids)
        np.testing.assert_allclose(fn(moved, ids), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.slow  # the doctest of learn_rotations is the fast one
def test_learned_matrices_stay_orthogonal_and_lower_the_error_fused_and_online():
    """Channels of unequal size, at 4 bits in weights and activations; ``b`` is fused with a, ``d`` is online."""
    rng = np.random.default_rng(1)
    shapes = dict(a=(32, 64), b=(64, 48), d=(48, 6))
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(256, 32)).astype(np.float32)
    params["a"] *= np.exp(1.5 * rng.normal(size=64)).astype(np.float32)
    fn = lambda p, x: jax.nn.relu((x @ p["a"]) @ p["b"]) @ p["d"]  # noqa: E731
    both = OpSpec(QuantSpec("int4"), QuantSpec("int4"))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule("b|d", both)])
    (group,) = jq.invariances.rotation_groups(fn, plan, params, x)
    start = {group: group.random(jax.random.key(0)), "d": jnp.asarray(orthogonal(48))}
    first, *_, last = jq.invariances.learn_rotations(fn, plan, params, start, [x] * 60, rate=0.05)
    assert float(last.loss) < 0.7 * float(first.loss)
    for matrix in last.matrices.values():
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)
    bases = {"d": Orthogonal(last.matrices["d"])}
    moved = jq.invariances.precondition_params(jq.invariances.rotate(params, group, last.matrices[group]), plan, bases)
    run = jq.invariances.precondition(fn, plan, bases)
    expected = fn(params, x)
    np.testing.assert_allclose(run(moved, x), expected, rtol=0, atol=1e-5 * float(np.abs(expected).max()))


def test_a_cayley_step_is_a_rotation():
    skew = jnp.asarray(RNG.normal(size=(6, 6)), jnp.float32)
    r = cayley(jnp.eye(6), skew - skew.T)
    np.testing.assert_allclose(r @ r.T, np.eye(6), atol=1e-5)
    assert np.linalg.det(r) == pytest.approx(1, abs=1e-4)


def test_refusals():
    fn = lambda p, x: (x @ p["a"]) @ p["b"]  # noqa: E731
    plan = jq.make_plan(fn, AB, X, rules=[jq.Rule("b", INT4)])
    (group,) = jq.invariances.rotation_groups(fn, plan, AB, X)
    with pytest.raises(jq.QuantError, match=r"rotate: the matrix does not fit the group; got shape=\(4, 4\)"):
        jq.invariances.rotate(AB, group, jnp.eye(4))
    done = {**AB, "b": jq.quantize(AB["b"], present(INT4.weight), reduce_axes=(-2,))}
    with pytest.raises(jq.QuantError, match="rotate at b: the parameter is quantized already"):
        jq.invariances.rotate(done, group, jnp.eye(8))
    with pytest.raises(jq.QuantError, match="learn_rotations: there is nothing to learn"):
        next(jq.invariances.learn_rotations(fn, plan, AB, {}, [X]))

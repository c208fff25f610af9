"""Trees of QTensors: JAX's own functions keep them whole; arithmetic that reaches codes is refused at their use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import promotes
from narrowed import instance

import jaxquant as jq
from jaxquant import QuantError, QuantSpec

QTYPES = ("int8", "int4", "nf4", "float8_e4m3fn", "mxfp4", "nvfp4")
CHANGES = {
    "half": lambda a: a * 0.5,
    "cast": lambda a: a.astype(jnp.bfloat16),
    "average": lambda a: 0.9 * a + 0.1 * a,
    "root": lambda a: jnp.sqrt(jnp.abs(a)),
}


def quantized(qtype, shape=(32, 8)):
    w = jnp.linspace(-2.0, 3.0, 256).reshape(shape)
    return jq.quantize(w, QuantSpec(qtype), reduce_axes=(-2,))


@promotes
@pytest.mark.parametrize("qtype", QTYPES)
def test_arithmetic_on_codes_is_refused(qtype):
    q, x = quantized(qtype), jnp.ones((2, 32))
    params = {"w": q}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    run = jq.quantized(fn)
    for change in CHANGES.values():
        changed = jax.tree.map(change, params)
        for use in (
            lambda c=changed: c["w"].dequantize(),
            lambda c=changed: run(c, x),
            lambda c=changed: jax.jit(run)(c, x),
        ):
            with pytest.raises(QuantError, match="something has computed with them"):
                use()
    with pytest.raises(QuantError, match="something has computed with them"):
        jax.jit(lambda p: run(jax.tree.map(CHANGES["half"], p), x))(params)


@pytest.mark.parametrize("qtype", QTYPES)
def test_what_jax_makes_of_trees(qtype):
    q = quantized(qtype)
    want = np.asarray(q.dequantize())
    same = (
        jax.tree.map(lambda a: a, q),
        jax.tree.map(np.asarray, q),
        jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, q)),
        jax.device_put(q, jax.devices()[0]),
        jax.jit(lambda q: q)(q),
        jax.tree.map(lambda a: jnp.stack([a, a])[1], q),
        jax.tree.map(lambda a: a[0], jax.vmap(lambda q, _: q, (None, 0))(q, jnp.zeros(2))),
        jax.lax.scan(lambda c, _: (c, None), q, length=2)[0],
        jax.lax.cond(True, lambda: q, lambda: q),
    )
    for other in same:
        np.testing.assert_array_equal(np.asarray(other.dequantize()), want)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    assert stacked.shape == (2, *q.shape)
    np.testing.assert_array_equal(np.asarray(jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)[1])[1], want)
    shapes = jax.eval_shape(lambda: q)
    assert (shapes.shape, shapes.nbytes) == (q.shape, q.nbytes)
    for nothing in (lambda a: None, lambda a: a.shape, lambda a: jnp.isnan(a).any(), jnp.zeros_like, type):
        assert isinstance(jax.tree.map(nothing, q), jq.QTensor)


def flattened(a):
    return a.reshape(-1)


def first(a):
    return a[0]


def one(a):
    return a.reshape(-1)[0]


def numbers(a):
    return np.asarray(a).tolist()


def nothing(a):
    return None


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("change", [flattened, first, numbers, nothing, one])
def test_leaves_without_their_axes_are_refused_at_their_path(qtype, change):
    """As of a tree that was taken off its devices twice, or written as lists: every use says so, with the path."""
    fn, params, x = lambda p, x: x @ p["layer"]["w"], {"layer": {"w": quantized(qtype)}}, jnp.ones((2, 32))
    floats = {"layer": {"w": jnp.ones((32, 8))}}
    plan = jq.make_plan(fn, floats, x, rules=[jq.Rule("w", jq.OpSpec(QuantSpec(qtype)))])
    changed = jax.tree.map(change, params)
    with pytest.raises(QuantError, match="something has computed with them"):
        changed["layer"]["w"].dequantize()
    for use in (
        lambda: jq.quantized(fn)(changed, x),
        lambda: jq.quantized(fn, plan)(changed, x),
        lambda: jq.make_plan(fn, changed, x, rules=[jq.Rule("w", "w8a8")]),
        lambda: jq.quantize_params(changed, plan),
        lambda: jq.dequantize_params(changed),
    ):
        with pytest.raises(QuantError, match=r"at layer/w: its leaves are no .* something has computed with them"):
            use()


def test_leaves_that_do_not_fit_each_other():
    q = quantized("int4")
    assert q.checked() is q
    run = jq.quantized(lambda p, x: x @ p["w"])
    with pytest.raises(QuantError):
        run({"w": q.replace(codes=q.codes[:, :-1])}, jnp.ones((2, 32)))
    for broken in (
        q.replace(codes=q.codes[:, :-1]),
        q.replace(scale=instance(jax.Array, q.scale)[0]),
        q.replace(scale=jnp.ones((1, 5))),
    ):
        with pytest.raises(QuantError, match="something has computed with them"):
            broken.dequantize()


def test_the_way_to_do_it():
    """Half of a tree, where QTensors are leaves."""
    params = {"w": quantized("int8"), "b": jnp.ones(8)}
    halved = jax.tree.map(
        lambda a: a.replace(scale=instance(jax.Array, a.scale) * 0.5) if isinstance(a, jq.QTensor) else a * 0.5,
        params,
        is_leaf=lambda a: isinstance(a, jq.QTensor),
    )
    np.testing.assert_array_equal(halved["w"].dequantize(), params["w"].dequantize() * 0.5)

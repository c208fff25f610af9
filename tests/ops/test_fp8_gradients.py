"""Gradients in fp8, and gradients that are rounded stochastically."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from narrowed import present
from ops_reference import INTEGER, MATMUL, error, unequal

import jaxquant as jq
from jaxquant import QuantError, fake_quant, ops, recipes

PRODUCTS = {
    "x @ w": (MATMUL, (6, 16), (16, 5)),
    "x @ w.T": ((((1,), (1,)), ((), ())), (6, 16), (5, 16)),
    "batch": ((((2,), (1,)), ((0,), (0,))), (2, 4, 8), (2, 8, 3)),
}
STOCHASTIC = {name: recipe(rounding="stochastic") for name, recipe in
              (("int8", recipes.w8a8g8), ("fp8", recipes.fp8_train))}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.every
def test_the_formula(kind):
    """Scales of the operands go into g, which is rounded once to e5m2 for each product; codes are e4m3."""
    (numbers, *shapes), spec = PRODUCTS[kind], recipes.fp8_train()
    x, w = (unequal(i, shape) for i, shape in enumerate(shapes))
    y, pull = jax.vjp(lambda x, w: ops.dot_general(x, w, numbers, spec=spec), x, w)
    g = unequal(2, y.shape)
    product = functools.partial(lax.dot_general, dimension_numbers=numbers, precision="highest")
    (lc, rc), (lb, _) = numbers

    def parts(v, spec, contract):
        """Codes by ml_dtypes, and scales."""
        scale = np.max(np.abs(np.asarray(v)), axis=contract, keepdims=True) / np.float32(448)
        return jnp.asarray((np.asarray(v) / scale).astype(jnp.float8_e4m3fn).astype(np.float32)), jnp.asarray(scale)

    (cx, sx), (cw, sw) = parts(x, spec.act, lc), parts(w, spec.weight, rc)
    ones = [jnp.ones([1 if i in c else n for i, n in enumerate(v.shape)], v.dtype) for v, c in ((x, lc), (w, rc))]
    rows = x.ndim - len(lc) - len(lb)
    over_m, over_n = tuple(range(len(lb), len(lb) + rows)), tuple(range(len(lb) + rows, g.ndim))
    u = fake_quant(g * product(ones[0], sw), present(spec.grad), reduce_axes=over_n)
    v = fake_quant(g * product(sx, ones[1]), present(spec.grad), reduce_axes=over_m)
    want = jax.vjp(lambda x: product(x, cw), x)[1](u)[0], jax.vjp(lambda w: product(cx, w), w)[1](v)[0]
    for got, it in zip(pull(g), want, strict=True):
        assert np.asarray(got).any()
        assert error(got, it) <= INTEGER


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.every
def test_stochastic_rounding_is_right_on_average(name):
    """The mean over keys is the gradient of what the forward pass has computed, to three standard errors."""
    x, w, g, spec, n = unequal(3, (6, 16)), unequal(4, (16, 5)), unequal(5, (6, 5)), STOCHASTIC[name], 400

    def pull(key, spec=spec):
        return jax.vjp(lambda x, w: ops.dot_general(x, w, MATMUL, spec=spec, key=key), x, w)[1](g)

    found = jax.jit(jax.vmap(pull))(jax.random.split(jax.random.key(0), n))
    exact = pull(None, jq.OpSpec(spec.weight, spec.act))
    for each, it in zip(found, exact, strict=True):
        each = np.asarray(each, np.float64)
        spread = each.std(0)
        assert spread.any()
        assert np.abs(each.mean(0) - it).max() <= 4 * (spread / np.sqrt(n)).max() + 1e-6 * np.abs(it).max()
        assert len(np.unique(each.reshape(n, -1), axis=0)) > n / 2


def layers(spec):
    """A stack of layers in a scan, with remat, and its parameters, inputs and plan."""

    def fn(params, x):
        @jax.checkpoint
        def layer(x, w):
            return x + jnp.tanh(x @ w), None

        return lax.scan(layer, x, params["layers"])[0] @ params["head"]

    params = {"layers": 0.3 * unequal(6, (3, 8, 8)), "head": unequal(7, (8, 4))}
    x = unequal(8, (6, 8))
    return fn, params, x, jq.make_plan(fn, params, x, rules=[jq.Rule(".*", spec)])


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_step_is_deterministic_given_the_key(name):
    """Under jit, scan and remat; with another key another; the loss is the same with any, and without."""
    fn, params, x, plan = layers(STOCHASTIC[name])

    @jax.jit
    def step(params, key):
        return jax.value_and_grad(lambda p: jnp.sum(jq.quantized(fn, plan, key=key)(p, x) ** 2))(params)

    (a, ga), (b, gb), (c, gc) = (step(params, jax.random.key(i)) for i in (0, 0, 1))
    assert a == b == c
    forward = jax.jit(lambda p: jnp.sum(jq.quantized(fn, plan)(p, x) ** 2))
    np.testing.assert_allclose(a, forward(params), rtol=1e-6)
    plain = layers(jq.OpSpec(STOCHASTIC[name].weight, STOCHASTIC[name].act))[3]
    exact = jax.jit(jax.grad(lambda p: jnp.sum(jq.quantized(fn, plain)(p, x) ** 2)))(params)
    for path in params:
        np.testing.assert_array_equal(ga[path], gb[path])
        assert np.mean(np.asarray(ga[path]) != np.asarray(gc[path])) > 0.5
        assert error(ga[path], exact[path]) < (0.03 if name == "int8" else 0.3)  # 7 bits, and 2 of a significand


def test_layers_of_a_scan_have_noise_of_their_own():
    """Two equal layers in a row, that share a key: gradients that would be equal are rounded apart."""
    spec, w, x, g = STOCHASTIC["int8"], unequal(9, (8, 8)), unequal(10, (6, 8)), unequal(11, (6, 8))

    def layer(g, factor):
        pull = jax.vjp(lambda x: ops.dot_general(x, w, MATMUL, spec=spec, key=jax.random.key(0)), x)[1]
        return g, pull(g * factor)[0] / factor

    found = lax.scan(layer, g, jnp.array([1, 2, 4], jnp.float32))[1]  # powers of two: nothing but the noise differs
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_rows_on_several_devices():
    fn, params, x, plan = layers(STOCHASTIC["fp8"])
    rows = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("x",)), PartitionSpec("x"))
    step = jax.jit(jax.grad(lambda p, x, key: jnp.sum(jq.quantized(fn, plan, key=key)(p, x) ** 2)))
    alone, cut = (step(params, v, jax.random.key(0)) for v in (x, jax.device_put(x, rows)))
    for path in params:
        assert error(cut[path], alone[path]) < 0.3  # sums in another order may round to other codes


def test_refusals():
    fn, params, x, plan = layers(STOCHASTIC["int8"])
    run = jq.quantized(fn, plan)
    assert jax.eval_shape(run, params, x).shape == (6, 4)  # no gradient: no key
    with pytest.raises(QuantError, match="stochastic rounding of gradients needs a key"):
        jax.grad(lambda p: jnp.sum(run(p, x)))(params)
    with pytest.raises(QuantError, match="quantized: nothing is rounded with a key"):
        jq.quantized(fn, layers(recipes.w8a8g8())[3], key=jax.random.key(0))
    with pytest.raises(QuantError, match="quantized: nothing is rounded with a key"):
        jq.quantized(fn, key=jax.random.key(0))
    with pytest.raises(QuantError, match="key must be a random key"):
        jq.quantized(fn, plan, key=0)  # type: ignore[arg-type]
    with pytest.raises(QuantError, match="key must be one key"):
        jq.quantized(fn, plan, key=jax.random.split(jax.random.key(0)))
    with pytest.raises(QuantError, match="dot_general: nothing is rounded with a key"):
        ops.dot_general(x, params["head"], MATMUL, spec=recipes.w8a8(), key=jax.random.key(0))

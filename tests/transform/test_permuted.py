"""Weights whose columns are stored by group (act-order), under the transformation and everything it composes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from narrowed import present

import jaxquant as jq
from jaxquant.core.qtensor import from_codes
from jaxquant.ops import operands
from jaxquant.ops.rowwise import produced_codes

RNG = np.random.default_rng(0)
ROWS, COLUMNS, GROUP = 32, 64, 16
X = jax.device_put(np.asarray(RNG.normal(size=(4, COLUMNS)), jnp.float32))


def weight():
    codes = jax.device_put(np.asarray(RNG.integers(-8, 8, (ROWS, COLUMNS)), jnp.int8))
    magnitude = 10.0 ** RNG.integers(-2, 2, (ROWS, COLUMNS // GROUP))
    scale = jax.device_put(np.asarray(RNG.random(magnitude.shape) * magnitude, jnp.float32))
    order = jnp.asarray(RNG.permutation(COLUMNS)[None], jnp.int32)
    return from_codes(codes, scale, None, None, order, qtype="int4", dtype=jnp.float32)


def on_shards(weights, inputs, outputs, body):
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    return lambda w, x: jax.shard_map(body, mesh=mesh, in_specs=(weights, inputs), out_specs=outputs)(w, x)


P = PartitionSpec
FUNCTIONS = {
    "product": lambda w, x: x @ w.T,
    "rows": lambda w, x: x @ w[8:24].T,
    "columns": lambda w, x: x[:, :40] @ w[:, :40].T,
    "not contracted": lambda w, x: x[:, :ROWS] @ w,
    "lookup": lambda w, x: w[jnp.array([3, 1])] + 0 * x[:1, :COLUMNS],
    "heads": lambda w, x: jnp.einsum("bk,hdk->bhd", x, w.reshape(4, 8, COLUMNS)),
    "remat": jax.checkpoint(lambda w, x: jnp.tanh(x @ w.T)),
    "columns over devices": on_shards(
        P(None, "model"), P(None, "model"), P(), lambda w, x: jax.lax.psum(x @ w.T, "model")
    ),
    "rows over devices": on_shards(P("model", None), P(), P(None, "model"), lambda w, x: x @ w.T),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_as_the_dequantized_weight(name):
    fn, w = FUNCTIONS[name], weight()
    wanted = fn(w.dequantize(), X)
    found = jax.jit(jq.quantized(fn))(w, X)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))


def test_stacked():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight() for _ in range(3)))
    square = lambda w, x: jnp.tanh(x @ w.T) @ jnp.ones((ROWS, COLUMNS), jnp.float32) / ROWS  # noqa: E731
    scanned = lambda ws, x: jax.lax.scan(lambda c, w: (square(w, c), None), x, ws)[0]  # noqa: E731
    wanted = scanned(stacked.dequantize(), X)
    np.testing.assert_allclose(jax.jit(jq.quantized(scanned))(stacked, X), wanted, rtol=1e-3, atol=1e-4)
    mapped = jax.jit(jax.vmap(jq.quantized(FUNCTIONS["product"]), in_axes=(0, None)))(stacked, X)
    wanted = jnp.einsum("bk,lnk->lbn", X, stacked.dequantize())
    np.testing.assert_allclose(mapped, wanted, rtol=1e-4, atol=1e-4 * float(np.abs(wanted).max()))


def test_gradient_to_the_scales():
    """Straight through the permutation: the gradient of the float product of the dequantized weight."""
    w = weight()
    loss = lambda scale, run: run(w.replace(scale=scale), X).sum()  # noqa: E731
    found = jax.grad(loss)(w.scale, jq.quantized(FUNCTIONS["product"]))
    wanted = jax.grad(loss)(w.scale, lambda q, x: x @ q.dequantize().T)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("permuted", [True, False])
def test_a_permuted_activation_is_none_that_a_kernel_makes(permuted, monkeypatch):
    """A function of rows makes columns in their own order, which is not that of the codes."""
    made = []

    def recorded(x, inputs, **how):
        made.append(how)
        return produced_codes(x, inputs, **how)

    monkeypatch.setattr(operands, "produced_codes", recorded)
    x = jnp.concatenate([X] * 8)
    spec = jq.OpSpec(
        jq.QuantSpec("int4", granularity="per_group", group_size=GROUP), jq.QuantSpec("int8", granularity="per_channel")
    )
    w = weight() if permuted else jq.quantize(weight().dequantize(), present(spec.weight), reduce_axes=(-1,))
    plan = jq.make_plan(FUNCTIONS["product"], weight().dequantize(), x, rules=[jq.Rule(".*", spec)])
    jax.make_jaxpr(jq.quantized(lambda w, x: jnp.tanh(x) @ w.T, plan))(w, x)
    assert len(made) == (0 if permuted else 1)

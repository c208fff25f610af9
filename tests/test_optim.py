"""8-bit optimizers: steps and states of bitsandbytes; close to Optax's own in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ptq_cases import golden

import jaxquant as jq
from jaxquant import optim
from jaxquant.optim import Blocks

CASES = {
    "adam8bit": (optim.adam8bit(0.01), 2, 0.01),
    "adamw8bit": (optim.adamw8bit(0.003, 0.9, 0.95, weight_decay=0.1), 2, 0.003),
    "lion8bit": (optim.lion8bit(0.001, weight_decay=0.05), 1, 0.001),
    "sgd8bit": (optim.sgd8bit(0.01, weight_decay=0.01), 1, 0.01),
    "ademamix8bit": (optim.ademamix8bit(0.001), 3, 0.001),
}


def moments_of(state, name):
    found = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optim.State)) if
             isinstance(s, optim.State)]  # fmt: skip
    return found[0].moments[name]


def by_table(y, signed):
    """The code as bitsandbytes' CPU library finds it: through a table of 65536 entries on [-1, 1]."""
    table = optim._table(signed)
    middles = (table[:-1] + table[1:]) / np.float32(2)
    lookup = np.searchsorted(middles, np.linspace(-1, 1, 65536), side="left").astype(np.uint8)
    return jnp.asarray(lookup)[jnp.floor((y + 1) * 0.5 * 65535 + 0.5).astype(jnp.int32)]


@pytest.mark.parametrize("name", CASES)
def test_steps_and_states_are_those_of_bitsandbytes(name, monkeypatch):
    monkeypatch.setattr(optim, "_nearest", by_table)
    tx, count, _ = CASES[name]
    ref = golden(name)
    params = {size: jnp.asarray(ref[f"p0.{size}"]) for size in ("big", "small")}
    state, update = tx.init(params), jax.jit(tx.update)
    for t in (1, 2, 3):
        grads = {size: jnp.asarray(ref[f"grad{t}.{size}"]).astype(jnp.float32) for size in ("big", "small")}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if t in (1, 3):
            for size in ("big", "small"):
                if f"p{t}.{size}" in ref:
                    close = np.isclose(params[size], ref[f"p{t}.{size}"], rtol=1e-4, atol=1e-5)
                    assert np.mean(~close) < (2e-3 if size == "big" else 1e-9)  # as for the codes below
    # The file's states are those after three steps, under both of its names.
    theirs = [ref["s3.big.state1"].reshape(-1, 64, 68)[i] for i in range(max(count - 1, 1))]
    absmax = [ref["s3.big.absmax1"].reshape(-1, 17)[i] for i in range(max(count - 1, 1))]
    if count > 1:
        theirs, absmax = [*theirs, ref["s3.big.state2"]], [*absmax, ref["s3.big.absmax2"]]
    for m, codes, size in zip(moments_of(state, "big"), theirs, absmax, strict=True):
        np.testing.assert_allclose(m.absmax, size, rtol=1e-5)
        assert np.mean(np.asarray(m.codes) != codes) < 2e-3  # float32 rounding at the edges of the table's cells


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed):
    ref = golden("adam8bit")
    np.testing.assert_allclose(optim._table(signed), ref["qmap1" if signed else "qmap2"], rtol=1e-6)


def test_blocks_hold_what_they_can():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1000)), jnp.float32) * jnp.array([[1e-6], [1.0], [1e6]])
    b = Blocks.of(x, True)
    each = np.repeat(np.asarray(b.absmax), 256)[:3000].reshape(3, 1000)
    assert b.codes.shape == x.shape
    assert np.all(np.abs(b.real() - x) <= 0.0072 * each)  # half the widest step of the map
    np.testing.assert_array_equal(Blocks.of(jnp.zeros(5000), True).real(), 0)


def test_trains_like_adam():
    target = jnp.asarray(np.random.default_rng(0).normal(size=(80, 80)), jnp.float32)
    loss = lambda p: jnp.mean((p - target) ** 2)  # noqa: E731

    def run(tx):
        def step(carry, _):
            p, state = carry
            updates, state = tx.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        p = jnp.zeros_like(target)
        return float(loss(jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=200)[0][0])(p)))

    assert run(optim.adam8bit(0.02)) < 1.2 * run(optax.adam(0.02)) + 1e-3


def test_refusals():
    with pytest.raises(jq.QuantError, match="b2 must be in"):
        optim.adamw8bit(1e-3, b2=1.0)
    with pytest.raises(jq.QuantError, match="optim at n: only float parameters train"):
        optim.lion8bit(1e-3).init({"n": jnp.arange(3)})

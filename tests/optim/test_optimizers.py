"""Optimizers with quantized states: steps and states of bitsandbytes, laws of their storage, and where they lie."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_settings import donates, makes_nan, needs_jit, optax_promotes
from narrowed import instance, untyped
from ptq_cases import golden

import jaxquant as jq
from jaxquant import optim
from jaxquant.core.codec import nearest_codes
from jaxquant.core.qtypes import QTYPES
from jaxquant.optim import dynamic_maps, one_pass, registers, scale
from jaxquant.optim import moments as storage

CASES = {
    "adam8bit": (optim.adam8bit(0.01), 0.01),
    "adamw8bit": (optim.adamw8bit(0.003, 0.9, 0.95, weight_decay=0.1), 0.003),
    "lion8bit": (optim.lion8bit(0.001, weight_decay=0.05), 0.001),
    "sgd8bit": (optim.sgd8bit(0.01, weight_decay=0.01), 0.01),
    "ademamix8bit": (optim.ademamix8bit(0.001), 0.001),
    "rmsprop8bit": (optim.rmsprop8bit(0.003, 0.97, weight_decay=0.01), 0.003),
    "adagrad8bit": (optim.adagrad8bit(0.01, weight_decay=0.01), 0.01),
}
SIZES = ("big", "small")


def own(state):
    """The one `State` in a chain."""
    (found,) = [s for s in jax.tree.leaves(state, is_leaf=lambda s: isinstance(s, optim.State))
                if isinstance(s, optim.State)]  # fmt: skip
    return found


def middles(qtype):
    table = np.asarray(QTYPES[qtype].table, np.float32)
    return (table[:-1] + table[1:]) / np.float32(2)


def by_table(y, qtype):
    """The code as bitsandbytes' CPU library finds it: through a table of 65536 entries on [-1, 1]."""
    lookup = np.searchsorted(middles(qtype.name), np.linspace(-1, 1, 65536), side="left").astype(np.uint8)
    return jnp.asarray(lookup)[jnp.floor((jnp.clip(y, -1, 1) + 1) * 0.5 * 65535 + 0.5).astype(jnp.int32)]


def theirs(ref, t, p, qmaps) -> dict[str, Any]:
    """A state in the golden file as an entry of bitsandbytes' state dict; before the first step: zeros."""
    entry = {"step": t}
    for i in qmaps:
        state, absmax = ref[f"s3.big.state{i}"], ref[f"s3.big.absmax{i}"]
        entry |= {f"state{i}": state if t else state * 0, f"absmax{i}": absmax if t else absmax * 0}
        entry[f"qmap{i}"] = ref[f"qmap{i}"]
    return entry


@pytest.mark.parametrize("name", CASES)
@pytest.mark.every
def test_steps_and_states_are_those_of_bitsandbytes(name, monkeypatch):
    monkeypatch.setattr(storage, "nearest_codes", by_table)
    tx, ref = CASES[name][0], golden(name)
    qmaps = [i for i in (1, 2) if f"qmap{i}" in ref]
    params: Any = {size: jnp.asarray(ref[f"p0.{size}"]) for size in SIZES}
    small = {f"state{i}": np.zeros((2, 100) if name == "ademamix8bit" and i == 1 else 100, np.float32) for i in qmaps}
    states = {0: theirs(ref, 0, params["big"], qmaps), 1: {"step": 0, **small}}
    state, update = optim.from_bitsandbytes(states, tx.init(params), params, names=SIZES), jax.jit(tx.update)
    for t in (1, 2, 3):
        grads = {size: jnp.asarray(ref[f"grad{t}.{size}"]).astype(jnp.float32) for size in SIZES}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for size in SIZES:
            if f"p{t}.{size}" in ref:
                close = np.isclose(params[size], ref[f"p{t}.{size}"], rtol=1e-4, atol=1e-5)
                assert np.mean(~close) < (2e-3 if size == "big" else 1e-9)  # as for the codes below
    found = optim.to_bitsandbytes(state, params, names=SIZES)
    for key, want in theirs(ref, 3, params["big"], qmaps).items():
        got = found[0][key]
        if key.startswith("state"):
            assert np.mean(got != want) < 2e-3  # float32 rounding at the edges of the table's cells
        else:
            np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(found[1]["state1"], ref["s3.small.state1"], rtol=1e-5, atol=1e-9)


def test_their_state_dicts_are_read_to_the_bit():
    """Nested as new versions nest them; the other counts of a chain follow; what does not fit is refused."""
    ref, params = golden("adam8bit"), {"a": jnp.ones(100), "b": jnp.ones((64, 68))}
    tx = optim.adam8bit(optax.constant_schedule(0.01))
    entry = theirs(ref, 3, params["b"], (1, 2))
    step = {"step": entry.pop("step")}
    small = {"state1": np.ones(100, np.float32), "state2": np.ones(100, np.float32)}
    states = {0: {**step, "__bnb_optimizer_quant_state__": entry}, 1: {"step": 3, **small}}
    read = functools.partial(optim.from_bitsandbytes, names=("b", "a"))
    state = read(states, tx.init(params), params)
    for name, i in (("m", 1), ("v", 2)):
        q = own(state).moments[name]["b"]
        each = np.repeat(ref[f"s3.big.absmax{i}"], 256).reshape(64, 68)
        np.testing.assert_array_equal(
            np.asarray(q.dequantize()).reshape(64, 68), ref[f"qmap{i}"][ref[f"s3.big.state{i}"]] * each
        )
    assert [int(c) for c in jax.tree.leaves(state) if c.dtype == jnp.int32] == [3, 3]
    again = optim.to_bitsandbytes(state, params, names=("b", "a"))[0]
    for key, value in entry.items():
        np.testing.assert_array_equal(again[key], value)
    with pytest.raises(jq.QuantError, match="from_bitsandbytes at b: state2 is missing"):
        read({**states, 0: {"step": 3, "state1": entry["state1"], **{k: entry[k] for k in ("absmax1", "qmap1")}}},
             tx.init(params), params)  # fmt: skip
    with pytest.raises(jq.QuantError, match="qmap1 must be one of the two dynamic maps"):
        read({**states, 0: {**step, **entry, "qmap1": entry["qmap1"] * 2}}, tx.init(params), params)
    with pytest.raises(jq.QuantError, match="at b: absmax1 must be float32"):
        read({**states, 0: {**step, **entry, "absmax1": entry["absmax1"][:-1]}}, tx.init(params), params)
    with pytest.raises(jq.QuantError, match="parameters differ in their steps"):
        read({**states, 1: {"step": 2, **small}}, tx.init(params), params)
    with pytest.raises(jq.QuantError, match="states 0 to 1"):
        read({0: states[0]}, tx.init(params), params)
    with pytest.raises(jq.QuantError, match="names must be the paths"):
        optim.to_bitsandbytes(state, params, names=("b",))
    with pytest.raises(jq.QuantError, match="one quantized optimizer"):
        optim.to_bitsandbytes(optax.adam(0.1).init(params), params)
    with pytest.raises(jq.QuantError, match="at b: bitsandbytes has no such moments"):
        optim.to_bitsandbytes(optim.adam4bit(0.1).init(params), params)


@pytest.mark.slow
def test_bitsandbytes_goes_on_from_our_states(monkeypatch):
    """It loads what we write, and its next step is ours, to the codes that its table finds."""
    monkeypatch.setattr(storage, "nearest_codes", by_table)
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes.optim")
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=(2, 64, 64)).astype(np.float32)
    tx, first = optim.adam8bit(0.01), {"w": jnp.asarray(w)}
    update = jax.jit(tx.update)
    updates, state = update({"w": jnp.asarray(grads[0])}, jax.jit(tx.init)(first))
    params: Any = optax.apply_updates(first, updates)
    p = torch.nn.Parameter(torch.tensor(np.asarray(params["w"])))
    optimizer = bnb.Adam8bit([p], lr=0.01)
    entries = {i: {k: v if k == "step" else torch.tensor(v) for k, v in e.items()}
               for i, e in optim.to_bitsandbytes(state, params).items()}  # fmt: skip
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    p.grad = torch.tensor(grads[1])
    optimizer.step()
    updates, state = update({"w": jnp.asarray(grads[1])}, state)
    got: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(got["w"], p.detach().numpy(), rtol=1e-4, atol=1e-5)
    back = optim.from_bitsandbytes(optimizer.state_dict()["state"], state, params)
    for name in ("m", "v"):
        ours, its = (own(s).moments[name]["w"] for s in (state, back))
        assert np.mean(np.asarray(ours.codes) != np.asarray(its.codes)) < 2e-3  # float32 rounding, as above
        np.testing.assert_allclose(ours.scale, its.scale, rtol=1e-6)


@pytest.mark.parametrize("qtype", ["dynamic8", "udynamic8"])
@pytest.mark.every
def test_codes_are_the_nearest(qtype):
    """Of every float32 number in [-1, 1], those on a middle to the lower entry."""
    m = middles(qtype)
    near = np.concatenate([f(m, to).astype(np.float32) for f in (lambda x, _: x, np.nextafter) for to in (-2, 2)])
    bits = st.integers(0, int(np.float32(1).view(np.int32)))
    run = jax.jit(lambda y: nearest_codes(y, QTYPES[qtype]))

    @settings(max_examples=30)
    @given(st.lists(st.tuples(bits, st.booleans()), min_size=64, max_size=64))
    def law(drawn):
        y = np.asarray([b for b, _ in drawn], np.int32).view(np.float32)
        y = np.concatenate([np.where([s for _, s in drawn], -y, y), near, np.array([0, -0.0, 1, -1], np.float32)])
        np.testing.assert_array_equal(run(y), np.searchsorted(m, y, side="left"))

    law()


@pytest.mark.parametrize("shape", [(16, 512), (16, 2, 128), (3, 1700), (4100,), (4099,)])
@pytest.mark.every
def test_moments_are_the_nearest_of_their_blocks(shape):
    """Both schemes, blocks in row-major order, by NumPy; a block of zeros stays zeros."""
    x = np.random.default_rng(0).normal(size=shape) * np.exp(np.random.default_rng(1).normal(size=shape) * 3)
    x = x.astype(np.float32)
    x.reshape(-1)[:300] = 0
    for how, signed in itertools.product((optim.EIGHT_BITS, optim.FOUR_BITS), (True, False)):
        v = x if signed else x * x

        @jax.jit
        def run(v, how=how, signed=signed):
            zeros = how.zeros(v, "w", signed=signed)
            q = storage.stored(v, zeros)
            return zeros, q, storage.stored(v * 0, zeros), storage.real(q, shape)

        zeros, q, again, got = run(v)
        assert jax.tree.structure(q) == jax.tree.structure(zeros)
        assert jax.tree.all(jax.tree.map(np.array_equal, again, zeros))
        rows = np.pad(v.reshape(-1), (0, -v.size % how.block)).reshape(-1, how.block)
        absmax = np.abs(rows).max(1, keepdims=True)
        unit = rows * (np.float32(1) / np.where(absmax > 0, absmax, 1))
        if q.qtype == "uint4":
            want = np.clip(np.rint(unit * 16), 1, 16) / 16 * absmax
        else:
            table = np.asarray(QTYPES[q.qtype].table, np.float32)
            want = table[np.searchsorted(middles(q.qtype), unit, side="left")] * absmax
        assert got.shape == shape
        np.testing.assert_allclose(got, want.reshape(-1)[: x.size].reshape(shape), rtol=1e-6, atol=1e-36)
        assert q.nbytes <= rows.size * (1 + 4 / 256 if how is optim.EIGHT_BITS else 0.5 + 5 / 128)


def test_states_are_a_quarter_and_less():
    params = {"w": jnp.ones((512, 512)), "b": jnp.ones(512)}
    size = lambda tx: sum(x.nbytes for x in jax.tree.leaves(own(tx.init(params)).moments))  # noqa: E731
    floats = 2 * 4 * (512 * 512 + 512)
    assert size(optim.adam8bit(1e-3)) < 0.27 * floats
    assert size(optim.adam4bit(1e-3)) < 0.15 * floats


@makes_nan
def test_a_broken_moment_stays_visible():
    x = jnp.ones((16, 512)).at[2, 3].set(jnp.nan).at[5, 6].set(jnp.inf)
    for how in (optim.EIGHT_BITS, optim.FOUR_BITS):
        run = jax.jit(lambda x, how=how: storage.stored(x, how.zeros(x, "w", signed=True)))
        y = np.asarray(instance(jq.QTensor, run(x)).dequantize())
        assert not np.isfinite(y[2, 3])
        assert not np.isfinite(y[5, 6])
        np.testing.assert_array_equal(y[7], 1)


TRAINED = {
    "adam8bit": (optim.adam8bit(0.02), optax.adam(0.02)),
    "lion8bit": (optim.lion8bit(0.005), optax.lion(0.005, weight_decay=0.0)),
    "sgd8bit": (optim.sgd8bit(20.0), optax.sgd(20.0, 0.9)),
    "rmsprop8bit": (optim.rmsprop8bit(0.02), optax.rmsprop(0.02, 0.99, eps=1e-8, eps_in_sqrt=False)),
    "adagrad8bit": (optim.adagrad8bit(0.2), optax.adagrad(0.2, 0.0)),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.every
@optax_promotes
def test_trains_like_float(name):
    """On gradients with noise: without, a mean that moves by less than half a step of its map stays where it is."""
    target = jax.device_put(np.asarray(np.random.default_rng(0).normal(size=(80, 80)), jnp.float32))
    loss = lambda p: jnp.mean((p - target) ** 2)  # noqa: E731

    def run(tx):
        def step(carry, key):
            p, state = carry
            g = jax.grad(loss)(p + jax.random.normal(key, p.shape, p.dtype))
            updates, state = tx.update(g, state, p)
            return (optax.apply_updates(p, updates), state), None

        p = jnp.zeros_like(target)
        return float(
            loss(
                jax.jit(lambda p, k: jax.lax.scan(step, (p, tx.init(p)), jax.random.split(k, 200))[0][0])(
                    p, jax.random.key(0)
                )
            )
        )

    quantized, plain = map(run, TRAINED[name])
    assert quantized < 1.2 * plain + 2e-3


def test_rules_and_the_leaf_say_what_is_kept():
    params = {"embed": jnp.ones((64, 128)), "layers": [{"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128)}]}
    tx, of_one = optim.scale_by_adam8bit(), optim.Storage(exempt=r"^layers/0/kernel$")
    state = own(tx.init(params))
    m = state.moments["m"]
    named = own(optim.scale_by_adam8bit(storage=of_one).init(params)).moments["v"]
    assert named["embed"].qtype == "udynamic8"
    assert named["layers"][0]["kernel"].dtype == jnp.float32
    assert m["embed"].dtype == m["layers"][0]["bias"].dtype == jnp.float32
    assert m["layers"][0]["kernel"].qtype == "dynamic8"
    # A state that is given is kept as it is: here with the second moment on the signed map.
    signed = jax.tree.map(lambda x: x, m)
    _, state = tx.update(params, optim.State(state.count, {"m": m, "v": signed}))
    assert own(state).moments["v"]["layers"][0]["kernel"].qtype == "dynamic8"


def test_saves_and_restores(tmp_path):
    params = {
        "w": jax.device_put(np.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)),
        "b": jnp.ones(8),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optim.adamw4bit(1e-3))
    _, state = jax.jit(lambda params: tx.update(params, tx.init(params), params))(params)
    jq.io.save(tmp_path / "state.safetensors", state)
    restored = jq.io.load(tmp_path / "state.safetensors", like=jax.eval_shape(tx.init, params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_restores_from_orbax(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    tx, params = (
        optim.scale_by_adam8bit(storage=optim.FOUR_BITS),
        {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 68)))},
    )
    _, state = jax.jit(lambda params: tx.update(params, tx.init(params), params))(params)
    jq.io.save_orbax(tmp_path / "state", state)
    back = optim.State(**jq.io.load_orbax(tmp_path / "state"))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, back, state))


@donates
@needs_jit  # which places results
def test_lies_where_the_parameters_do_and_is_donated():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    rng = np.random.default_rng(0)
    w, flat = (rng.normal(size=s).astype(np.float32) for s in ((64, 1024), (64, 68 * 8)))
    params = {"w": put(w, "x", "y"), "flat": put(flat, "x", None), "b": put(np.ones(8, np.float32), "y")}
    tx = optim.adamw8bit(1e-3)
    places = optim.shardings(jax.eval_shape(tx.init, params), params)
    state = jax.jit(tx.init, out_shardings=places)(params)
    m = state[0].moments["m"]
    assert m["w"].codes.sharding.shard_shape((64, 1024)) == (32, 512)
    assert m["w"].scale.sharding.shard_shape(m["w"].scale.shape) == (32, 2)
    assert m["flat"].codes.sharding.shard_shape(m["flat"].codes.shape) == (68, 256)
    assert m["b"].sharding.spec == PartitionSpec("y")
    step = jax.jit(tx.update, donate_argnums=1, out_shardings=(jax.tree.map(lambda p: p.sharding, params), places))
    alone = jax.jit(tx.update)(jax.tree.map(np.asarray, params), tx.init(jax.tree.map(np.asarray, params)), params)
    found = step(params, state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(state[0].moments))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)
    with pytest.raises(jq.QuantError, match="shardings at w: a parameter must have a NamedSharding"):
        optim.shardings(state, {"w": jnp.ones((64, 256))})


def test_hyperparameters_may_be_traced():
    params = {"w": jnp.ones((64, 64))}
    tx = optax.inject_hyperparams(optim.adamw8bit, static_args="storage")(learning_rate=0.1)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(params, state, params)
    want: Any = optim.adamw8bit(0.1).update(params, optim.adamw8bit(0.1).init(params), params)[0]
    np.testing.assert_allclose(updates["w"], want["w"], rtol=2**-24 / (1 - 0.999))  # of b2 in float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adamw8bit(1e-3, b2=1.0), "adamw8bit: b2 must be in"),
        (lambda: optim.rmsprop8bit(1e-3, b=-0.1), "rmsprop8bit: b must be in"),
        (lambda: optim.sgd8bit(1e-3, momentum=1.5), "sgd8bit: momentum must be in"),
        (lambda: optim.adam8bit(-1e-3), "adam8bit: learning_rate must be finite and not negative"),
        (lambda: optim.adamw4bit(1e-3, eps=-1.0), "adamw4bit: eps must be finite and not negative"),
        (lambda: optim.adam4bit(1e-3, b1=1.0), "adam4bit: b1 must be in"),
        (lambda: untyped.optim.adam8bit("0.1"), "adam8bit: learning_rate must be a number"),
        (lambda: optim.adagrad8bit(1e-3, eps=float("nan")), "adagrad8bit: eps must be finite"),
        (lambda: untyped.optim.lion8bit("fast"), "learning_rate must be a number"),
        (lambda: untyped.optim.scale_by_adam8bit(storage=8), "storage must be a Storage"),
        (lambda: optim.Storage("int8"), "Storage: signed must be a type for such moments"),
        (lambda: optim.Storage(block=0), "Storage: block must be an integer from 2 on"),
        (lambda: optim.Storage(block=3), "whole bytes"),
        (lambda: optim.Storage(exempt=("(",)), "exempt must be regular expressions"),
        (lambda: optim.lion8bit(1e-3).init({"n": jnp.arange(3)}), "optim at n: only float parameters train"),
    ],
)  # fmt: skip
@pytest.mark.every
def test_refusals(make, message):
    with pytest.raises(jq.QuantError, match=message):
        make()


@pytest.mark.parametrize("qtype", ["dynamic8", "udynamic8", "dynamic4"])
@pytest.mark.every
def test_maps_are_computed_where_a_chip_looks_nothing_up(qtype):
    """Entries to a few units in the last place, and the nearest codes but within two units of a boundary."""
    table, m, tables = np.asarray(QTYPES[qtype].table, np.float32), middles(qtype), dynamic_maps.tables(qtype)

    def run(f, *x):
        parts = [np.resize(each, (-(-each.size // 1024), 8, 128)) for each in x]
        found = jax.jit(jax.vmap(lambda *part: f(*part, tables, qtype, interpret=True)))(*parts)
        return np.asarray(found).reshape(-1)[: x[0].size]

    entries = run(dynamic_maps.values, np.arange(table.size, dtype=np.int32) - (128 if table.size == 256 else 0))
    np.testing.assert_allclose(entries, table, rtol=4e-7, atol=0)
    rng, beside = np.random.default_rng(0), np.arange(-40, 41, dtype=np.int32)[:, None]
    near = (m.view(np.int32) + beside).view(np.float32)
    y = np.concatenate([10 ** rng.uniform(-8, 0, 4096), rng.uniform(0, 1, 4096), [0, 1]]).astype(np.float32)
    y = np.concatenate([y, near.reshape(-1), table] if qtype == "udynamic8" else [y, -y, near.reshape(-1), table])
    scaled = np.abs(y) * np.float32(dynamic_maps.largest(qtype))
    got, want = run(dynamic_maps.codes, y, scaled) & 255, np.searchsorted(m, y, side="left")
    below = np.minimum(got, want)[got != want]
    assert np.abs(got - want).max() <= 1
    assert np.abs(y[got != want].view(np.int32) - m[below].view(np.int32)).max() <= 2


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("adam8bit", (256, 512)),
        ("adam8bit", (4, 160, 128)),
        ("ademamix8bit", (3, 22000)),
        ("lion8bit", (256, 2304)),
        ("rmsprop8bit", (64, 1024)),
        ("adam4bit", (512, 256)),
        ("adam4bit", (3, 22000)),
    ],
)
@pytest.mark.every
@makes_nan
def test_one_pass_takes_the_same_step(name, shape, monkeypatch):
    """The kernel for TPUs, in the interpreter: two steps as they are elsewhere, a broken block and one of zeros."""
    rng = np.random.default_rng(0)
    grads = (rng.normal(size=shape) * np.exp(rng.normal(size=shape) * 2)).astype(np.float32)
    grads.reshape(-1)[:256], grads.reshape(-1)[300] = 0, np.nan
    tx = {"adam8bit": optim.scale_by_adam8bit(), "ademamix8bit": optim.scale_by_ademamix8bit(),
          "lion8bit": optim.scale_by_lion8bit(), "rmsprop8bit": optim.scale_by_rms8bit(),
          "adam4bit": optim.scale_by_adam8bit(storage=optim.FOUR_BITS)}[name]  # fmt: skip
    state, grads = tx.init({"w": grads}), {"w": jnp.asarray(grads)}
    want = jax.jit(lambda s: (u := tx.update(grads, s))[:1] + tx.update(grads, u[1]))(state)
    monkeypatch.setattr(scale, "in_one_pass", functools.partial(one_pass.in_one_pass, interpret=True))
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu=None, default, **_: (tpu or default)(*args))
    got = jax.jit(lambda s: (u := tx.update(grads, s))[:1] + tx.update(grads, u[1]))(state)
    for a, b in zip(want[:2], got[:2], strict=True):
        assert np.isnan(b["w"].reshape(-1)[300])
        close = np.isclose(a["w"], b["w"], rtol=1e-5, atol=1e-7, equal_nan=True)
        assert np.mean(~close) < 1e-4  # a code beside it in the first step
    for kind, moment in want[2].moments.items():
        a, b = moment["w"], got[2].moments[kind]["w"]
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5)
        whole = ~np.isnan(np.repeat(np.asarray(a.scale).reshape(-1), a.stored.size // a.scale.size))
        assert np.mean((np.asarray(a.stored) != np.asarray(b.stored)).reshape(-1)[whole]) < 1e-3


INJECTED = optax.inject_hyperparams(optim.scale_by_lion8bit, static_args="storage")


@pytest.mark.parametrize(
    ("tx", "dtype", "kernels"),
    [
        (INJECTED(b1=0.9), "bfloat16", 1),  # hyperparameters are bfloat16 too
        (optim.scale_by_adam8bit(storage=optim.FOUR_BITS), "float32", 1),
        (optim.scale_by_adam8bit(storage=optim.Storage(block=128)), "bfloat16", 1),
        (optim.scale_by_adam8bit(storage=optim.Storage(block=64)), "float32", 0),
        (optim.scale_by_adam8bit(), "float16", 0),
    ],
)
def test_a_tpu_takes_one_kernel(tx, dtype, kernels):
    grads = {"w": jax.ShapeDtypeStruct((512, 512), dtype)}
    traced = jax.jit(tx.update).trace(grads, jax.eval_shape(tx.init, grads))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == kernels


def test_scales_turn_in_registers():
    """As the chip does it; the interpreter of the other tests takes reshapes."""
    form = registers.Form("dynamic8", 256, 0, interpret=False)
    x = np.random.default_rng(0).uniform(size=registers.ROWS).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(form.spread)(x[None]), np.repeat(x[:, None], 128, axis=1))
    np.testing.assert_array_equal(jax.jit(form.gathered)(x[:, None])[0], x)

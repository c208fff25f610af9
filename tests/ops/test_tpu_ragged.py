"""The ragged product of TPUs, in Pallas' interpreter: each row times the dequantized matrix of its own expert."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged_reference import SIZES, by_expert, grouped

import jaxquant as jq
from jaxquant import ops
from jaxquant.core import views
from jaxquant.core.by_platform import Target
from jaxquant.ops.kernels.tpu import ragged
from jaxquant.ops.problem import RaggedProduct
from jaxquant.ops.select import select

SPECS = {
    "int8": jq.QuantSpec("int8"),
    "int4": jq.QuantSpec("int4"),
    "int4 128": grouped("int4", 128),
    "int4 256": grouped("int4", 256),
    "int4 32": grouped("int4", 32),
    "uint4 64 zero": grouped("uint4", 64, symmetric=False),
    "float8_e4m3fn": jq.QuantSpec("float8_e4m3fn"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "nf4": grouped("nf4", 64),
    "iq4_nl": grouped("iq4_nl", 32),
}
TABLES = ("nf4", "iq4_nl", "mxfp4", "nvfp4")
K, N = 256, 200


def normal(key: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


def experts(name: str, *lead: int) -> jq.QTensor:
    make = lambda w: jq.quantize(w, SPECS[name], reduce_axes=(-2,))  # noqa: E731
    for _ in lead:
        make = jax.vmap(make)
    return jq.ops.lay_out(make(normal(1, (*lead, 4, K, N))), "tpu")


def interpreted(problem: RaggedProduct, monkeypatch: pytest.MonkeyPatch, chip: str | None = None) -> np.ndarray:
    monkeypatch.setattr(ragged.RaggedExperts, "interpret", True)
    kernel = select(problem, Target("tpu", chip))
    assert isinstance(kernel, ragged.ByteExperts) == (chip is not None)
    assert kernel.name == "ragged_experts"
    return np.asarray(kernel.run(problem), np.float64)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("name", SPECS)
def test_each_row_by_its_expert(name: str, act: str | None, rows: str, monkeypatch: pytest.MonkeyPatch):
    m, sizes = SIZES[rows]
    x, w = normal(0, (m, K)), experts(name)
    x = x if act is None else jq.quantize(x, jq.QuantSpec(act), reduce_axes=(-1,))
    if name in TABLES and m > 128:  # XLA decodes these, once for all rows
        return
    got = interpreted(RaggedProduct(x, w, None, jnp.float32, jnp.asarray(sizes)), monkeypatch)
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= (2**-8 if name == "nf4" else 1e-6) * terms)
    assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("name", SPECS)
def test_experts_as_checkpoints_have_them(name: str, monkeypatch: pytest.MonkeyPatch):
    """[experts, outputs, inputs], seen as [experts, inputs, outputs]."""
    m, sizes = SIZES["few"]
    q = jq.ops.lay_out(jq.quantize(normal(1, (4, N, K)), SPECS[name], reduce_axes=(-1,)), "tpu")
    x, w = normal(0, (m, K)), views.transpose(q, (0, 2, 1))
    got = interpreted(RaggedProduct(x, w, None, jnp.float32, jnp.asarray(sizes)), monkeypatch)
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= (2**-8 if name == "nf4" else 1e-6) * terms)


@pytest.mark.parametrize("name", TABLES)
def test_chips_that_gather_bytes(name: str, monkeypatch: pytest.MonkeyPatch):
    m, sizes = SIZES["few"]
    x, w = normal(0, (m, K)), experts(name)
    problem = RaggedProduct(x, w, None, jnp.float32, jnp.asarray(sizes))
    got, older = (interpreted(problem, monkeypatch, chip) for chip in ("TPU v6 lite", None))
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= (2**-8 if name == "nf4" else 1e-6) * terms)
    np.testing.assert_allclose(got, older, rtol=1e-5, atol=1e-5 * np.max(terms))


@pytest.mark.parametrize("name", ["mxfp8", "float8_e4m3fn", "mxfp4"])
def test_activations_in_fp8(name: str, monkeypatch: pytest.MonkeyPatch):
    """One scale per row goes to the result; scales of blocks, powers of two, into values that are exact in bfloat16."""
    m, sizes = SIZES["few"]
    w, act = experts(name), SPECS["mxfp8" if name == "mxfp8" else "float8_e4m3fn"]
    x = jq.quantize(normal(0, (m, K)), act, reduce_axes=(-1,))
    got = interpreted(RaggedProduct(x, w, None, jnp.float32, jnp.asarray(sizes)), monkeypatch)
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


@pytest.mark.parametrize("name", ["int4 32", "uint4 64 zero"])
def test_many_rows_of_bfloat16_multiply_rounded_values(name: str, monkeypatch: pytest.MonkeyPatch):
    m, sizes = SIZES["tiles"]
    x, w = normal(0, (m, K)), experts(name)
    got = interpreted(RaggedProduct(x, w, None, jnp.bfloat16, jnp.asarray(sizes)), monkeypatch)
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= 2**-8 * (terms + np.abs(want)))


@pytest.mark.parametrize("name", ["int8", "int4 128"])
def test_a_layer_of_a_stack(name: str, monkeypatch: pytest.MonkeyPatch):
    m, sizes = SIZES["few"]
    x, stack = normal(0, (m, K)), experts(name, 3)
    layer = jax.tree.map(lambda v: v[2], stack)
    inside = layer.layer_of(stack, jnp.int32(2))
    got = interpreted(RaggedProduct(x, inside, None, jnp.float32, jnp.asarray(sizes)), monkeypatch)
    want, terms = by_expert(x, layer, sizes)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


def test_a_step_for_every_tile_of_every_expert():
    """Every row is in one step; steps are in the order of rows; those without an expert read no other one."""
    steps_of = jax.jit(ragged.Steps.of, static_argnums=(1, 2))
    for m, sizes in SIZES.values():
        for tile in (16, 128):
            steps = steps_of(jnp.asarray(sizes), m, tile)
            expert, at, start, end = (np.asarray(v) for v in steps[:4])
            count = int(steps.number[0])
            assert np.all(np.diff(at) >= 0)
            assert set(at[:count]) == set(range(-(-m // tile)))
            seen = np.zeros(m, int)
            for e, t, low, high in zip(expert[:count], at, start, end, strict=False):
                rows = np.arange(max(low, t * tile), min(high, (t + 1) * tile))
                seen[rows] += 1
                assert len(rows) == 0 or sum(sizes[:e]) <= rows[0] < rows[-1] + 1 <= sum(sizes[: e + 1])
            assert np.all(seen[: sum(sizes)] == 1)
            assert not seen[sum(sizes) :].any()
            assert set(expert) <= {e for e, n in enumerate(sizes) if n} | {0}


def test_others_are_multiplied_as_before():
    x, sizes = normal(0, (6, K)), jnp.asarray([2, 2, 0, 2])
    name = lambda x, w: select(RaggedProduct(x, w, None, jnp.float32, sizes), Target("tpu")).name  # noqa: E731
    assert name(x.astype(jnp.float32), experts("int8")) != "ragged_experts"
    assert name(jq.quantize(x, jq.QuantSpec("uint8", symmetric=False), reduce_axes=(-1,)), experts("int8")) == "int8"
    many, some = normal(0, (300, K)), jnp.asarray([130, 0, 0, 170])
    assert select(RaggedProduct(many, experts("nf4"), None, jnp.float32, some), Target("tpu")).name != "ragged_experts"
    assert name(x, normal(1, (4, K, N))) != "ragged_experts"


def test_gradients_are_those_of_the_float_product():
    x, w, sizes = normal(0, (6, K)), experts("int4 128"), jnp.asarray([2, 2, 0, 2])
    real = w.dequantize(jnp.bfloat16)
    loss = lambda x, w: jnp.sum(ops.ragged_dot(x, w, sizes).astype(jnp.float32) ** 2)  # noqa: E731
    got, want = (np.asarray(jax.grad(loss)(x, v), np.float64) for v in (w, real))
    assert np.linalg.norm(got - want) <= 2**-7 * np.linalg.norm(want)

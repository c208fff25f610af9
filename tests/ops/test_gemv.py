"""Products of one row as fused loops: every kind of code and scale, against float64, and what they compile to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan, needs_jit
from narrowed import present
from ops_reference import INTEGER, MATMUL, dot_error, error, kernel_of, quantized, real, slow_but, spec_of, unequal

import jaxquant as jq
from jaxquant import OpSpec, QTensor, ops, recipes
from jaxquant.core.codec import values_of
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.kernels.cpu import gemv, machine

GRIDS = 8e-6  # how far values of nf4 are off in 16 bits, where the largest is 1
SPECS = {
    "int4": recipes.w4a16(128).weight,
    "uint4": recipes.w4a16(128, symmetric=False).weight,
    "int8": recipes.w8a16(64).weight,
    "uint8": spec_of("uint8", "per_group", group=64, symmetric=False),
    "int2": spec_of("int2", "per_group", group=64),
    "int3": spec_of("int3", "per_group", group=32),
    "int6": spec_of("int6", "per_group", group=192),
    "nf4": recipes.nf4(64).weight,
    "fp4": spec_of("fp4", "per_group", group=64),
    "iq4_nl": spec_of("iq4_nl", "per_group", group=32),
    "mxfp4": recipes.mxfp4().weight,
    "nvfp4": recipes.nvfp4().weight,
    "float8_e4m3fn": spec_of("float8_e4m3fn", "per_group", group=64),
    "float8_e5m2": spec_of("float8_e5m2"),
    "mxfp8": spec_of("mxfp8"),
    "nf4 by channel": spec_of("nf4", "per_channel"),
}


def choice(q, precision=None, m=1):
    """The kernel for [m, K] times the weight [K, N]."""
    return kernel_of(jnp.zeros((m, q.shape[-2]), jnp.float32), q, MATMUL, precision)


def product(x, q, precision=None):
    return ops.dot_general(x, q, MATMUL, precision)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("k, n", [(384, 5), (1536, 300), (12672, 24)])
def test_values(name, k, n):
    """A weight of one block and of several, and sums so long that they are a loop of their own."""
    q = quantized(unequal(1, (k, n)), SPECS[name])
    x = unequal(2, (1, k))
    assert choice(q) == "Gemv"
    got, (xs, ws) = jax.jit(product)(x, q), (real(x), real(q))
    if name.startswith("nf4"):
        scale = np.repeat(np.asarray(q.scale, np.float64), k // q.scale.shape[0], axis=0)
        assert np.all(np.abs(got - xs @ ws) <= GRIDS * (np.abs(xs) @ scale) + INTEGER * (np.abs(xs) @ np.abs(ws)))
    else:
        assert dot_error(got, xs, ws, MATMUL) < INTEGER


@pytest.mark.every
@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "uint8"])
def test_blocks_of_bytes(name):
    """Three rows are multiplied by blocks: scales in fp8 beside codes in fp8, which are decoded from patterns."""
    q, x = quantized(unequal(12, (384, 5)), SPECS[name]), unequal(13, (3, 384))
    assert choice(q, m=3) == "Blocked"
    assert dot_error(jax.jit(product)(x, q), real(x), real(q), MATMUL) < INTEGER


@pytest.mark.parametrize("name", ["nf4", "int4", "fp4"])
def test_highest_is_exact(name):
    q, x = quantized(unequal(3, (384, 20)), SPECS[name]), unequal(4, (1, 384))
    assert choice(q, "highest") == ("Blocked" if name == "nf4" else "Gemv")
    assert dot_error(product(x, q, "highest"), real(x), real(q), MATMUL) < INTEGER


@pytest.mark.every
@pytest.mark.parametrize("name", [name for name, t in QTYPES.items() if t.bits <= 4 and t.kind != "int"])
def test_grids_are_whole_numbers(name):
    """Whole numbers times a unit, in 16 bits: exact but for nf4."""
    qtype = QTYPES[name]
    of, unit, exact = present(gemv._numbers(qtype))
    assert of is not None
    codes = jnp.arange(1 << qtype.bits, dtype=jnp.uint8)
    whole, values = of(codes), np.asarray(values_of(codes, qtype), np.float64)
    np.testing.assert_allclose(
        np.asarray(whole, np.float64) * unit, values, rtol=0, atol=(1 / 65534 if name == "nf4" else 2**-24) * qtype.qmax
    )
    assert exact == (name != "nf4")
    assert whole.dtype == (
        np.int16 if qtype.kind == "table" and name not in ("iq4_nl", "binary", "quaternary") else np.int8
    )


@makes_nan
@pytest.mark.every
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_pattern_of_fp8(name):
    """As XLA converts it, and as float16 times a unit: with subnormals, infinities, NaN and the sign of zero."""
    qtype, patterns = QTYPES[name], jnp.arange(256, dtype=jnp.uint8)
    of, unit, _ = present(gemv._numbers(qtype))
    assert of is not None
    want = np.asarray(patterns).view(qtype.code_dtype).astype(np.float32)
    for got in (values_of(patterns, qtype), of(patterns).astype(jnp.float32) * unit):
        np.testing.assert_array_equal(got, want)
        finite = ~np.isnan(want)
        np.testing.assert_array_equal(np.signbit(got)[finite], np.signbit(want)[finite])


@pytest.mark.every
def test_what_fits(monkeypatch):
    """Groups that no number of lanes cuts evenly, other numbers of rows, and codes of 8 bits that are no integers."""
    monkeypatch.setattr(machine, "int8_dots", lambda: "vectors")
    assert choice(quantized(jnp.ones((1024, 4)), SPECS["int4"]), m=2) == "Blocked"
    assert choice(quantized(jnp.ones((1024, 4)), spec_of("int4", "per_group", group=16))) == "Gemv"
    assert choice(quantized(jnp.ones((104, 4)), spec_of("int4", "per_group", group=8))) == "Blocked"
    assert choice(quantized(jnp.ones((1022, 4)), spec_of("int4", "per_group", group=14))) == "Blocked"
    assert choice(quantized(jnp.ones((1024, 4)), spec_of("dynamic8", "per_group", group=64))) == "Blocked"
    assert choice(quantized(jnp.ones((1024, 4)), spec_of("int8"))) == "ResidualSplit"
    assert choice(quantized(jnp.ones((1024, 4)), spec_of("float8_e4m3fn"))) == "Gemv"
    assert choice(quantized(jnp.ones((1024, 4)), spec_of("float8_e4m3fn"), (-1,))) == "Blocked"  # rows last


@pytest.mark.parametrize("name", ["int8", "w4 two-level"])
def test_without_int8_dots(name, monkeypatch):
    """One scale per channel, and multipliers in int8, where XLA has no fast int8 dot."""
    spec = {"int8": spec_of("int8"), "w4 two-level": recipes.w4a16(64, two_level=True).weight}[name]
    q, x = quantized(unequal(5, (384, 20)), spec), unequal(6, (1, 384))
    monkeypatch.setattr(machine, "int8_dots", lambda: "none")
    assert choice(q) == "Gemv"
    assert dot_error(product(x, q), real(x), real(q), MATMUL) < INTEGER


@pytest.mark.parametrize("name", slow_but(["uint4", "mxfp4"], "uint4"))
def test_transformations(name):
    """Stacked weights, under vmap of either side and scan; and the gradient is that of the float product."""
    spec, e, k = SPECS[name], 2, 384
    w, x = unequal(7, (e, k, 20)), unequal(8, (e, 1, k))
    q = jax.vmap(lambda w: quantized(w, spec))(w)
    one = quantized(w[0], spec)

    @jax.jit
    def everything(x, q, one):
        stacked = ops.dot_general(x, q, (((2,), (1,)), ((0,), (0,))))
        scanned = lax.scan(lambda c, v: (c, product(*v)), 0, (x, q))[1]
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(product(x, one))))(x[0])
        return (jax.vmap(product)(x, q), stacked, scanned), jax.vmap(product, (0, None))(x, one), slope

    stacks, first, slope = everything(x, q, one)
    want = np.einsum("emk,ekn->emn", x, jax.vmap(QTensor.dequantize)(q))
    for got, exact in (*((got, want) for got in stacks), (first[0], want[0])):
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    float_slope = jax.grad(lambda x: jnp.sum(jnp.sin(x @ one.dequantize())))(x[0])
    np.testing.assert_allclose(slope, float_slope, rtol=1e-4, atol=1e-4 * np.abs(float_slope).max())


@needs_jit  # reads a compiled program
@pytest.mark.parametrize("name", slow_but(["nf4", "nvfp4", "int3"], "nf4"))
def test_codes_are_decoded_on_their_own(name):
    """The loop that multiplies reads whole numbers: it neither looks up nor unpacks, and there is no float weight."""
    k, n = 1024, 640
    q, x = quantized(unequal(9, (k, n)), SPECS[name]), jax.ShapeDtypeStruct((1, k), jnp.float32)
    program = jax.jit(product).lower(x, q).compile()
    loops = [
        b
        for b in re.split(r"\n(?=%|ENTRY)", present(program.as_text()))
        if re.search(rf"multiply\(.*{gemv.LOOP}/mul", b)
    ]
    loops = [body for body in loops if re.search(r"= s(8|16)\[.* slice\(", body)]
    assert loops
    assert not any(re.search(r"shift-right|gather\(|u8\[", body) for body in loops)
    assert present(program.memory_analysis()).temp_size_in_bytes < 0.2 * 4 * k * n


def test_the_plan_and_the_program_say_so():
    from jaxquant.ops.kernel import kernel

    q, x = quantized(jnp.ones((512, 256), jnp.float32), SPECS["int4"]), jnp.ones((1, 512), jnp.float32)
    assert kernel(1, 256, 512, OpSpec(SPECS["int4"]), "float32") == "float32 GEMV"
    assert jq.explain(lambda p, x: product(x, p["w"]), {"w": q}, x)["w"].kernels == ("float32 GEMV",)


def test_over_devices():
    """Inside shard_map, the weight's rows over the devices; the sum is a loop of its own."""
    k, n = 12672, 48
    q, x = quantized(unequal(10, (k, n)), SPECS["uint4"]), unequal(11, (1, k))
    by_rows = jax.tree.map(lambda v: P(*("d" if size == n else None for size in v.shape)), q)
    mesh = Mesh(np.array(jax.devices()), ("d",))
    run = jax.jit(jax.shard_map(product, mesh=mesh, in_specs=(P(), by_rows), out_specs=P(None, "d")))
    assert error(run(x, q), jax.jit(product)(x, q)) <= INTEGER

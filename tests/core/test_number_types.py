"""Number types against their own definitions: ml_dtypes' casts, and codes that other libraries wrote."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from core import reference, vectors
from hypothesis import given
from hypothesis import strategies as st
from narrowed import instance

import jaxquant as jq
from jaxquant import QTensor, QuantSpec
from jaxquant.core.codec import codes_of, from_bits, round_to_grid, to_bits, values_of
from jaxquant.core.qtensor import from_codes, scale_values
from jaxquant.core.qtypes import QTYPES, qtype_of

pytestmark = pytest.mark.every

FLOATS = {
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}


def encode(v, qtype):
    """Codes of scaled values, as bit patterns."""
    info = QTYPES[qtype]
    codes = np.asarray(codes_of(round_to_grid(jnp.asarray(v), info), info))
    return codes if codes.dtype == np.uint8 or info.kind == "int" else codes.view(np.uint8)


def finite_patterns(dtype):
    bits = ml_dtypes.finfo(dtype).bits
    values = np.arange(1 << bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


@pytest.mark.parametrize("qtype", FLOATS)
def test_float_codes_are_the_casts_of_ml_dtypes(qtype):
    """On every value, every midpoint and its neighbours, and random magnitudes; beyond the range we saturate."""
    dtype = FLOATS[qtype]
    values = finite_patterns(dtype)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    largest = values[-1]
    spread = rng.choice([-1, 1], 4000) * 10.0 ** rng.uniform(-9, np.log10(largest), 4000)
    v = np.concatenate(
        [values, -values, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf), spread, [0.0, -0.0]]
    ).astype(np.float32)
    v = v[np.abs(v) <= largest]
    np.testing.assert_array_equal(encode(v, qtype), v.astype(dtype).view(np.uint8))
    beyond = np.array([largest * 1.01, largest * 1.3, 1e30, np.inf], np.float32)
    for sign in (1, -1):
        assert np.all(np.asarray(round_to_grid(jnp.asarray(sign * beyond), QTYPES[qtype])) == sign * largest)


@given(st.floats(width=32, allow_nan=False), st.sampled_from(list(FLOATS)))
def test_any_float_is_cast_or_saturates(v, qtype):
    dtype = FLOATS[qtype]
    v = np.where(np.abs(v) < 2.0**-126, 0, np.array([v], np.float32)).astype(np.float32)
    clipped = np.clip(v, float(ml_dtypes.finfo(dtype).min), float(ml_dtypes.finfo(dtype).max))
    np.testing.assert_array_equal(encode(v, qtype), clipped.astype(dtype).view(np.uint8))


@pytest.mark.parametrize("qtype", QTYPES)
def test_every_code_survives(qtype):
    """code -> value -> code, and code -> bits -> code, for every code of the type."""
    info = QTYPES[qtype]
    g = reference.grid(qtype)
    if info.kind == "int":
        codes = jnp.asarray(g.codes.astype(info.code_dtype))
    elif info.packed:
        codes = jnp.asarray(g.codes.astype(np.uint8))
    else:
        codes = jnp.asarray(g.codes.astype(np.uint8).view(info.code_dtype))
    values = jax.jit(lambda c: values_of(c, info))(codes)
    np.testing.assert_array_equal(values, g.values.astype(np.float32))
    again = jax.jit(lambda v: codes_of(round_to_grid(v, info), info))(values)
    assert again.dtype == codes.dtype
    np.testing.assert_array_equal(np.asarray(again).view(np.uint8), np.asarray(codes).view(np.uint8))
    if info.packed:
        bits = jax.jit(lambda c: to_bits(c, info))(codes)
        assert bits.dtype == jnp.uint8
        assert np.asarray(bits).max() < 1 << info.bits
        np.testing.assert_array_equal(jax.jit(lambda b: from_bits(b, info))(bits), codes)


def test_nf4_is_defined_by_normal_quantiles():
    """QLoRA's table: symmetric about an exact 0, 8 positive and 7 negative values, ends at -1 and 1."""
    table = np.array(QTYPES["nf4"].table)
    assert (table[0], table[7], table[-1]) == (-1.0, 0.0, 1.0)
    assert np.all(np.diff(table) > 0)
    assert np.all(np.diff(table[7:]) > 0)
    # Appendix E: averages of neighbouring quantiles of N(0, 1), from two ranges of probabilities, normalised
    quantile = np.vectorize(__import__("statistics").NormalDist().inv_cdf)
    end = 0.9677083
    positive = quantile(np.linspace(end, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(end, 0.5, 8)[:-1])
    derived = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(table, derived / derived.max(), atol=2e-4)


# -- codes that other libraries wrote ---------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", ["nf4", "fp4"])
def test_bitsandbytes(qtype):
    """Table, absmax, codes and dequantized values, bit for bit; bitsandbytes' fp4 has two codes for 0."""
    unit = vectors.load(f"bnb_{qtype}_48x128_b64_bfloat16")
    q = jq.quantize(unit["orig"], QuantSpec(qtype, granularity="per_group", group_size=64), reduce_axes=(-1,))
    table = unit["weight.quant_map"]
    np.testing.assert_array_equal(np.asarray(QTYPES[qtype].table, np.float32), table)
    np.testing.assert_array_equal(np.ravel(instance(jax.Array, q.scale)), unit["weight.absmax"])
    theirs = vectors.nibbles(unit["weight"].reshape(48, 64), high_first=True)
    ours = np.asarray(q.logical_codes())
    np.testing.assert_array_equal(np.where(table[ours] == 0, 0, ours), np.where(table[theirs] == 0, 0, theirs))
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])


def test_modelopt_nvfp4():
    unit = vectors.load("modelopt_nvfp4_32x64")
    q = jq.quantize(unit["orig"], QuantSpec("nvfp4"), reduce_axes=(-1,))
    scale = instance(QTensor, q.scale)
    np.testing.assert_array_equal(np.ravel(instance(jax.Array, scale.scale)), unit["weight_scale_2"].ravel())
    np.testing.assert_array_equal(scale.codes, unit["weight_scale"])
    np.testing.assert_array_equal(q.codes, unit["weight"])  # packed as they pack: the even code in the low nibble
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])


def test_gguf_mxfp4():
    """The scale is the OCP formula's. gguf has one code for 0; low nibbles are a block's first half."""
    unit = vectors.load("gguf_MXFP4")
    blocks = unit["blocks"].reshape(4, 8, 17)
    q = jq.quantize(unit["orig"], QuantSpec("mxfp4"), reduce_axes=(-1,))
    np.testing.assert_array_equal(np.asarray(q.scale).view(np.uint8), blocks[..., 0])
    nibbles = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], -1).reshape(4, 256)
    codes = np.asarray(q.logical_codes())
    np.testing.assert_array_equal(np.where(codes == 8, 0, codes), nibbles)
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])


def test_compressed_tensors_mxfp4():
    """Their scale rounds the absmax up at times; given the scale, the codes are ours."""
    unit = vectors.load("ct_mxfp4_32x128")
    scale = np.exp2(unit["weight_scale"].astype(np.float32) - 127)
    q = jq.quantize(unit["orig"], QuantSpec("mxfp4"), reduce_axes=(-1,), scale=scale)
    np.testing.assert_array_equal(q.codes, unit["weight_packed"])
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])


def test_torchao_float8():
    """Their scale is computed in bfloat16; given the scale, the codes are ours."""
    unit = vectors.load("torchao_float8wo")
    scale = unit["0._weight_scale"]
    q = jq.quantize(unit["orig"], QuantSpec("float8_e4m3fn"), reduce_axes=(-1,), scale=scale)
    np.testing.assert_array_equal(np.asarray(q.codes).view(np.uint8), unit["0._weight_qdata"].view(np.uint8))
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])
    ours = jq.quantize(unit["orig"], QuantSpec("float8_e4m3fn"), reduce_axes=(-1,)).scale
    np.testing.assert_allclose(instance(jax.Array, ours), scale, rtol=2.0**-8)


def test_hqq_float_zero_points():
    unit = vectors.load("hqq_w4_g64_ax1")
    spec = QuantSpec("uint4", symmetric=False)
    packed = unit["noopt.W_q"]
    q = jq.quantize(unit["orig"], spec, reduce_axes=(-1,), scale=unit["noopt.scale"], zero_point=unit["noopt.zero"])
    np.testing.assert_array_equal(q.logical_codes(), np.concatenate([packed >> 4, packed & 15]))
    packed = unit["W_q"]
    codes = jnp.asarray(np.concatenate([packed >> 4, packed & 15]))
    q = from_codes(codes, jnp.asarray(unit["scale"]), jnp.asarray(unit["zero"]), qtype="uint4", dtype="float32")
    np.testing.assert_array_equal(q.dequantize(), unit["ref_dequant"])


# -- block formats by their formulas ----------------------------------------------------------------------------------


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_mx_scales_are_powers_of_two(absmax):
    for qtype, emax in (("mxfp8", 8), ("mxfp4", 2)):
        scale, _ = jq.scale_zero_point(-absmax, absmax, QuantSpec(qtype))
        assert scale.dtype == jnp.float8_e8m0fnu
        found = float(instance(jax.Array, scale).astype(jnp.float32))
        assert found == 2.0 ** (np.floor(np.log2(np.float64(absmax))) - emax)


def test_nvfp4_maps_the_largest_block_to_448():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 64)) * 10.0 ** rng.uniform(-3, 3, (4, 1))).astype(np.float32)
    q = jq.quantize(x, QuantSpec("nvfp4"), reduce_axes=(-1,))
    scale = instance(QTensor, q.scale)
    unit = instance(jax.Array, scale.scale)
    assert float(np.max(np.asarray(scale.codes).astype(np.float32))) == 448
    np.testing.assert_allclose(float(unit[0, 0]), np.abs(x).max() / (448 * 6), rtol=1e-6)
    local = np.abs(x.reshape(4, 4, 16)).max(-1) / 6 / np.float64(unit[0, 0])
    np.testing.assert_allclose(np.asarray(scale.codes).astype(np.float64), local, rtol=2.0**-4, atol=2.0**-10)
    np.testing.assert_array_equal(scale_values(q.scale), np.asarray(scale.codes).astype(np.float32) * np.asarray(unit))


# -- names and the table ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, expected",
    [("int8", "int8"), (jnp.int8, "int8"), (np.dtype("uint8"), "uint8"), (jnp.float8_e4m3fn, "float8_e4m3fn")],
)
def test_types_by_name_or_dtype(name, expected):
    assert qtype_of(name).name == expected
    assert QuantSpec(name).qtype == expected
    assert qtype_of(QTYPES[expected]) is QTYPES[expected]


@pytest.mark.parametrize(
    "dtype, row",
    [
        ("float32", "32 1 8 23 -3.40282e+38 3.40282e+38 1.17549e-38 1.19209e-07"),
        ("float16", "16 1 5 10 -65504 65504 6.10352e-05 0.000976562"),
        ("bfloat16", "16 1 8 7 -3.38953e+38 3.38953e+38 1.17549e-38 0.0078125"),
        ("float8_e4m3fn", "8 1 4 3 -448 448 0.015625 0.125"),
        ("float8_e5m2", "8 1 5 2 -57344 57344 6.10352e-05 0.25"),
        ("float4_e2m1fn", "4 1 2 1 -6 6 1 0.5"),
        ("mxfp8", "8 1 4 3 -448 448 0.015625 0.125"),
        ("nvfp4", "4 1 2 1 -6 6 1 0.5"),
        ("int8", "8 1 0 - -128 127 - 1"),
        ("int4", "4 1 0 - -8 7 - 1"),
        ("int3", "3 1 0 - -4 3 - 1"),
        ("int2", "2 1 0 - -2 1 - 1"),
        ("uint8", "8 0 0 - 0 255 - 1"),
        ("uint2", "2 0 0 - 0 3 - 1"),
        ("nf4", "4 - - table -1 1 - 0.0795803"),
        ("fp4", "4 - - table -1 1 - 0.00520833"),
    ],
)
def test_dtype_table(dtype, row):
    columns = ("bits", "sign", "exponent", "mantissa", "min", "max", "smallest normal", "resolution")
    found = next(r for r in jq.dtype_table() if r["dtype"] == dtype)
    assert tuple(found[c] for c in columns) == tuple(row.split())


def test_dtype_table_prints_and_renders():
    table = jq.dtype_table()
    assert {r["dtype"] for r in table} == {"float32", "float16", "bfloat16", *QTYPES}
    assert len(table) == len(QTYPES) + 3
    lines = str(table).splitlines()
    assert len(lines) == len(table) + 2
    assert lines[0].split()[:2] == ["dtype", "bits"]
    assert all(line == line.rstrip() for line in lines)
    markdown = table.markdown().splitlines()
    assert len(markdown) == len(table) + 2
    assert {line.count("|") for line in markdown} == {len(table.columns) + 1}
    assert next(r for r in table if r["dtype"] == "mxfp4")["scale"] == "power of two per 32"
    assert next(r for r in table if r["dtype"] == "nvfp4")["scale"] == "fp8 x one float32 per 16"

"""The ends of the range: subnormal and huge numbers, infinities, NaN, float64, scalars; and given scales."""

import functools
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from core import reference
from core.cases import SCHEMES, unequal
from double_precision import double_precision
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_settings import makes_nan, needs_jit
from narrowed import instance, present, untyped

import jaxquant as jq
from jaxquant import QuantError, QuantSpec
from jaxquant.core.qtensor import scale_values

OBSERVERS = (
    jq.observers.AbsMax(),
    jq.observers.MinMax(),
    jq.observers.Percentile(99.0),
    jq.observers.EMA(0.9),
    jq.observers.MSE(),
    jq.observers.Entropy(),
)


def roundtrip(spec, axes):
    """x -> (real scale, codes, dequantized), compiled."""

    @jax.jit
    def run(x):
        q = jq.quantize(x, spec, reduce_axes=axes)
        return scale_values(q.scale), q.logical_codes(), q.dequantize()

    return run


def edges(dtype) -> np.ndarray:
    """One row of 32 for each magnitude a dtype has, from its least subnormal number to its largest; and a zero row."""
    info = ml_dtypes.finfo(dtype)
    least, tiny, largest = (float(v) for v in (info.smallest_subnormal, info.tiny, info.max))
    with np.errstate(over="ignore"):
        tops = np.array([0.0, least, 3 * least, tiny, 5 * tiny, 1.0, largest / 3, largest])
        row = np.concatenate([[1.0, -1.0, 0.0], np.random.default_rng(0).uniform(-1, 1, 29)])
        return (tops[:, None] * row).astype(dtype)


HALF_SCHEMES = (
    ("int8", True),
    ("uint4", False),
    ("float8_e5m2", True),
    ("nf4", True),
    ("mxfp8", True),
    ("nvfp4", True),
)


@pytest.mark.parametrize(
    "qtype, symmetric, dtype",
    [
        *((qtype, symmetric, "float32") for qtype, symmetric in SCHEMES[::2]),
        *((qtype, symmetric, "bfloat16") for qtype, symmetric in SCHEMES[1::4]),
        *((qtype, symmetric, "float16") for qtype, symmetric in HALF_SCHEMES),
    ],
)
def test_every_magnitude(qtype, symmetric, dtype):
    x = edges(dtype)
    spec = QuantSpec(qtype, symmetric=symmetric)
    scale, _, y = (np.asarray(a).astype(np.float64) for a in roundtrip(spec, (-1,))(x))
    assert np.all(np.isfinite(scale))
    assert np.all(scale > 0)
    assert np.all(np.isfinite(y))
    scale, x = reference.expand(scale, x.shape), x.astype(np.float64)
    # The computation is in float32, where XLA may take subnormal numbers for 0.
    slack = 2.0**-126 + float(ml_dtypes.finfo(dtype).smallest_subnormal) + np.abs(x) * float(ml_dtypes.finfo(dtype).eps)
    g = reference.grid(qtype)
    if symmetric and g.values[0] == 0:
        x = np.maximum(x, 0)
    widest = np.max(np.diff(g.values)) * scale
    if qtype == "mxfp8":
        widest = np.maximum(widest, 2 * 64 * scale)  # the scale is a power of two: up to 512 scales saturate at 448
    if qtype in ("mxfp4", "nvfp4"):
        widest = np.maximum(widest, 2 * 2 * scale)  # likewise up to 8 at 6
    assert np.all(np.abs(y - x) <= widest * (0.5 + 2.0**-20) + slack)


def test_small_float16_channels_survive():
    """A float16 channel keeps its relative precision however far below 1.0 it lies."""
    rng = np.random.default_rng(0)
    tops = np.array([2e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e2, 6e4])
    x = (rng.uniform(-1, 1, (64, len(tops))) * tops).astype(np.float16)
    q = jq.quantize(x, QuantSpec("int8"), reduce_axes=(-2,))
    error = np.abs(np.asarray(q.dequantize(jnp.float32)) - x.astype(np.float32)).max(0)
    assert np.all(error <= np.abs(x.astype(np.float32)).max(0) / 253)
    assert q.scale.dtype == jnp.float32


@pytest.mark.parametrize("qtype", ["uint2", "uint4", "uint8"])
def test_what_exceeds_the_dtype_becomes_its_largest_number(qtype):
    """A code may stand for half a step more than the largest element; float16 would make that infinite."""
    largest = float(np.finfo(np.float16).max)
    x = np.concatenate([np.linspace(low, largest, 50) for low in (-20000.0, -9000.0, -1000.0)]).astype(np.float16)
    x = x.reshape(3, 50)
    spec = QuantSpec(qtype, symmetric=False)
    q = jq.quantize(x, spec, reduce_axes=(-1,))
    assert np.any(np.asarray(q.dequantize(jnp.float32)) > 65520) or qtype == "uint8"
    for y in (q.dequantize(), jq.fake_quant(x, spec, reduce_axes=(-1,)), q.dequantize(jnp.float8_e4m3fn)):
        assert np.all(np.isfinite(np.asarray(y).astype(np.float32)))


# -- NaN --------------------------------------------------------------------------------------------------------------

BROKEN = (
    QuantSpec("int8"),
    QuantSpec("uint4", symmetric=False),
    QuantSpec("uint8"),
    QuantSpec("int4", granularity="per_tensor"),
    QuantSpec("float8_e4m3fn", granularity="per_group", group_size=16),
    QuantSpec("nf4"),
    QuantSpec("mxfp8"),
    QuantSpec("nvfp4"),
    QuantSpec("int8", scale_dtype="bfloat16"),
    *(QuantSpec("int4", calibration=o) for o in OBSERVERS[2:]),
    QuantSpec("uint4", symmetric=False, calibration=jq.observers.Percentile(99.0)),
)


@makes_nan
@needs_jit
@pytest.mark.parametrize(
    "spec, shape, axes, dtype",
    [
        (QuantSpec("int8"), (8, 2048), (-1,), "float32"),
        (QuantSpec("uint4", symmetric=False), (2048, 8), (-2,), "bfloat16"),
        (QuantSpec("int4", granularity="per_tensor"), (4, 8, 512), (-1, -3), "float16"),
        (QuantSpec("nvfp4"), (8, 2048), (-1,), "float32"),
    ],
    ids=str,
)
def test_nan_is_found_in_large_arrays(spec, shape, axes, dtype):
    """XLA's CPU backend gives large reductions to a library whose max and min drop NaN; ranges may not rely on them."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * unequal(rng, shape, 0.5)).astype(dtype)
    run = roundtrip(spec, axes)
    ids = reference.block_ids(shape, spec.granularity, spec.group_size, axes)
    places = np.unravel_index([5, 4000, 4001], shape)
    for value in (np.nan, -np.nan):
        bad = x.copy()
        bad[places] = value
        with pytest.raises(QuantError, match="NaN cannot be quantized"):
            jq.quantize(bad, spec, reduce_axes=axes)
        touched = np.isin(ids, ids[places]) | (spec.qtype == "nvfp4")
        np.testing.assert_array_equal(np.isnan(run(bad)[2]), touched)
    infinite, zero = x.copy(), x.copy()
    infinite[places], zero[places] = [np.inf, -np.inf, np.inf], 0
    np.testing.assert_array_equal(run(infinite)[0], run(zero)[0])
    y = np.asarray(run(infinite)[2]).astype(np.float32)
    assert np.all(np.isfinite(y))
    assert np.all(np.sign(y[places]) == [1, -1, 1])


@makes_nan
@pytest.mark.parametrize("spec", BROKEN, ids=str)
def test_nan_is_refused_or_stays_visible(spec):
    x = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32) * unequal(
        np.random.default_rng(1), (4, 32)
    )
    x = x.astype(np.float32)
    bad = x.copy()
    bad[2, 5] = np.nan
    with pytest.raises(QuantError, match="quantize: NaN cannot be quantized"):
        jq.quantize(bad, spec, reduce_axes=(-1,))
    block = reference.block_ids(x.shape, spec.granularity, spec.group_size, (-1,))
    touched = block == block[2, 5]
    if spec.qtype == "nvfp4":
        touched[:] = True  # through the float32 that all blocks share
    np.testing.assert_array_equal(np.isnan(jq.fake_quant(bad, spec, reduce_axes=(-1,))), touched)
    if spec.calibration is not None:
        return  # quantize has seen the NaN in the scale already, and these take long to compile
    run = roundtrip(spec, (-1,))
    scale, _, y = (np.asarray(a) for a in run(bad))
    np.testing.assert_array_equal(np.isnan(reference.expand(scale, x.shape)), touched)
    np.testing.assert_array_equal(np.isnan(y), touched)
    np.testing.assert_array_equal(y[~touched], np.asarray(run(x)[2])[~touched])


@makes_nan
def test_nan_with_a_given_scale():
    x = jnp.array([1.0, np.nan, 2.0])
    with pytest.raises(QuantError, match="NaN cannot be quantized"):
        jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,), scale=0.5)
    y = jq.fake_quant(x, QuantSpec("int8"), reduce_axes=(-1,), scale=0.5)
    np.testing.assert_array_equal(y, [1.0, np.nan, 2.0])


@makes_nan
@pytest.mark.parametrize("qtype", ["int8", "uint4", "nf4", "float4_e2m1fn", "float8_e4m3fn"])
@needs_jit
def test_nan_with_a_given_scale_stays_visible_under_jit(qtype):
    """No code stands for it but in fp8, so it becomes the scale of its block."""
    spec = QuantSpec(qtype, granularity="per_group", group_size=2)
    x, scale = np.array([[1.0, 0.5, np.nan, 0.5], [1.0, 0.0, 0.5, 1.0]], np.float32), np.full((2, 2), 0.5, np.float32)
    y = np.asarray(jax.jit(lambda x: jq.quantize(x, spec, reduce_axes=(-1,), scale=scale).dequantize())(x))
    touched = np.zeros((2, 4), bool)
    touched[0, 2 : 3 if qtype == "float8_e4m3fn" else 4] = True
    np.testing.assert_array_equal(np.isnan(y), touched)
    clean = jq.quantize(np.nan_to_num(x), spec, reduce_axes=(-1,), scale=scale).dequantize()
    np.testing.assert_array_equal(y[~touched], np.asarray(clean)[~touched])


# -- given scales -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype, symmetric", [*SCHEMES[::4], *HALF_SCHEMES, ("fp4", True), ("mxfp4", True)])
def test_given_scales_saturate(qtype, symmetric):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 32)) * unequal(rng, (2, 32))).astype(np.float32)
    x[:, :8] = [np.inf, -np.inf, 1e30, -1e30, 3e38, -3e38, 0.0, 1e-30]
    spec = QuantSpec(qtype, symmetric=symmetric)
    g = reference.grid(qtype, narrow=spec.type.kind == "int" and spec.type.qmin == -spec.type.qmax)
    blocks = (2, 32 // (spec.group_size or 32))
    scale = (2.0 ** rng.integers(-3, 3, blocks)).astype(np.float32)
    zero_point = None if symmetric else np.rint(rng.uniform(g.values[0], g.values[-1], blocks)).astype(np.int32)
    q = jq.quantize(x, spec, reduce_axes=(-1,), scale=scale, zero_point=zero_point)
    codes = np.asarray(q.logical_codes())
    values = g.value_of(codes if codes.dtype.kind in "iu" else codes.view(np.uint8))
    z = 0 if symmetric else reference.expand(zero_point, x.shape)
    with np.errstate(over="ignore"):
        v = (x.astype(np.float64) / reference.expand(scale, x.shape)).astype(np.float32)
    np.testing.assert_array_equal(values, g.values[g.nearest((v if symmetric else np.rint(v)) + z)])
    assert np.all(values[:, [0, 2, 4]] == g.values[-1])
    assert np.all(values[:, [1, 3, 5]] == g.values[0])
    np.testing.assert_array_equal(scale_values(q.scale), scale)
    y = (values - z) * reference.expand(scale, x.shape)
    np.testing.assert_array_equal(q.dequantize(), y.astype(np.float32))


def test_a_scalar_scale_is_every_block_s_scale():
    x = jnp.arange(12.0).reshape(3, 4) - 5
    q = jq.quantize(x, QuantSpec("int4"), reduce_axes=(-1,), scale=0.5)
    full = jq.quantize(x, QuantSpec("int4"), reduce_axes=(-1,), scale=jnp.full((3, 1), 0.5))
    np.testing.assert_array_equal(q.codes, full.codes)
    np.testing.assert_array_equal(q.scale, full.scale)
    z = jq.quantize(x, QuantSpec("uint4", symmetric=False), reduce_axes=(-1,), scale=0.5, zero_point=10)
    np.testing.assert_array_equal(z.logical_codes(), np.clip(np.rint(np.asarray(x) / 0.5) + 10, 0, 15))


def test_negative_scales_and_float_zero_points_are_allowed():
    """Imported checkpoints have them."""
    x = jnp.array([[-1.0, 0.25, 2.0], [3.0, -0.5, 1.0]])
    q = jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,), scale=jnp.array([[-0.5], [0.25]]))
    np.testing.assert_array_equal(q.logical_codes(), [[2, 0, -4], [12, -2, 4]])
    np.testing.assert_array_equal(q.dequantize(), [[-1.0, 0.0, 2.0], [3.0, -0.5, 1.0]])
    spec = QuantSpec("uint4", symmetric=False)
    zero_point = jnp.array([[2.25], [2.5]])
    q = jq.quantize(x, spec, reduce_axes=(-1,), scale=jnp.array([[0.5], [1.0]]), zero_point=zero_point)
    np.testing.assert_array_equal(q.logical_codes(), [[0, 3, 6], [6, 2, 4]])  # round(x / scale + zero point)
    np.testing.assert_array_equal(q.dequantize(), [[-1.125, 0.375, 1.875], [3.5, -0.5, 1.5]])


@given(st.sampled_from(["int8", "uint4", "float8_e4m3fn", "nf4"]), st.integers(0, 2**31))
@settings(max_examples=20)
def test_a_given_scale_equal_to_the_computed_one_gives_the_same_codes(qtype, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((6, 8)) * unequal(rng, (6, 8))).astype(np.float32)
    spec = QuantSpec(qtype, symmetric=qtype != "uint4")
    q = jq.quantize(x, spec, reduce_axes=(-2,))
    again = jq.quantize(x, spec, reduce_axes=(-2,), scale=q.scale, zero_point=q.zero_point)
    np.testing.assert_array_equal(again.codes, q.codes)


# -- scale_zero_point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype, symmetric", [("uint8", True), ("int4", False), ("nf4", True), *HALF_SCHEMES])
def test_scale_zero_point_is_what_quantize_uses(qtype, symmetric):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 32)) * unequal(rng, (5, 32))).astype(np.float32)
    x[1] = 0
    spec = QuantSpec(qtype, symmetric=symmetric)
    groups = x.reshape(5, -1, spec.group_size or 32)
    scale, zero_point = jq.scale_zero_point(groups.min(-1), groups.max(-1), spec)
    q = jq.quantize(x, spec, reduce_axes=(-1,))
    np.testing.assert_array_equal(scale_values(scale), scale_values(q.scale))
    if symmetric:
        assert zero_point is None
        assert q.zero_point is None
    else:
        assert zero_point is not None
        assert q.zero_point is not None
        np.testing.assert_array_equal(zero_point, q.zero_point)
        assert zero_point.dtype == q.zero_point.dtype == q.type.code_dtype


@given(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 2)
def test_scale_zero_point_follows_its_equations(a, b):
    lo, hi = min(a, b), max(a, b)
    spec = QuantSpec("uint8", symmetric=False)
    scale, zero_point = jq.scale_zero_point(np.float32(lo), np.float32(hi), spec)
    expected = reference.quantize(np.array([lo, hi], np.float32), spec, (-1,))
    tiny = float(np.finfo(np.float32).tiny)
    assert isinstance(scale, jax.Array)
    assert zero_point is not None
    if max(hi, 0) - min(lo, 0) >= 256 * tiny:
        assert float(scale) == expected.scale[0]
        assert int(zero_point) == expected.zero_point[0]
    assert 0 <= int(zero_point) <= 255
    assert float(scale) > 0


def test_scale_zero_point_near_overflow():
    largest = float(np.finfo(np.float32).max)
    scale, zero_point = jq.scale_zero_point(-largest, largest, QuantSpec("uint8", symmetric=False))
    np.testing.assert_allclose(instance(jax.Array, scale), largest / 127.5, rtol=1e-6)
    assert int(present(zero_point)) == 128


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scale_dtype(dtype):
    """Scales of 16 bits stay finite and above 0; the error law holds against the scale that is stored."""
    x, spec = edges("float32"), QuantSpec("int8", scale_dtype=dtype)
    with pytest.raises(QuantError, match="a scale that its dtype cannot hold") if dtype == "float16" else nullcontext():
        jq.quantize(x, spec, reduce_axes=(-1,))
    q = jax.jit(lambda x: jq.quantize(x, spec, reduce_axes=(-1,)))(x)  # saturates
    assert q.scale.dtype == dtype
    scale = np.asarray(q.scale).astype(np.float64)
    info = ml_dtypes.finfo(dtype)
    least = 2.0**-24 if dtype == "float16" else float(info.tiny)
    assert np.all((scale >= least) & (scale <= float(info.max)))
    absmax = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    top = np.clip(absmax / 127, least, float(info.max))
    top = np.where(top < float(info.tiny), np.ceil(top / least) * least, top)
    normal = absmax >= 2.0**-126  # XLA may take less for 0
    np.testing.assert_allclose(scale[normal], top[normal], rtol=float(info.eps) / 2 * 1.01)
    y, s = np.asarray(q.dequantize()), reference.expand(q.scale, x.shape)
    inside = np.abs(x) <= 127 * s
    assert np.all((np.abs(y - x) <= s * (0.5 + 2.0**-16) + 2.0**-126)[inside])


# -- the ends of float32 ----------------------------------------------------------------------------------------------

TINY, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
ENDS = (
    QuantSpec("int2"),
    QuantSpec("int4"),
    QuantSpec("int4", narrow_range=True),
    QuantSpec("int8"),
    QuantSpec("int8", narrow_range=False),
    QuantSpec("uint4"),
    QuantSpec("uint2", symmetric=False),
    QuantSpec("uint8", symmetric=False),
    QuantSpec("int8", symmetric=False),
    QuantSpec("int8", scale_dtype="float16"),
    QuantSpec("uint4", symmetric=False, scale_dtype="float16"),
    QuantSpec("int4", scale_dtype="bfloat16"),
    QuantSpec("uint8", symmetric=False, scale_dtype="bfloat16"),
    QuantSpec("float8_e4m3fn"),
    QuantSpec("float4_e2m1fn"),
    QuantSpec("nf4"),
    QuantSpec("mxfp8"),
    QuantSpec("mxfp4"),
    QuantSpec("nvfp4"),
    QuantSpec("int4", granularity="per_group", group_size=16, two_level=True),
)


def half_step(spec, x):
    """The largest error that the range of each block allows, in float64; blocks are rows."""
    info, g = spec.type, reference.grid(spec.qtype).values
    lo, hi = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    absmax = np.maximum(-lo, hi) if info.signed else hi
    gap = np.max(np.diff(g)) / 2
    if info.scale_format == "e8m0":
        top = np.floor(np.log2(info.qmax))
        scale = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(absmax, TINY))) - top, -126)
        return scale * max(gap, 2.0 ** (top + 1) - info.qmax)  # what lies between the last number and the next power
    if info.scale_format == "e4m3":
        unit = max(absmax.max() / (6 * 448), TINY * 2.0**9)
        off = np.maximum(absmax / 6 / 16, unit * 2.0**-9)  # a scale has 3 bits, and is not less than 2**-9
        return (absmax / 6 + off) * gap + 6 * off
    if not spec.symmetric:
        step = (hi - lo) / (info.qmax - info.qmin)
    elif spec.whole_range and info.signed:
        step = np.maximum(-lo / -g[0], hi / g[-1])  # the ends on codes, the wider of the two choices
    else:
        step = absmax / info.qmax
    if spec.two_level:
        unit = max(absmax.max() / (info.qmax * 15), TINY)
        return (step + unit) / 2 + unit / 2 * (info.qmax + 1)
    dtype = np.dtype(spec.scale_dtype or np.float32)
    least = 2.0**-24 if dtype == np.float16 else TINY
    if dtype == np.float16:  # subnormal steps are rounded up
        step = np.where(step < 2.0**-14, np.ceil(step / least) * least, step)
    rounding = float(ml_dtypes.finfo(dtype).eps) / 2 * np.maximum(step, least)
    return np.maximum(step, least) * gap + rounding * (info.qmax - info.qmin)


@functools.cache
def there_and_back(spec):
    axes = (-1,)
    return jax.jit(
        lambda x: (jq.quantize(x, spec, reduce_axes=axes).dequantize(), jq.fake_quant(x, spec, reduce_axes=axes))
    )


@pytest.mark.parametrize("spec", ENDS, ids=str)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.one_of(st.integers(-126, -110), st.integers(-126, 127)), min_size=8, max_size=8),
)
def test_no_value_is_more_than_half_a_step_off(spec, seed, exponents):
    """From the smallest normal number to the largest finite one, whichever signs a block has."""
    rng = np.random.default_rng(seed)
    size = spec.group_size or 32
    rows = rng.uniform(-1, 1, (8, size))
    rows[:, 0], rows[:, 1] = rng.choice([1, -1], 8), np.where(rng.random(8) < 0.5, rows[:, 1], -rows[:, 0])
    rows *= rng.random((8, size)) < rng.choice([0.1, 1], (8, 1))
    rows[:, 0] = np.where(rows[:, 0] == 0, 1, rows[:, 0])
    signs = rng.integers(0, 3, (8, 1)) if spec.type.signed or not spec.symmetric else 1
    rows = np.where(signs == 1, np.abs(rows), np.where(signs == 2, -np.abs(rows), rows))
    top = 2.0 ** np.asarray(exponents)[:, None] * rng.choice([1, 1.5, 2 - 2.0**-23], (8, 1))
    if spec.scale_dtype == "float16":
        top = np.minimum(top, 65504.0 * 3)  # what is beyond is refused, or saturates
    x = np.float32(np.clip(rows * top, -LARGEST, LARGEST))
    y, trained = (np.asarray(a, np.float64) for a in there_and_back(spec)(x))
    np.testing.assert_array_equal(y, trained)
    assert np.all(np.isfinite(y))
    x = x.astype(np.float64)
    bound = half_step(spec, x)[:, None]
    flushed = np.where(np.abs(x) < TINY, np.abs(x), 0)  # XLA may take less for 0
    assert np.all(np.abs(y - x) <= bound * (1 + 2.0**-18) + flushed)
    absmax = np.abs(x).max(-1)
    assert np.all((absmax < TINY) | (absmax <= bound[:, 0]) | np.any(y != 0, -1))


# -- float64 ----------------------------------------------------------------------------------------------------------

FLOAT64 = (
    QuantSpec("int8"),
    QuantSpec("uint4", symmetric=False),
    QuantSpec("int3", granularity="per_group", group_size=8),
    QuantSpec("float8_e4m3fn"),
    QuantSpec("nf4"),
    QuantSpec("mxfp4"),
    QuantSpec("nvfp4"),
)


@pytest.mark.parametrize("spec", FLOAT64, ids=str)
def test_float64_agrees_with_the_reference(spec):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)) * unequal(rng, (4, 64))
    x[0, :3] = [np.inf, 0.0, 1.0]
    x[1, 0] = 2.0 - 2.0**-40  # in float32 this is 2, with another exponent
    x[1, 1:] = np.clip(x[1, 1:], -1.5, 1.5)
    with double_precision():
        q = jq.quantize(x, spec, reduce_axes=(-1,))
        y, fake = q.dequantize(), jq.fake_quant(x, spec, reduce_axes=(-1,))
        assert q.dtype == y.dtype == fake.dtype == jnp.float64
        expected = reference.quantize(x, spec, (-1,), compute=np.float64)
        np.testing.assert_array_equal(reference.expand(scale_values(q.scale), x.shape), expected.scale)
        np.testing.assert_array_equal(y, expected.dequantized)
        np.testing.assert_array_equal(fake, y)
        assert scale_values(q.scale).dtype == jnp.float32


@pytest.mark.parametrize("spec", [*FLOAT64, QuantSpec("int4", calibration=jq.observers.MSE())], ids=str)
def test_float32_under_x64_is_as_without(spec):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 64)) * unequal(rng, (4, 64))).astype(np.float32)
    without = jq.quantize(x, spec, reduce_axes=(-1,))
    with double_precision():
        within = jq.quantize(x, spec, reduce_axes=(-1,))
        assert within.dequantize().dtype == jnp.float32
        for a, b in zip(jax.tree.leaves(without), jax.tree.leaves(within), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_float64_scales():
    with double_precision():
        x = np.array([1.0, -3.0]) * 1e200
        q = jq.quantize(x, QuantSpec("int8", scale_dtype="float64"), reduce_axes=(-1,))
        assert q.scale.dtype == jnp.float64
        np.testing.assert_allclose(q.dequantize(), x, atol=3e200 / 254)


# -- one answer however it is asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int8"),
        QuantSpec("uint4", symmetric=False, granularity="per_group", group_size=8),
        QuantSpec("int3", calibration=jq.observers.MSE()),
    ],
    ids=str,
)
def test_eager_jit_vmap_scan_and_numpy_agree(spec):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 4, 32)) * unequal(rng, (3, 4, 32))).astype(np.float32)
    fn = functools.partial(jq.quantize, spec=spec, reduce_axes=(-1,))
    one = lambda a: fn(a)  # noqa: E731
    expected = [one(a) for a in x]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *expected)
    jitted = jax.jit(one)
    results = {
        "jit": jax.tree.map(lambda *leaves: jnp.stack(leaves), *[jitted(jnp.asarray(a)) for a in x]),
        "vmap": jax.vmap(one)(x),
        "map": jax.lax.map(one, x),
    }
    for name, q in results.items():
        assert jax.tree.structure(q) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
            if spec.calibration is None:
                np.testing.assert_array_equal(a, b, err_msg=name)
            else:  # sums in another order: the best clip may differ in its last bits
                np.testing.assert_allclose(
                    np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), rtol=1e-5, err_msg=name
                )


def test_fp8_input():
    """A float dtype as any other: its values are quantized, and come back in it."""
    x = jnp.array([1.0, -2.0, 0.5], jnp.float8_e4m3fn)
    q = jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,))
    np.testing.assert_array_equal(q.codes, [64, -127, 32])
    assert q.dequantize().dtype == jnp.float8_e4m3fn


def test_constants_inside_a_trace():
    """What is concrete while something else is traced is used as it is, and checked without staging the check."""
    x, scale = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.5])
    for fn in (
        lambda a: jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,)).dequantize() * a,
        lambda a: jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,), scale=scale).dequantize() * a,
        lambda a: jq.quantize(a * x, QuantSpec("int8"), reduce_axes=(-1,), scale=0.5).dequantize(),
        lambda a: jq.scale_zero_point(-1.0, 2.0, QuantSpec("int8"))[0] * a,
    ):
        np.testing.assert_array_equal(jax.jit(fn)(1.0), fn(1.0))


def test_lists_and_scalars():
    q = untyped.quantize([1.0, -2.0, 0.5], QuantSpec("int8"), reduce_axes=0)
    np.testing.assert_array_equal(q.codes, [64, -127, 32])
    scalar = jq.quantize(-2.0, QuantSpec("int8"), reduce_axes=())
    assert (scalar.shape, scalar.scale.shape, int(scalar.codes)) == ((), (), -127)
    assert np.float32(scalar.dequantize()) == -2
    assert float(jq.fake_quant(-2.0, QuantSpec("int4", granularity="per_tensor"), reduce_axes=())) == pytest.approx(
        -2.0, rel=1e-6
    )


@pytest.mark.parametrize("axes", [0, (0,), (-2,), [-2], np.int64(0), (np.int32(0),)])
def test_axes_can_be_written_in_several_ways(axes):
    x = jnp.arange(12.0).reshape(3, 4) - 6
    q = jq.quantize(x, QuantSpec("int8"), reduce_axes=axes)
    assert q.scale.shape == (1, 4)
    assert q.minor == (-2,)


def test_quantize_passes_no_gradient():
    """Codes are integers; the scale, computed from x, counts as constant."""
    x = jnp.array([0.3, -1.0, 0.7])
    for spec in (QuantSpec("int8"), QuantSpec("float8_e4m3fn"), QuantSpec("uint4", symmetric=False)):
        grad = jax.grad(lambda a, s=spec: jq.quantize(a, s, reduce_axes=(-1,)).dequantize().sum())(x)
        np.testing.assert_array_equal(grad, 0)

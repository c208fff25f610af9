"""Stochastic rounding: unbiased, to the two neighbours only, and never away from a value that is on the grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import reference
from core.cases import unequal
from double_precision import double_precision
from jax_settings import makes_nan

import jaxquant as jq
from jaxquant import QuantSpec
from jaxquant.core.codec import round_to_grid
from jaxquant.core.qtypes import QTYPES

SCHEMES = (
    ("int8", True),
    ("int2", True),
    ("uint4", False),
    ("float8_e4m3fn", True),
    ("float8_e5m2", True),
    ("float4_e2m1fn", True),
    ("nf4", True),
    ("fp4", True),
    ("mxfp8", True),
    ("nvfp4", True),
)
DRAWS = 2048


def data():
    rng = np.random.default_rng(0)
    return (rng.standard_normal((3, 32)) * unequal(rng, (3, 32), 0.5)).astype(np.float32)


@pytest.mark.parametrize("qtype, symmetric", SCHEMES)
def test_unbiased_and_only_the_two_neighbours(qtype, symmetric):
    x = data()
    spec = QuantSpec(qtype, symmetric=symmetric, rounding="stochastic")
    q = jq.quantize(x, spec, reduce_axes=(-1,), key=jax.random.key(1))
    scale = reference.expand(jq.core.qtensor.scale_values(q.scale), x.shape)
    zero_point = 0 if symmetric else reference.expand(q.zero_point, x.shape)

    draw = jax.jit(jax.vmap(lambda key: jq.fake_quant(x, spec, reduce_axes=(-1,), key=key)))
    y = np.asarray(draw(jax.random.split(jax.random.key(7), DRAWS))).astype(np.float64)

    narrow = spec.type.kind == "int" and spec.type.qmin == -spec.type.qmax
    values = reference.grid(qtype, narrow=narrow).values
    v = np.clip(x / scale + zero_point, values[0], values[-1])
    high = np.clip(np.searchsorted(values, v), 1, len(values) - 1)
    low, high = ((values[i] - zero_point) * scale for i in (high - 1, high))
    is_low, is_high = (np.isclose(y, end, rtol=1e-6, atol=0) | (y == end) for end in (low, high))
    assert np.all(is_low | is_high)

    saturating = spec.type.scale_format is not None  # block formats: their scales are rounded
    inside = (v > values[0]) & (v < values[-1]) if saturating else np.full(x.shape, True)
    fraction = np.where(inside, np.clip((x - low) / (high - low), 0, 1), 0)
    deviation = (high - low) * np.sqrt(fraction * (1 - fraction) / DRAWS)
    error = np.abs(y.mean(0) - x)
    bound = 5 * deviation + 1e-6 * np.abs(x) + 2 * (high - low) / DRAWS  # five sigma; the last term for rare events
    assert np.all((error <= bound)[inside])


@pytest.mark.parametrize("qtype", ["uint2", "int3", "uint4", "int8"])
def test_ranges_with_a_zero_point_end_on_codes(qtype):
    """Rows that are all negative, all positive, nearly so, of one sign and 0, and zeros."""
    spec = QuantSpec(qtype, symmetric=False, rounding="stochastic")
    x = np.array(
        [[-3, -1, -2], [5, 4, 1], [-1e-6, 1, 0.3], [-1, 1e-6, -0.7], [0, 0, 0], [-0.31, 0.64, 0.1]], np.float32
    )
    q = jq.quantize(x, spec, reduce_axes=(-1,), key=jax.random.key(0))
    v = x.astype(np.float64) / np.asarray(q.scale, np.float64) + np.asarray(q.zero_point, np.float64)
    assert np.all((v >= spec.type.qmin - 1e-5) & (v <= spec.type.qmax + 1e-5))
    steps = spec.type.qmax - spec.type.qmin
    span = np.maximum(x.max(-1), 0) - np.minimum(x.min(-1), 0)
    assert np.all(
        np.asarray(q.scale)[span > 0, 0] <= span[span > 0] / (steps - 1) * (1 + 1e-6)
    )  # a step at most is lost


@pytest.mark.parametrize("qtype, symmetric", SCHEMES[1:10:2])
def test_quantize_and_fake_quant_draw_the_same(qtype, symmetric):
    x, key = data(), jax.random.key(3)
    spec = QuantSpec(qtype, symmetric=symmetric, rounding="stochastic")
    q = jq.quantize(x, spec, reduce_axes=(-1,), key=key)
    np.testing.assert_array_equal(q.dequantize(), jq.fake_quant(x, spec, reduce_axes=(-1,), key=key))
    other = jq.quantize(x, spec, reduce_axes=(-1,), key=jax.random.key(4))
    assert np.any(np.asarray(other.logical_codes()) != np.asarray(q.logical_codes()))
    # The scale does not depend on the key.
    for a, b in zip(jax.tree.leaves(q.scale), jax.tree.leaves(other.scale), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("qtype", [*dict(SCHEMES), "uint8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_grid_values_never_move(qtype, dtype):
    """Not for any noise in [0, 1): also not for the least and the largest that a generator can return."""
    info = QTYPES[qtype]
    values = reference.grid(qtype).values
    with double_precision() if dtype == "float64" else jax.default_device(None):
        eps = float(jnp.finfo(dtype).eps)
        for noise in (0.0, eps / 2, eps, 0.25, 0.5, 1 - eps, 1 - eps / 2):
            v = jnp.asarray(values, dtype)
            out = round_to_grid(v, info, jnp.full(v.shape, noise, dtype))
            np.testing.assert_array_equal(out, v)


@pytest.mark.parametrize("qtype", ["int8", "uint4", "float8_e4m3fn", "float4_e2m1fn", "nf4", "fp4"])
def test_rounds_up_exactly_where_the_noise_is_below_the_fraction(qtype):
    info, values = QTYPES[qtype], reference.grid(qtype).values
    rng = np.random.default_rng(0)
    cell = rng.integers(0, len(values) - 1, 400)
    fraction, noise = rng.integers(1, 64, 400) / 64, (rng.integers(0, 64, 400) + 0.5) / 64  # never equal
    low, high = values[cell], values[cell + 1]
    v = (low + fraction * (high - low)).astype(np.float32)
    out = round_to_grid(jnp.asarray(v), info, jnp.asarray(noise, jnp.float32))
    np.testing.assert_array_equal(out, np.where(noise < fraction, high, low).astype(np.float32))


@makes_nan
def test_saturates_and_keeps_nan():
    spec = QuantSpec("int4", rounding="stochastic")
    x = jnp.array([np.inf, -np.inf, 1e30, -1e30, 7.4, -8.4])
    for seed in range(5):
        q = jq.quantize(x, spec, reduce_axes=(-1,), scale=1.0, key=jax.random.key(seed))
        np.testing.assert_array_equal(q.logical_codes(), [7, -8, 7, -8, 7, -8])
    y = jq.fake_quant(jnp.array([1.0, jnp.nan]), spec, reduce_axes=(-1,), scale=1.0, key=jax.random.key(0))
    np.testing.assert_array_equal(y, [1.0, np.nan])


def test_half_to_even():
    """Ties go to even multiples of the scale, with a zero point as without."""
    x = jnp.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    expected = np.array([-2, -2, 0, 0, 2, 2])
    symmetric = jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,), scale=1.0)
    np.testing.assert_array_equal(symmetric.codes, expected)
    for zero_point in (3, 4):
        spec = QuantSpec("int8", symmetric=False)
        q = jq.quantize(x, spec, reduce_axes=(-1,), scale=1.0, zero_point=zero_point)
        np.testing.assert_array_equal(q.codes, expected + zero_point)


def test_gradient_is_straight_through():
    x = jnp.asarray(data())
    fn = functools.partial(jq.fake_quant, spec=QuantSpec("int4", rounding="stochastic"), reduce_axes=(-1,))
    g = jax.grad(lambda a: jnp.sum(fn(a, key=jax.random.key(0)) * jnp.cos(a)))(x)
    y = fn(x, key=jax.random.key(0))
    np.testing.assert_allclose(g, jnp.cos(x) - y * jnp.sin(x), rtol=1e-6)

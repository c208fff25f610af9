"""Sums that do not fit an int32 are split, and only those."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_reference import INTEGER, MATMUL, check_dot, quantized, spec_of

from jaxquant import OpSpec, QTensor, ops
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.integer import overflow_limit

INT8 = overflow_limit(128, 128)  # -128 is a code of int8
BOTH_ASYMMETRIC = overflow_limit(255, 255)


@pytest.fixture(autouse=True)
def int8_dots(monkeypatch):
    """Integers are multiplied as such, also where XLA has no fast dot for them and the product would be of floats."""
    monkeypatch.setattr(machine, "int8_dots", lambda: "vectors")


def saturated(shape, seed, code=127):
    """int8 codes all +-127 with scale 1: most signs are +, so that the sums are large."""
    signs = np.where(np.random.default_rng(seed).random(shape) < 0.01, -1, 1)
    return QTensor(jnp.asarray(signs * code, jnp.int8), jnp.ones((1, 1)), None, qtype="int8", dtype=jnp.float32)


def dots(f, *args, platform="cpu"):
    """Of what K the dots are in a program for a platform, loops included."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"dot_general.*contracting_dims = \[(\d+)\].* : \(tensor<([\dx]+)xi8>", text)
    return [int(shape.split("x")[int(axis)]) for axis, shape in found]


def test_limits():
    """The largest sums that are sure to fit: -2**31 does, and is one more in magnitude than 2**31 - 1."""
    for a, b in ((128, 128), (127, 128), (255, 255), (15, 128), (1, 1)):
        assert overflow_limit(a, b) * a * b <= 2**31 - 1 < (overflow_limit(a, b) + 1) * a * b
    assert 130_000 < INT8 < 133_145
    assert 33_000 < BOTH_ASYMMETRIC < 33_100


@pytest.mark.parametrize("k", [140_000, 300_000])
def test_int8(k):
    x, w = saturated((2, k), 0), saturated((k, 3), 1)
    exact = np.asarray(x.codes, np.int64) @ np.asarray(w.codes, np.int64)
    assert np.abs(exact).max() > 2**31
    got = ops.dot_general(x, w, MATMUL)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-23)  # the rounding of two float32 sums


def test_the_lowest_code():
    """(-128)**2 * K is 2**31 at K = 131072: one more than int32 holds."""
    x, w = saturated((2, 2**17), 0, -128), saturated((2**17, 2), 1, -128)
    exact = np.asarray(x.codes, np.int64) @ np.asarray(w.codes, np.int64)
    np.testing.assert_allclose(np.asarray(ops.dot_general(x, w, MATMUL), np.float64), exact, rtol=2**-23)


@pytest.mark.parametrize("k", [40_000])
def test_asymmetric_uint8(k):
    """Positive arrays: codes up to 255 and zero point 0."""
    rng = np.random.default_rng(0)
    x, w = (jax.device_put(np.asarray(rng.uniform(0.99, 1, s), jnp.float32)) for s in ((2, k), (k, 3)))
    spec = spec_of("uint8", symmetric=False)
    q = quantized(w, spec)
    assert np.asarray(q.logical_codes(), np.int64).sum(0).max() * 252 > 2**31
    check_dot(x, q, spec=OpSpec(spec, spec), bound=INTEGER)
    check_dot(x, q, spec=OpSpec(spec, spec_of("uint8")), bound=INTEGER)


def test_split_at_the_limit():
    def f(x, w):
        return ops.dot_general(x, w, MATMUL)

    for k, want in ((INT8, [INT8]), (INT8 + 1, [INT8, 1]), (300_000, [INT8, INT8, 300_000 - 2 * INT8])):
        for platform in ("cpu", "tpu"):
            assert dots(f, saturated((2, k), 0), saturated((k, 3), 1), platform=platform) == want
    spec = spec_of("uint8", symmetric=False)

    def g(x, w):
        return ops.dot_general(x, w, MATMUL, spec=OpSpec(spec, spec))

    for k, want in ((BOTH_ASYMMETRIC, 1), (BOTH_ASYMMETRIC + 1, 2)):
        assert len(dots(g, jnp.ones((2, k)), jnp.ones((k, 3)))) == want


def test_long_groups():
    """Scales that change every 150,000 elements: each group is split on its own."""
    k = 300_000
    x, w = saturated((2, k), 0), saturated((k, 3), 1)
    scales = jnp.asarray([[1.0, 3.0, 0.1], [0.01, 5.0, 2.0]])
    w = QTensor(w.codes, scales, None, qtype="int8", dtype=jnp.float32)
    parts = np.asarray(x.codes, np.int64).reshape(2, 2, -1), np.asarray(w.codes, np.int64).reshape(2, -1, 3)
    exact = sum((parts[0][:, g] @ parts[1][g]) * np.asarray(scales, np.float64)[g] for g in range(2))
    np.testing.assert_allclose(np.asarray(ops.dot_general(x, w, MATMUL), np.float64), exact, rtol=1e-6)


def test_weight_only():
    k = 300_000
    w = saturated((k, 3), 1)
    x = jnp.ones((2, k))  # digits of 127
    exact = np.broadcast_to(np.asarray(w.codes, np.int64).sum(0), (2, 3))
    np.testing.assert_allclose(np.asarray(ops.dot_general(x, w, MATMUL), np.float64), exact, rtol=1e-6)


def test_convolution_beyond_the_limit():
    """Split along the input features."""
    channels = 15_000
    x = saturated((1, 9 * channels), 0).codes.reshape(1, 3, 3, channels)
    w = saturated((9 * channels, 2), 1).codes.reshape(3, 3, channels, 2)
    one = jnp.ones((1, 1, 1, 1))
    left, right = (QTensor(v, one, None, qtype="int8", dtype=jnp.float32) for v in (x, w))
    exact = np.asarray(x, np.int64).reshape(1, -1) @ np.asarray(w, np.int64).reshape(-1, 2)
    layout = ("NHWC", "HWIO", "NHWC")
    got = ops.conv_general_dilated(left, right, (1, 1), "VALID", dimension_numbers=layout)
    assert 9 * channels > INT8
    np.testing.assert_allclose(np.asarray(got, np.float64).reshape(1, 2), exact, rtol=1e-6)


def test_convolution_in_groups_beyond_the_limit():
    """Feature groups are not split: where int32 could overflow they are computed in float."""
    channels = INT8 + 1
    x = saturated((1, 2 * channels), 0).codes.reshape(1, 1, 1, 2 * channels)
    w = saturated((channels, 2), 1).codes.reshape(1, 1, channels, 2)
    one = jnp.ones((1, 1, 1, 1))
    left, right = (QTensor(v, one, None, qtype="int8", dtype=jnp.float32) for v in (x, w))
    groups = np.asarray(x, np.int64).reshape(2, channels), np.asarray(w, np.int64).reshape(channels, 2)
    exact = [groups[0][g] @ groups[1][:, g] for g in range(2)]
    window: Any = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
    got = ops.conv_general_dilated(left, right, (1, 1), "VALID", **window)
    np.testing.assert_allclose(np.asarray(got, np.float64).reshape(2), exact, rtol=1e-4)  # a long float sum

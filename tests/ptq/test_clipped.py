"""Clipped rounding: the least error among ranges, however it is weighed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from narrowed import untyped
from ptq_cases import CELLS, FAST_CELLS, error, gram, inputs, spec, weight

import jaxquant as jq
from jaxquant.ptq import clipped, rtn

K, N = 48, 6
X, W = inputs(128, K), weight(K, N)
STATS = gram(X)


def block_error(x, w, q, group):
    """The error of each block on its own: what a clip can see."""
    d = np.asarray(w - q.dequantize(), np.float64).reshape(K // group, group, N)
    return float(sum(np.sum((np.asarray(x)[:, i * group : (i + 1) * group] @ d[i]) ** 2) for i in range(K // group)))


@pytest.mark.parametrize(
    "bits, group, symmetric",
    [c if c in FAST_CELLS else pytest.param(*c, marks=pytest.mark.slow) for c in CELLS],
)
def test_is_never_worse_than_the_full_range_by_its_own_measure(bits, group, symmetric):
    of = spec(bits, group, symmetric)
    q, nearest = clipped(W, of, reduce_axes=(-2,), stats=STATS), rtn(W, of, reduce_axes=(-2,))
    assert block_error(X, W, q, group or K) < block_error(X, W, nearest, group or K)
    assert q.scale.shape == nearest.scale.shape
    # With one block the measure is the error of the outputs. Errors of different groups may add up or cancel, which
    # the measure does not see: on these 48 inputs they add up in one cell, where the clip is small anyway.
    if (bits, group, symmetric) != (8, 16, False):
        assert error(X, W, q) < error(X, W, nearest)


@pytest.mark.parametrize("symmetric", [True, False])
def test_unweighted_is_the_range_of_the_mse_observer(symmetric):
    of = spec(3, 16, symmetric, narrow_range=False if symmetric else None)
    q = clipped(W, of, reduce_axes=(-2,), weighting="none")
    other = rtn(W, spec(3, 16, symmetric, calibration=jq.observers.MSE()), reduce_axes=(-2,))
    np.testing.assert_allclose(q.dequantize(), other.dequantize(), rtol=1e-5, atol=1e-6)


def test_unweighted_in_double_precision():
    of = spec(3, 16, True)
    with double_precision():
        q = clipped(W, of, reduce_axes=(-2,), weighting="none")
    np.testing.assert_array_equal(q.dequantize(), clipped(W, of, reduce_axes=(-2,), weighting="none").dequantize())


def test_a_diagonal_matrix_and_its_diagonal_are_one():
    stats = {"gram": {"gram": jnp.diag(jnp.diagonal(STATS["gram"]["gram"][0]))[None]}}
    of = spec(3, 16, False)
    full, diagonal = (clipped(W, of, reduce_axes=(-2,), stats=stats, weighting=w) for w in ("gram", "diagonal"))
    np.testing.assert_allclose(full.dequantize(), diagonal.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qtype", ["nvfp4", "nf4"])
def test_other_grids(qtype):
    of = jq.QuantSpec("nvfp4") if qtype == "nvfp4" else jq.QuantSpec(qtype, granularity=jq.PerGroup(16))
    q, nearest = clipped(W, of, reduce_axes=(-2,), stats=STATS), rtn(W, of, reduce_axes=(-2,))
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    assert block_error(X, W, q, 16) < block_error(X, W, nearest, 16)


def test_per_tensor():
    of = jq.QuantSpec("int3", granularity="per_tensor")
    q = clipped(W, of, reduce_axes=(-2,), stats=STATS)
    assert q.scale.shape == (1, 1)
    assert error(X, W, q) < error(X, W, rtn(W, of, reduce_axes=(-2,)))


def test_refusals():
    with pytest.raises(jq.QuantError, match="clipped: needs the Gram matrix"):
        clipped(W, spec(3, 16, True), reduce_axes=(-2,))
    with pytest.raises(jq.QuantError, match="clipped: unknown weighting"):
        untyped.ptq.clipped(W, spec(3, 16, True), reduce_axes=(-2,), weighting="mse")

"""Coordinate descent: never worse than its start, a local minimum at the end, for every kind of weight and grid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan, needs_jit
from ptq_cases import CELLS, FAST_CELLS, error, gram, inputs, spec, weight

import jaxquant as jq
from jaxquant.ptq import descend, gptq, rtn

K, N = 48, 6
X, W = inputs(128, K), weight(K, N)
STATS = gram(X)
G16 = spec(3, 16, False)


def damped_error(x, w, q, damping=0.01):
    """What is minimised: tr(E^T (H + damping) E), in float64, for each output."""
    x, e = np.asarray(x, np.float64), np.asarray(w, np.float64) - np.asarray(q.dequantize(), np.float64)
    h = x.T @ x
    h = h / np.mean(np.diag(h)) + damping * np.eye(len(h))
    return np.einsum("kr,kl,lr->r", e, h, e)


@pytest.mark.parametrize(
    "bits, group, symmetric",
    [c if c in FAST_CELLS else pytest.param(*c, marks=pytest.mark.slow) for c in CELLS],
)
def test_improves_every_output_in_every_cell(bits, group, symmetric):
    of = spec(bits, group, symmetric)
    nearest = rtn(W, of, reduce_axes=(-2,))
    q = descend(W, of, reduce_axes=(-2,), stats=STATS, start=rtn)
    assert np.all(damped_error(X, W, q) <= damped_error(X, W, nearest))
    assert error(X, W, q) < 0.9 * error(X, W, nearest)
    first = gptq(W, of, reduce_axes=(-2,), stats=STATS)
    best = descend(W, of, reduce_axes=(-2,), stats=STATS)
    assert np.all(damped_error(X, W, best) <= damped_error(X, W, first) * (1 + 1e-5))


def test_ends_where_no_single_code_can_be_changed_for_the_better():
    of = spec(2, 16, True)
    q = descend(W, of, reduce_axes=(-2,), stats=STATS, sweeps=30)
    codes, scale = np.asarray(q.logical_codes(), np.int64), np.asarray(q.scale)
    least = damped_error(X, W, q)
    for k in range(0, K, 5):
        for step in (-1, 1):
            other = codes.copy()
            other[k] = np.clip(other[k] + step, -1, 1)
            changed = jq.quantize(jnp.asarray(other * np.repeat(scale, 16, 0), jnp.float32), of,
                                  reduce_axes=(-2,), scale=q.scale)  # fmt: skip
            assert np.all(damped_error(X, W, changed) >= least * (1 - 1e-5))


def test_scales_are_those_of_least_squares():
    of = spec(4, None, True)
    q = descend(W, of, reduce_axes=(-2,), stats=STATS, sweeps=30)
    c = np.asarray(q.logical_codes(), np.float64)
    h = np.asarray(X, np.float64).T @ np.asarray(X, np.float64)
    h = h / np.mean(np.diag(h)) + 0.01 * np.eye(K)
    best = np.einsum("kr,kl,lr->r", c, h, np.asarray(W)) / np.einsum("kr,kl,lr->r", c, h, c)
    np.testing.assert_allclose(np.asarray(q.scale)[0], best, rtol=1e-4)


def test_without_refit_scales_stay():
    first = gptq(W, G16, reduce_axes=(-2,), stats=STATS)
    q = descend(W, G16, reduce_axes=(-2,), stats=STATS, refit=False)
    np.testing.assert_array_equal(q.scale, first.scale)
    np.testing.assert_array_equal(q.zero_point, first.zero_point)
    assert error(X, W, q) < error(X, W, first)


def test_no_sweeps_is_the_start():
    first, q = gptq(W, G16, reduce_axes=(-2,), stats=STATS), descend(W, G16, reduce_axes=(-2,), stats=STATS, sweeps=0)
    assert jax.tree.structure(q) == jax.tree.structure(first)
    jax.tree.map(np.testing.assert_array_equal, q, first)


@pytest.mark.parametrize("block_size", [7, 16])
def test_blocks_do_not_change_the_result(block_size):
    one = descend(W, spec(3, None, True), reduce_axes=(-2,), stats=STATS, start=rtn, sweeps=2)
    other = descend(W, spec(3, None, True), reduce_axes=(-2,), stats=STATS, start=rtn, sweeps=2, block_size=block_size)
    np.testing.assert_allclose(one.dequantize(), other.dequantize(), rtol=1e-5)


@pytest.mark.parametrize("qtype", ["nf4", "nvfp4", pytest.param("mxfp4", marks=pytest.mark.slow)])
def test_other_grids(qtype):
    x, w = inputs(128, 64), weight(64, N)
    of = jq.QuantSpec("nf4", granularity=jq.PerGroup(32)) if qtype == "nf4" else jq.QuantSpec(qtype)
    q, first = descend(w, of, reduce_axes=(-2,), stats=gram(x)), gptq(w, of, reduce_axes=(-2,), stats=gram(x))
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(q)] == [(a.shape, a.dtype) for a in jax.tree.leaves(first)]
    assert np.all(damped_error(x, w, q) <= damped_error(x, w, first) * (1 + 1e-5))
    assert error(x, w, q) < error(x, w, first)


def test_scales_in_bfloat16_stay_exact():
    of = spec(4, 16, True, scale_dtype="bfloat16")
    q, first = descend(W, of, reduce_axes=(-2,), stats=STATS), gptq(W, of, reduce_axes=(-2,), stats=STATS)
    assert q.scale.dtype == jnp.bfloat16
    assert error(X, W, q) < error(X, W, first)


def test_refusals():
    with pytest.raises(jq.QuantError, match="descend: needs the Gram matrix"):
        descend(W, G16, reduce_axes=(-2,))
    with pytest.raises(jq.QuantError, match="sweeps must be a number"):
        descend(W, G16, reduce_axes=(-2,), stats=STATS, sweeps=-1)
    with pytest.raises(jq.QuantError, match="damping must be positive"):
        descend(W, G16, reduce_axes=(-2,), stats=STATS, damping=0)


@makes_nan
@needs_jit
def test_nan_in_a_traced_gram_matrix_stays_visible():
    one = jax.jit(functools.partial(descend, spec=G16, reduce_axes=(-2,), start=rtn))
    assert np.all(np.isnan(one(W, stats=gram(X.at[3, 4].set(jnp.nan))).dequantize()))

"""Learned rounding: no output gets worse than rounded to nearest, in any cell."""

import numpy as np
import pytest
from ptq_cases import CELLS, error, gram, inputs, spec, weight

import jaxquant as jq
from jaxquant.ptq import autoround, rtn

K, N = 48, 6
X, W = inputs(128, K), weight(K, N)
STATS = gram(X)


def damped_error(w, q):
    x, e = np.asarray(X, np.float64), np.asarray(w, np.float64) - np.asarray(q.dequantize(), np.float64)
    h = x.T @ x
    return np.einsum("kr,kl,lr->r", e, h / np.mean(np.diag(h)) + 0.01 * np.eye(K), e)


@pytest.mark.parametrize(
    "bits, group, symmetric",
    [c if c in {(3, 16, False), (2, None, True)} else pytest.param(*c, marks=pytest.mark.slow) for c in CELLS],
)
def test_improves_on_rounding_to_nearest_in_every_cell(bits, group, symmetric):
    of = spec(bits, group, symmetric)
    q, nearest = autoround(W, of, reduce_axes=(-2,), stats=STATS), rtn(W, of, reduce_axes=(-2,))
    assert np.all(damped_error(W, q) <= damped_error(W, nearest) * (1 + 1e-5))
    assert error(X, W, q) < 0.9 * error(X, W, nearest)
    assert [(a.shape, a.dtype) for a in (q.codes, q.scale)] == [(a.shape, a.dtype) for a in (q.codes, nearest.scale)]


def test_the_best_of_no_steps_is_rounding_to_nearest():
    of = spec(3, 16, False)
    q, nearest = autoround(W, of, reduce_axes=(-2,), stats=STATS, learning_rate=0.0), rtn(W, of, reduce_axes=(-2,))
    np.testing.assert_array_equal(q.dequantize(), nearest.dequantize())


def test_refusals():
    with pytest.raises(jq.QuantError, match="autoround: needs the Gram matrix"):
        autoround(W, spec(3, 16, False), reduce_axes=(-2,))
    with pytest.raises(jq.QuantError, match="needs an integer type with scales of their own"):
        autoround(W, jq.QuantSpec("nf4"), reduce_axes=(-2,), stats=STATS)
    with pytest.raises(jq.QuantError, match="iterations must be positive"):
        autoround(W, spec(3, 16, False), reduce_axes=(-2,), stats=STATS, iterations=0)
    with pytest.raises(jq.QuantError, match="damping must be positive"):
        autoround(W, spec(3, 16, False), reduce_axes=(-2,), stats=STATS, damping=-1)

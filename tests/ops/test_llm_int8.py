"""LLM.int8(): the codes and results of bitsandbytes; exact in features with outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import untyped
from ptq_cases import golden, inputs, weight

import jaxquant as jq
from jaxquant import ops
from jaxquant.core.qtensor import from_codes
from jaxquant.ops.axes import Axes
from jaxquant.ops.outliers import split

INT8 = jq.QuantSpec("int8")
llm_int8 = jax.jit(ops.llm_int8, static_argnames="threshold")
W = jq.quantize(weight(48, 6), INT8, reduce_axes=(-2,))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_results_are_those_of_bitsandbytes(threshold):
    ref = golden(f"llm_int8_matmul_thr{threshold}")
    x, own = ref["x"], jq.quantize(ref["w"].T, INT8, reduce_axes=(-2,))
    different = np.asarray(own.logical_codes(), int).T - ref["CB"]  # it multiplies by a rounded reciprocal: ties move
    assert np.abs(different).max() <= 1
    assert np.count_nonzero(different) <= 2
    np.testing.assert_allclose(np.asarray(own.scale)[0] * 127, ref["SCB"], rtol=1e-6)
    w = from_codes(jnp.asarray(ref["CB"].T), own.scale, None, qtype="int8", dtype=jnp.float16, minor=(-2,))
    parts = jax.jit(lambda x: split(x, Axes((), (0,), (1,)), jq.QuantSpec("int8"), threshold or np.inf))
    q, large, some = parts(x)
    np.testing.assert_array_equal(q.codes, ref["CA"])
    np.testing.assert_allclose(np.asarray(q.scale)[:, 0] * 127, ref["SCA"], rtol=1e-6)
    assert bool(some) == bool(threshold)
    if threshold:
        np.testing.assert_array_equal(np.flatnonzero(np.any(large != 0, axis=0)), ref["outlier_cols"])
    y = llm_int8(x, w, jnp.asarray(ref["bias"]), threshold=threshold)
    assert y.dtype == jnp.float16
    # Two products, each rounded to float16, in another order of summation.
    size = np.abs(ref["out"].astype(np.float32)).max()
    np.testing.assert_allclose(y.astype(jnp.float32), ref["out"].astype(np.float32), atol=2 * size * 2.0**-11)


def test_features_with_outliers_are_exact():
    x = jnp.zeros((3, 48)).at[:, 7].set(jnp.array([1e3, 0.01, -2.0]))
    y = llm_int8(x, W)
    np.testing.assert_allclose(y, x @ W.dequantize(), rtol=1e-6)
    # Of one row without a batch, by another kernel: sums in another order.
    np.testing.assert_allclose(llm_int8(x[0], W), y[0], rtol=1e-6)


def test_outliers_do_not_spoil_the_rest():
    x = (inputs(32, 48) / 20).at[:, 3].mul(1e3)
    exact = x @ W.dequantize()
    error = lambda t: float(np.linalg.norm(llm_int8(x, W, threshold=t) - exact))  # noqa: E731
    assert error(6.0) < 0.2 * error(0.0)


def test_refusals():
    x = jnp.ones((2, 48))
    with pytest.raises(jq.QuantError, match="llm_int8: the weight must be a symmetric int8 QTensor"):
        untyped.ops.llm_int8(x, W.dequantize())
    with pytest.raises(jq.QuantError, match="one scale per output"):
        ops.llm_int8(x, jq.quantize(W.dequantize(), INT8, reduce_axes=(-1,)))
    with pytest.raises(jq.QuantError, match="x does not fit the weight"):
        ops.llm_int8(x[:, 1:], W)
    with pytest.raises(jq.QuantError, match="threshold must not be negative"):
        ops.llm_int8(x, W, threshold=-1)


def test_the_gradient_is_that_of_the_float_product():
    """Straight through, with outliers and without."""
    x, w = inputs(5, 48).at[:, 7].mul(20), W.dequantize()
    for threshold in (0.0, 6.0):
        loss = lambda x, t=threshold: (ops.llm_int8(x, W, threshold=t) @ np.arange(6, dtype=np.float32)).sum()  # noqa: E731
        wanted = np.broadcast_to(np.asarray(w) @ np.arange(6), x.shape)
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), wanted, rtol=1e-4, atol=1e-4)

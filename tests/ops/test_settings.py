"""Settings of JAX that forbid something: implicit promotion of dtypes, and NaN anywhere on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_reference import MATMUL, unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, observers, ops, recipes

INT8 = QuantSpec("int8")
WITH_GRAD = OpSpec(INT8, INT8, INT8)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


@pytest.mark.every
@pytest.mark.parametrize("spec", [recipes.w8a8(), WITH_GRAD, recipes.nf4(32), recipes.mxfp8()], ids=str)
def test_strict_promotion(spec):
    """Products and gradients of any two float dtypes; each gradient has the dtype of its operand."""

    def loss(x, w):
        return ops.dot_general(x, w, MATMUL, spec=spec).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        for left in DTYPES:
            for right in DTYPES:
                x, w = jax.ShapeDtypeStruct((4, 64), left), jax.ShapeDtypeStruct((64, 8), right)
                dx, dw = jax.eval_shape(jax.grad(loss, (0, 1)), x, w)
                assert (dx.dtype, dw.dtype) == (left, right)


@pytest.mark.every
@pytest.mark.parametrize("calibration", [None, observers.MSE(), observers.Percentile()], ids=str)
def test_strict_promotion_of_one_array(calibration):
    spec = QuantSpec("int4", calibration=calibration)
    with jax.numpy_dtype_promotion("strict"):
        for dtype in DTYPES:
            x = jax.ShapeDtypeStruct((4, 64), dtype)
            assert jax.eval_shape(lambda x: jq.quantize(x, spec, reduce_axes=-1).dequantize(), x).dtype == dtype
            assert jax.eval_shape(jax.grad(lambda x: jq.fake_quant(x, spec, reduce_axes=-1).sum()), x).dtype == dtype


@pytest.mark.parametrize("zero", [False, True])
def test_no_nan_on_the_way(zero):
    """Outside of jit, with quantized gradients, a row of zeros among them."""
    x, w = unequal(0, (4, 64)), unequal(1, (64, 8))
    x = x.at[1].set(0) if zero else x
    with jax.debug_nans(True):
        found = jax.grad(lambda w: ops.dot_general(x, w, MATMUL, spec=WITH_GRAD).sum())(w)
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("qtype", ["int2", "uint4", "int8"])
@pytest.mark.parametrize("signs", [(0.1, 1), (-1, 1)])
@pytest.mark.parametrize("size", [1.3e-38, 2e-38, 1e-36, 1.0, 1e30, 2e38])
def test_the_ends_of_the_range(qtype, signs, size):
    """Half a step, from the smallest normal number on; a step is at least that number."""
    x = (np.linspace(*signs, 16) * size).astype(np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)[None]  # XLA takes subnormal numbers for 0
    q = jq.quantize(x, QuantSpec(qtype, symmetric=False), reduce_axes=-1)
    levels = 2 ** int(qtype[-1]) - 1
    step = max((max(x.max(), 0) / levels - min(x.min(), 0) / levels), np.finfo(np.float32).tiny)
    np.testing.assert_allclose(q.scale, step, rtol=1e-6)
    off = np.abs(np.asarray(q.dequantize(), np.float64) - x)
    assert off.max() <= 0.5001 * step + np.finfo(np.float32).tiny / 2

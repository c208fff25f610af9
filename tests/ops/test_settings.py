"""Settings of JAX that forbid something: implicit promotion of dtypes, and NaN anywhere on the way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from flax import nnx
from jax_settings import makes_nan
from narrowed import instance
from ops_reference import MATMUL, unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, observers, ops, recipes
from jaxquant.core.arithmetic import nan_where
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.ptq.gram import lower_factor

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


def test_strict_promotion_in_64_bits():
    """Tables and 4-bit floats in float64; a product whose zero points lie along what is summed, as a CPU runs it."""
    x = jax.ShapeDtypeStruct((4, 64), np.float64)
    with jax.numpy_dtype_promotion("strict"), double_precision():
        for spec in (QuantSpec("nf4"), QuantSpec("float4_e2m1fn")):
            values = jax.eval_shape(lambda x, spec=spec: jq.quantize(x, spec, reduce_axes=-1).dequantize(), x)
            assert values.dtype == np.float64
        x, w = unequal(0, (4, 64)), unequal(1, (64, 8))
        q = jq.quantize(w, QuantSpec("int4", symmetric=False), reduce_axes=-1)
        found = ops.dot_general(x, q, MATMUL)
        assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.asarray(x) @ q.dequantize(), atol=1e-4 * np.abs(x).sum(1).max())


@pytest.mark.parametrize("scale_dtype", [jnp.bfloat16, jnp.float16])
def test_scales_in_a_narrow_dtype(scale_dtype):
    """The gradient ends at the last code, and not at a product that the narrow dtype has rounded."""
    spec = QuantSpec("uint8", symmetric=False, scale_dtype=scale_dtype)
    scale = jnp.array([[1 + 3 * 2.0**-7]], scale_dtype)  # 255 times this has more bits than the dtype
    end = np.float32(255) * np.float32(scale[0, 0])
    x, given = jnp.array([[end * 0.9999, end * 1.0001]], jnp.float32), {"zero_point": jnp.zeros((1, 1), jnp.uint8)}
    with jax.numpy_dtype_promotion("strict"):
        slope = jax.grad(lambda x: jq.fake_quant(x, spec, reduce_axes=-1, scale=scale, **given).sum())(x)
    np.testing.assert_array_equal(slope, [[1, 0]])


def test_a_kernel_runs_where_functions_are_not_compiled():
    """The choice between a kernel and what XLA partitions is an operation, compiled as XLA's own are."""
    with jax.disable_jit():
        found = if_undivided(lambda x: x + 1, lambda x: x - 1, jnp.ones(3))
    np.testing.assert_array_equal(found, [2, 2, 2])


@pytest.mark.parametrize("zero", [False, True])
def test_no_nan_on_the_way(zero):
    """Outside of jit, with quantized gradients, a row of zeros among them."""
    x, w = unequal(0, (4, 64)), unequal(1, (64, 8))
    x = x.at[1].set(0) if zero else x
    with jax.debug_nans(True):
        found = jax.grad(lambda w: ops.dot_general(x, w, MATMUL, spec=WITH_GRAD).sum())(w)
    assert np.all(np.isfinite(found))


@makes_nan
@pytest.mark.parametrize("rows", [3, 300])
def test_a_nan_on_the_way(rows):
    """JAX's own error, which names an operation: it runs a program again that returned a NaN, without compiling it."""
    x, w = unequal(0, (rows, 64)).at[1, 2].set(np.nan), jq.quantize(unequal(1, (64, 8)), INT8, reduce_axes=-2)
    product = functools.partial(ops.dot_general, dimension_numbers=MATMUL, spec=recipes.w8a8())
    for fn in (lambda: product(x, w), lambda: jq.fake_quant(x, INT8, reduce_axes=-1)):
        with jax.debug_nans(True), pytest.raises(FloatingPointError, match="encountered in"):
            fn()


@makes_nan
@pytest.mark.every
@pytest.mark.parametrize("dtype", [*DTYPES, jnp.float8_e8m0fnu, jnp.float8_e4m3fn, jnp.float8_e5m2], ids=jnp.dtype)
def test_a_nan_where_it_belongs(dtype):
    """The rest as it was, signed zeros too; where nothing is broken, no operation returns a NaN, compiled or not."""
    x = np.array([[1, 2, -0.0], [0.25, -2, 4]], np.float32)
    x = jnp.asarray(x if dtype != jnp.float8_e8m0fnu else 2**x, dtype)
    broken = np.array([False, True, False])
    found = nan_where(jnp.asarray(broken)[None], x)
    assert found.dtype == dtype
    values = np.asarray(found, np.float32)
    np.testing.assert_array_equal(np.isnan(values), np.broadcast_to(broken, x.shape))
    want = np.asarray(x, np.float32)
    np.testing.assert_array_equal(values[:, ~broken], want[:, ~broken])
    np.testing.assert_array_equal(np.signbit(values[:, ~broken]), np.signbit(want[:, ~broken]))
    none = jnp.zeros((2, 3), bool)
    for alone in (False, True):
        with jax.debug_nans(True), jax.disable_jit(alone), jax.numpy_dtype_promotion("strict"):
            np.testing.assert_array_equal(jax.vmap(nan_where)(none, x), x)
            if dtype == jnp.float32:
                slope = jax.grad(lambda x: nan_where(none, x).sum())(x)
                np.testing.assert_array_equal(slope, np.ones_like(x))


def test_no_nan_of_its_own():
    """What is filled in, not known yet or not found yet is no NaN, outside of jit and in it."""
    table, x = unequal(0, (6, 8)), unequal(1, (4, 8))
    layer = jq.linen.QuantDense(2, spec=recipes.w8a8(static=True))
    with jax.debug_nans(True):
        for rows in (table, jq.quantize(table, INT8, reduce_axes=-1)):
            found = ops.take(rows, jnp.array([4, 1]), 0, spec=OpSpec(INT8))
            np.testing.assert_allclose(found, table[np.array([4, 1])], atol=float(np.abs(table).max()) / 250)
        lookup = lambda p, i: jnp.take(p, i, axis=0)  # noqa: E731
        plan = jq.make_plan(lookup, table, jnp.array([4, 1]), rules=[jq.Rule("", recipes.w8a16())])
        assert jnp.isfinite(jq.quantized(lookup, plan)(jq.quantize_params(table, plan), jnp.array([4, 1]))).all()
        variables = jax.jit(layer.init)(jax.random.key(0), x)
        assert np.all(np.isfinite(layer.apply(variables, x, mutable=["quant"])[0]))
        dense = jq.nnx.QuantLinear(8, 2, spec=recipes.w8a8(static=True), rngs=nnx.Rngs(0))
        dense.set_attributes(calibrating=True)
        assert np.all(np.isfinite(dense(x)))
        h = jnp.ones((3, 3)) + jnp.eye(3)
        lower = lower_factor(h, 0.25)
    np.testing.assert_allclose(lower.T @ lower, h + 0.25 * jnp.eye(3), rtol=1e-5)


@pytest.mark.parametrize("qtype", ["int2", "uint4", "int8"])
@pytest.mark.parametrize("signs", [(0.1, 1), (-1, 1)])
@pytest.mark.parametrize("size", [1.3e-38, 2e-38, 1e-36, 1.0, 1e30, 2e38])
def test_the_ends_of_the_range(qtype, signs, size):
    """Half a step, from the smallest normal number on; a step is at least that number."""
    low, high = signs
    x = (np.linspace(low, high, 16) * size).astype(np.float32)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)[None]  # XLA takes subnormal numbers for 0
    q = jq.quantize(x, QuantSpec(qtype, symmetric=False), reduce_axes=-1)
    levels = 2 ** int(qtype[-1]) - 1
    step = max((max(x.max(), 0) / levels - min(x.min(), 0) / levels), np.finfo(np.float32).tiny)
    np.testing.assert_allclose(instance(jax.Array, q.scale), step, rtol=1e-6)
    off = np.abs(np.asarray(q.dequantize(), np.float64) - x)
    assert off.max() <= 0.5001 * step + np.finfo(np.float32).tiny / 2

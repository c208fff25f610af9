"""fake_quant: the values of quantize and dequantize, the straight-through gradients, what is kept for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import reference
from core.cases import unequal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import needs_jit
from narrowed import present

import jaxquant as jq
from jaxquant import QuantSpec
from jaxquant.core.observers import EMA, MSE, Entropy, Percentile
from jaxquant.core.qtensor import scale_values


def data(shape=(6, 32), dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * unequal(rng, shape, 0.5)).astype(dtype)


def fake(x, spec, axes=(-1,), **given):
    return jq.fake_quant(x, spec, reduce_axes=axes, **given)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, dtype",
    [
        (QuantSpec("nvfp4", calibration=MSE()), np.float32),
        (QuantSpec("int3", calibration=MSE()), jnp.bfloat16),
        (QuantSpec("uint3", symmetric=False, calibration=MSE()), np.float32),
        (QuantSpec("int4", calibration=Percentile(95.0)), jnp.bfloat16),
        (QuantSpec("int4", calibration=EMA(0.9)), np.float32),
        (QuantSpec("int8", scale_dtype="bfloat16"), jnp.bfloat16),
        pytest.param(QuantSpec("int4", calibration=Entropy()), np.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_is_dequantize_of_quantize_bit_for_bit(spec, dtype):
    """Eager and compiled, also where a calibrator adds up errors. The case laws cover every type."""
    compiled = jax.jit(lambda a: fake(a, spec))
    for seed in range(3):
        x = data(dtype=dtype, seed=seed)
        expected = jq.quantize(x, spec, reduce_axes=(-1,)).dequantize()
        bits = np.dtype(f"u{expected.dtype.itemsize}")
        for y in (fake(x, spec), compiled(x)):
            assert y.dtype == expected.dtype == x.dtype
            np.testing.assert_array_equal(np.asarray(y).view(bits), np.asarray(expected).view(bits))


def test_given_scales_give_the_same_values():
    x = data()
    scale = np.abs(x).max(-1, keepdims=True) / 5
    for spec, zero_point in ((QuantSpec("int4"), None), (QuantSpec("uint4", symmetric=False), np.full((6, 1), 6.25))):
        q = jq.quantize(x, spec, reduce_axes=(-1,), scale=scale, zero_point=zero_point)
        y = fake(x, spec, scale=scale, zero_point=zero_point)
        np.testing.assert_array_equal(y, q.dequantize())


# -- gradient with respect to x ---------------------------------------------------------------------------------------


SATURATING = [
    ("int4", None, -8, 7),
    ("int8", None, -127, 127),
    ("int4", MSE(), -8, 7),
    ("uint4", None, 0, 15),
    ("float8_e4m3fn", None, -448, 448),
    ("float4_e2m1fn", None, -6, 6),
    ("nf4", None, -1, 1),
]


@pytest.mark.parametrize("qtype, calibration, qmin, qmax", SATURATING)
def test_gradient_is_one_inside_a_given_range_and_zero_outside(qtype, calibration, qmin, qmax):
    scale = np.array([[0.25], [2.0]], np.float32)
    factors = np.array([-1e9, -2, -1.001, -1, -0.999, -0.3, 0, 0.3, 0.999, 1, 1.001, 2, 1e9, np.inf], np.float32)
    x = scale * np.where(factors < 0, -qmin, qmax) * np.where(factors < 0, factors, factors)
    if qmin == 0:
        x = np.where(factors < 0, scale * factors, x)
    x = x.astype(np.float32)
    g = np.arange(1, x.size + 1, dtype=np.float32).reshape(x.shape)
    _, vjp = jax.vjp(lambda a: fake(a, QuantSpec(qtype, calibration=calibration), scale=scale), x)
    inside = (x >= qmin * scale) & (x <= qmax * scale)
    assert 4 <= inside.sum() < x.size
    np.testing.assert_array_equal(vjp(g)[0], np.where(inside, g, 0))


@pytest.mark.parametrize("zero_point", [3, 2.5])
def test_gradient_mask_with_a_zero_point(zero_point):
    x, scale = np.linspace(-8, 12, 41, dtype=np.float32)[None], 0.5
    spec = QuantSpec("uint4", symmetric=False)
    grad = jax.grad(lambda a: fake(a, spec, scale=scale, zero_point=zero_point).sum())(x)
    np.testing.assert_array_equal(grad, (x >= (0 - zero_point) * scale) & (x <= (15 - zero_point) * scale))


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int4"),
        QuantSpec("uint4", symmetric=False),
        QuantSpec("float8_e4m3fn", granularity="per_group", group_size=8),
        QuantSpec("nf4", granularity="per_tensor"),
        QuantSpec("int4", calibration=EMA(0.5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_nothing_is_clipped_or_kept_with_absmax(spec, dtype):
    """The gradient is the identity, in the dtype of x, and the backward pass needs nothing of the forward pass."""
    x, g = data(dtype=dtype), data(dtype=dtype, seed=1)
    y, vjp = jax.vjp(lambda a: fake(a, spec), x)
    assert y.dtype == x.dtype
    assert jax.tree.leaves(vjp) == []
    (dx,) = vjp(jnp.asarray(g))
    assert dx.dtype == x.dtype
    np.testing.assert_array_equal(dx, g)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int3", calibration=MSE()),
        QuantSpec("uint3", symmetric=False, calibration=Percentile(80.0)),
        QuantSpec("uint4"),
        QuantSpec("mxfp8"),
        QuantSpec("nvfp4"),
    ],
    ids=str,
)
def test_computed_ranges_that_clip(spec):
    """1 inside the range that was computed, which counts as constant; residuals are x and the scales."""
    dtype = jnp.bfloat16 if spec.qtype in ("uint3", "mxfp8") else np.float32
    x, g = data(dtype=dtype), data(dtype=dtype, seed=1)
    x[:, 0] = 1.95 * 2 ** np.ceil(np.log2(np.abs(x.astype(np.float32)).max(1)))  # above the range of the mx types
    q = jq.quantize(x, spec, reduce_axes=(-1,))
    scale = reference.expand(scale_values(q.scale), x.shape)
    z = 0 if q.zero_point is None else reference.expand(q.zero_point, x.shape)
    low, high = (spec.type.qmin - z) * scale, (spec.type.qmax - z) * scale
    inside = (x >= low.astype(np.float32)) & (x <= high.astype(np.float32))
    assert 0 < np.sum(~inside) < x.size / 2 + 20
    _, vjp = jax.vjp(lambda a: fake(a, spec), x)
    np.testing.assert_array_equal(vjp(jnp.asarray(g))[0], np.where(inside, g, 0))
    scales = sum(np.asarray(leaf).nbytes for leaf in (scale_values(q.scale), q.zero_point) if leaf is not None)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= x.nbytes + scales


def test_residuals_with_a_given_scale():
    x, scale = jnp.asarray(data((64, 64), jnp.bfloat16)), jnp.full((64, 1), 0.1)
    _, vjp = jax.vjp(lambda a, s: fake(a, QuantSpec("int4"), scale=s), x, scale)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(vjp)) <= x.nbytes + scale.nbytes


def test_compiled_gradient_keeps_no_float_copy():
    """One training step's gradient of a clipped fake_quant holds less than three arrays of the input's size."""
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    for spec in (QuantSpec("int4"), QuantSpec("int4", calibration=Percentile(99.0))):
        fn = jax.grad(lambda a, s=spec: jnp.sum(fake(a, s, scale=0.1) ** 2))
        temp = present(jax.jit(fn).lower(x).compile().memory_analysis()).temp_size_in_bytes
        assert temp <= 1.05 * 512 * 512 * 4


# -- gradients with respect to scale and zero point -------------------------------------------------------------------


@pytest.mark.parametrize(
    "qtype, symmetric", [("int4", True), ("uint4", False), ("uint4", True), ("float8_e5m2", True), ("nf4", True)]
)
def test_learned_step_gradient(qtype, symmetric):
    """Per element q - z - x / s inside and q - z outside, summed over each block (LSQ, equation 3)."""
    x, g = data().astype(np.float64), data(seed=1)
    spec = QuantSpec(qtype, symmetric=symmetric)
    grid = reference.grid(qtype, narrow=spec.type.qmin == -spec.type.qmax and spec.type.kind == "int")
    scale = (np.abs(x).max(-1, keepdims=True) / (0.4 * grid.values[-1])).astype(np.float32)  # much is outside
    scale[::2] /= 6
    z = np.zeros((6, 1)) if symmetric else np.array([[3.0], [5], [8], [0], [15], [7]])
    v = (x / scale).astype(np.float32).astype(np.float64)
    q = grid.values[grid.nearest(np.rint(v) + z if not symmetric else v)]
    inside = (x >= (grid.values[0] - z) * scale) & (x <= (grid.values[-1] - z) * scale)
    assert 10 < inside.sum() < x.size - 10
    expected = np.sum(g * np.where(inside, q - z - x / scale, q - z), -1, keepdims=True)

    zero_point = None if symmetric else jnp.asarray(z, jnp.int32)
    fn = lambda s: fake(x.astype(np.float32), spec, scale=s, zero_point=zero_point)  # noqa: E731
    _, vjp = jax.vjp(fn, jnp.asarray(scale))
    (ds,) = vjp(jnp.asarray(g))
    assert ds.shape == (6, 1)
    size = np.sum(np.abs(g) * (np.abs(q - z) + np.abs(v)), -1, keepdims=True)
    assert np.all(np.abs(ds - expected) <= 2e-6 * size)


def test_learned_step_gradient_against_finite_differences():
    """Outside the range the output is linear in the scale and in the zero point, so differences are exact."""
    x = np.array([[9.0, -12.0, 20.0, -30.0], [5.0, 6.0, -7.0, 80.0]], np.float32)
    scale, zero_point = np.array([[0.5], [0.25]], np.float32), np.array([[7.5], [6.25]], np.float32)
    spec, g = QuantSpec("uint4", symmetric=False), data((2, 4), seed=1)
    fn = lambda s, z: jnp.sum(g * fake(x, spec, scale=s, zero_point=z))  # noqa: E731
    ds, dz = jax.grad(fn, (0, 1))(jnp.asarray(scale), jnp.asarray(zero_point))
    step = 2.0**-6
    for block in range(2):
        e = np.zeros((2, 1), np.float32)
        e[block] = step
        slope_s = (fn(scale + e, zero_point) - fn(scale - e, zero_point)) / (2 * step)
        slope_z = (fn(scale, zero_point + e) - fn(scale, zero_point - e)) / (2 * step)
        np.testing.assert_allclose(ds[block, 0], slope_s, rtol=1e-4)
        np.testing.assert_allclose(dz[block, 0], slope_z, rtol=1e-4)


def test_float_zero_point_gradient():
    """0 inside, -scale outside."""
    x = np.array([[-3.0, -1.0, 0.2, 4.0, 9.0, 12.0]], np.float32)
    spec = QuantSpec("uint4", symmetric=False)
    g = np.arange(1.0, 7.0, dtype=np.float32)[None]
    dz = jax.grad(lambda z: jnp.sum(g * fake(x, spec, scale=0.5, zero_point=z)))(jnp.array([[4.5]]))
    inside = (x >= -4.5 * 0.5) & (x <= (15 - 4.5) * 0.5)
    np.testing.assert_allclose(dz, np.sum(np.where(inside, 0, -0.5 * g), keepdims=True), rtol=1e-6)
    integer = jax.vjp(lambda s: fake(x, spec, scale=s, zero_point=jnp.array([[4]])), jnp.array([[0.5]]))[1](g)
    assert len(integer) == 1


def test_scalar_scale_receives_the_sum():
    x, spec = data(), QuantSpec("int4")
    fn = lambda s: jnp.sum(fake(x, spec, scale=s) * x)  # noqa: E731
    one = jax.grad(fn)(jnp.float32(0.3))
    each = jax.grad(fn)(jnp.full((6, 1), 0.3))
    assert one.shape == ()
    np.testing.assert_allclose(one, each.sum(), rtol=1e-5)
    per_tensor = jax.grad(lambda s: jnp.sum(fake(x, QuantSpec("int4", granularity="per_tensor"), scale=s) * x))
    np.testing.assert_allclose(per_tensor(jnp.full((1, 1), 0.3)).sum(), one, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_half_precision_gradients(dtype, scale_dtype):
    """Gradients have the dtypes of what they are gradients of; sums are formed in float32."""
    x, g = data(dtype=dtype), data(dtype=dtype, seed=1)
    scale = jnp.asarray(np.abs(x.astype(np.float32)).max(-1, keepdims=True) / 5, scale_dtype)
    _, vjp = jax.vjp(lambda a, s: fake(a, QuantSpec("int4"), scale=s), jnp.asarray(x), scale)
    dx, ds = vjp(jnp.asarray(g))
    assert (dx.dtype, ds.dtype) == (dtype, scale_dtype)
    full = jax.vjp(
        lambda a, s: fake(a, QuantSpec("int4"), scale=s), jnp.asarray(x, jnp.float32), scale.astype(jnp.float32)
    )[1](jnp.asarray(g, jnp.float32))
    np.testing.assert_array_equal(dx, np.asarray(full[0]).astype(dtype))
    np.testing.assert_allclose(np.float32(ds), full[1], rtol=2.0**-8 if scale_dtype == jnp.bfloat16 else 1e-6)


def test_gradients_reach_what_the_scale_is_made_from():
    """A scale computed from x by the caller carries x's gradient too."""
    x, spec = jnp.array([[1.0, -2.0, 8.0]]), QuantSpec("int4")
    fn = lambda a: fake(a, spec, scale=jnp.max(jnp.abs(a), keepdims=True) / 14).sum()  # noqa: E731
    ds = jax.grad(lambda s: fake(x, spec, scale=s).sum())(jnp.full((1, 1), 8 / 14))
    np.testing.assert_allclose(jax.grad(fn)(x), [[1.0, 1.0, float(ds[0, 0]) / 14]], rtol=1e-6)


# -- under every transformation ---------------------------------------------------------------------------------------

TRANSFORMED = [QuantSpec("int4"), QuantSpec("uint4", symmetric=False, calibration=Percentile(90.0))]


def loss_of(spec):
    return lambda a: jnp.sum(jnp.sin(fake(a, spec) * 3))


@pytest.mark.parametrize("spec", TRANSFORMED, ids=str)
def test_transformations_do_not_change_value_or_gradient(spec):
    xs = jnp.asarray(np.stack([data((4, 32), seed=s) for s in range(3)]))
    loss = loss_of(spec)
    values, grads = zip(*(jax.value_and_grad(loss)(x) for x in xs), strict=True)
    values, grads = jnp.stack(values), jnp.stack(grads)
    value_and_grad = jax.value_and_grad(loss)
    remat = jax.value_and_grad(jax.checkpoint(loss))
    ways = {
        "jit": lambda: [jnp.stack(a) for a in zip(*map(jax.jit(value_and_grad), xs), strict=True)],
        "vmap": lambda: jax.vmap(value_and_grad)(xs),
        "scan": lambda: jax.lax.scan(lambda c, x: (c, value_and_grad(x)), 0.0, xs)[1],
        "remat": lambda: jax.jit(jax.vmap(remat))(xs),
        "grad of scan": lambda: (
            values,
            jax.grad(lambda a: jax.lax.scan(lambda c, x: (c + loss(x), None), 0.0, a)[0])(xs),
        ),
    }
    for name, way in ways.items():
        value, grad = way()
        np.testing.assert_allclose(value, values, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(grad, grads, rtol=1e-5, atol=1e-6, err_msg=name)


def test_vmap_over_scales():
    x, scales = data(), jnp.array([0.1, 0.3, 1.0])
    spec = QuantSpec("int4")
    grads = jax.vmap(jax.grad(lambda s: fake(x, spec, scale=s).sum()))(scales)
    np.testing.assert_allclose(grads, [jax.grad(lambda s: fake(x, spec, scale=s).sum())(s) for s in scales], rtol=1e-5)


@needs_jit
def test_eval_shape_and_second_use():
    spec = QuantSpec("int4")
    out = jax.eval_shape(lambda a: fake(a, spec), jax.ShapeDtypeStruct((4, 8), jnp.bfloat16))
    assert (out.shape, out.dtype) == ((4, 8), jnp.bfloat16)
    traces = []
    fn = jax.jit(lambda a: (traces.append(1), fake(a, QuantSpec("int4")))[1])
    fn(data())
    fn(data(seed=1))
    assert len(traces) == 1


# -- sharding ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    return Mesh(np.array(jax.devices()[:8]), ("d",))


@needs_jit
@pytest.mark.parametrize(
    "spec, axes, part",
    [
        (QuantSpec("int8"), (-1,), P("d", None)),
        (QuantSpec("uint4", symmetric=False, granularity="per_group", group_size=16), (-1,), P("d", None)),
        (QuantSpec("int3", granularity="per_group", group_size=8), (-2,), P(None, "d")),
        (QuantSpec("int4"), (-1,), P("d", None)),
        (QuantSpec("mxfp4"), (-1,), P("d", None)),
        (QuantSpec("nvfp4"), (-1,), P("d", None)),
        (QuantSpec("int4", calibration=MSE()), (-1,), P("d", None)),
    ],
    ids=str,
)
def test_sharding_along_a_kept_axis(mesh, spec, axes, part):
    """The same codes and scales, still sharded, and no data moved but scalars for the whole array."""
    x = data((64, 64))
    sharded = jax.device_put(x, NamedSharding(mesh, part))
    compiled = jax.jit(lambda a: jq.quantize(a, spec, reduce_axes=axes)).lower(sharded).compile()
    text = present(compiled.as_text())
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert "collective-permute" not in text
    q, expected = compiled(sharded), jq.quantize(x, spec, reduce_axes=axes)
    for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        if spec.calibration is None:
            np.testing.assert_array_equal(a, b)
        else:  # errors are added up in another order
            np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-4)
    assert not q.codes.sharding.is_fully_replicated
    assert len({s.device for s in q.codes.addressable_shards}) == 8
    if spec.granularity != "per_channel":
        return
    y = jax.jit(lambda a: fake(a, spec, axes))(sharded)
    assert y.sharding.is_equivalent_to(sharded.sharding, 2)
    np.testing.assert_allclose(y, expected.dequantize(), rtol=1e-4 if spec.calibration else 0)
    grad = jax.jit(jax.grad(lambda a: jnp.sum(fake(a, spec, axes) ** 2)))(sharded)
    assert grad.sharding.is_equivalent_to(sharded.sharding, 2)


def test_sharding_along_the_reduced_axis(mesh):
    """Maxima are exact in any order: the same codes."""
    x = data((16, 64))
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "d")))
    for spec in (QuantSpec("uint4", symmetric=False), QuantSpec("int8", granularity="per_tensor")):
        q = jax.jit(functools.partial(jq.quantize, spec=spec, reduce_axes=(-1,)))(sharded)
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(jq.quantize(x, spec, reduce_axes=(-1,))), strict=True):
            np.testing.assert_array_equal(a, b)


def test_eager_on_a_sharded_array_and_shard_map(mesh):
    x = data((16, 64))
    sharded = jax.device_put(x, NamedSharding(mesh, P("d", None)))
    spec = QuantSpec("int4", granularity="per_group", group_size=16)
    expected = jq.quantize(x, spec, reduce_axes=(-1,))
    fn = lambda a: jq.quantize(a, spec, reduce_axes=(-1,))  # noqa: E731
    per_shard = jax.shard_map(fn, mesh=mesh, in_specs=P("d", None), out_specs=P("d", None))
    for q in (fn(sharded), jax.jit(per_shard)(sharded)):
        for a, b in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)

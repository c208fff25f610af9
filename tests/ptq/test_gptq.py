"""GPTQ: equal to AutoGPTQ and to the definition; every kind of weight, grid and Gram matrix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan, needs_jit
from narrowed import present
from ptq_cases import CELLS, FAST_CELLS, FullRange, error, golden, gram, inputs, spec, weight

import jaxquant as jq
from jaxquant.ptq import gptq, rtn

K, N = 48, 6
X, W = inputs(128, K), weight(K, N)
STATS = gram(X)
G16 = spec(4, 16, False)


# -- the reference ---------------------------------------------------------------------------------------------------

# name: bits, group (None: one per output), symmetric, act-order, static groups
AUTOGPTQ = {
    "w3g32_sym": (3, 32, True, False, False),
    "w4g32_sym": (4, 32, True, False, False),
    "w4g32_act_sym": (4, 32, True, True, False),
    "w4g32_act_static_sym": (4, 32, True, True, True),
    "w4g64_asym": (4, None, False, False, False),
    "w8g64_act_asym": (8, None, False, True, False),
    "w8g64_act_static_asym": (8, None, False, True, True),
}


@pytest.mark.parametrize("name", AUTOGPTQ)
def test_codes_are_those_of_autogptq(name):
    bits, group, symmetric, act, static = AUTOGPTQ[name]
    ref = golden(f"autogptq_{name}")
    w, h = ref["W"].T, ref["H"]
    calibration = FullRange(bits=bits) if symmetric else None
    how: Any = dict(granularity="per_group", group_size=group) if group else {}
    of = jq.QuantSpec(f"uint{bits}", symmetric=False, calibration=calibration, **how)
    stats = {"gram": {"gram": jnp.asarray(h)[None], "rows": jnp.float32(2)}}
    order = "descending" if act else "given"
    q = gptq(
        jnp.asarray(w), of, reduce_axes=(-2,), stats=stats, order=order, static_groups=static, block_size=32
    )  # fmt: skip
    assert (q.permutation is None) == (name != "w4g32_act_sym")
    np.testing.assert_allclose(q.dequantize(), ref["gptq_fakequant"].T, rtol=1e-6, atol=1e-7)
    scale = np.asarray(q.scale).T
    np.testing.assert_allclose(np.sort(scale), np.sort(ref["gptq_scale"]), rtol=1e-6)
    codes = q.unpermuted().logical_codes()
    reference = np.rint(ref["gptq_fakequant"] / ref["gptq_scale"][:, ref["g_idx"]]) + ref["gptq_zero"][:, ref["g_idx"]]
    np.testing.assert_array_equal(codes, reference.T)


def by_definition(w, h, scale, damping):
    """Optimal brain quantization in a given order: the inverse of what is left, anew at every step, in float64."""
    w, h = np.array(w, np.float64), np.array(h, np.float64)
    h = h / np.mean(np.diag(h)) + damping * np.eye(len(h))
    out = np.empty_like(w)
    for i in range(len(w)):
        inverse = np.linalg.inv(h[i:, i:])
        out[i] = np.clip(np.rint(w[i] / scale), -8, 7) * scale
        w[i:] -= inverse[:, :1] * ((w[i] - out[i]) / inverse[0, 0])
    return out


@pytest.mark.parametrize("block_size", [10, 128, pytest.param(1, marks=pytest.mark.slow)])
def test_is_optimal_brain_quantization_in_a_fixed_order_whatever_the_blocks(block_size):
    q = gptq(W, spec(4, None, True), reduce_axes=(-2,), stats=STATS, order="given", block_size=block_size)
    expected = by_definition(W, X.T @ X, np.asarray(q.scale)[0], 0.01)
    np.testing.assert_allclose(q.dequantize(), expected, rtol=1e-5, atol=1e-6)


# -- the error -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, group, symmetric",
    [c if c in FAST_CELLS else pytest.param(*c, marks=pytest.mark.slow) for c in CELLS],
)
def test_beats_rounding_to_nearest_in_every_cell(bits, group, symmetric):
    of = spec(bits, group, symmetric)
    nearest = error(X, W, rtn(W, of, reduce_axes=(-2,)))
    for order in ("group_aware",) if (bits, group, symmetric) in FAST_CELLS else ("given", "group_aware"):
        assert error(X, W, gptq(W, of, reduce_axes=(-2,), stats=STATS, order=order)) < nearest


@pytest.mark.parametrize("qtype", ["nf4", pytest.param("fp4", marks=pytest.mark.slow), "nvfp4"] + [
    pytest.param(t, marks=pytest.mark.slow) for t in ("mxfp4", "mxfp8", "float8_e4m3fn", "uint5", "int6", "int7")
])  # fmt: skip
def test_every_grid(qtype):
    x, w = inputs(128, 64), weight(64, N)
    group: Any = dict(granularity="per_group", group_size=32) if qtype in ("nf4", "fp4") else {}
    of = jq.QuantSpec(qtype, symmetric=not qtype.startswith("u"), **group)
    q = gptq(w, of, reduce_axes=(-2,), stats=gram(x))
    nearest = rtn(w, of, reduce_axes=(-2,))
    assert jax.tree.structure(q) == jax.tree.structure(nearest)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(q)] == [(a.shape, a.dtype) for a in jax.tree.leaves(nearest)]
    assert error(x, w, q) < 0.8 * error(x, w, nearest)


@pytest.mark.parametrize(
    "options", [dict(static_groups=True), dict(clip="gram"), dict(static_groups=True, clip="gram")]
)
def test_options(options):
    q = gptq(W, G16, reduce_axes=(-2,), stats=STATS, **options)
    assert error(X, W, q) < 0.8 * error(X, W, rtn(W, G16, reduce_axes=(-2,)))


def test_static_groups_have_the_scales_of_the_weight_as_it_is():
    q = gptq(W, G16, reduce_axes=(-2,), stats=STATS, order="descending", static_groups=True)
    nearest = rtn(W, G16, reduce_axes=(-2,))
    np.testing.assert_array_equal(q.scale, nearest.scale)
    np.testing.assert_array_equal(q.zero_point, nearest.zero_point)


def test_per_tensor_keeps_the_one_scale():
    of = jq.QuantSpec("int4", granularity="per_tensor")
    q, nearest = gptq(W, of, reduce_axes=(-2,), stats=STATS), rtn(W, of, reduce_axes=(-2,))
    np.testing.assert_array_equal(q.scale, nearest.scale)
    assert error(X, W, q) < error(X, W, nearest)


@pytest.mark.parametrize(
    "length, group, block_size", [(60, 12, 32), (66, 33, 8), (62, 31, 8), (45, 45, 16), (40, 8, 4)]
)
def test_groups_and_blocks_that_do_not_divide_each_other(length, group, block_size):
    x, w, of = inputs(128, length), weight(length, N), spec(4, group, True)
    q = gptq(w, of, reduce_axes=(-2,), stats=gram(x), block_size=block_size)
    assert q.scale.shape == (length // group, N)
    assert error(x, w, q) < error(x, w, rtn(w, of, reduce_axes=(-2,)))


# -- every weight ----------------------------------------------------------------------------------------------------


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_any_axes():
    q = gptq(W, G16, reduce_axes=(-2,), stats=STATS)
    other = gptq(W.T, G16, reduce_axes=(1,), stats=STATS)
    np.testing.assert_array_equal(other.dequantize(), q.dequantize().T)
    split = gptq(W.reshape(3, 16, 2, 3), G16, reduce_axes=(-4, -3), stats=STATS)  # several axes on either side
    np.testing.assert_array_equal(split.dequantize().reshape(K, N), q.dequantize())
    assert split.scale.shape == (3, 1, 2, 3)


def test_dtype_of_the_weight_is_kept():
    q = gptq(W.astype(jnp.bfloat16), G16, reduce_axes=(-2,), stats=STATS)
    assert q.dtype == jnp.bfloat16
    half = gptq(W, spec(4, 16, True, scale_dtype="bfloat16"), reduce_axes=(-2,), stats=STATS)
    assert half.scale.dtype == jnp.bfloat16
    assert error(X, W, half) < error(X, W, rtn(W, spec(4, 16, True, scale_dtype="bfloat16"), reduce_axes=(-2,)))


def test_experts_are_quantized_each_with_its_own_statistics():
    x, w = jnp.stack([inputs(64, K, seed) for seed in (3, 4)]), jnp.stack([W, weight(K, N, seed=5)])
    q = gptq(w, G16, reduce_axes=(-2,), stats=gram(x))
    for e in range(2):
        alone = gptq(w[e], G16, reduce_axes=(-2,), stats=gram(x[e]))
        np.testing.assert_array_equal(q.dequantize()[e], alone.dequantize())


def test_experts_have_permutations_of_their_own():
    x, w = jnp.stack([inputs(64, K, seed) for seed in (3, 4)]), jnp.stack([W, weight(K, N, seed=5)])
    q = gptq(w, G16, reduce_axes=(-2,), stats=gram(x), order="descending")
    assert present(q.permutation).shape == (2, K, 1)
    for e in range(2):
        alone = gptq(w[e], G16, reduce_axes=(-2,), stats=gram(x[e]), order="descending")
        np.testing.assert_array_equal(q.dequantize()[e], alone.dequantize())


def test_grouped_outputs_are_quantized_each_with_its_own_statistics():
    x = jnp.stack([inputs(64, K, seed) for seed in (3, 4)])  # as of a convolution with two feature groups
    q = gptq(W, G16, reduce_axes=(-2,), stats=gram(x))
    for g, half in enumerate((slice(0, 3), slice(3, 6))):
        alone = gptq(W[:, half], G16, reduce_axes=(-2,), stats=gram(x[g]))
        np.testing.assert_array_equal(q.dequantize()[:, half], alone.dequantize())


@needs_jit  # else it takes half a minute
def test_stacked_and_convolution_weights_in_a_model():
    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])[0]
        image = x.reshape(-1, 4, 4, 1) * jnp.ones((1, 1, 1, 3), x.dtype)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, params["conv"], (1, 1), "SAME", dimension_numbers=numbers)

    params = {"stack": jnp.stack([weight(16, 16, seed=s) / 8 for s in (6, 7)]), "conv": weight(3, 3, 3, 2)}
    x = inputs(32, 16)
    of = jq.OpSpec(spec(4, None, False))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", of)])
    stats = jq.calibrate(fn, plan, params, [x], collect={"gram": jq.calibration.Gram()})
    qparams = jq.quantize_params(params, plan, method=gptq, stats=stats)
    for i in range(2):
        own = jax.tree.map(lambda a, i=i: a[i], stats["stack"])
        alone = gptq(params["stack"][i], present(of.weight), reduce_axes=(-2,), stats=own)
        same(jax.tree.map(lambda a, i=i: a[i], qparams["stack"]), alone)
    nearest = jq.quantize_params(params, plan)
    far = jax.jit(lambda p: jnp.linalg.norm(jq.quantized(fn, plan)(p, x) - fn(params, x)))
    assert far(qparams) < far(nearest)
    assert far({**params, "conv": qparams["conv"]}) < far({**params, "conv": nearest["conv"]})


# -- every Gram matrix -----------------------------------------------------------------------------------------------


def test_weights_of_dead_inputs_are_rounded_to_nearest():
    of = spec(4, None, True)
    x = X.at[:, 5].set(0).at[:, 20].set(0)
    q = gptq(W, of, reduce_axes=(-2,), stats=gram(x))
    dead = np.array([5, 20])
    np.testing.assert_array_equal(
        q.logical_codes()[dead], jq.quantize(W, of, reduce_axes=(-2,), scale=q.scale).logical_codes()[dead]
    )
    assert error(x, W, q) < error(x, W, rtn(W, of, reduce_axes=(-2,)))


def test_without_any_information_it_is_rounding_to_nearest():
    same(gptq(W, G16, reduce_axes=(-2,), stats=gram(X * 0)), rtn(W, G16, reduce_axes=(-2,)))


@pytest.mark.parametrize("rows, size", [(1, 1.0), (3, 1e-12), (20, 1e12)])
def test_singular_gram_matrices_of_any_magnitude(rows, size):
    x = X[:rows] * size
    q = gptq(W, G16, reduce_axes=(-2,), stats=gram(x))
    assert np.all(np.isfinite(q.dequantize()))
    assert error(x, W, q) < error(x, W, rtn(W, G16, reduce_axes=(-2,)))


def test_damping_grows_until_the_matrix_can_be_factored():
    x = X[:20] / jnp.linalg.norm(X[:20], axis=0, keepdims=True)
    h = x.T @ x - 0.2 * jnp.eye(K)  # rank 20, and then not positive
    assert np.linalg.eigvalsh(h)[0] < -0.15
    stats = {"gram": {"gram": h[None], "rows": jnp.float32(128)}}
    weak = gptq(W, G16, reduce_axes=(-2,), stats=stats, damping=1e-4)
    same(weak, gptq(W, G16, reduce_axes=(-2,), stats=stats, damping=1.0))


# -- refusals --------------------------------------------------------------------------------------------------------

with jax.debug_nans(False):
    NAN_STATS, NAN_W = gram(X.at[3, 4].set(jnp.nan)), W.at[0, 0].set(jnp.nan)


@makes_nan
@pytest.mark.parametrize(
    "w, stats, options, message",
    [
        (W, None, {}, r"gptq: needs the Gram matrix of the inputs; got stats=None\. Pass stats=calibrate"),
        (W, {"range": 1}, {}, r"got stats=\('range',\)"),
        (W, gram(X[:, :32]), {}, r"must be \[batch, channels, channels\] for 48 contracted elements"),
        (W, NAN_STATS, {}, "the Gram matrix must be finite"),
        (W, gram(X.at[3, 4].set(jnp.inf)), {}, "the Gram matrix must be finite"),
        (NAN_W, STATS, {}, "NaN cannot be quantized"),
        (W, gram(jnp.stack([X] * 4)), {}, "the batch of the statistics must be the leading axes"),
        (W, STATS, dict(order="random"), "unknown order"),
        (W, STATS, dict(clip="mse"), "unknown clip"),
        (W, STATS, dict(damping=0), "damping must be positive"),
        (W, STATS, dict(block_size=0), "block_size must be a positive integer"),
    ],
)
def test_refusals(w, stats, options, message):
    with pytest.raises(jq.QuantError, match=message):
        gptq(w, G16, reduce_axes=(-2,), stats=stats, **options)


def test_refuses_no_reduced_axes_and_groups_that_do_not_divide():
    with pytest.raises(jq.QuantError, match="at least one reduced axis"):
        gptq(W, spec(4, None, True), reduce_axes=(), stats=STATS)
    with pytest.raises(jq.QuantError, match="group_size must divide"):
        gptq(W, spec(4, 32, True), reduce_axes=(-2,), stats=STATS)
    with pytest.raises(jq.QuantError, match="a descending order scatters the groups over several axes"):
        gptq(W.reshape(3, 16, N), G16, reduce_axes=(-3, -2), stats=STATS, order="descending")


@makes_nan
@needs_jit
def test_nan_in_a_traced_gram_matrix_stays_visible():
    one = jax.jit(functools.partial(gptq, spec=G16, reduce_axes=(-2,)))
    q = one(W, stats=NAN_STATS)
    assert np.all(np.isnan(q.dequantize()))


@pytest.mark.every
@pytest.mark.parametrize("method", ["gptq", "clipped", "descend", "autoround", "hqq"])
def test_strict_promotion(method):
    """Nothing is promoted silently, here and in the other methods."""
    stats = None if method == "hqq" else STATS
    for symmetric in (True, False):
        how = functools.partial(getattr(jq.ptq, method), spec=spec(4, 16, symmetric), reduce_axes=(-2,))
        with jax.numpy_dtype_promotion("strict"):
            assert jax.eval_shape(lambda w, s, how=how: how(w, stats=s), W, stats).shape == W.shape

"""Two-level scales: integers 1 .. 15 times one float for all groups of a channel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan, needs_jit
from narrowed import instance

import jaxquant as jq
from jaxquant import QTensor, QuantError, QuantSpec, observers, recipes
from jaxquant.io import native

SPEC = QuantSpec("int4", granularity="per_group", group_size=32, two_level=True)


def weight(shape=(128, 12), decades=1.0):
    """Channels and groups of unequal magnitude."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape) * 10 ** (decades * rng.random((*shape[:-2], 1, shape[-1])))
    groups = np.repeat(rng.random((*shape[:-2], shape[-2] // 32, shape[-1])) + 0.2, 32, axis=-2)
    return jnp.asarray((w * groups).astype(np.float32))


def test_the_law_by_hand():
    """scale = multiplier * unit, unit = range of the channel / 7.5 / 15; codes round to nearest and saturate."""
    w = np.asarray(weight())
    q = jq.quantize(w, SPEC, reduce_axes=(-2,))
    groups = w.reshape(4, 32, 12)
    reach = np.maximum(groups.max(axis=1), -groups.min(axis=1) * np.float32(7.5 / 8.5))
    unit = (reach.max(axis=0) / np.float32(112.5)).astype(np.float32)
    np.testing.assert_allclose(np.asarray(instance(QTensor, q.scale).scale)[0], unit, rtol=1e-6)
    multiplier = np.asarray(instance(QTensor, q.scale).logical_codes())
    assert multiplier.min() >= 1
    assert multiplier.max() == 15
    np.testing.assert_array_equal(multiplier, np.clip(np.rint(reach / np.float32(7.5) / unit), 1, 15))
    scale = np.repeat(multiplier * unit, 32, axis=0)
    np.testing.assert_array_equal(np.asarray(q.logical_codes()), np.clip(np.rint(w / scale), -8, 7))
    np.testing.assert_allclose(np.asarray(q.dequantize()), np.asarray(q.logical_codes()) * scale, rtol=1e-6)


def test_error_is_close_to_that_of_float_scales():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((1024, 64)).astype(np.float32))

    def error(spec):
        return float(jnp.linalg.norm(jq.quantize(w, spec, reduce_axes=(-2,)).dequantize() - w) / jnp.linalg.norm(w))

    grouped = QuantSpec("int4", granularity="per_group", group_size=128)
    two_level = QuantSpec("int4", granularity="per_group", group_size=128, two_level=True)
    assert error(grouped) < error(two_level) < 1.01 * error(grouped) < error(QuantSpec("int4"))


@pytest.mark.parametrize("calibration", [None, observers.MSE(), observers.Percentile(99.0)], ids=str)
def test_calibrators(calibration):
    spec = QuantSpec("int4", granularity="per_group", group_size=32, two_level=True, calibration=calibration)
    w = weight()
    q = jq.quantize(w, spec, reduce_axes=(-2,))
    assert instance(QTensor, q.scale).scale.shape == (1, 12)
    error = jnp.sum((q.dequantize() - w) ** 2, axis=0) / jnp.sum(w**2, axis=0)
    assert float(jnp.max(error)) < 0.05
    np.testing.assert_array_equal(jq.fake_quant(w, spec, reduce_axes=(-2,)), q.dequantize())


@makes_nan
@needs_jit  # where it is known, NaN raises
def test_bytes_nan_and_zeros():
    q = jq.quantize(jnp.zeros((64, 4)), SPEC, reduce_axes=(-2,))
    np.testing.assert_array_equal(q.dequantize(), 0)
    assert q.nbytes == 64 * 4 // 2 + 2 * 4 // 2 + 4 * 4  # codes, integers, floats
    with pytest.raises(QuantError, match="NaN"):
        jq.quantize(weight().at[3, 2].set(jnp.nan), SPEC, reduce_axes=(-2,))
    out = jax.jit(lambda w: jq.quantize(w, SPEC, reduce_axes=(-2,)).dequantize())(weight().at[3, 2].set(jnp.nan))
    np.testing.assert_array_equal(jnp.any(jnp.isnan(out), axis=0), np.arange(12) == 2)


def test_stacks_and_gradient_of_what_saturates():
    w = weight((3, 64, 4))
    stacked = jax.vmap(lambda w: jq.quantize(w, SPEC, reduce_axes=(-2,)))(w)
    one = jq.quantize(w[1], SPEC, reduce_axes=(-2,))
    np.testing.assert_array_equal(jax.tree.map(lambda v: v[1], stacked).dequantize(), one.dequantize())
    g = jax.grad(lambda w: jq.fake_quant(w, SPEC, reduce_axes=(-2,)).sum())(w[1])
    reach = jnp.repeat(7 * instance(QTensor, one.scale).dequantize(), 32, axis=0)
    np.testing.assert_array_equal(g, jnp.abs(w[1]) <= reach)
    assert 0 < float(jnp.mean(g)) < 1


def test_saved_and_loaded(tmp_path):
    q = jq.quantize(weight(), SPEC, reduce_axes=(-2,))
    native.save(tmp_path / "w.safetensors", {"w": q})
    back = native.load(tmp_path / "w.safetensors")["w"]
    assert isinstance(back, QTensor)
    assert jax.tree.structure(back) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, back, q)


def test_spec():
    assert recipes.w4a16(32, two_level=True).weight == SPEC
    assert recipes.w4a8(32, two_level=True).weight == SPEC
    text = '{"qtype": "int4", "granularity": "per_group", "group_size": 32, "scale_dtype": "uint4"}'  # as in files
    assert SPEC.to_json() == text
    assert QuantSpec.from_json(text) == SPEC
    assert (
        QuantSpec.from_dict({"qtype": "int4", "granularity": "per_group", "group_size": 32, "two_level": True}) == SPEC
    )
    with pytest.raises(QuantError, match=r"two-level scales are integers times one float32; .*Leave scale_dtype out"):
        QuantSpec("int4", granularity=jq.PerGroup(32), scale_dtype="float16", two_level=True)
    groups = jq.PerGroup(32)
    for bad in (
        lambda: QuantSpec("int4", two_level=True),
        lambda: QuantSpec("int8", granularity=groups, two_level=True),
        lambda: QuantSpec("int4", granularity=groups, symmetric=False, two_level=True),
        lambda: QuantSpec("nf4", granularity=groups, two_level=True),
    ):
        with pytest.raises(QuantError, match="two-level"):
            bad()

"""take agrees with jnp.take on the dequantized table: in every mode, axis and storage."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_settings import makes_nan
from ops_reference import quantized, slow_but, spec_of, unequal

from jaxquant import OpSpec, QTensor, QuantSpec, fake_quant, observers, ops

SHAPE = (6, 32, 5)
INDICES = jnp.asarray([[0, 4, -1], [2, -5, 3]])
OUTSIDE = jnp.asarray([0, 99, -99, -4, 3, 5, 6, -6, -7])
SPECS = {
    "int8": spec_of("int8"),
    "asymmetric": spec_of("uint4", symmetric=False),
    "groups": spec_of("int4", "per_group"),
    "3 bits": spec_of("int3", "per_group", symmetric=False),
    "per tensor": spec_of("int8", "per_tensor"),
    "nf4": QuantSpec("nf4", granularity="per_group", group_size=16),
    "fp8": QuantSpec("float8_e4m3fn"),
    "mxfp4": QuantSpec("mxfp4"),
    "nvfp4": QuantSpec("nvfp4"),  # its scales are quantized themselves
    "clipped": spec_of("int4", calibration=observers.Percentile(90.0)),
}


@pytest.mark.parametrize("name", slow_but(SPECS, "asymmetric", "3 bits", "per tensor", "nf4", "nvfp4", "clipped"))
def test_axes_and_storage(name):
    """Along each axis: the outermost, the one that is reduced (and packed), and the last."""
    table = unequal(0, SHAPE)
    q = quantized(table, SPECS[name])
    stored = [q, q.store(())] if q.minor else [q]
    spec = OpSpec(SPECS[name])

    @jax.jit
    def program(table, stored):
        frozen = [[ops.take(s, INDICES, axis) for s in stored] for axis in (0, 1, -1)]
        return frozen, [ops.take(table, INDICES, axis, spec=spec, reduce_axes=(-2,)) for axis in (0, 1, -1)]

    frozen, trained = program(table, stored)
    values = q.dequantize()
    for axis, got, qat in zip((0, 1, -1), frozen, trained, strict=True):
        want = np.asarray(jnp.take(values, INDICES, axis=axis))
        for each in got:
            np.testing.assert_array_equal(each, want)
        np.testing.assert_array_equal(qat, want)


@pytest.mark.parametrize("mode, fill", [(None, None), ("fill", None), ("fill", 7.5), ("clip", None), ("wrap", None)])
def test_modes(mode, fill):
    table = unequal(1, (6, 8))
    for spec, axis in ((spec_of("int4", "per_group", group=4), 0), (spec_of("int8"), 1)):
        q = quantized(table, spec, (-1,))
        for indices in (OUTSIDE, OUTSIDE.astype(jnp.int8), jnp.abs(OUTSIDE).astype(jnp.uint8)):
            want = jnp.take(q.dequantize(), indices, axis=axis, mode=mode, fill_value=fill)
            got = ops.take(q, indices, axis, mode=mode, fill_value=fill)
            np.testing.assert_array_equal(got, want)
            got = ops.take(table, indices, axis, mode=mode, fill_value=fill, spec=OpSpec(spec))
            np.testing.assert_array_equal(got, want)


@makes_nan
def test_small_index_types_and_a_large_table():
    """300 rows do not fit the index type, nor does -300."""
    table = unequal(2, (300, 4))
    q = quantized(table, spec_of("int8"), (-1,))
    for dtype, indices in ((jnp.uint8, [0, 255]), (jnp.int8, [-1, 127, -128])):
        for mode in ("fill", "clip", "wrap"):
            indices = jnp.asarray(indices, dtype)
            want = jnp.take(q.dequantize(), indices.astype(jnp.int32), axis=0, mode=mode)
            np.testing.assert_array_equal(ops.take(q, indices, 0, mode=mode), want)
    huge = jnp.asarray([2**32 - 1, 5], jnp.uint32)
    assert np.isnan(ops.take(q, huge, 0)[0]).all()
    np.testing.assert_array_equal(ops.take(q, huge, 0, mode="wrap")[0], q.dequantize()[(2**32 - 1) % 300])


@makes_nan
def test_one_row_and_no_rows():
    table = unequal(3, (1, 8))
    for spec in (spec_of("int8"), spec_of("int8", "per_tensor"), spec_of("int8", "per_tensor", symmetric=False)):
        q = quantized(table, spec, (-1,))
        want = jnp.take(q.dequantize(), OUTSIDE, axis=0)
        np.testing.assert_array_equal(ops.take(q, OUTSIDE, 0), want)
        np.testing.assert_array_equal(ops.take(table, OUTSIDE, 0, spec=OpSpec(spec)), want)
        for indices in (jnp.zeros((0, 3), jnp.int32), jnp.zeros((2, 0), jnp.int8)):
            assert ops.take(q, indices, 0).shape == (*indices.shape, 8)
            assert ops.take(q, indices, 1).shape == (1, *indices.shape)
            assert ops.take(table, indices, 0, spec=OpSpec(spec)).shape == (*indices.shape, 8)
    scalar = ops.take(q, 0, 0)
    assert scalar.shape == (8,)


@pytest.mark.parametrize("axes", [(-1,), 1, (0,), (0, 1), (-2, 1), ()])
def test_reduced_axes(axes):
    table = unequal(4, (6, 8))
    spec = spec_of("int4", symmetric=False)
    q = quantized(table, spec, axes)
    for axis in (0, 1):
        got = ops.take(table, INDICES, axis, spec=OpSpec(spec), reduce_axes=axes)
        np.testing.assert_array_equal(got, jnp.take(q.dequantize(), INDICES, axis=axis))


def test_dtypes():
    for dtype in (jnp.bfloat16, jnp.float16):
        table = unequal(5, (6, 8), dtype)
        q = quantized(table, spec_of("int8"), (-1,))
        assert ops.take(q, INDICES, 0).dtype == dtype
        np.testing.assert_array_equal(ops.take(q, INDICES, 0), jnp.take(q.dequantize(), INDICES, axis=0))
        assert ops.take(table, INDICES, 0, spec=OpSpec(spec_of("int8"))).dtype == dtype
        assert ops.take(q, jnp.zeros((0,), jnp.int32), 0).dtype == dtype


def test_gradients():
    table, g = unequal(6, (7, 8)), unequal(7, (*INDICES.shape, 8))
    spec = spec_of("int4")
    q = quantized(table, spec, (-1,))

    def of_rows(axis, mode=None):
        return jax.grad(lambda t: jnp.sum(ops.take(t, INDICES, axis, mode=mode, spec=OpSpec(spec)) * g))(table)

    want = jax.grad(lambda t: jnp.sum(jnp.take(fake_quant(t, spec, reduce_axes=(-1,)), INDICES, axis=0) * g))(table)
    np.testing.assert_allclose(of_rows(0), want, rtol=1e-6)
    assert not np.asarray(want)[1].any()  # a row that no index names

    def of_scale(scale):
        leaf = QTensor(q.codes, scale, None, qtype="int4", dtype=jnp.float32, minor=q.minor, length=q.length)
        return jnp.sum(ops.take(leaf, INDICES, 0) * g)

    def reference(scale):
        return jnp.sum(jnp.take(q.logical_codes().astype(jnp.float32) * scale, INDICES, axis=0) * g)

    np.testing.assert_allclose(jax.grad(of_scale)(q.scale), jax.grad(reference)(q.scale), rtol=1e-5)


@makes_nan
def test_without_quantization_it_is_jnp():
    table = unequal(8, (6, 8))
    cases: list[Any] = [{}, {"axis": 1}, {"axis": 0, "mode": "clip"}, {"axis": 0, "fill_value": 3.0}]
    for kwargs in cases:
        for spec in (None, OpSpec(), OpSpec(act=spec_of("int8"))):
            np.testing.assert_array_equal(
                ops.take(table, OUTSIDE, spec=spec, **kwargs), jnp.take(table, OUTSIDE, **kwargs)
            )


def test_only_the_rows_are_dequantized():
    """The float table never exists: no array of its size in the program."""
    table = unequal(9, (64, 32), decades=0.2)
    for spec in (spec_of("int8"), spec_of("int4", "per_group")):
        q = quantized(table, spec, (-1,))
        jaxpr = jax.make_jaxpr(lambda q: ops.take(q, jnp.arange(3), 0))(q).jaxpr
        big = [
            v
            for eqn in jaxpr.eqns
            for v in eqn.outvars
            if jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.size > 96
        ]
        assert not big

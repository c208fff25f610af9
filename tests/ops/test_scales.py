"""Scales and layouts that are rare, against the dequantized operands: each was once multiplied wrongly."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ops_reference import INTEGER, MATMUL, WEIGHT_ONLY, dot, dot_error, error, quantized, real, spec_of, unequal

import jaxquant as jq
from jaxquant import OpSpec, ops, recipes
from jaxquant.ops.kernels.cpu import gemv


def product(x, q, spec=None):
    return jax.jit(functools.partial(ops.dot_general, dimension_numbers=MATMUL, spec=spec))(x, q)


@pytest.mark.every
@given(
    planes=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([8, 16, 24, 32, 64, 96, 128, 256, 512, 1024, 4096]),
    groups=st.integers(1, 400),
)
def test_loops_have_whole_groups_or_lie_in_one(planes, group, groups):
    """Of a plane of so many groups: lanes and chunks cover it, and none straddles the end of a group."""
    scale = np.zeros((1, 1, groups))
    w: Any = types.SimpleNamespace(planes=planes, shape=(1, 1, planes * group * groups), scale=scale, multiplier=None)
    cut = gemv._chunks_of(w)
    if cut is not None:
        size = cut.lanes * cut.terms
        assert size * cut.chunks == group * groups
        assert cut.group == group
        assert cut.chunks == 1 or size % group == 0 or group % size == 0
        assert cut.lanes % group == 0 or group % cut.lanes == 0
        assert cut.terms * planes <= 96


@pytest.mark.parametrize("k, spec", [(11008, recipes.w4a16(256).weight), (24576, recipes.w8a16(8192).weight)])
def test_groups_longer_than_a_chunk(k, spec):
    q, x = quantized(unequal(0, (k, 3)), spec), unequal(1, (1, k))
    assert dot_error(product(x, q), real(x), real(q), MATMUL) < INTEGER


@pytest.mark.parametrize("bits", [3, 4])
def test_views_of_unsigned_codes(bits):
    """A slice of a packed weight has a code per byte, which are no packed bytes."""
    q = quantized(unequal(2, (64, 256)), spec_of(f"uint{bits}", symmetric=False), (-1,))
    x = unequal(3, (2, 256))
    plan = jq.make_plan(lambda p, x: x @ p["w"][:32].T, {"w": q}, x, rules=[])
    got = jax.jit(jq.quantized(lambda p, x: x @ p["w"][:32].T, plan))({"w": q}, x)
    w = real(q)[:32].T
    assert dot_error(got, real(x), w, MATMUL) < WEIGHT_ONLY


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("qtype", ["int4", "uint8", "nf4"])
def test_scales_in_fp8(qtype, m):
    spec, w = spec_of(qtype, symmetric=not qtype.startswith("u")), unequal(4, (256, 24))
    scale = quantized(w, spec).scale
    small = jq.quantize(scale, spec_of("float8_e4m3fn", "per_tensor"), reduce_axes=(0, 1))
    zero_point = None if spec.symmetric else jnp.full(scale.shape, 100.0)
    q = jq.quantize(w, spec, reduce_axes=(-2,), scale=small, zero_point=zero_point)
    x = unequal(5, (m, 256))
    assert dot_error(product(x, q), real(x), real(q), MATMUL) < WEIGHT_ONLY


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("qtype", ["int4", "nf4"])
def test_scales_in_fp8_with_a_mean(qtype, m):
    """Double quantization stores what differs from the mean of the scales."""
    spec = spec_of(qtype, "per_group", group=64)
    q = jq.ptq.double_quantized(unequal(6, (256, 24)), spec, reduce_axes=(-2,), qtype="float8_e4m3fn")
    x = unequal(7, (m, 256))
    assert dot_error(product(x, q), real(x), real(q), MATMUL) < WEIGHT_ONLY


def test_activation_groups_that_planes_do_not_divide():
    k = 2050
    spec = OpSpec(spec_of("int4"), spec_of("int8", "per_group", group=1025))
    q, x = quantized(unequal(8, (k, 5)), spec.weight), unequal(9, (3, k))
    assert dot_error(product(x, q, spec), real(x, spec.act, (-1,)), real(q), MATMUL) < INTEGER


@pytest.mark.parametrize("qtype", ["int8", "uint4"])
def test_zero_points_of_a_whole_stack(qtype):
    """One for all matrices of a batch, one row of activations."""
    spec = spec_of(qtype, symmetric=False)
    numbers = (((2,), (1,)), ((0,), (0,)))
    act = spec_of("int8", "per_group", group=64)
    q, x = quantized(unequal(10, (3, 256, 16)), spec, (0, 1)), unequal(11, (3, 1, 256))
    got = jax.jit(lambda x, q: ops.dot_general(x, q, numbers, spec=OpSpec(act=act)))(x, q)
    exact, size = (dot(f(real(x, act, (-1,))), f(real(q)), numbers) for f in (lambda v: v, lambda v: v**2))
    assert error(got, exact, np.sqrt(np.abs(size))) < INTEGER


def test_infinite_activations_stay_in_their_row():
    q = quantized(jnp.ones((24576, 4)), spec_of("float8_e4m3fn"))
    x = jnp.ones((1, 24576)).at[0, 0].set(jnp.inf)
    assert np.isinf(np.asarray(product(x, q))).all()

"""conv_general_dilated agrees with the float convolution of the values its operands stand for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from jax import lax
from jax_settings import makes_nan
from ops_reference import INTEGER, WEIGHT_ONLY, error, quantized, real, slow_but, spec_of, unequal

from jaxquant import OpSpec, QuantSpec, ops, recipes
from jaxquant.ops.kernels.cpu.machine import int8_dots

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
ASYMMETRIC = OpSpec(spec_of("int8", symmetric=False), spec_of("uint8", symmetric=False))

# name: (x, kernel, the arguments of lax.conv_general_dilated)
WINDOWS = {
    "same": ((2, 7, 6, 5), (3, 3, 5, 4), dict(padding="SAME", dimension_numbers=NHWC)),
    "valid, strides": (
        (2, 7, 6, 5),
        (3, 2, 5, 4),
        dict(padding="VALID", window_strides=(2, 1), dimension_numbers=NHWC),
    ),
    "same lower": (
        (2, 7, 6, 5),
        (4, 2, 5, 4),
        dict(padding="SAME_LOWER", window_strides=(2, 2), dimension_numbers=NHWC),
    ),
    "explicit padding": ((2, 7, 6, 5), (3, 3, 5, 4), dict(padding=((2, 0), (1, 3)), dimension_numbers=NHWC)),
    "negative padding": ((2, 7, 6, 5), (3, 3, 5, 4), dict(padding=((-1, 2), (0, -2)), dimension_numbers=NHWC)),
    "kernel dilation": ((2, 9, 8, 5), (3, 2, 5, 4), dict(padding="SAME", rhs_dilation=(2, 3), dimension_numbers=NHWC)),
    "image dilation": (
        (2, 5, 4, 5),
        (3, 3, 5, 4),
        dict(padding=((2, 1), (1, 2)), lhs_dilation=(2, 3), rhs_dilation=(1, 2), dimension_numbers=NHWC),
    ),
    "feature groups": (
        (2, 7, 6, 6),
        (3, 3, 2, 12),
        dict(padding="SAME", feature_group_count=3, dimension_numbers=NHWC),
    ),
    "depthwise": ((2, 7, 6, 6), (3, 3, 1, 12), dict(padding="SAME", feature_group_count=6, dimension_numbers=NHWC)),
    "batch groups": ((6, 5, 4, 5), (3, 3, 5, 6), dict(padding="SAME", batch_group_count=3, dimension_numbers=NHWC)),
    "channels first": ((2, 5, 7, 6), (4, 5, 3, 3), dict(padding="SAME", dimension_numbers=NCHW)),
    "by default": ((2, 5, 7, 6), (4, 5, 3, 3), dict(padding="SAME", window_strides=[2, 2])),
    "all orders mixed": ((7, 5, 2, 6), (3, 4, 3, 5), dict(padding="SAME", dimension_numbers=("HCNW", "HOWI", "WNHC"))),
    "one spatial axis": ((2, 9, 5), (3, 5, 4), dict(padding="SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
    "one spatial axis, channels first": (
        (2, 6, 9),
        (4, 3, 3),
        dict(
            padding=((2, 1),),
            window_strides=(2,),
            lhs_dilation=(2,),
            feature_group_count=2,
            dimension_numbers=("NCW", "OIW", "NCW"),
        ),
    ),
    "three spatial axes": (
        (2, 4, 5, 3, 5),
        (3, 2, 3, 5, 4),
        dict(padding="SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")),
    ),
    "one pixel": ((1, 1, 1, 5), (1, 1, 5, 4), dict(padding="VALID", dimension_numbers=NHWC)),
    "one of each": ((1, 3, 3, 1), (3, 3, 1, 1), dict(padding="VALID", dimension_numbers=NHWC)),
    "no spatial axes": ((3, 5), (5, 4), dict(padding=(), window_strides=(), dimension_numbers=("NC", "IO", "NC"))),
}


def axes_of(name):
    """Axes of images and of the kernel that share a scale."""
    left, right, window = WINDOWS[name]
    numbers = lax.conv_dimension_numbers(left, right, window.get("dimension_numbers"))
    return numbers.lhs_spec[1:], numbers.rhs_spec[1:], numbers


def conv(x, k, name, **kwargs):
    window = {"window_strides": (1,) * (x.ndim - 2), **WINDOWS[name][2]}
    return ops.conv_general_dilated(x, k, **window, **kwargs)


def conv_error(got, x, k, name):
    """Error against a float64 convolution, image by image and feature by feature."""
    window = {"window_strides": (1,) * (x.ndim - 2), **WINDOWS[name][2]}
    numbers = axes_of(name)[2]
    with double_precision():
        want = np.asarray(lax.conv_general_dilated(jnp.asarray(x), jnp.asarray(k), precision="highest", **window))
    spatial = tuple(numbers.out_spec[2:])
    size = np.sqrt(np.mean(want**2, axis=spatial, keepdims=True))
    return error(got, want, np.broadcast_to(size, want.shape))


SLOW = {"same lower", "explicit padding", "depthwise", "by default", "one spatial axis", "one pixel", "one of each"}


@pytest.mark.parametrize("name", slow_but(WINDOWS, *(WINDOWS.keys() - SLOW)))
def test_windows(name):
    left, right, _ = WINDOWS[name]
    x, k = unequal(0, left) + 0.1, unequal(1, right) - 0.05
    ax, ak, _ = axes_of(name)
    both = quantized(k, ASYMMETRIC.weight, ak)
    weight_only = quantized(k, spec_of("int8"), ak).store(())

    @jax.jit
    def program(x, both, weight_only):
        return conv(x, both, name, spec=ASYMMETRIC), conv(x, weight_only, name)

    integer, digits = program(x, both, weight_only)
    assert conv_error(integer, real(x, ASYMMETRIC.act, ax), real(both), name) <= INTEGER
    assert conv_error(digits, real(x), real(weight_only), name) <= WEIGHT_ONLY


def test_holes_of_dilated_images_are_real_zeros():
    """As in a transposed convolution: a zero point stands for 0 in no hole, since there is no code."""
    name = "one spatial axis, channels first"
    x, k = unequal(0, WINDOWS[name][0]) + 0.1, unequal(1, WINDOWS[name][1])
    got = jax.jit(lambda x, k: conv(x, k, name, spec=ASYMMETRIC))(x, k)
    ax, ak, _ = axes_of(name)
    assert conv_error(got, real(x, ASYMMETRIC.act, ax), real(k, ASYMMETRIC.weight, ak), name) <= INTEGER


SPECS = {
    "w8a8": recipes.w8a8(),
    "w8a8 asymmetric": recipes.w8a8(act_symmetric=False),
    "per tensor": OpSpec(spec_of("int8", "per_tensor"), spec_of("uint8", "per_tensor", symmetric=False)),
    "w4a8, weights per group": recipes.w4a8(9),
    "activations per group": OpSpec(spec_of("int4"), spec_of("int8", "per_group", group=3)),
    "w4a4": recipes.w4a4(),
    "w2a4": OpSpec(spec_of("uint2", symmetric=False), spec_of("int4")),
    "after a ReLU": OpSpec(spec_of("int8"), spec_of("uint8")),
    "w8a16": recipes.w8a16(),
    "w4a16": recipes.w4a16(None),
    "w4a16, weights per group": recipes.w4a16(9, symmetric=False),  # groups are multiplied in float
    "activations only": OpSpec(act=spec_of("int8")),
    "fp8": recipes.fp8(),
    "fp8 weights, int8 activations": OpSpec(QuantSpec("float8_e5m2"), spec_of("int8")),
    "nf4": recipes.nf4(9),
}


@pytest.mark.parametrize(
    "name", slow_but(SPECS, "w8a8", "per tensor", "w4a8, weights per group", "after a ReLU", "w4a16", "fp8", "nf4")
)
def test_specs(name):
    spec = SPECS[name]
    x, k = unequal(2, (2, 6, 5, 3)), unequal(3, (3, 3, 3, 4))
    frozen = k if spec.weight is None else quantized(k, spec.weight, (0, 1, 2))
    got = jax.jit(lambda x, *ks: [conv(x, k, "same", spec=spec) for k in ks])(x, k, frozen)
    bound = WEIGHT_ONLY if name in ("w8a16", "w4a16") else INTEGER
    for each in got:
        assert conv_error(each, real(x, spec.act, (1, 2, 3)), real(frozen), "same") <= bound
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("minor", [(), (-4, -3, -2), (-1,)])
def test_storage_orders(minor):
    x, k = unequal(4, (2, 6, 5, 3)), quantized(unequal(5, (3, 2, 3, 4)), spec_of("int4", symmetric=False), (0, 1, 2))
    got = jax.jit(lambda x, k: conv(x, k, "same", spec=OpSpec(act=spec_of("int8"))))(x, k.store(minor))
    assert conv_error(got, real(x, spec_of("int8"), (1, 2, 3)), real(k), "same") <= INTEGER


def test_both_quantized():
    x, k = unequal(6, (2, 6, 5, 3)), unequal(7, (3, 3, 3, 4))
    images = quantized(x, spec_of("uint8", symmetric=False), (1, 2, 3))
    kernel = quantized(k, spec_of("int8"), (0, 1, 2))
    assert conv_error(conv(images, kernel, "same"), real(images), real(kernel), "same") <= INTEGER
    assert conv_error(conv(images, k, "same"), real(images), real(k), "same") <= INTEGER


def test_padding_is_real_zero():
    """A window that sees nothing but padding gives exactly 0, whatever the zero points."""
    x, k = jnp.abs(unequal(8, (1, 2, 2, 3))) + 1, jnp.abs(unequal(9, (3, 3, 3, 2))) + 1
    for spec in (ASYMMETRIC, OpSpec(ASYMMETRIC.weight), OpSpec(act=ASYMMETRIC.act)):
        got = ops.conv_general_dilated(x, k, (1, 1), ((6, 0), (1, 1)), dimension_numbers=NHWC, spec=spec)
        assert not np.asarray(got[:, :4]).any()
        assert np.asarray(got[:, -1]).all()


def test_precision():
    x, k = unequal(10, (2, 7, 6, 5)), quantized(unequal(11, (3, 3, 5, 4)), spec_of("int8"), (0, 1, 2))
    for precision in ("highest", lax.Precision.HIGHEST, ["highest", "highest"]):
        assert conv_error(conv(x, k, "same", precision=precision), real(x), real(k), "same") <= INTEGER
    if int8_dots() != "none":  # else a float convolution
        assert conv_error(conv(x, k, "same"), real(x), real(k), "same") > INTEGER


def test_static_activations():
    x, k = unequal(12, (2, 7, 6, 5)), unequal(13, (3, 3, 5, 4))
    spec = recipes.w8a8(static=True, act_symmetric=False)
    got = conv(x, k, "same", spec=spec, act_scale=0.05, act_zero_point=jnp.int8(-20))
    left = real(x, spec.act, (1, 2, 3), 0.05, jnp.int8(-20))
    assert conv_error(got, left, real(k, spec.weight, (0, 1, 2)), "same") <= INTEGER


@pytest.mark.parametrize("dtype", slow_but([jnp.bfloat16, jnp.float16], jnp.bfloat16))
def test_half_precision(dtype):
    x, k = unequal(14, (2, 7, 6, 5), dtype, decades=0.5), unequal(15, (3, 3, 5, 4), dtype, decades=0.5)
    for spec in (recipes.w8a8(), recipes.w8a16(), recipes.nf4(5)):
        for kernel in (k, quantized(k, spec.weight, (0, 1, 2))):
            got = conv(x, kernel, "same", spec=spec)
            assert got.dtype == dtype
            left, right = real(x, spec.act, (1, 2, 3)), real(k, spec.weight, (0, 1, 2))
            assert conv_error(got, left, right, "same") <= jnp.finfo(dtype).eps / 2
    wide = conv(x, k, "same", spec=recipes.w8a8(), preferred_element_type=jnp.float32)
    left, right = real(x, spec_of("int8"), (1, 2, 3)), real(k, spec_of("int8"), (0, 1, 2))
    assert conv_error(wide, left, right, "same") <= INTEGER


def test_float64():
    with double_precision():
        x, k = unequal(16, (2, 7, 6, 5), np.float64), unequal(17, (3, 3, 5, 4), np.float64)
        q = quantized(k, spec_of("int8"), (0, 1, 2))
        got = conv(x, q, "same")
        assert got.dtype == np.float64
        assert conv_error(got, real(x), real(q), "same") <= 1e-13
        left = real(x, spec_of("int8"), (1, 2, 3))
        assert conv_error(conv(x, q, "same", spec=recipes.w8a8()), left, real(q), "same") <= INTEGER


@makes_nan
def test_images_stay_alone():
    x = unequal(18, (3, 6, 5, 3))
    k = quantized(unequal(19, (3, 3, 3, 4)), spec_of("int8"), (0, 1, 2))
    for spec in (None, recipes.w8a8()):
        clean = conv(x, k, "same", spec=spec)
        for bad in (np.nan, np.inf):
            got = conv(x.at[1, 2, 2, 0].set(bad), k, "same", spec=spec)
            np.testing.assert_array_equal(got[::2], clean[::2])
            assert not np.array_equal(got[1], clean[1])


def test_nothing_to_quantize():
    x, k = unequal(20, (2, 7, 6, 5)), unequal(21, (3, 3, 5, 4))
    want = lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=NHWC)
    np.testing.assert_array_equal(conv(x, k, "same"), want)
    np.testing.assert_array_equal(conv(x, k, "same", spec=OpSpec()), want)
    empty = conv(x[:0], k, "same", spec=recipes.w8a8())
    assert empty.shape == (0, 7, 6, 4)


def test_no_integer_convolution_on_gpus():
    """XLA refuses them there; the program that is lowered for each platform has its own."""
    x, k = jnp.ones((2, 6, 5, 3), jnp.float32), jnp.ones((3, 3, 3, 4), jnp.float32)
    for spec in (recipes.w8a8(), recipes.w8a16()):
        q = quantized(k, spec.weight, (0, 1, 2))
        traced = jax.jit(lambda x, q, spec=spec: conv(x, q, "same", spec=spec)).trace(x, q)
        for platform, integer in (("cuda", False), ("rocm", False), ("cpu", int8_dots() != "none")):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert bool(re.search(r"stablehlo.convolution.*xi32>", text)) == integer

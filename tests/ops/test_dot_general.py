"""dot_general agrees with the float product of the values its operands stand for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from jax import lax
from narrowed import present, untyped
from ops_reference import (
    INTEGER,
    MATMUL,
    WEIGHT_ONLY,
    check_dot,
    check_product,
    dot,
    dot_error,
    dot_values,
    error,
    quantized,
    real,
    slow_but,
    spec_of,
    unequal,
)

from jaxquant import OpSpec, QTensor, QuantSpec, observers, ops, quantize, recipes
from jaxquant.core.qtensor import from_codes
from jaxquant.ops.kernels.cpu.machine import int8_dots

GRANULARITIES = ("per_tensor", "per_channel", "per_group")
INTS = tuple(f"{u}int{bits}" for bits in range(2, 9) for u in ("", "u"))
RECIPES = {
    "w8a16": recipes.w8a16(),
    "w8a16 grouped": recipes.w8a16(16),
    "w4a16": recipes.w4a16(16),
    "w4a16 asymmetric": recipes.w4a16(16, symmetric=False),
    "w4a16 per channel": recipes.w4a16(None),
    "nf4": recipes.nf4(32),
    "w8a8": recipes.w8a8(),
    "w8a8 asymmetric": recipes.w8a8(act_symmetric=False),
    "w4a8": recipes.w4a8(16),
    "w4a4": recipes.w4a4(),
    "w4a4 grouped": recipes.w4a4(16),
    "fp8": recipes.fp8(),
    "mxfp8": recipes.mxfp8(),
    "mxfp4": recipes.mxfp4(),
    "mxfp4 both": recipes.mxfp4(act=True),
    "nvfp4": recipes.nvfp4(),
    "nvfp4 both": recipes.nvfp4(act=True),
}


def bound_of(spec):
    """Weight-only with an integer weight is approximate at the default precision; everything else is not."""
    approximate = spec.act is None and spec.weight is not None and spec.weight.type.kind == "int"
    return WEIGHT_ONLY if approximate else INTEGER


@pytest.mark.parametrize(
    "name", slow_but(RECIPES, *(n for n in RECIPES if not n.endswith(("grouped", "channel", "both"))))
)
def test_recipes(name):
    spec = RECIPES[name]
    x, w = unequal(0, (5, 64)), unequal(1, (64, 12))
    frozen = check_dot(x, quantized(w, spec.weight), bound=bound_of(spec), spec=spec)
    trained = check_dot(x, w, bound=bound_of(spec), spec=spec)
    assert error(trained, frozen) <= INTEGER  # one computation for both


@pytest.mark.parametrize("left", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("right", [True, False], ids=["symmetric", "asymmetric"])
def test_granularities_on_both_sides(left, right):
    x, w = unequal(2, (6, 48)) + 0.1, unequal(3, (48, 10)) - 0.05
    specs = {
        f"{a}, {b}": OpSpec(spec_of("int8", b, group=24, symmetric=right), spec_of("int8", a, group=16, symmetric=left))
        for a, b in itertools.product(GRANULARITIES, repeat=2)  # groups of 16 and 24 meet in runs of 8
    }
    got = jax.jit(lambda x, w: {k: ops.dot_general(x, w, MATMUL, spec=s) for k, s in specs.items()})(x, w)
    for key, spec in specs.items():
        assert dot_error(got[key], *dot_values(x, w, MATMUL, spec), MATMUL) <= INTEGER, key


@pytest.mark.parametrize("sizes", slow_but([(16, 16), (8, 32), (32, 8), (4, 6), (1, 48), (48, 48)], (32, 8), (4, 6)))
def test_group_sizes(sizes):
    a, b = sizes
    spec = OpSpec(spec_of("int4", "per_group", group=b, symmetric=False), spec_of("int8", "per_group", group=a))
    check_dot(unequal(2, (6, 96)), unequal(3, (96, 10)), spec=spec)


@pytest.mark.parametrize("a, w", [("uint8", "uint8"), ("uint8", "int8"), ("int8", "uint4"), ("uint4", "uint8")])
def test_unsigned_types(a, w):
    x, weight = unequal(4, (6, 32)), unequal(5, (32, 9))
    check_dot(x, weight, spec=OpSpec(spec_of(w, "per_group", symmetric=False), spec_of(a, symmetric=False)))
    check_dot(jnp.abs(x), weight, spec=OpSpec(spec_of(w, symmetric=False), spec_of(a)))  # after a ReLU


@pytest.mark.parametrize("qtype", slow_but(INTS, "int2", "uint3", "int4", "uint8"))
def test_integer_types(qtype):
    symmetric = not qtype.startswith("u")
    x, w = unequal(6, (5, 24)), unequal(7, (24, 7))
    q = quantized(w, spec_of(qtype, symmetric=symmetric))
    act = OpSpec(act=spec_of(qtype, symmetric=symmetric))
    weight_only, both = jax.jit(lambda x, q: [ops.dot_general(x, q, MATMUL, spec=s) for s in (None, act)])(x, q)
    # Nearly all codes of the small types are 0, where activations may be large: the error on the whole says little.
    few = qtype.endswith(("2", "3"))
    check_product(weight_only, real(x), real(q), bound=10 * WEIGHT_ONLY if few else WEIGHT_ONLY)
    assert dot_error(both, *dot_values(x, q, MATMUL, act), MATMUL) <= INTEGER


@pytest.mark.parametrize(
    "low, other", [("float8_e4m3fn", "float8_e5m2"), ("mxfp4", "mxfp8"), ("nf4", "int8"), ("fp4", "mxfp4")]
)
def test_mixed_kinds(low, other):
    x, w = unequal(8, (5, 64)), unequal(9, (64, 7))
    check_dot(x, quantized(w, QuantSpec(low)), spec=OpSpec(act=QuantSpec(other)))
    check_dot(x, quantized(w, QuantSpec(other)), spec=OpSpec(act=QuantSpec(low)))


# -- dimension numbers ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "batch": ((2, 5, 16), (2, 16, 6), (((2,), (1,)), ((0,), (0,)))),
    "two batch axes, swapped": ((3, 2, 5, 16), (2, 3, 16, 6), (((3,), (2,)), ((0, 1), (1, 0)))),
    "batch last": ((5, 16, 2), (16, 6, 2), (((1,), (0,)), ((2,), (2,)))),
    "two contracted": ((5, 4, 8), (4, 8, 6), (((1, 2), (0, 1)), ((), ()))),
    "two contracted, listed backwards": ((5, 4, 8), (4, 8, 6), (((2, 1), (1, 0)), ((), ()))),
    "two contracted, other order in the weight": ((5, 4, 8), (8, 6, 4), (((1, 2), (2, 0)), ((), ()))),
    "three contracted": ((2, 4, 5, 8), (8, 6, 4, 2), (((0, 1, 3), (3, 2, 0)), ((), ()))),
    "contracted first": ((16, 5), (6, 16), (((0,), (1,)), ((), ()))),
    "two row axes each": ((2, 5, 16), (3, 16, 4), (((2,), (1,)), ((), ()))),
    "negative axes": ((5, 16), (16, 6), (((-1,), (-2,)), ((), ()))),
    "vectors": ((16,), (16,), (((0,), (0,)), ((), ()))),
    "vector and matrix": ((16,), (16, 6), (((0,), (0,)), ((), ()))),
    "matrix and vector": ((5, 16), (16,), (((1,), (0,)), ((), ()))),
    "one element": ((1, 1), (1, 1), MATMUL),
    "nothing contracted": ((5,), (6,), (((), ()), ((), ()))),
    "scalars": ((), (), (((), ()), ((), ()))),
    "only batch axes": ((4, 3), (4, 3), (((), ()), ((0, 1), (0, 1)))),
    "batch of vectors": ((4, 16), (4, 16), (((1,), (1,)), ((0,), (0,)))),
}


SLOW = {"batch", "two contracted", "three contracted", "contracted first", "two row axes each", "one element"}


@pytest.mark.parametrize("name", slow_but(LAYOUTS, *(LAYOUTS.keys() - SLOW)))
def test_dimension_numbers(name):
    left, right, numbers = LAYOUTS[name]
    x, w = unequal(10, left), unequal(11, right)
    channel, group = spec_of("int8", symmetric=False), spec_of("int8", "per_group")
    grouped = name not in ("one element", "nothing contracted", "scalars", "only batch axes")
    specs = [channel, group] if grouped else [channel]
    qs = [quantize(w, h, reduce_axes=numbers[0][1]) for h in specs]

    @jax.jit
    def program(x, qs):
        return [ops.dot_general(x, q, numbers, spec=OpSpec(act=a)) for q, a in zip(qs, specs[::-1], strict=True)]

    for got, a, q in zip(program(x, qs), specs[::-1], qs, strict=True):
        assert dot_error(got, real(x, a, numbers[0][0]), real(q), numbers) <= INTEGER, a


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_only_dimension_numbers(layout):
    left, right, numbers = LAYOUTS[layout]
    x, q = unequal(12, left), quantize(unequal(13, right), spec_of("int8"), reduce_axes=numbers[0][1])
    got = jax.jit(lambda x, q: ops.dot_general(x, q, numbers))(x, q)
    check_product(got, real(x), real(q), numbers, WEIGHT_ONLY)


@pytest.mark.parametrize("m", slow_but([1, 2, 3, 33], 1, 33))
@pytest.mark.parametrize("n", slow_but([1, 2, 40], 1, 40))
def test_rows(m, n):
    x, w = unequal(14, (m, 64)), unequal(15, (64, n))
    check_dot(x, w, spec=recipes.w8a8(act_symmetric=False))
    check_dot(x, quantized(w, spec_of("int4", "per_group", group=16, symmetric=False)), bound=WEIGHT_ONLY)


def test_weight_on_the_left():
    w, x = unequal(16, (6, 32)), unequal(17, (32, 5))
    for spec in (spec_of("int8"), spec_of("uint4", "per_group", symmetric=False), spec_of("nf4")):
        q = quantized(w, spec, (-1,))
        check_dot(q, x, bound=bound_of(OpSpec(spec)))
        check_dot(q, x, spec=OpSpec(act=spec_of("int8", symmetric=False)))
        check_dot(q, x, spec=OpSpec(spec, spec_of("int8", "per_group")))


def test_both_quantized():
    x, w = unequal(18, (6, 32)), unequal(19, (32, 5))
    for a, b in (("int8", "int8"), ("uint8", "int4"), ("float8_e4m3fn", "float8_e4m3fn"), ("int8", "nf4")):
        left = quantized(x, spec_of(a, "per_group", symmetric=not a.startswith("u")), (-1,))
        check_dot(left, quantized(w, spec_of(b)))
        check_dot(left, quantized(w, spec_of(b, "per_group", group=16)), spec=OpSpec(weight=spec_of(b)))


def test_quantized_activation_with_a_float_weight():
    x, w = unequal(20, (6, 32)), unequal(21, (32, 5))
    q = quantized(x, spec_of("int8"), (-1,))
    check_dot(q, w, bound=WEIGHT_ONLY)
    check_dot(q, w, bound=INTEGER, precision="highest")


HIGH = lax.Precision.HIGHEST


@pytest.mark.parametrize("precision", ["highest", "float32", HIGH, (HIGH, HIGH), ["highest", "default"]])
def test_precision_forms(precision):
    check_dot(unequal(22, (4, 64)), quantized(unequal(23, (64, 6)), spec_of("int8")), precision=precision)


def test_default_precision():
    x, q = unequal(22, (4, 64)), quantized(unequal(23, (64, 6)), spec_of("int8"))
    by_default = error(check_dot(x, q, bound=WEIGHT_ONLY), dot(real(x), real(q), MATMUL))
    assert by_default > INTEGER or int8_dots() == "none"  # there is a difference
    with jax.default_matmul_precision("highest"):
        check_dot(x, q)
        check_dot(x, q, bound=WEIGHT_ONLY, precision="default")


def test_scales_that_vary_within_a_group():
    """Groups along an axis that the other operand contracts in another place: only the values are left to multiply."""
    x, w = unequal(24, (5, 4, 8)), unequal(25, (8, 6, 4))
    numbers = (((1, 2), (2, 0)), ((), ()))  # the weight's order of the contracted axes is not the activation's
    for act in (spec_of("int8", "per_group"), spec_of("int8", "per_group", group=2, symmetric=False)):
        check_dot(x, w, numbers, spec=OpSpec(spec_of("int8"), act))
    q = quantize(w, spec_of("int8"), reduce_axes=(1,))  # scales along the contracted axes, by another op's choice
    check_dot(x, q, numbers)  # they go into the activation
    check_dot(x, q, numbers, spec=OpSpec(act=spec_of("int8")))


def test_a_calibrator_of_the_spec():
    x, w = unequal(26, (5, 64)), unequal(27, (64, 6))
    spec = OpSpec(spec_of("int3", calibration=observers.MSE()), spec_of("int4", calibration=observers.Percentile(99.0)))
    check_dot(x, w, spec=spec)


def test_stochastic_weights_run_frozen():
    spec = OpSpec(QuantSpec("int8", rounding="stochastic"))
    x, w = unequal(28, (5, 16)), unequal(29, (16, 6))
    q = quantize(w, present(spec.weight), reduce_axes=(0,), key=jax.random.key(0))
    check_dot(x, q, bound=WEIGHT_ONLY, spec=spec)


# -- imported tensors: what quantize does not make --------------------------------------------------------------------


def test_negative_scales_and_zero_points_in_float():
    x, rng = unequal(30, (5, 16)), np.random.default_rng(0)
    codes = jax.device_put(np.asarray(rng.integers(0, 16, (16, 6)), jnp.uint8))
    scale = unequal(31, (2, 6))  # of either sign
    for zero, minor in ((unequal(32, (2, 6)) * 7, ()), (None, (-2,)), (jnp.full((2, 6), 9, jnp.uint8), ())):
        q = from_codes(codes, scale, zero, qtype="uint4", dtype=jnp.float32, minor=minor)
        check_dot(x, q, bound=WEIGHT_ONLY)
        check_dot(x, q, spec=OpSpec(act=spec_of("uint8", symmetric=False)))
    codes = jax.device_put(np.asarray(rng.integers(0, 256, (16, 6)), jnp.uint8))
    q = from_codes(codes, scale, unequal(33, (2, 6)) * 100, qtype="uint8", dtype=jnp.float32)
    check_dot(x, q)


def test_blocks_over_output_channels():
    """One scale per 8 x 2 block, as block-wise fp8 checkpoints have it."""
    x, w = unequal(34, (5, 16)), unequal(35, (16, 6))
    scale = jnp.abs(unequal(36, (2, 3))) / 50
    codes = jnp.clip(jnp.rint(w / jnp.repeat(jnp.repeat(scale, 8, 0), 2, 1)), -127, 127).astype(jnp.int8)
    q = QTensor(codes, scale, None, qtype="int8", dtype=jnp.float32)
    check_dot(x, q, bound=WEIGHT_ONLY)
    check_dot(x, q, spec=OpSpec(act=spec_of("int8")))


# -- dtypes and magnitudes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16 asymmetric", "w4a4 grouped", "fp8", "nf4"])
@pytest.mark.parametrize("dtype", slow_but(["bfloat16", "float16"], "bfloat16"))
def test_half_precision(dtype, name):
    """Rounded once, at the end: half a unit in the last place, apart from the bound of the float32 result."""
    spec, dtype = RECIPES[name], jnp.dtype(dtype)
    x, w = unequal(37, (5, 64), dtype), unequal(38, (64, 6), dtype)
    q = quantized(w, spec.weight)

    @jax.jit
    def program(x, q, w):
        frozen = ops.dot_general(x, q, MATMUL, spec=spec)
        return frozen, ops.dot_general(x, w, MATMUL, preferred_element_type=jnp.float32, spec=spec)

    left, right = dot_values(x, q, MATMUL, spec)
    want, size = dot(left, right, MATMUL), np.sqrt(dot(left**2, right**2, MATMUL))
    frozen, trained = program(x, q, w)
    assert (frozen.dtype, trained.dtype) == (dtype, jnp.float32)
    assert error(trained, want, size) <= bound_of(spec)
    # The two are one computation, so that rounding the wide one gives the narrow one, but for the order of sums.
    half = float(jnp.finfo(dtype).eps) / 2
    assert np.all(
        np.abs(np.asarray(frozen, np.float64) - want) <= 1.001 * half * np.abs(want) + 5 * bound_of(spec) * size
    )


def test_mixed_dtypes():
    x, w = unequal(39, (5, 16), jnp.bfloat16), unequal(40, (16, 6))
    assert ops.dot_general(x, quantized(w, spec_of("int8")), MATMUL).dtype == jnp.float32
    q = quantized(w.astype(jnp.bfloat16), spec_of("int8"))
    assert ops.dot_general(x.astype(jnp.float32), q, MATMUL).dtype == jnp.float32
    assert ops.dot_general(x, q, MATMUL, preferred_element_type=jnp.float16).dtype == jnp.float16
    check_dot(jnp.arange(-8, 8).reshape(1, 16), quantized(w, spec_of("int8")), bound=WEIGHT_ONLY)


def test_float64():
    with double_precision():
        x, w = unequal(41, (5, 32), np.float64), unequal(42, (32, 6), np.float64)
        for spec in (recipes.w8a8(), recipes.w4a16(8, symmetric=False), recipes.w4a8(8), recipes.fp8(), recipes.nf4(8)):
            q = quantized(w, spec.weight)
            # An activation in float64 is multiplied in float64.
            bound = 1e-13 if spec.act is None else INTEGER
            assert check_dot(x, q, spec=spec, bound=bound).dtype == np.float64
            assert check_dot(x, w, spec=spec, bound=bound).dtype == np.float64
        wide = OpSpec(spec_of("int8", "per_group", scale_dtype=np.float64))
        check_dot(x, quantized(w, wide.weight), bound=1e-13)
        q = quantized(w.astype(np.float32), wide.weight)
        check_dot(x.astype(np.float32), q, bound=WEIGHT_ONLY)
        check_dot(x.astype(np.float32), q, spec=OpSpec(act=spec_of("int8")))


@pytest.mark.parametrize("name", slow_but(RECIPES, "w8a8 asymmetric", "w8a16", "w4a16", "fp8", "nf4"))
def test_magnitudes(name):
    spec = RECIPES[name]
    rows = jnp.asarray([1e-20, 1.0, 1e20, 1e10], jnp.float32)[:, None]
    columns = jnp.asarray([1e10, 1e-10, 1.0, 1e15], jnp.float32)[None, :]
    x, w = unequal(43, (4, 64)) * rows, unequal(44, (64, 4)) * columns
    check_dot(x, quantized(w, spec.weight), bound=bound_of(spec), spec=spec)
    check_dot(x * 1e14, w * 1e-17, bound=bound_of(spec), spec=spec)  # 1e34 in a row: the scaled sums do not overflow


@pytest.mark.parametrize("name", ["w8a8", "w8a8 asymmetric", "w8a16", "w4a16", "fp8", "nf4"])
def test_zero_rows(name):
    spec = RECIPES[name]
    x, w = unequal(45, (4, 64)).at[2].set(0), unequal(46, (64, 4)).at[:, 1].set(0)
    got = check_dot(x, quantized(w, spec.weight), bound=bound_of(spec), spec=spec)
    assert not got[2].any()
    assert not got[:, 1].any()


@pytest.mark.parametrize("name", ["w8a8", "w8a8 asymmetric", "w8a16", "w4a16", "w4a8", "fp8", "nf4"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_bad_rows_stay_alone(name, bad):
    spec, x = RECIPES[name], unequal(47, (4, 64))
    q = quantized(unequal(48, (64, 4)), spec.weight)
    clean = ops.dot_general(x, q, MATMUL, spec=spec)
    got = ops.dot_general(x.at[2, 5].set(bad), q, MATMUL, spec=spec)
    others = np.array([0, 1, 3])
    np.testing.assert_array_equal(got[others], clean[others])
    assert not np.array_equal(got[2], clean[2])
    if np.isnan(bad) or spec.act is None:
        assert not np.isfinite(got[2]).any()  # nothing is hidden


# -- static ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_static_activations(granularity):
    x, w = unequal(49, (6, 16)), unequal(50, (16, 5))
    blocks = {"per_tensor": (1, 1), "per_channel": (6, 1), "per_group": (6, 2)}[granularity]
    scale = jnp.abs(unequal(51, blocks)) / 40
    zero = jax.device_put(np.asarray(np.random.default_rng(0).integers(-100, 100, blocks), jnp.int8))
    symmetric = OpSpec(spec_of("int8"), spec_of("int8", granularity, static=True))
    asymmetric = OpSpec(spec_of("int8"), spec_of("int8", granularity, symmetric=False, static=True))
    check_dot(x, w, spec=symmetric, act_scale=scale)
    check_dot(x, w, spec=asymmetric, act_scale=scale, act_zero_point=zero)
    check_dot(x, w, spec=asymmetric, act_scale=scale, act_zero_point=zero.astype(jnp.float32) + 0.25)
    check_dot(x, w, spec=symmetric, act_scale=0.03)
    if granularity == "per_tensor":  # with the weight on the left
        q, numbers = quantized(w, spec_of("int8")).store(()), (((0,), (0,)), ((), ()))
        check_dot(q, x.T, numbers, spec=OpSpec(act=symmetric.act), act_scale=0.03)


def test_recipe_for_static_activations():
    x, w = unequal(52, (6, 16)), unequal(53, (16, 5))
    check_dot(x, w, spec=recipes.w8a8(static=True), act_scale=0.02)
    spec = recipes.w8a8(static=True, act_symmetric=False)
    check_dot(x, w, spec=spec, act_scale=0.02, act_zero_point=-7)


# -- nothing to do ----------------------------------------------------------------------------------------------------


def test_without_quantization_it_is_lax():
    x, w = unequal(54, (5, 16)), unequal(55, (16, 6))
    want = lax.dot_general(x, w, MATMUL)
    for spec in (None, OpSpec()):
        np.testing.assert_array_equal(ops.dot_general(x, w, MATMUL, spec=spec), want)
    assert ops.dot_general(x, w, MATMUL, preferred_element_type=jnp.bfloat16).dtype == jnp.bfloat16
    np.testing.assert_array_equal(untyped.ops.dot_general([[1.0, 2.0]], [[3.0], [4.0]], MATMUL), [[11.0]])


@pytest.mark.parametrize("m, k, n", [(0, 8, 3), (2, 0, 3), (2, 8, 0), (0, 0, 0)])
def test_empty_operands(m, k, n):
    x, w = jnp.ones((m, k), jnp.bfloat16), jnp.ones((k, n), jnp.bfloat16)
    for spec in (recipes.w8a8(), recipes.w4a16(8), recipes.w8a16(), recipes.llm_int8()):
        got = ops.dot_general(x, w, MATMUL, spec=spec)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, lax.dot_general(x, w, MATMUL))

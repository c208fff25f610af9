"""Laws of quantize, dequantize and fake_quant that hold for every number type, shape, set of axes, magnitude and dtype.

Each case compiles one program; Hypothesis then varies the data. All laws are checked on each array, one function a law.
"""

import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from core import reference
from core.cases import CASES, Case, all_cases, arrays
from hypothesis import given, settings
from narrowed import present

import jaxquant as jq
from jaxquant.core.qtensor import scale_values
from jaxquant.core.qtypes import QTYPES

# -- one program per case, and what it returns ------------------------------------------------------------------------


class Quantized:
    """The result of a case on one array, in NumPy; scales and zero points repeated over their elements."""

    def __init__(self, case: Case, out):
        self.case = case
        codes, again, scale, zero_point, self.y, self.fake = (None if a is None else np.asarray(a) for a in out)
        self.codes, self.again = bits(present(codes)), bits(present(again))
        self.scale = reference.expand(scale, case.shape)
        self.zero_point = np.zeros(case.shape) if zero_point is None else reference.expand(zero_point, case.shape)

    @property
    def values(self):
        """Grid values of the codes."""
        return grid_of(self.case).value_of(self.codes)


WITHOUT_ZERO = ("binary", "quaternary", "iq4_nl")
"""Types none of whose codes stands for 0."""


def bits(codes: np.ndarray) -> np.ndarray:
    """fp8 codes as their bit patterns, integers as they are."""
    return codes if codes.dtype.kind in "iu" else codes.view(np.uint8)


def grid_of(case: Case) -> reference.Grid:
    info = case.spec.type
    return reference.grid(case.spec.qtype, narrow=info.kind == "int" and info.qmin == -info.qmax)


def is_whole(case: Case) -> bool:
    """Whether a symmetric range may end half a step beyond the last codes."""
    values = grid_of(case).values
    return case.spec.symmetric and case.spec.type.kind == "int" and values[0] < -values[-1]


def program(case: Case):
    """The compiled function x -> Quantized."""

    @jax.jit
    def run(x):
        q = jq.quantize(x, case.spec, reduce_axes=case.axes)
        y = q.dequantize()
        again = jq.quantize(y, case.spec, reduce_axes=case.axes, scale=q.scale, zero_point=q.zero_point)
        fake = jq.fake_quant(x, case.spec, reduce_axes=case.axes)
        return q.logical_codes(), again.logical_codes(), scale_values(q.scale), q.zero_point, y, fake

    return lambda x: Quantized(case, run(x))


# -- the laws ---------------------------------------------------------------------------------------------------------


def agrees_with_the_reference(case, x, q, run):
    expected = reference.quantize(x, case.spec, case.axes)
    np.testing.assert_array_equal(q.scale, expected.scale)
    np.testing.assert_array_equal(q.zero_point, expected.zero_point)
    np.testing.assert_array_equal(q.values, grid_of(case).values[expected.index])
    np.testing.assert_array_equal(q.y, expected.dequantized)


def scale_is_finite_and_positive(case, x, q, run):
    assert np.all(np.isfinite(q.scale))
    assert np.all(q.scale > 0)


def result_keeps_shape_and_dtype(case, x, q, run):
    assert q.y.shape == q.fake.shape == q.codes.shape == x.shape
    assert q.y.dtype == q.fake.dtype == x.dtype


def fake_quant_is_quantize_and_dequantize(case, x, q, run):
    width = np.dtype(f"u{x.dtype.itemsize}")
    np.testing.assert_array_equal(q.fake.view(width), q.y.view(width))


def zero_is_exact(case, x, q, run):
    if case.spec.qtype in WITHOUT_ZERO:
        return  # grids without 0
    assert np.all(q.y[x == 0] == 0)


def error_is_at_most_half_a_step(case, x, q, run):
    """Half the distance between the neighbouring grid values, and the roundings to float32 and to the array's dtype."""
    g, x = grid_of(case), x.astype(np.float64)
    low, high = (g.values[0] - q.zero_point) * q.scale, (g.values[-1] - q.zero_point) * q.scale
    with np.errstate(invalid="ignore"):
        inside = (x >= low) & (x <= high)
    step = g.gap(np.where(inside, x, 0) / q.scale + q.zero_point) * q.scale
    info = ml_dtypes.finfo(case.dtype)
    size = np.maximum(np.abs(x), np.abs(q.y.astype(np.float64)))
    rounding = size * (float(info.eps) / 2 + 2.0**-22) + float(info.smallest_subnormal) / 2
    error = np.abs(q.y.astype(np.float64) - x)
    assert np.all(error[inside] <= (step / 2 + rounding)[inside])


def computed_range_covers_the_array(case, x, q, run):
    """absmax and minmax clip nothing; the mx and nvfp4 scales are too coarse to promise that."""
    if QTYPES[case.spec.qtype].scale_format is not None:
        return
    g, x = grid_of(case), x.astype(np.float64)
    whole = is_whole(case)
    beyond = 0.5 if whole or not case.spec.symmetric else 0  # a whole range ends half a step beyond the last codes
    low, high = (g.values[0] - q.zero_point - beyond) * q.scale, (g.values[-1] - q.zero_point + beyond) * q.scale
    least = x >= low * (1 + 2.0**-20)
    if case.spec.symmetric and not whole and g.values[0] > -g.values[-1]:
        least = True  # a symmetric type that reaches less far below 0: an unsigned one not at all, dynamic8 to -0.993
    assert np.all(((x <= high * (1 + 2.0**-20)) & least)[np.isfinite(x)])


def infinities_saturate(case, x, q, run):
    g = grid_of(case)
    assert np.all(q.values[x == np.inf] == g.values[-1])
    assert np.all(q.values[x == -np.inf] == g.values[0])


def infinities_do_not_widen_the_range(case, x, q, run):
    if np.any(np.isinf(x)):
        np.testing.assert_array_equal(q.scale, run(np.where(np.isinf(x), 0, x).astype(x.dtype)).scale)


def quantizing_again_changes_nothing(case, x, q, run):
    # Where the array's dtype tells neighbouring grid values apart; subnormal float16 numbers may not.
    info, g = ml_dtypes.finfo(case.dtype), grid_of(case)
    y = np.abs(q.y.astype(np.float64))
    spacing = np.maximum(y * float(info.eps), float(info.smallest_subnormal))
    resolved = spacing < g.isolation(q.values) * q.scale
    np.testing.assert_array_equal(q.again[resolved], q.codes[resolved])
    # With a range of its own too: the largest magnitude stays what it was. (An asymmetric range may lose its last
    # step to a tie, the fp8 scales of nvfp4 are subnormal in places, and iq4_nl reaches further below 0 than above,
    # dynamic8 less far.)
    if is_whole(case):
        same = keeps_its_whole_range(case, q)
        np.testing.assert_array_equal(run(q.y).values[same], q.values[same])
    elif case.spec.symmetric and case.spec.qtype not in ("nvfp4", "iq4_nl", "dynamic4", "dynamic8") and resolved.all():
        np.testing.assert_array_equal(run(q.y).values, q.values)


def keeps_its_whole_range(case, q):
    """Where a block quantized with a whole range must have the same codes again.

    Let Q be the last code and y = v s (1 + d) an element of code v, with |d| <= e. An end of the block has a last code.
    The range with that end on it has the scale s (1 + d), so that an element is off by at most 2 e |v| s. The other
    range has the scale r s (1 + d), and r <= 1 - 1 / (2 Q + 3): v / r lies up to half a step from v, and the element
    is off by at least (1 - r - 2 e) |v| s. Four times the squares of the first are less if 6 e < 1 / (2 Q + 3).
    """
    values, off = q.values.astype(np.float64), np.zeros(case.shape)
    np.divide(np.abs(q.y.astype(np.float64) / q.scale - values), np.abs(values), out=off, where=values != 0)
    ids = reference.block_ids(case.shape, case.spec.granularity, case.spec.group_size, case.axes)
    most = np.zeros(ids.max() + 1)
    np.maximum.at(most, ids, off + 2.0**-22)  # and the roundings to float32
    return 6 * most[ids] < 1 / (2 * grid_of(case).values[-1] + 3)


def blocks_are_independent(case, x, q, run):
    if case.spec.qtype == "nvfp4":
        return  # one float32 for the whole array: the largest block touches all others
    ids = reference.block_ids(case.shape, case.spec.granularity, case.spec.group_size, case.axes)
    changed = ids == ids.ravel()[x.size // 3]
    other = run(np.where(changed, (1 - x.astype(np.float64) / 7), x).astype(x.dtype))
    for name in ("codes", "scale", "zero_point", "y"):
        np.testing.assert_array_equal(getattr(other, name)[~changed], getattr(q, name)[~changed])


def units_do_not_matter(case, x, q, run):
    """Twice the array is twice the scale and the same codes."""
    double = run((x.astype(np.float64) * 2).astype(x.dtype))
    np.testing.assert_array_equal(double.codes, q.codes)
    # All-zero blocks have one scale in any unit: 1, or the least number for a grid without 0.
    empty = np.isin(reference.quantize(x, case.spec, case.axes).scale, (1.0, float(np.finfo(np.float32).tiny)))
    np.testing.assert_array_equal(double.scale[~empty], 2 * q.scale[~empty])


def negation_negates(case, x, q, run):
    g = grid_of(case)
    if case.spec.symmetric and not g.is_table and g.values[0] == -g.values[-1]:
        np.testing.assert_array_equal(run(-x).values, -q.values)


def permutations_commute(case, x, q, run):
    """Order within a channel or across channels does not matter; across groups, the order of channels does not."""
    rng = np.random.default_rng(x.size)
    for axis in range(x.ndim):
        if case.spec.granularity == "per_group" and axis - x.ndim in case.axes:
            continue
        order = rng.permutation(x.shape[axis])
        other = run(np.take(x, order, axis))
        for name in ("codes", "scale", "zero_point", "y"):
            np.testing.assert_array_equal(getattr(other, name), np.take(getattr(q, name), order, axis))


def zero_blocks_have_scale_one(case, x, q, run):
    ids = reference.block_ids(case.shape, case.spec.granularity, case.spec.group_size, case.axes)
    zero = ~np.isin(ids, ids[x != 0])
    if case.spec.qtype in WITHOUT_ZERO:  # no code stands for 0: the least scale is the nearest to it
        assert np.all(q.scale[zero] == np.finfo(np.float32).tiny)
        return
    assert np.all(q.values[zero] == q.zero_point[zero])
    if case.spec.qtype != "nvfp4":  # there the fp8 scale is 1, times the array's float32
        assert np.all(q.scale[zero] == 1)


LAWS = (
    agrees_with_the_reference,
    scale_is_finite_and_positive,
    result_keeps_shape_and_dtype,
    fake_quant_is_quantize_and_dequantize,
    zero_is_exact,
    error_is_at_most_half_a_step,
    computed_range_covers_the_array,
    infinities_saturate,
    infinities_do_not_widen_the_range,
    quantizing_again_changes_nothing,
    blocks_are_independent,
    units_do_not_matter,
    negation_negates,
    permutations_commute,
    zero_blocks_have_scale_one,
)


def check(case: Case, max_examples: int) -> None:
    run = program(case)

    @settings(max_examples=max_examples)
    @given(arrays(case.shape, case.dtype))
    def laws_hold(x):
        q = run(x)
        for law in LAWS:
            law(case, x, q, run)

    laws_hold()


EVERYWHERE: dict[str, list[Case]] = {}
for each in itertools.chain.from_iterable(map(all_cases, QTYPES)):
    EVERYWHERE.setdefault(f"{each.spec.qtype} {each.spec.granularity.name}", []).append(each)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_laws(case):
    check(case, max_examples=8)


@pytest.mark.slow
@pytest.mark.parametrize("cases", EVERYWHERE.values(), ids=EVERYWHERE)
def test_laws_everywhere(cases):
    for case in cases:
        check(case, max_examples=15)

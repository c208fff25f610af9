"""Range choice: how good it is, one array against many batches, merging, and life inside scan and vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import reference
from core.cases import unequal
from hypothesis import given, settings
from hypothesis import strategies as st
from jax_settings import makes_nan, needs_jit
from narrowed import instance

import jaxquant as jq
from jaxquant import QuantError, QuantSpec
from jaxquant.core.affine import roundtrip
from jaxquant.core.observers import EMA, MSE, AbsMax, Bounded, Entropy, MinMax, Percentile, RoundedUp

ALL = (AbsMax(), MinMax(), EMA(0.9), Percentile(99.0), MSE(), Entropy(), Bounded(0.01, 2.0), RoundedUp(448.0))
FREE = ALL[:-2]
"""Those whose range is that of the data alone: 0 for zeros, and in the units of the data."""
HISTOGRAMS = (Percentile(99.0), MSE(), Entropy())
STEP = roundtrip(QuantSpec("int4", calibration=MSE()))


def batches(n=5, shape=(64, 4), decades=1.0, seed=0):
    """Batches of unequal size of channel and of time: later ones are wider."""
    rng = np.random.default_rng(seed)
    growth = 1.7 ** np.arange(n)[:, None, None]
    return (rng.standard_normal((n, *shape)) * unequal(rng, (1, shape[-1]), decades) * growth).astype(np.float32)


def per_block_error(x, spec, axes):
    y = np.asarray(jq.quantize(x, spec, reduce_axes=axes).dequantize()).astype(np.float64)
    ids = reference.block_ids(x.shape, spec.granularity, spec.group_size, axes)
    return np.bincount(ids.ravel(), ((y - x) ** 2).ravel())


# -- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "qtype, calibration, expected",
    [("int3", MSE(), 0.206), ("int2", MSE(), 0.392), ("int3", None, 0.335), ("int2", None, 0.867)],
)
def test_error_on_gaussian_weights(qtype, calibration, expected):
    """Relative Frobenius error per channel, of ranges with equal ends; the channels differ in size by four decades."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((1024, 256)) * 10 ** rng.uniform(-2, 2, 256)).astype(np.float32)
    spec = QuantSpec(qtype, calibration=calibration, narrow_range=True if calibration is None else None)
    y = np.asarray(jq.fake_quant(w, spec, reduce_axes=(-2,)))
    errors = np.linalg.norm(y - w, axis=0) / np.linalg.norm(w, axis=0)
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("int3", granularity="per_group", group_size=16, calibration=MSE()),
        QuantSpec("uint3", symmetric=False, calibration=MSE()),
        QuantSpec("nf4", calibration=MSE()),
        QuantSpec("mxfp4", calibration=MSE()),
        QuantSpec("nvfp4", calibration=MSE()),
    ],
    ids=str,
)
def test_mse_is_never_worse_than_the_full_range(spec):
    """In no block; nvfp4 has a float32 for the whole array, so there only in all."""
    rng = np.random.default_rng(0)
    for kind in range(4):
        x = rng.standard_normal((6, 64)) * unequal(rng, (6, 64), (0.3, 1.5, 0.0, 0.5)[kind])
        if kind == 2:
            x = np.abs(x) ** 3  # one-sided, heavy tail
        x[0] = 0
        x = x.astype(np.float32)
        plain = QuantSpec(spec.qtype, **{k: v for k, v in spec.to_dict().items() if k not in ("qtype", "calibration")})
        ours, full = per_block_error(x, spec, (-1,)), per_block_error(x, plain, (-1,))
        if spec.qtype == "nvfp4":
            ours, full = ours.sum(), full.sum()
        assert np.all(ours <= full * (1 + 1e-5))
        assert np.sum(ours) < np.sum(full) or spec.qtype == "mxfp4"


def test_mse_finds_the_best_clip():
    """No clip on a fine grid of them has an error more than half a percent lower."""
    x = np.random.default_rng(0).standard_normal((1, 512)).astype(np.float32)
    for qtype in ("int2", "int4"):
        best = per_block_error(x, QuantSpec(qtype, calibration=MSE()), (-1,))[0]
        clips = np.linspace(0.02, 1, 400) * np.abs(x).max()
        info = QuantSpec(qtype, calibration=MSE()).type
        v = np.clip(np.rint(x / (clips[:, None] / info.qmax)), info.qmin, info.qmax) * clips[:, None] / info.qmax
        assert best <= np.min(np.sum((v - x) ** 2, 1)) * 1.005


def test_two_sided_mse_clips_each_end():
    """A lone outlier on one side of an asymmetric block costs the other side nothing."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (1, 256)).astype(np.float32)
    x[0, 0] = -20
    spec = QuantSpec("uint2", symmetric=False, calibration=MSE())
    y = np.asarray(jq.quantize(x, spec, reduce_axes=(-1,)).dequantize())
    full = np.asarray(jq.quantize(x, QuantSpec("uint2", symmetric=False), reduce_axes=(-1,)).dequantize())
    assert np.sum((y - x) ** 2) <= np.sum((full - x) ** 2)


@pytest.mark.parametrize("p", [51.0, 99.9, 100.0])
def test_percentile_is_numpy_s(p):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5, 300)) * unequal(rng, (5, 300))).astype(np.float32)
    of_array = compiled(Percentile(p), (1,))[2]
    lo, hi = of_array(x, True)
    expected = np.percentile(np.abs(x), p, axis=1, keepdims=True)
    np.testing.assert_allclose(hi, expected, rtol=1e-5)
    np.testing.assert_array_equal(lo, -hi)
    lo, hi = of_array(x, False)
    np.testing.assert_allclose(hi, np.maximum(np.percentile(x, p, axis=1, keepdims=True), 0), rtol=1e-4)
    np.testing.assert_allclose(lo, np.minimum(np.percentile(x, 100 - p, axis=1, keepdims=True), 0), rtol=1e-4)


def test_percentile_through_quantize():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 500)) * unequal(rng, (4, 500))).astype(np.float32)
    q = jq.quantize(x, QuantSpec("int8", calibration=Percentile(99.0)), reduce_axes=(-1,))
    np.testing.assert_allclose(
        np.ravel(instance(jax.Array, q.scale)), np.percentile(np.abs(x), 99, axis=1) / 127, rtol=1e-5
    )
    assert np.mean(np.abs(q.logical_codes()) == 127) == pytest.approx(0.01, abs=0.005)


@given(st.floats(2**-100, 2**100, width=32), st.sampled_from([1.0, 1.5, 448.0, 3.0]))
@settings(max_examples=50)
def test_ranges_are_rounded_up_to_a_power_of_two(absmax, unit):
    """The least unit * 2**k that is not below: in Python's exact floats."""
    x = np.array([0, -absmax / 3, absmax], np.float32)
    lo, hi = RoundedUp(unit).range(jnp.asarray(x), (0,), symmetric=True, roundtrip=STEP)
    k = int(np.floor(np.log2(absmax / unit))) - 1
    while unit * 2.0**k < absmax:
        k += 1
    assert (-float(lo[0]), float(hi[0])) == (unit * 2.0**k, unit * 2.0**k)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("float8_e4m3fn", granularity=jq.PerGroup(16), calibration=RoundedUp(448.0)),
        QuantSpec("float8_e4m3fn", calibration=Bounded(1 / 512, 2.0)),
        QuantSpec("float8_e4m3fn", calibration=Bounded(1 / 512)),
    ],
    ids=str,
)
def test_ranges_of_other_libraries(spec):
    assert QuantSpec.from_json(spec.to_json()) == spec
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, 32)) * unequal(rng, (6, 1), 4.0)).astype(np.float32)
    scale = np.asarray(jq.quantize(x, spec, reduce_axes=(-1,)).scale)
    if isinstance(spec.calibration, RoundedUp):
        absmax = np.abs(x.reshape(6, 2, 16)).max(-1)
        np.testing.assert_array_equal(scale, np.exp2(np.ceil(np.log2(absmax / 448))))
    else:
        absmax = np.clip(np.abs(x).max(-1, keepdims=True), 1 / 512, spec.calibration.most)
        np.testing.assert_allclose(scale, absmax / 448, rtol=1e-6)


@needs_jit  # else it searches for minutes
def test_entropy_clips_outliers_and_keeps_what_is_dense():
    rng = np.random.default_rng(0)
    uniform = rng.uniform(-1, 1, 4096)
    outliers = np.concatenate([rng.standard_normal(4094), [50.0, -60.0]])
    x = np.stack([uniform, outliers * 1e-3]).astype(np.float32)
    range_of = jax.jit(lambda a: Entropy().range(a, (1,), symmetric=True, roundtrip=roundtrip(QuantSpec("int8"))))
    lo, hi = (np.ravel(b) for b in range_of(x))
    assert hi[0] > 0.9
    assert 1e-3 < hi[1] < 20e-3
    np.testing.assert_array_equal(lo, -hi)


@pytest.mark.parametrize("observer", FREE, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_contain_zero_and_are_independent(observer, symmetric):
    """Each block has its own range, in the block's own units; all-zero blocks have (0, 0)."""
    step = STEP if symmetric else roundtrip(QuantSpec("uint4", symmetric=False))
    x = batches(1, (96, 6))[0]
    x[:, 2] = 0
    x[:, 3] = np.abs(x[:, 3])
    run = jax.jit(lambda a: observer.range(a, (0,), symmetric=symmetric, roundtrip=step))
    lo, hi = (np.asarray(b) for b in run(x))
    assert lo.shape == hi.shape == (1, 6)
    assert np.all((lo <= 0) & (hi >= 0))
    assert lo[0, 2] == hi[0, 2] == 0
    largest = np.abs(x).max(0)
    assert np.all(np.maximum(-lo, hi)[0] <= largest * 1.2)  # least squares may widen a range a little
    assert np.all((np.maximum(-lo, hi)[0] > largest * 0.05) | (largest == 0))
    changed = x.copy()
    changed[:, 1] *= 100
    changed[:, 4] = -changed[::-1, 4]
    lo2, hi2 = (np.asarray(b) for b in run(changed))
    same = [0, 2, 3, 5]
    np.testing.assert_array_equal(lo2[0, same], lo[0, same])
    np.testing.assert_array_equal(hi2[0, same], hi[0, same])
    assert np.max(np.maximum(-lo2, hi2)[0, 1] / np.maximum(-lo, hi)[0, 1]) == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize(
    "spec",
    [QuantSpec("int4", calibration=o) for o in ALL]
    + [QuantSpec("uint4", symmetric=False, calibration=o) for o in (AbsMax(), Percentile(90.0), MSE())]
    + [QuantSpec("uint8", calibration=AbsMax()), QuantSpec("float8_e4m3fn", calibration=Percentile(90.0))],
    ids=str,
)
def test_the_laws_hold_with_every_calibrator(spec):
    """Zero exact, saturation, half a step inside the range, scales finite and positive."""
    x = batches(1, (64, 5))[0]
    x[3] = 0
    x[:, 2] = 0
    x[5, 1], x[6, 1] = np.inf, -np.inf
    q = jq.quantize(x, spec, reduce_axes=(0,))
    scale = np.asarray(q.scale).astype(np.float64)
    assert np.all(np.isfinite(scale) & (scale > 0))
    assert scale[0, 2] == (np.float32(0.01 / 7.5) if isinstance(spec.calibration, Bounded) else 1)
    y, g = np.asarray(q.dequantize()), reference.grid(spec.qtype, narrow=spec.type.qmin == -spec.type.qmax)
    z = 0 if q.zero_point is None else np.asarray(q.zero_point).astype(np.float64)
    assert np.all(y[x == 0] == 0)
    low, high = (g.values[0] - z) * scale, (g.values[-1] - z) * scale
    np.testing.assert_allclose(y[x == np.inf], np.broadcast_to(high, x.shape)[x == np.inf], rtol=1e-6)
    np.testing.assert_allclose(y[x == -np.inf], np.broadcast_to(low, x.shape)[x == -np.inf], rtol=1e-6)
    inside = (x >= low) & (x <= high)
    step = g.gap(np.where(inside, x, 0) / scale + z) * scale
    assert np.all(np.abs(y - x)[inside] <= (step / 2 * (1 + 1e-5))[inside])


# -- many batches -----------------------------------------------------------------------------------------------------


@functools.cache
def compiled(observer, axes=(0,)):
    """(update, result, range) of an observer, compiled; the last two take ``symmetric``."""

    def finish(state, symmetric):
        return observer.result(state, symmetric=symmetric, roundtrip=STEP)

    def of_array(x, symmetric):
        return observer.range(x, axes, symmetric=symmetric, roundtrip=STEP)

    update = jax.jit(lambda state, x: observer.update(state, x, axes))
    return update, jax.jit(finish, static_argnums=1), jax.jit(of_array, static_argnums=1)


def stream(observer, xs, axes=(0,), shape=(1, 4)):
    state = observer.init(shape)
    for x in xs:
        state = compiled(observer, axes)[0](state, x)
    return state


def result(observer, state, symmetric=True):
    return [np.asarray(b) for b in compiled(observer)[1](state, symmetric)]


@pytest.mark.parametrize("observer", [AbsMax(), MinMax(), Bounded(0.1, 3.0), RoundedUp(1.5)], ids=str)
def test_streaming_is_the_range_of_all_batches(observer):
    xs = batches()
    lo, hi = result(observer, stream(observer, xs))
    expected = compiled(observer)[2](xs.reshape(-1, 4), True)
    np.testing.assert_array_equal(lo, expected[0])
    np.testing.assert_array_equal(hi, expected[1])
    backwards = stream(observer, xs[::-1])
    for a, b in zip(jax.tree.leaves(backwards), jax.tree.leaves(stream(observer, xs)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decay, n", [(0.0, 3), (0.5, 1), (0.5, 4), (0.99, 6), (0.999, 2)])
def test_ema_formula(decay, n):
    xs = batches(n)
    observer = EMA(decay)
    lo, hi = result(observer, stream(observer, xs))
    weights = (1 - decay) * decay ** np.arange(n - 1, -1, -1.0)
    weights = weights / weights.sum()
    smallest, largest = np.minimum(xs.min(1), 0), np.maximum(xs.max(1), 0)
    np.testing.assert_allclose(lo[0], weights @ smallest, rtol=1e-4)
    np.testing.assert_allclose(hi[0], weights @ largest, rtol=1e-4)


@pytest.mark.parametrize("p", [60.01, 99.51])
def test_streaming_percentile_is_within_a_bin(p):
    xs = batches(6, (500, 4))
    state = stream(Percentile(p), xs)
    flat = xs.reshape(-1, 4)
    width = np.asarray(state["span"])[0] / 1024
    lo, hi = result(Percentile(p), state)
    exact = np.percentile(np.abs(flat), p, axis=0, method="inverted_cdf")
    assert np.all(np.abs(hi[0] - exact) <= width * 1.001)
    lo, hi = result(Percentile(p), state, symmetric=False)
    exact = np.percentile(flat, p, axis=0, method="inverted_cdf")
    assert np.all(np.abs(hi[0] - np.maximum(exact, 0)) <= width * 1.001)
    exact = np.percentile(flat, 100 - p, axis=0, method="inverted_cdf")
    assert np.all(np.abs(lo[0] - np.minimum(exact, 0)) <= width * 1.001)


@pytest.mark.parametrize("symmetric", [True, False])
def test_streaming_mse_is_close_to_one_shot(symmetric):
    """The clip found on the histogram has an error within 3 percent of the one found on the data."""
    spec = QuantSpec("int3" if symmetric else "uint3", symmetric=symmetric, calibration=MSE())
    step = roundtrip(spec)
    xs = batches(3, (400, 4), seed=3)
    flat = jnp.asarray(xs.reshape(-1, 4))
    state = jax.jit(lambda a: stream(MSE(), a))(xs)
    finish = jax.jit(lambda s: MSE().result(s, symmetric=symmetric, roundtrip=step))
    streamed = step(flat, *finish(state))
    exact = step(flat, *jax.jit(lambda a: MSE().range(a, (0,), symmetric=symmetric, roundtrip=step))(flat))
    error = [np.sum(np.asarray(v - flat, np.float64) ** 2, 0) for v in (streamed, exact)]
    assert np.all(error[0] <= error[1] * 1.03)


def test_streaming_entropy_is_one_shot():
    """The histograms are the same whether the data come at once or, the widest first or last, in batches."""
    xs = batches(3)
    flat = jnp.asarray(xs.reshape(1, -1, 4))
    for a, b in zip(jax.tree.leaves(stream(Entropy(), xs)), jax.tree.leaves(stream(Entropy(), flat)), strict=True):
        np.testing.assert_array_equal(a, b)


@given(st.lists(st.integers(-30, 30), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_histograms_lose_no_counts(magnitudes, seed):
    """Whatever the ranges of the batches: they may double a hundred times, or shrink."""
    rng = np.random.default_rng(seed)
    xs = [(rng.standard_normal((50, 3)) * unequal(rng, (1, 3)) * 10.0**m).astype(np.float32) for m in magnitudes]
    state = stream(Percentile(), xs, shape=(1, 3))
    counts, span = np.asarray(state["counts"]), np.asarray(state["span"])
    assert np.all(counts.sum(-1) == 50 * len(xs))
    assert np.all(np.isfinite(span))
    largest = np.abs(np.concatenate(xs)).max(0)
    assert np.all((span[0] > largest) & (span[0] <= 2 * largest))
    # Each element is counted in the bin it lies in, up to merging of bins: cumulative counts are exact at every edge
    # that was an edge for all batches.
    edges = np.arange(-1024, 1025) / 1024
    for channel in range(3):
        data = np.concatenate([x[:, channel] for x in xs]).astype(np.float64)
        for edge in (0, 512, 1024, 1536, 2048):
            below = np.sum(data < edges[edge] * span[0, channel])
            assert counts[0, channel, :edge].sum() == below


def test_histograms_survive_zero_batches_and_infinities():
    x = batches(1)[0]
    zero = np.zeros_like(x)
    expected = stream(Percentile(), [x])
    for first, second in ((zero, x), (x, zero)):
        state = stream(Percentile(), [first, second])
        np.testing.assert_array_equal(state["span"], expected["span"])
        assert np.all(np.asarray(state["counts"]).sum(-1) == 2 * len(x))
    infinite = x.copy()
    infinite[:2] = np.inf
    state = stream(Percentile(), [infinite])
    assert np.all(np.isfinite(np.asarray(state["span"])))


@pytest.mark.parametrize("observer", ALL, ids=str)
def test_merging_is_updating(observer):
    """Other hosts' states: merging in order is updating in order; for all but EMA the order does not matter."""
    xs = batches(4)
    one = stream(observer, xs)
    merged = observer.merge(stream(observer, xs[:1]), stream(observer, xs[1:]))
    swapped = observer.merge(stream(observer, xs[1:]), stream(observer, xs[:1]))
    empty = observer.merge(observer.init((1, 4)), one)
    for a, b, c, d in zip(*(jax.tree.leaves(s) for s in (one, merged, swapped, empty)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6)
        np.testing.assert_allclose(d, a, rtol=1e-6)
        if not isinstance(observer, EMA):
            np.testing.assert_array_equal(b, a)
            np.testing.assert_array_equal(c, a)


@pytest.mark.parametrize("observer", [AbsMax(), MinMax(), EMA(0.9), Percentile(99.0)], ids=str)
def test_states_scan_and_vmap(observer):
    """States are plain pytrees of float32, whose shapes and dtypes no update changes."""
    xs = batches(4)
    expected = stream(observer, xs)
    for dtype in (jnp.float32, jnp.bfloat16):
        abstract = jax.eval_shape(
            lambda s, x: observer.update(s, x, (0,)), expected, jax.ShapeDtypeStruct((8, 4), dtype)
        )
        assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(
            lambda a: (a.shape, a.dtype), expected
        )
    scanned, _ = jax.lax.scan(lambda s, x: (observer.update(s, x, (0,)), None), observer.init((1, 4)), xs)
    per_channel = jax.vmap(lambda x: stream(observer, x, shape=(1,)), in_axes=2, out_axes=1)(xs)
    for a, b, c in zip(*(jax.tree.leaves(s) for s in (expected, scanned, per_channel)), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(b, a, rtol=1e-6)
        np.testing.assert_allclose(c.reshape(a.shape), a, rtol=1e-6)


@pytest.mark.parametrize("axes, shape", [((0, 2), (1, 3, 1)), ((), (2, 3, 4))])
def test_blocks_along_any_axes(axes, shape):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 3, 4)) * unequal(rng, (2, 3, 4))).astype(np.float32)
    for observer in (AbsMax(), MinMax(), Percentile(100.0)):
        update, finish, of_array = compiled(observer, axes)
        lo, hi = of_array(x, False)
        assert lo.shape == hi.shape == shape
        expected = np.maximum(x, 0).max(axes, keepdims=True)
        if isinstance(observer, AbsMax):
            expected = np.abs(x).max(axes, keepdims=True)
        np.testing.assert_array_equal(hi, expected)
        state = update(observer.init(shape), x)
        bins = np.asarray(state["span"]) / 1024 if isinstance(observer, Percentile) else 0
        assert np.all(np.abs(finish(state, False)[1] - expected) <= bins)


@pytest.mark.parametrize(
    "axes, dtype",
    [((0,), "bfloat16"), ((1,), "float32"), ((2,), "float16"), ((0, 2), "float32"), ((0, 1, 2), "float32")],
)
def test_large_arrays_take_the_same_values(axes, dtype):
    """Beyond a few hundred elements the CPU uses another reduction; infinities switch it off."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 32, 8)) * unequal(rng, (64, 32, 8))).astype(dtype)
    y, finite = x.copy(), x.copy()
    y[5, 6, 7], y[0, 0, 0] = np.inf, -np.inf
    finite[5, 6, 7] = finite[0, 0, 0] = 0
    for a, f in ((x, x), (y, finite)):
        f = f.astype(np.float32)
        lo, hi = compiled(MinMax(), axes)[2](a, False)
        assert lo.dtype == hi.dtype == jnp.float32
        np.testing.assert_array_equal(lo, np.minimum(f.min(axes, keepdims=True), 0))
        np.testing.assert_array_equal(hi, np.maximum(f.max(axes, keepdims=True), 0))
        np.testing.assert_array_equal(compiled(AbsMax(), axes)[2](a, True)[1], np.abs(f).max(axes, keepdims=True))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EMA(1.0), "EMA: decay must be in"),
        (lambda: EMA(-0.1), "EMA: decay must be in"),
        (lambda: Bounded(-1.0), "Bounded: bounds must be"),
        (lambda: Bounded(2.0, 2.0), "Bounded: bounds must be"),
        (lambda: RoundedUp(0.0), "RoundedUp: unit must be"),
        (lambda: Percentile(50.0), "Percentile: p must be in"),
        (lambda: Percentile(101), "Percentile: p must be in"),
        (lambda: Percentile(float("nan")), "Percentile: p must be in"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(QuantError, match=message):
        make()


# -- counts -----------------------------------------------------------------------------------------------------------


def doubled(observer, state, times):
    """The state merged with itself, over and over: 2**times as many elements."""
    return jax.jit(lambda s: jax.lax.fori_loop(0, times, lambda _, s: observer.merge(s, s), s))(state)


@pytest.mark.parametrize("observer", HISTOGRAMS, ids=str)
def test_one_more_counts_beyond_float32_and_int32(observer):
    """2**40 elements and then three: every count is exact, in the pair that holds it."""
    first = doubled(observer, stream(observer, [np.array([[0.25], [0.25], [0.75]], np.float32)], shape=(1, 1)), 40)
    more = stream(observer, [np.array([[0.25], [0.75], [-0.9]], np.float32)], shape=(1, 1))
    state = jax.vmap(lambda a, b: observer.merge(a, b))(*(jax.tree.map(lambda v: v[None], s) for s in (first, more)))
    exact = np.asarray(state["counts"], np.float64) + np.asarray(state["rest"], np.float64)
    assert sorted(exact[exact > 0]) == [1, 2**40 + 1, 2**41 + 1]


def test_percentiles_of_very_many():
    """99.9999 percent of 2**36 elements leave out less than one in 2**19, and no more."""
    small, large = (stream(Percentile(), [np.full((1, 1), v, np.float32)], shape=(1, 1)) for v in (0.5, 0.999))
    merged = jax.jit(Percentile().merge)
    bounds = jax.jit(
        lambda state: [Percentile(99.9999).result(state, symmetric=s, roundtrip=STEP) for s in (True, False)]
    )
    for power, outside in ((16, True), (17, False)):  # 2**-20 and 2**-19 of all, against 1e-6
        (_, hi), (lo, above) = bounds(merged(doubled(Percentile(), small, 36), doubled(Percentile(), large, power)))
        np.testing.assert_allclose(hi, [[0.5 if outside else 1.0]], atol=2e-3)
        np.testing.assert_array_equal(lo, [[0]])
        np.testing.assert_allclose(above, [[0.5 if outside else 1.0]], atol=2e-3)


def test_one_large_array():
    """Three quarters zeros of 2**25 elements, in one batch and, exactly, in one array."""
    x = jnp.concatenate([jnp.zeros(3 << 23, jnp.float16), jnp.ones(1 << 23, jnp.float16)])
    observer = Percentile(70.0)
    state = jax.jit(lambda x: observer.update(observer.init((1,)), x, (0,)))(x)
    assert sorted(np.asarray(state["counts"])[0, [1024, 1536]].tolist()) == [1 << 23, 3 << 23]
    assert np.all(np.asarray(observer.result(state, symmetric=True, roundtrip=STEP)[1]) <= 2 / 1024)


@makes_nan
@pytest.mark.parametrize("observer", ALL, ids=str)
def test_what_does_not_count(observer):
    """The state is that of the elements that count, whatever the others hold."""
    x = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    counted = np.random.default_rng(1).random((40, 3)) < 0.5
    dirty = np.where(counted, x, np.float32(np.nan))
    dirty[0][~counted[0]] = 1e30
    update = jax.jit(observer.update, static_argnums=2)
    found = update(observer.init((1, 3)), dirty, (0,), counted)
    for i in range(3):
        alone = update(observer.init((1, 1)), x[counted[:, i], i : i + 1], (0,))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[:, i : i + 1], b), found, alone)
    before = update(observer.init((1, 3)), x, (0,))
    for empty in (
        update(before, np.zeros((0, 3), np.float32), (0,)),
        update(before, dirty, (0,), np.zeros((40, 3), bool)),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), empty, before)

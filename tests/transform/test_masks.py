"""Masks of what counts: statistics are those of the rows alone that the mask leaves in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_settings import makes_nan
from transform_cases import close, unequal

import jaxquant as jq
from jaxquant import recipes
from jaxquant.transform import statistics

LENGTHS = np.array([5, 2, 3])
MASK = np.arange(5)[None] < LENGTHS[:, None]
CLEAN = np.array(unequal((3, 5, 8), 7, 0.5))
PADDED = np.where(MASK[..., None], CLEAN, np.nan).astype(np.float32)
PADDED[1, 2:] = 50.0
PARAMS = {"a": unequal((8, 8), 1, 0.3), "b": unequal((8, 8), 2, 0.3)}
COLLECT = {
    "gram": statistics.Gram(),
    "absmax": statistics.ChannelAbsMax(),
    "mean": statistics.ChannelMean(),
    "histogram": statistics.Range(jq.observers.Percentile(90.0)),
    "average": statistics.Range(jq.observers.EMA(0.9)),
    "range": statistics.Range(jq.observers.AbsMax()),
}


def layers(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def stacked(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["a"], p["b"]]))[0]


FUNCTIONS = {
    "plain": layers,
    "one axis for all": lambda p, x: layers(p, x.reshape(-1, 8)).reshape(x.shape),
    "vmap": lambda p, x: jax.vmap(lambda x: layers(p, x))(x),
    "scan": lambda p, x: lax.scan(lambda c, _: (c, layers(p, x)), 0, None, length=2)[1][0],
    "cond": lambda p, x: lax.cond(jnp.ones(()) < 9, lambda: layers(p, x), lambda: 3 * x),
}


def by_hand(rows):
    x = np.asarray(rows, np.float64)
    return {"gram": x.T @ x, "absmax": np.abs(x).max(0), "sum": x.sum(0), "abs_sum": np.abs(x).sum(0), "rows": len(x)}


def agrees(found, rows, times=1):
    want = by_hand(rows)
    close(found["gram"]["gram"][0], times * want["gram"], 1e-5)
    close(found["absmax"][0], want["absmax"], 1e-6)
    for name in ("sum", "abs_sum"):
        close(found["mean"][name][0], times * want[name], 1e-5)
    assert float(found["mean"]["rows"]) == float(found["gram"]["rows"]) == times * want["rows"]
    close(found["range"]["absmax"][0], want["absmax"].max(), 1e-6)
    assert float(found["histogram"]["counts"].sum()) == times * want["rows"] * rows.shape[1]


@pytest.mark.parametrize("name", [n if n == "plain" else pytest.param(n, marks=pytest.mark.slow) for n in FUNCTIONS])
def test_only_rows_that_count(name):
    """NaN and large values in padding change nothing, in either of two layers, in any call."""
    fn = FUNCTIONS[name]
    plan = jq.make_plan(fn, PARAMS, CLEAN, rules=[jq.Rule(".*", recipes.w8a16())])
    stats = jq.calibrate(fn, plan, PARAMS, [PADDED], collect=COLLECT, mask=[MASK])
    second = np.tanh(CLEAN[MASK] @ np.asarray(PARAMS["a"]))
    for path, rows in (("a", CLEAN[MASK]), ("b", second)):
        agrees(stats[path], rows, 2 if name == "scan" else 1)
        average = stats[path]["average"]
        close(average["lo"] / average["weight"], rows.min()[None], 1e-5)


def test_batches_of_masks():
    """A function of the arguments; batches in which nothing counts, or without rows, have no effect."""
    fn = lambda p, x, mask: layers(p, x)  # noqa: E731
    plan = jq.make_plan(fn, PARAMS, CLEAN, MASK, rules=[jq.Rule(".*", recipes.w8a8(static=True))])
    batches = [(PADDED, MASK), (PADDED + 9, np.zeros_like(MASK)), (PADDED[:0], MASK[:0]), (-PADDED, MASK)]
    stats = jq.calibrate(fn, plan, PARAMS, batches, collect=COLLECT, mask=lambda x, mask: mask)
    agrees(stats["a"], np.concatenate([CLEAN[MASK], -CLEAN[MASK]]))
    alone = jq.calibrate(fn, plan, PARAMS, [batches[0], batches[3]], collect=COLLECT, mask=lambda x, mask: mask)
    jax.tree.map(np.testing.assert_array_equal, stats, alone)
    close(jq.act_state(plan, stats)["a"]["scale"], np.abs(CLEAN[MASK]).max() / 127, 1e-6)
    with pytest.raises(jq.QuantError, match=r"act_state: there are no ranges .*paths=\('a', 'b'\)"):
        jq.act_state(plan, jq.calibrate(fn, plan, PARAMS, batches[1:3], mask=lambda x, mask: mask))


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_convolutions(groups):
    """Windows count of which nothing is left out; a mask of images alone is every window of those."""
    x, w = np.array(unequal((3, 6, 4), 5, 0.5)), unequal((3, 4 // groups, 8), 6, 0.3)
    fn = lambda p, x: lax.conv_general_dilated(  # noqa: E731
        x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=groups
    )
    plan = jq.make_plan(fn, {"w": w}, x, rules=[jq.Rule("w", recipes.w8a16())])
    lengths = [6, 2, 4]
    mask = np.arange(6)[None] < np.array(lengths)[:, None]
    collect = {name: COLLECT[name] for name in ("gram", "absmax")}
    stats = jq.calibrate(fn, plan, {"w": w}, [np.where(mask[..., None], x, np.nan)], collect=collect, mask=[mask])["w"]
    parts = [jq.calibrate(fn, plan, {"w": w}, [x[i : i + 1, :n]], collect=collect)["w"] for i, n in ((0, 6), (2, 4))]
    close(stats["gram"]["gram"], parts[0]["gram"]["gram"] + parts[1]["gram"]["gram"], 1e-5)
    assert float(stats["gram"]["rows"]) == 4 + 2
    close(stats["absmax"][0], np.abs(x[mask]).max(0), 1e-6)
    some = jq.calibrate(fn, plan, {"w": w}, [x], collect=collect, mask=[np.array([True, False, True])])["w"]
    want = jq.calibrate(fn, plan, {"w": w}, [x[[0, 2]]], collect=collect)["w"]
    close(some["gram"]["gram"], want["gram"]["gram"], 1e-5)


def test_what_does_not_fit_is_named_at_once():
    def fn(p, x):
        over_time = lax.scan(lambda c, row: (c, row @ p["a"]), 0, jnp.swapaxes(x, 0, 1))[1]
        mixed = jnp.einsum("btc,tu->buc", x, p["mix"])
        return over_time.sum() + mixed.sum() + (x @ p["b"]).sum()

    params = {**PARAMS, "mix": unequal((5, 4), 3)}
    plan = jq.make_plan(fn, params, CLEAN, rules=[jq.Rule(".*", recipes.w8a16())])
    with pytest.raises(jq.QuantError) as error:
        jq.calibrate(fn, plan, params, [CLEAN], mask=[MASK])
    text = str(error.value)
    assert "a: its input does not begin with the axes of the mask: it has shape (3, 8), the mask (3, 5)" in text
    assert "mix: it contracts an axis of the mask" in text
    assert "b:" not in text
    experts, sizes = {"w": unequal((2, 8, 4), 3)}, jnp.array([9, 6], jnp.int32)
    ragged = lambda p, x: lax.ragged_dot(x.reshape(-1, 8), p["w"], sizes)  # noqa: E731
    plan = jq.make_plan(ragged, experts, CLEAN, rules=[jq.Rule("w", recipes.w8a16())])
    with pytest.raises(jq.QuantError, match="at w: a ragged_dot has its rows in the order of the experts"):
        jq.calibrate(ragged, plan, experts, [CLEAN], mask=[MASK])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK, "one mask for each batch"),
        ([MASK.astype(np.int32)], "a mask must be a boolean array"),
        ([np.True_], "a mask must be a boolean array"),
        ([], "fewer masks than batches"),
        ([MASK, MASK], "more masks than batches"),
    ],
)
def test_refusals(mask, message):
    plan = jq.make_plan(layers, PARAMS, CLEAN, rules=[jq.Rule(".*", recipes.w8a16())])
    with pytest.raises(jq.QuantError, match=message):
        jq.calibrate(layers, plan, PARAMS, [CLEAN], mask=mask)


@makes_nan
def test_nan_that_counts_is_named():
    """With the first batch of each weight; inf too. Padding may hold what it likes."""
    plan = jq.make_plan(layers, PARAMS, CLEAN, rules=[jq.Rule(".*", recipes.w8a16())])
    infinite = CLEAN.copy()
    infinite[0, 0, 0] = np.inf
    with pytest.raises(jq.QuantError, match=r"hold NaN or inf: a \(batch 1\); got"):
        jq.calibrate(layers, plan, PARAMS, [CLEAN, infinite, np.ones_like(CLEAN)])
    with pytest.raises(jq.QuantError, match=r"hold NaN or inf: a \(batch 2\), b \(batch 2\)"):
        jq.calibrate(layers, plan, PARAMS, [CLEAN, CLEAN, PADDED])


def test_collect_must_be_named():
    plan = jq.make_plan(layers, PARAMS, CLEAN, rules=[jq.Rule(".*", recipes.w8a16())])
    remedy = r'calibrate: collect must .*collect=\{"gram": jq.calibration.Gram\(\)\}'
    wrong: Any
    for wrong in (statistics.Gram(), [statistics.Gram()], {"gram": statistics.Gram}, {0: statistics.Gram()}):
        with pytest.raises(jq.QuantError, match=remedy):
            jq.calibrate(layers, plan, PARAMS, [CLEAN], collect=wrong)
        with pytest.raises(jq.QuantError, match="merge_stats: collect must"):
            jq.calibration.merge_stats(plan, [], collect=wrong)


def test_losses():
    """Distilled and measured on what counts: rows beyond it may hold anything."""
    params, spec = PARAMS, jq.OpSpec(jq.QuantSpec("int3"))
    plan = jq.make_plan(layers, params, CLEAN, rules=[jq.Rule(".*", spec)])
    other = np.where(MASK[..., None], CLEAN, 7.0).astype(np.float32)
    candidates = {"int3": spec}
    tables = [
        jq.mixed.sensitivity(layers, plan, params, [x], candidates, mask=[MASK], probes=1) for x in (CLEAN, other)
    ]
    rows = jq.mixed.sensitivity(layers, plan, params, [CLEAN[MASK]], candidates)
    for path in plan:
        assert tables[0][path, "int3"].error == pytest.approx(tables[1][path, "int3"].error, rel=1e-5)
        assert tables[0][path, "int3"].error == pytest.approx(rows[path, "int3"].error, rel=1e-4)
    with pytest.raises(jq.QuantError, match=r"outputs do not begin with the axes of the mask: .*has shape"):
        jq.mixed.sensitivity(lambda p, x: layers(p, x).sum(1), plan, params, [CLEAN], candidates, mask=[MASK])


def test_distilled():
    optax = pytest.importorskip("optax")
    plan = jq.make_plan(layers, PARAMS, CLEAN, rules=[jq.Rule(".*", jq.OpSpec(jq.QuantSpec("int3")))])
    qparams = jq.quantize_params(PARAMS, plan)
    other = np.where(MASK[..., None], CLEAN, 7.0).astype(np.float32)
    losses = [
        [
            float(d.loss)
            for d in jq.calibration.distill(layers, plan, PARAMS, qparams, [x] * 2, optax.sgd(0.1), mask=lambda _: MASK)
        ]
        for x in (CLEAN, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][1] < losses[0][0]


def test_in_turns():
    """`quantize_sequentially` with a mask is that of the rows that count."""
    plan = jq.make_plan(layers, PARAMS, CLEAN, rules=[jq.Rule(".*", recipes.w4a16(None))])
    masked = jq.calibration.quantize_sequentially(layers, plan, PARAMS, [PADDED], mask=iter([MASK]))
    alone = jq.calibration.quantize_sequentially(layers, plan, PARAMS, [CLEAN[MASK]])
    for path in plan:
        np.testing.assert_array_equal(masked[path].logical_codes(), alone[path].logical_codes())

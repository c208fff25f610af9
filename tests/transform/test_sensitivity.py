"""What each weight costs, and the best choice for a budget."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec
from jaxquant.transform.allocation import _knapsack
from jaxquant.transform.distill import relative_error
from jaxquant.transform.sensitivity import Cell, Sensitivity

RNG = np.random.default_rng(0)
PARAMS = {  # the first layer's output is divided by 100 in the second's favour: errors of very unequal weight
    "a": RNG.normal(size=(16, 24)).astype(np.float32) * np.exp(RNG.normal(size=24)).astype(np.float32),
    "b": RNG.normal(size=(24, 8)).astype(np.float32),
    "c": RNG.normal(size=(16, 8)).astype(np.float32) / 100,
}
X = RNG.normal(size=(32, 16)).astype(np.float32)
CANDIDATES = {name: OpSpec(QuantSpec(name)) for name in ("int2", "int4", "int5", "int8")}


def fn(p, x):
    return jnp.tanh(x @ p["a"] / 8) @ p["b"] + x @ p["c"]


@pytest.fixture(scope="module")
def table():
    plan = jq.make_plan(fn, PARAMS, X, rules=[jq.Rule(".", CANDIDATES["int8"])])
    return jq.mixed.sensitivity(fn, plan, PARAMS, [X, 0.5 * X], CANDIDATES, probes=64)


def error(plan):
    return float(relative_error(fn(jq.dequantize_params(jq.quantize_params(PARAMS, plan)), X), fn(PARAMS, X)))


def test_errors_are_those_of_one_weight_quantized_alone(table):
    alone = dict(PARAMS, b=jq.quantize(PARAMS["b"], QuantSpec("int2"), reduce_axes=(-2,)).dequantize())
    losses = [relative_error(fn(alone, x), fn(PARAMS, x)) for x in (X, 0.5 * X)]
    cell = table["b", "int2"]
    assert cell.error == pytest.approx(float(np.mean(losses)), rel=1e-4)
    delta = alone["b"] - PARAMS["b"]
    assert cell.sqnr == pytest.approx(10 * np.log10((PARAMS["b"] ** 2).sum() / (delta**2).sum()), rel=1e-4)
    assert cell.nbytes == jq.quantize(PARAMS["b"], QuantSpec("int2"), reduce_axes=(-2,)).nbytes


def test_more_bits_cost_less(table):
    for path in PARAMS:
        assert table[path, "int2"].error > table[path, "int4"].error > table[path, "int8"].error
        assert table[path, "int2"].sqnr < table[path, "int4"].sqnr < table[path, "int8"].sqnr


def test_the_estimate_is_of_the_right_size(table):
    """To first order and with 64 probes; the weight that matters least is found without running it."""
    for path in PARAMS:
        cell = table[path, "int4"]
        assert cell.error / 3 < cell.estimate < 3 * cell.error
    assert min(PARAMS, key=lambda path: table[path, "int4"].estimate) == "c"


def test_json(table):
    again = Sensitivity.from_json(table.to_json())
    assert again == table
    assert "int4" in str(again)
    with pytest.raises(jq.QuantError, match="Sensitivity: not a sensitivity table"):
        Sensitivity.from_json("{}")


def test_beats_uniform_at_equal_bytes(table):
    uniform = table.uniform("int4")
    budget = sum(item.nbytes[1] for item in uniform.items)
    chosen = jq.mixed.allocate(table, budget=budget)
    assert sum(item.nbytes[1] for item in chosen.items) <= budget
    assert table.predicted(chosen) < table.predicted(uniform)
    assert error(chosen) < error(uniform)
    elements = sum(w.size for w in PARAMS.values())
    assert jq.mixed.allocate(table, mean_bits=8 * budget / elements) == chosen


@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9).map(float)), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 30),
)
def test_the_knapsack_is_exact(rows, slack):
    budget = sum(min(n for n, _ in row) for row in rows) + slack
    choice = _knapsack(rows, budget, 1000)
    total = lambda c, k: sum(row[i][k] for row, i in zip(rows, c, strict=True))  # noqa: E731
    every = itertools.product(*(range(len(row)) for row in rows))
    best = min(total(c, 1) for c in every if total(c, 0) <= budget)
    assert total(choice, 0) <= budget
    assert total(choice, 1) == best


def test_many_weights_with_few_states():
    rows = [[(int(n), float(1 / n)) for n in RNG.integers(10, 1000, 5)] for _ in range(60)]
    budget = sum(int(np.mean([n for n, _ in row])) for row in rows)
    costs = []
    for limit in (50, 20_000):
        choice = _knapsack(rows, budget, limit)
        assert sum(row[k][0] for row, k in zip(rows, choice, strict=True)) <= budget
        costs.append(sum(row[k][1] for row, k in zip(rows, choice, strict=True)))
    assert costs[1] <= costs[0] <= 1.1 * costs[1]


def test_refusals(table):
    with pytest.raises(jq.QuantError, match="allocate: one of budget and mean_bits is needed"):
        jq.mixed.allocate(table)
    with pytest.raises(jq.QuantError, match=r"allocate: no choice fits the budget; got budget=10. Allow \d+ bytes"):
        jq.mixed.allocate(table, budget=10)
    with pytest.raises(jq.QuantError, match="sensitivity: nothing to measure with; got batches=0"):
        jq.mixed.sensitivity(fn, table.plan, PARAMS, [], CANDIDATES)


def test_activations_count_where_a_candidate_has_them(table):
    plan = table.plan
    both = {"w": OpSpec(QuantSpec("int8")), "wa": OpSpec(QuantSpec("int8"), QuantSpec("int4"))}
    seen = []
    found = jq.mixed.sensitivity(fn, plan, PARAMS, [X], both, progress=lambda done, total: seen.append((done, total)))
    assert found["b", "wa"].error > 2 * found["b", "w"].error
    assert seen == [(i, 6) for i in range(1, 7)]
    assert isinstance(found.cells[0], Cell)


def test_distilling_makes_up_for_rounding():
    plan = jq.make_plan(fn, PARAMS, X, rules=[jq.Rule("a|b", OpSpec(QuantSpec("int3")))])
    qparams = jq.quantize_params(PARAMS, plan)
    sgd = _SignDescent()
    *_, last = jq.calibration.distill(fn, plan, PARAMS, qparams, [X] * 60, sgd)
    target = fn(PARAMS, X)
    before, after = (float(relative_error(fn(jq.dequantize_params(p), X), target)) for p in (qparams, last.params))
    assert after < 0.8 * before
    assert last.step == 60
    assert jax.tree.structure(last.params) == jax.tree.structure(qparams)
    np.testing.assert_array_equal(last.params["a"].codes, qparams["a"].codes)
    assert last.params["c"] is qparams["c"]  # a matrix in float: neither scale nor vector
    with pytest.raises(jq.QuantError, match="distill: there is nothing to train"):
        next(jq.calibration.distill(fn, jq.Plan(()), PARAMS, PARAMS, [X], sgd))


class _SignDescent:
    """Sign descent with momentum, in the form of an Optax transformation."""

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grads, state, params=None):
        state = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state, grads)
        return jax.tree.map(lambda m: -0.003 * m / (jnp.abs(m) + 1e-8), state), state


def test_choices_as_a_whole_are_never_worse_and_fit(table):
    start = table.choose({"a": "int4", "b": "int4", "c": "int8"})
    size = lambda plan: sum(item.nbytes[1] for item in plan.items)  # noqa: E731
    told = []
    found = jq.mixed.refine(fn, table, start, PARAMS, [X], evaluations=12, progress=lambda *now: told.append(now))
    assert error(found) < error(start)
    assert size(found) <= size(start)
    assert told[-1][0] <= told[-1][1] == 12
    assert [n for n, _ in told] == list(range(1, len(told) + 1))
    uniform = table.uniform("int4")
    assert error(jq.mixed.refine(fn, table, start, PARAMS, [X], budget=size(uniform), evaluations=12)) <= error(uniform)


def test_refusals_of_refine(table):
    with pytest.raises(jq.QuantError, match="refine: there are no batches"):
        jq.mixed.refine(fn, table, table.uniform("int4"), PARAMS, [])
    both = {"w8a8": OpSpec(QuantSpec("int8"), QuantSpec("int8"))}
    cells = tuple(Cell(path, "w8a8", 1, 1.0, 1.0) for path in PARAMS)
    acts = Sensitivity(table.plan, both, cells)
    with pytest.raises(jq.QuantError, match="a candidate quantizes activations"):
        jq.mixed.refine(fn, acts, acts.uniform("w8a8"), PARAMS, [X])

"""A batch where a list of batches is expected."""

import jax
import jax.numpy as jnp
import pytest
from narrowed import untyped
from transform_cases import unequal

import jaxquant as jq
from jaxquant import recipes
from jaxquant.transform.sensitivity import Sensitivity

PARAMS = {"w": unequal((8, 8), 1)}
X = unequal((4, 8), 2)
SPEC = recipes.w8a8()


def fn(p, x):
    return x @ p["w"]


PLAN = jq.make_plan(fn, PARAMS, X, rules=[jq.Rule("w", SPEC)])


def table():
    return Sensitivity(PLAN, {"a": jq.OpSpec(jq.QuantSpec("int8"))}, ())


distill = untyped.calibration.distill
CALLS = {
    "calibrate": lambda b: jq.calibrate(fn, PLAN, PARAMS, b),
    "compare": lambda b: jq.compare(fn, PARAMS, jq.quantize_params(PARAMS, PLAN), b, plan=PLAN),
    "sensitivity": lambda b: jq.mixed.sensitivity(fn, PLAN, PARAMS, b, {"a": SPEC}),
    "refine": lambda b: jq.mixed.refine(fn, table(), PLAN, PARAMS, b),
    "quantize_sequentially": lambda b: jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, b),
    "distill": lambda b: next(
        untyped.calibration.distill(fn, PLAN, PARAMS, jq.quantize_params(PARAMS, PLAN), b, _Never())
    ),
    "learn_rotations": lambda b: next(jq.invariances.learn_rotations(fn, PLAN, PARAMS, {"w": jnp.eye(8)}, b)),
}


class _Never:
    """An optimizer whose step is never reached."""

    def init(self, params):
        return params


BAD = {
    "an array": (X, "this is a batch, or no batch"),
    "a dict": ({"x": X}, "this is a batch, or no batch"),
    "a number": (3, "this is a batch, or no batch"),
    "a text": ("x", "this is a batch, or no batch"),
    "two arguments": ([(X, X)], "does not take the arguments of a batch"),
    "no argument": ([()], "does not take the arguments of a batch"),
}


@pytest.mark.every
@pytest.mark.parametrize("name", CALLS)
def test_bad_batches(name):
    for batches, rule in BAD.values():
        with pytest.raises(jq.QuantError, match=rf"^{name}: .*{rule}.*Pass a list of batches"):
            CALLS[name](batches)


@pytest.mark.every
def test_good_batches():
    """Lists, generators, tuples; a batch by itself, in a tuple or in a list."""
    expected = jq.calibrate(fn, PLAN, PARAMS, [(X,)])
    for batches in ([X], (X,), iter([X]), [[X]], ((X,),)):
        found = jq.calibrate(fn, PLAN, PARAMS, batches)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


def test_an_error_of_the_function_itself_says_how_it_was_called():
    """A batch of dicts for a function of arrays, and the wrong level of a tree: JAX and Flax speak of their insides."""
    calls = {
        "make_plan called it as fn(dict of 1 leaf, dict of 1 leaf)": lambda: jq.quantize_model(
            fn, PARAMS, recipe="w8a8:static", batches=[{"x": X}]
        ),
        "make_plan called it as fn(dict of 1 leaf, float32[4, 8])": lambda: jq.quantize_model(
            lambda p, x: x @ p["params"]["w"], PARAMS, X, recipe="w8a8"
        ),
        "calibrate called it as fn(dict of 1 leaf, float32[4, 7])": lambda: jq.calibrate(
            fn, PLAN, PARAMS, [X, X[:, :7]]
        ),
    }
    for words, call in calls.items():
        with pytest.raises((TypeError, KeyError, IndexError, AttributeError)) as error:
            call()
        assert [note for note in error.value.__notes__ if note.startswith("jaxquant: fn raised this when")] == [
            f"jaxquant: fn raised this when {words}"
        ]


def test_parameters_that_no_rule_can_match():
    with pytest.raises(jq.QuantError, match="None can be: that takes float arrays"):
        jq.quantize_model(fn, {"w": jnp.ones((8, 8), jnp.int32)}, jnp.ones((4, 8), jnp.int32), recipe="w8a16")

"""A batch where a list of batches is expected."""

import jax
import jax.numpy as jnp
import pytest
from transform_cases import unequal

import jaxquant as jq
from jaxquant import recipes

PARAMS = {"w": unequal((8, 8), 1)}
X = unequal((4, 8), 2)
SPEC = recipes.w8a8()


def fn(p, x):
    return x @ p["w"]


PLAN = jq.make_plan(fn, PARAMS, X, rules=[jq.Rule("w", SPEC)])


def table():
    return jq.transform.Sensitivity(PLAN, {"a": jq.OpSpec(jq.QuantSpec("int8"))}, ())


CALLS = {
    "calibrate": lambda b: jq.calibrate(fn, PLAN, PARAMS, b),
    "compare": lambda b: jq.compare(fn, PARAMS, jq.quantize_params(PARAMS, PLAN), b, plan=PLAN),
    "sensitivity": lambda b: jq.mixed.sensitivity(fn, PLAN, PARAMS, b, {"a": SPEC}),
    "refine": lambda b: jq.transform.refine(fn, table(), PLAN, PARAMS, b),
    "quantize_sequentially": lambda b: jq.calibration.quantize_sequentially(fn, PLAN, PARAMS, b),
    "distill": lambda b: next(jq.calibration.distill(fn, PLAN, PARAMS, jq.quantize_params(PARAMS, PLAN), b, _Never())),
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

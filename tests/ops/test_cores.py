"""What several cores change on the CPU: one dot that they share is preferred to a loop over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_reference import INTEGER, MATMUL, WEIGHT_ONLY, dot_error, quantized, real, spec_of, unequal

from jaxquant import OpSpec, ops, recipes
from jaxquant.ops import formulation, machine
from jaxquant.ops.matrix import Axes, canonical
from jaxquant.ops.operands import Operand


@pytest.fixture(params=[1, 2, 64])
def count(request, monkeypatch):
    monkeypatch.setattr(formulation, "cores", lambda: request.param)
    monkeypatch.setattr(formulation, "int8_dots", lambda: "vectors")
    monkeypatch.setattr(formulation, "bfloat16_dots", lambda: True)
    jax.clear_caches()  # of programs for another machine
    yield request.param
    jax.clear_caches()


def chosen(spec, rows, *, trained=False):
    found = []

    def run(x, w):
        left = canonical(Operand(spec.act, (-1,)).quantized(x, None), Axes((), (0,), (1,)))
        weight = Operand(spec.weight, (-2,)).quantized(w, None) if trained else quantized(w, spec.weight)
        found.append(formulation.choose("cpu", left, canonical(weight, Axes((), (1,), (0,))), None, trained=trained))

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 256), (256, 64))))
    return found[0]


@pytest.mark.every
def test_the_formulation(count):
    several = count > 1
    for rows in (64, 256):
        assert chosen(recipes.w8a8(), rows) == ("integer" if several else "blocks")
    assert chosen(recipes.w8a8(), 8) == "integer"
    for rows, many in ((24, "digits"), (25, "digits"), (48, "digits"), (49, "blocks")):
        assert chosen(recipes.w8a16(), rows) == (many if several or rows == 24 else "blocks")
        assert chosen(OpSpec(spec_of("int4")), rows) == ("digits" if rows == 24 else "blocks")  # a loop either way


@pytest.mark.parametrize("spec, bound", [(recipes.w8a8(), INTEGER), (recipes.w8a16(), WEIGHT_ONLY)])
def test_the_product(count, spec, bound):
    x, w = unequal(0, (70, 256)), unequal(1, (256, 64))
    q = quantized(w, spec.weight)
    for rows in (40, 70):
        left = real(x[:rows], spec.act, (1,))
        got = jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec))(x[:rows], q)
        assert dot_error(got, np.asarray(left), np.asarray(real(q)), MATMUL) <= bound


@pytest.mark.every
def test_a_weight_in_training_is_one_float_dot_already(count):
    assert [chosen(recipes.w8a16(), rows, trained=True) for rows in (24, 25)] == ["digits", "dequantized"]


def test_a_process_has_cores():
    assert machine.cores() >= 1

"""What several cores change on the CPU: one dot that they share is preferred to a loop over blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_reference import INTEGER, MATMUL, WEIGHT_ONLY, dot_error, kernel_of, quantized, real, spec_of, unequal

from jaxquant import OpSpec, ops, recipes
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.operands import Side


@pytest.fixture(params=[1, 2, 64])
def count(request, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: request.param)
    monkeypatch.setattr(machine, "int8_dots", lambda: "vectors")
    monkeypatch.setattr(machine, "bfloat16_dots", lambda: True)
    return request.param


def chosen(spec, rows, *, trained=False):
    found = []

    def run(x, w):
        weight = Side(spec.weight, (-2,)).quantized(w, None) if trained else quantized(w, spec.weight)
        found.append(kernel_of(Side(spec.act, (-1,)).quantized(x, None), weight))

    jax.eval_shape(run, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 256), (256, 64))))
    return found[0]


@pytest.mark.every
def test_the_formulation(count):
    several = count > 1
    for rows in (64, 256):
        assert chosen(recipes.w8a8(), rows) == ("Int8" if several else "Blocked")
    assert chosen(recipes.w8a8(), 8) == "Int8"
    for rows, many in ((24, "ResidualSplit"), (25, "ResidualSplit"), (48, "ResidualSplit"), (49, "Blocked")):
        assert chosen(recipes.w8a16(), rows) == (many if several or rows == 24 else "Blocked")
        assert chosen(OpSpec(spec_of("int4")), rows) == (
            "ResidualSplit" if rows == 24 else "Blocked"
        )  # a loop either way


@pytest.mark.parametrize("spec, bound", [(recipes.w8a8(), INTEGER), (recipes.w8a16(), WEIGHT_ONLY)])
def test_the_product(count, spec, bound):
    few, many = 40 + count, 70 + count  # no other test has them, so no program of another machine is found
    x, w = unequal(0, (many, 256)), unequal(1, (256, 64))
    q = quantized(w, spec.weight)
    for rows in (few, many):
        left = real(x[:rows], spec.act, (1,))
        got = jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec))(x[:rows], q)
        assert dot_error(got, np.asarray(left), np.asarray(real(q)), MATMUL) <= bound


@pytest.mark.every
def test_a_weight_in_training_is_one_float_dot_already(count):
    assert [chosen(recipes.w8a16(), rows, trained=True) for rows in (24, 25)] == ["ResidualSplit", "Float"]


def test_a_process_has_cores():
    assert machine.cores() >= 1

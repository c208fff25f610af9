"""Quantized gradients: the two products of the backward pass as products of integers."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import instance
from ops_reference import INTEGER, MATMUL, error, quantized, spec_of, unequal

import jaxquant as jq
from jaxquant import OpSpec, QuantError, QuantSpec, fake_quant, ops, recipes

SPECS = {
    "int8": recipes.w8a8g8(),
    "asymmetric": OpSpec(spec_of("uint8", symmetric=False), spec_of("int8", symmetric=False), QuantSpec("int8")),
    "narrow": OpSpec(spec_of("int4"), spec_of("uint4", symmetric=False), spec_of("int6", "per_tensor")),
}
PRODUCTS = {
    "x @ w": (MATMUL, (6, 16), (16, 5)),
    "x @ w.T": ((((1,), (1,)), ((), ())), (6, 16), (5, 16)),
    "batch, two axes": ((((3, 1), (2, 1)), ((0,), (0,))), (2, 4, 5, 8), (2, 4, 8, 3)),
    "rows around": ((((1,), (2,)), ((2,), (0,))), (5, 8, 2), (2, 3, 8, 4)),
}


def by_hand(x, w, g, numbers, spec):
    """The formula: scales go into g, g is rounded once for each product, and the rest is exact."""
    (lc, rc), (lb, _) = numbers
    product = functools.partial(lax.dot_general, dimension_numbers=numbers, precision="highest")

    def parts(v, spec, contract):
        q = jq.quantize(v, spec, reduce_axes=contract)
        scale = instance(jax.Array, q.scale)
        return jnp.round(q.dequantize() / scale), scale

    (cx, sx), (cw, sw) = parts(x, spec.act, lc), parts(w, spec.weight, rc)
    ones = [jnp.ones([1 if i in c else n for i, n in enumerate(v.shape)], v.dtype) for v, c in ((x, lc), (w, rc))]
    rows = x.ndim - len(lc) - len(lb)
    over_m = tuple(range(len(lb), len(lb) + rows))
    over_n = tuple(range(len(lb) + rows, g.ndim))
    u = fake_quant(g * product(ones[0], sw), spec.grad, reduce_axes=over_n)
    v = fake_quant(g * product(sx, ones[1]), spec.grad, reduce_axes=over_m)
    return jax.vjp(lambda x: product(x, cw), x)[1](u)[0], jax.vjp(lambda w: product(cx, w), w)[1](v)[0]


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", PRODUCTS)
def test_the_formula(kind, name):
    spec, (numbers, *shapes) = SPECS[name], PRODUCTS[kind]
    x, w = (unequal(i, shape) for i, shape in enumerate(shapes))
    y, pull = jax.vjp(lambda x, w: ops.dot_general(x, w, numbers, spec=spec), x, w)
    g = unequal(2, y.shape)
    for got, want in zip(pull(g), by_hand(x, w, g, numbers, spec), strict=True):
        assert got.shape == want.shape
        assert np.asarray(got).any()
        assert error(got, want) <= INTEGER


def test_every_product_is_one_of_int8():
    """Of the three products of a training step none is in float, and the weight is not transposed for them.

    As they are lowered for an accelerator: what a CPU multiplies in depends on the CPU.
    """
    spec, shapes = recipes.w8a8g8(), ((32, 128), (128, 256))

    def loss(x, w):
        return jnp.sum(jnp.sin(ops.dot_general(x, w, MATMUL, spec=spec)))

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line.rsplit(":", 1)[1] for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) == 3
    for types in products:
        assert re.fullmatch(r" \(tensor<[\dx]+xi8>, tensor<[\dx]+xi8>\) -> tensor<[\dx]+xi32>", types)
    weights = "tensor<128x256xf32>"
    assert not [line for line in text.splitlines() if "stablehlo.transpose" in line and weights in line]


def test_a_plan_takes_it_through_the_function():
    params = {"a": unequal(3, (8, 16)), "b": unequal(4, (16, 4))}
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]  # noqa: E731
    x = unequal(5, (6, 8))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w8a8g8())])
    assert "g int8" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan
    loss = lambda fn: jax.jit(jax.grad(lambda p: jnp.sum(fn(p, x) ** 2)))  # noqa: E731
    got = loss(jq.quantized(fn, plan))(params)
    plain = loss(jq.quantized(fn, jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w8a8())])))(params)
    for path in params:
        assert 0 < error(got[path], plain[path]) < 0.03  # rounded, and to 8 bits


def test_a_frozen_weight():
    """The gradient of x is a product with its codes; the scales have that of the float product."""
    x, g, spec = unequal(6, (6, 16)), unequal(7, (6, 5)), recipes.w8a8g8()
    q = quantized(unequal(8, (16, 5)), spec.weight)
    run = lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec)  # noqa: E731
    dx, dq = jax.vjp(run, x, q)[1](g)
    assert error(dx, by_hand(x, q.dequantize(), g, MATMUL, spec)[0]) <= INTEGER
    assert np.asarray(dq.scale).all()


def test_a_convolution_keeps_its_gradients_in_float():
    fn = lambda p, x: lax.conv_general_dilated(x, p["k"], (1,), "SAME")  # noqa: E731
    params, x = {"k": unequal(9, (4, 3, 3))}, unequal(10, (2, 3, 8))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w8a8g8())])
    assert plan["k"].spec == recipes.w8a8()
    assert "gradients stay in float" in plan["k"].note
    with pytest.raises(QuantError, match="dot_general and einsum only"):
        ops.conv_general_dilated(x, params["k"], (1,), "SAME", spec=recipes.w8a8g8())


@pytest.mark.parametrize(
    "make",
    [
        lambda: OpSpec(QuantSpec("int8"), None, QuantSpec("int8")),
        lambda: OpSpec(spec_of("int8", "per_group"), QuantSpec("int8"), QuantSpec("int8")),
        lambda: OpSpec(QuantSpec("nf4"), QuantSpec("int8"), QuantSpec("int8")),
        lambda: OpSpec(QuantSpec("int8"), spec_of("int8", "per_tensor", static=True), QuantSpec("int8")),
        lambda: OpSpec(QuantSpec("int8"), QuantSpec("int8"), QuantSpec("float8_e5m2")),
        lambda: OpSpec(QuantSpec("float8_e4m3fn"), QuantSpec("float8_e4m3fn"), QuantSpec("int8")),
        lambda: OpSpec(QuantSpec("float8_e4m3fn"), QuantSpec("float8_e4m3fn"), QuantSpec("mxfp8")),
    ],
)
@pytest.mark.every
def test_refusals(make):
    with pytest.raises(QuantError, match=r"grad|quantized gradients"):
        make()


def test_a_frozen_weight_that_has_no_integer_product():
    x, spec = unequal(11, (6, 16)), OpSpec(None, QuantSpec("int8"), QuantSpec("int8"))
    q = quantized(unequal(12, (16, 5)), QuantSpec("nf4"))
    with pytest.raises(QuantError, match="both operands are integers"):
        jax.grad(lambda x: jnp.sum(ops.dot_general(x, q, MATMUL, spec=spec)))(x)

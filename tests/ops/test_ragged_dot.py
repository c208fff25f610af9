"""ragged_dot agrees with the float product of each row with its own expert's dequantized matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double_precision import double_precision
from jax import lax
from narrowed import present
from ops_reference import INTEGER, WEIGHT_ONLY, error, quantized, real, spec_of, unequal

from jaxquant import OpSpec, QuantError, fake_quant, ops, recipes
from jaxquant.ops.kernels.cpu.machine import int8_dots

SIZES = jnp.asarray([3, 0, 4, 1])  # of 10 rows: one expert has none, and two rows have no expert
SPECS = {
    "w8a8": recipes.w8a8(),
    "asymmetric": OpSpec(spec_of("uint8", symmetric=False), spec_of("int8", symmetric=False)),
    "asymmetric weights": OpSpec(spec_of("uint4", symmetric=False), spec_of("int8")),
    "asymmetric activations": OpSpec(spec_of("int8"), spec_of("uint8", symmetric=False)),
    "per tensor": OpSpec(
        spec_of("int8", "per_tensor", symmetric=False), spec_of("int8", "per_tensor", symmetric=False)
    ),
    "w8a16": recipes.w8a16(),
    "w4a16 asymmetric": OpSpec(spec_of("int4", symmetric=False)),
    "w4a8 grouped": recipes.w4a8(8),
    "activations in groups": OpSpec(spec_of("int8"), spec_of("int8", "per_group")),
    "fp8": recipes.fp8(),
    "activations only": OpSpec(act=spec_of("int8")),
}


def product(x, w, sizes):
    """(result, natural size of its entries) in float64; 0 where a row has no expert."""
    out, size = (np.zeros((x.shape[0], w.shape[2])) for _ in range(2))
    start = 0
    for e, n in enumerate(np.asarray(sizes)):
        rows = slice(start, start + n)
        out[rows], size[rows] = x[rows] @ w[e], np.sqrt(x[rows] ** 2 @ w[e] ** 2)
        start += n
    return out, size


@pytest.mark.parametrize("name", SPECS)
def test_specs(name):
    spec = SPECS[name]
    x, w = unequal(0, (10, 16)), unequal(1, (4, 16, 5))
    frozen = w if spec.weight is None else quantized(w, spec.weight)
    got = jax.jit(lambda x, *ws: [ops.ragged_dot(x, w, SIZES, spec=spec) for w in ws])(x, w, frozen)
    bound = WEIGHT_ONLY if name in ("w8a16", "w4a16 asymmetric") else INTEGER
    want, size = product(real(x, spec.act, (1,)), real(frozen), SIZES)
    if spec.weight is None:
        want, size = product(real(x, spec.act, (1,)), real(w), SIZES)
    for each in got:
        assert error(each, want, size) <= bound
        assert not np.asarray(each[8:]).any()


def test_precision_dtypes_and_static_ranges():
    x, w = unequal(2, (10, 16)), unequal(3, (4, 16, 5))
    q = quantized(w, spec_of("int8"))
    want, size = product(real(x), real(q), SIZES)
    assert error(ops.ragged_dot(x, q, SIZES, "highest"), want, size) <= INTEGER
    digits = int8_dots() != "none"  # the activation in two digits; a machine without int8 dots multiplies floats
    assert (error(ops.ragged_dot(x, q, SIZES), want, size) > INTEGER) == digits
    half = ops.ragged_dot(x.astype(jnp.bfloat16), quantized(w.astype(jnp.bfloat16), spec_of("int8")), SIZES)
    assert half.dtype == jnp.bfloat16
    wide = ops.ragged_dot(x, q, SIZES, preferred_element_type=jnp.float16, spec=recipes.w8a8())
    assert wide.dtype == jnp.float16
    spec = recipes.w8a8(static=True, act_symmetric=False)
    got = ops.ragged_dot(x, q, SIZES, spec=spec, act_scale=0.05, act_zero_point=jnp.int8(7))
    left = real(x, spec.act, (1,), 0.05, jnp.int8(7))
    assert error(got, *product(left, real(q), SIZES)) <= INTEGER
    images = quantized(x, spec_of("uint8", symmetric=False), (1,))
    assert error(ops.ragged_dot(images, q, SIZES), *product(real(images), real(q), SIZES)) <= INTEGER
    with double_precision():
        x = unequal(4, (10, 16), np.float64)
        got = ops.ragged_dot(x, q, SIZES.astype(np.int32))
        assert got.dtype == np.float64
        assert error(got, *product(real(x), real(q), SIZES)) <= 1e-13


def test_sums_that_could_overflow():
    k = 140_000
    x, w = jnp.ones((2, k)), jnp.ones((1, k, 2))
    got = ops.ragged_dot(x, quantized(w, spec_of("int8")), jnp.asarray([2]), spec=recipes.w8a8())
    np.testing.assert_allclose(got, k, rtol=1e-6)


@pytest.mark.parametrize("name", ["w8a8", "asymmetric", "w8a16"])
def test_gradients(name):
    spec = SPECS[name]
    x, w, g = unequal(5, (10, 16)), unequal(6, (4, 16, 5)), unequal(7, (10, 5))

    def loss(x, w):
        return jnp.sum(ops.ragged_dot(x, w, SIZES, spec=spec) * g)

    def reference(x, w):
        x = x if spec.act is None else fake_quant(x, spec.act, reduce_axes=(1,))
        w = fake_quant(w, present(spec.weight), reduce_axes=(1,))
        return jnp.sum(lax.ragged_dot(x, w, SIZES, precision="highest") * g)

    for got, want in zip(*(jax.grad(f, (0, 1))(x, w) for f in (loss, reference)), strict=True):
        assert error(got, want) <= INTEGER
    assert not np.asarray(jax.grad(loss, 1)(x, w)[1]).any()  # the expert without rows


def test_under_jit_scan_and_vmap():
    """The sizes may be traced; experts may be stacked by layer; all may be mapped over."""
    spec = SPECS["asymmetric"]
    x, w = unequal(8, (10, 16)), unequal(9, (3, 4, 16, 16), decades=0.3)
    qs = quantized(w, spec.weight)
    sizes = jnp.asarray([[3, 0, 4, 1], [10, 0, 0, 0], [0, 2, 2, 6]])
    f = jax.jit(lambda x, q, sizes: ops.ragged_dot(x, q, sizes, spec=spec))
    want = [f(x, jax.tree.map(lambda leaf, i=i: leaf[i], qs), sizes[i]) for i in range(3)]
    scanned = lax.scan(lambda _, qs: (None, f(x, *qs)), None, (qs, sizes))[1]
    assert error(scanned, want) <= INTEGER
    for i in range(3):
        assert error(want[i], *product(real(x, spec.act, (1,)), real(qs)[i], sizes[i])) <= INTEGER
    stacked = jax.vmap(f)(jnp.stack([x] * 3), qs, sizes)  # JAX itself takes ragged_dot over all operands or none
    assert error(stacked, want) <= INTEGER


def test_nothing_to_quantize():
    x, w = unequal(10, (10, 16)), unequal(11, (4, 16, 5))
    np.testing.assert_array_equal(ops.ragged_dot(x, w, SIZES), lax.ragged_dot(x, w, SIZES))
    assert ops.ragged_dot(x[:0], w, SIZES * 0, spec=recipes.w8a8()).shape == (0, 5)


@pytest.mark.parametrize(
    "change, rule",
    [
        (dict(lhs=jnp.ones((10, 15))), "do not fit each other"),
        (dict(lhs=jnp.ones(16)), "do not fit each other"),
        (dict(rhs=jnp.ones((16, 5))), "do not fit each other"),
        (dict(group_sizes=jnp.asarray([3, 4])), "do not fit each other"),
        (dict(group_sizes=jnp.ones(4)), "do not fit each other"),
        (dict(spec=spec_of("int8")), "spec must be an OpSpec"),
        (dict(spec=recipes.w8a8(static=True)), "a static activation range is needed"),
        (dict(spec=None, act_scale=1.0), "act_scale without an activation"),
        (dict(spec=recipes.w4a16(5)), "group_size must divide"),
        (dict(precision="exact"), "unknown precision"),
        (dict(preferred_element_type=jnp.int32), "is a float array"),
        (dict(lhs=None), "must be an array or a QTensor"),
    ],
)
def test_refused(change, rule):
    call = dict(lhs=jnp.ones((10, 16)), rhs=jnp.ones((4, 16, 5)), group_sizes=SIZES, spec=recipes.w8a8())
    with pytest.raises(QuantError, match=rf"^ragged_dot: .*{rule}.*; got .*\. [A-Z].*\.$"):
        ops.ragged_dot(**{**call, **change})

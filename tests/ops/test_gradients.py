"""Gradients are those of the float product of the fake-quantized or dequantized operands."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import present
from ops_reference import INTEGER, MATMUL, error, quantized, spec_of, unequal

from jaxquant import OpSpec, QTensor, QuantSpec, fake_quant, observers, ops, recipes
from jaxquant.core.by_platform import Target
from jaxquant.ops.backward import _ProductOfCodes
from jaxquant.ops.kernels.tpu.chips import V5E, V6E

BATCHED = (((3, 1), (2, 1)), ((0,), (0,)))  # two contracted axes, a batch axis
SPECS = {
    "w8a8": recipes.w8a8(),
    "asymmetric": OpSpec(spec_of("uint8", symmetric=False), spec_of("int8", symmetric=False)),
    "w8a16": recipes.w8a16(),
    "w4a4 grouped": recipes.w4a4(8),
    "mixed": OpSpec(QuantSpec("nf4"), spec_of("uint4")),  # activations below 0 are clipped
    "fp8": recipes.fp8(),
    "clipping": OpSpec(
        spec_of("int4", calibration=observers.Percentile(80.0)), spec_of("int8", calibration=observers.Percentile(80.0))
    ),
}


def same_leaves(got, want, bound=INTEGER):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        if a.dtype not in (jax.dtypes.float0, jnp.float8_e8m0fnu):  # powers of two: there is no 0 among them
            assert error(np.asarray(a, np.float32), np.asarray(b, np.float32)) <= bound


@pytest.mark.parametrize("name", SPECS)
def test_straight_through(name):
    """With respect to float operands: the gradient of the float product of fake-quantized operands."""
    spec = SPECS[name]
    x, w = unequal(0, (2, 4, 5, 8)), unequal(1, (2, 4, 8, 3))
    g = unequal(2, (2, 5, 3))

    def loss(x, w):
        return jnp.sum(ops.dot_general(x, w, BATCHED, spec=spec) * g)

    def reference(x, w):
        x = x if spec.act is None else fake_quant(x, spec.act, reduce_axes=(1, 3))
        w = fake_quant(w, present(spec.weight), reduce_axes=(1, 2))
        return jnp.sum(lax.dot_general(x, w, BATCHED, precision="highest") * g)

    got, want = jax.jit(lambda x, w: [jax.grad(f, (0, 1))(x, w) for f in (loss, reference)])(x, w)
    same_leaves(got, want)
    assert all(np.asarray(leaf).any() for leaf in got)


@pytest.mark.parametrize("qtype", ["int8", "uint4", "float8_e4m3fn", "nf4", "nvfp4", "mxfp8"])
def test_frozen_operand(qtype):
    """x gets g @ W^T of the dequantized weight; scales get theirs; codes and zero points get none."""
    symmetric = not qtype.startswith("u")
    x, g = unequal(3, (5, 32)), unequal(4, (5, 4))
    grouped = qtype in ("uint4", "nf4")
    q = quantized(unequal(5, (32, 4)), spec_of(qtype, "per_group" if grouped else "per_channel", symmetric=symmetric))

    def loss(x, q):
        return jnp.sum(ops.dot_general(x, q, MATMUL) * g)

    def reference(x, q):
        return jnp.sum(lax.dot_general(x, q.dequantize(), MATMUL, precision="highest") * g)

    both = jax.jit(lambda x, q: [jax.grad(f, (0, 1), allow_int=True)(x, q) for f in (loss, reference)])(x, q)
    same_leaves(*both)
    dx, dq = both[0]
    assert error(dx, np.asarray(g, np.float64) @ np.asarray(q.dequantize(), np.float64).T) <= INTEGER
    assert isinstance(dq, QTensor)
    assert dq.codes.dtype == jax.dtypes.float0
    assert dq.zero_point is None or dq.zero_point.dtype == jax.dtypes.float0
    if qtype in ("int8", "uint4", "nf4"):
        assert np.asarray(dq.scale).all()


def test_both_frozen():
    x, w = quantized(unequal(6, (5, 32)), spec_of("int8"), (-1,)), quantized(unequal(7, (32, 4)), spec_of("int4"))
    slope = lambda fn: jax.grad(fn, (0, 1), allow_int=True)  # noqa: E731
    product = slope(lambda x, w: ops.dot_general(x, w, MATMUL).sum())
    reference = slope(lambda x, w: (x.dequantize() @ w.dequantize()).sum())
    got, want = jax.jit(lambda x, w: (product(x, w), reference(x, w)))(x, w)
    same_leaves(got, want)


def test_static_scale():
    """The gradient of the learned step size: per element q - z - x / s inside the range, q - z outside."""
    x, w, g = unequal(8, (5, 16)), unequal(9, (16, 4)), unequal(10, (5, 4))
    frozen = quantized(w, spec_of("int8"))
    zero = jnp.asarray(3.0)
    for how, given, lowest, highest in (
        (spec_of("int4", "per_tensor", static=True), None, -8, 7),
        (spec_of("int4", "per_tensor", static=True, symmetric=False), zero, -11, 4),  # a float zero point learns too
    ):
        inside = (np.asarray(x) / 0.2 > lowest) & (np.asarray(x) / 0.2 < highest)
        assert inside.any()
        assert not inside.all()
        spec = OpSpec(spec_of("int8"), how)

        def loss(x, w, scale, zero, spec=spec):
            return jnp.sum(ops.dot_general(x, w, MATMUL, spec=spec, act_scale=scale, act_zero_point=zero) * g)

        def reference(x, w, scale, zero, spec=spec):
            x = fake_quant(x, present(spec.act), reduce_axes=(-1,), scale=scale, zero_point=zero)
            w = w.dequantize() if isinstance(w, QTensor) else fake_quant(w, present(spec.weight), reduce_axes=(0,))
            return jnp.sum(lax.dot_general(x, w, MATMUL, precision="highest") * g)

        scale = jnp.asarray(0.2)
        for weight in (w, frozen):
            args = (x, weight, scale, given)
            slopes = [jax.grad(f, (0, 1, 2, 3), allow_int=True) for f in (loss, reference)]
            got, want = jax.jit(lambda *args, slopes=slopes: [f(*args) for f in slopes])(*args)
            same_leaves(got, want)
            assert got[2] != 0
            np.testing.assert_array_equal(got[0] != 0, inside)
            assert given is None or got[3] != 0


def test_static_scale_by_hand():
    x, w = jnp.asarray([[0.5, -0.31, 9.0]]), jnp.asarray([[1.0], [-1.0], [1.0]])
    spec = OpSpec(spec_of("int8"), spec_of("int4", "per_tensor", static=True))

    def loss(s):
        return ops.dot_general(x, w, MATMUL, spec=spec, act_scale=s)[0, 0]

    # q = 2, -2, 7 (clipped) at s = 0.2: (2 - 2.5) - (-2 + 1.55) + 7
    np.testing.assert_allclose(jax.grad(loss)(0.2), -0.5 + 0.45 + 7, rtol=1e-5)


def test_half_precision():
    """Gradients arrive in the operands' dtypes, within their rounding of the float32 ones."""
    x, w = unequal(11, (5, 32), jnp.bfloat16), unequal(12, (32, 4), jnp.bfloat16)
    wide = [v.astype(jnp.float32) for v in (x, w)]
    for spec in (recipes.w8a8(), recipes.w4a16(8)):

        def loss(x, w, spec=spec):
            return jnp.sum(ops.dot_general(x, w, MATMUL, spec=spec).astype(jnp.float32))

        got, want = jax.grad(loss, (0, 1))(x, w), jax.grad(loss, (0, 1))(*wide)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == jnp.bfloat16
            assert error(a.astype(jnp.float32), b) <= 2 * jnp.finfo(jnp.bfloat16).eps


def test_einsum():
    x, w, g = unequal(13, (2, 5, 8)), unequal(14, (8, 3, 4)), unequal(15, (2, 3, 5, 4))
    spec = recipes.w8a8()

    def loss(x, w):
        return jnp.sum(ops.einsum("btd,dhk->bhtk", x, w, spec=spec) * g)

    def reference(x, w):
        x, w = (
            fake_quant(x, present(spec.act), reduce_axes=(-1,)),
            fake_quant(w, present(spec.weight), reduce_axes=(0,)),
        )
        return jnp.sum(jnp.einsum("btd,dhk->bhtk", x, w, precision="highest") * g)

    same_leaves(*(jax.grad(f, (0, 1))(x, w) for f in (loss, reference)))


@pytest.mark.parametrize("name", ["w8a8", "asymmetric", "w8a16", "fp8"])
def test_convolution(name):
    spec = SPECS[name]
    x, k, g = unequal(16, (2, 6, 5, 3)), unequal(17, (3, 3, 3, 4)), unequal(18, (2, 3, 3, 4))
    window: Any = dict(window_strides=(2, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(x, k):
        return jnp.sum(ops.conv_general_dilated(x, k, **window, spec=spec) * g)

    def reference(x, k):
        x = x if spec.act is None else fake_quant(x, spec.act, reduce_axes=(1, 2, 3))
        k = k.dequantize() if isinstance(k, QTensor) else fake_quant(k, present(spec.weight), reduce_axes=(0, 1, 2))
        return jnp.sum(lax.conv_general_dilated(x, k, **window, precision="highest") * g)

    frozen = quantized(k, spec.weight, (0, 1, 2))

    @jax.jit
    def gradients(x, k, frozen):
        return [[jax.grad(f, (0, 1), allow_int=True)(x, v) for v in (k, frozen)] for f in (loss, reference)]

    same_leaves(*gradients(x, k, frozen))


def test_residuals():
    """Nothing is kept for the backward pass but the operands themselves, and codes of those that it computes with."""
    x, w = unequal(19, (6, 64)), unequal(20, (64, 16))
    image, kernel = unequal(21, (2, 6, 5, 3)), unequal(22, (3, 3, 3, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    for spec in (recipes.w8a8(), recipes.w4a16(16), recipes.fp8(), recipes.w4a4(16)):
        for weight in (w, quantized(w, spec.weight)):
            _, vjp = jax.vjp(lambda x, w, spec=spec: ops.dot_general(x, w, MATMUL, spec=spec), x, weight)
            check_residuals(vjp, (x, weight))
    for weight in (kernel, quantized(kernel, spec_of("int8"), (0, 1, 2))):
        _, vjp = jax.vjp(
            lambda x, k: ops.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=numbers, spec=recipes.w8a8()),
            image,
            weight,
        )
        check_residuals(vjp, (image, weight))


def check_residuals(vjp, operands):
    given = [np.asarray(leaf) for leaf in jax.tree.leaves(operands)]
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(vjp)]
    assert kept
    others = [leaf for leaf in kept if not any(leaf.dtype == g.dtype and np.array_equal(leaf, g) for g in given)]
    sizes = [leaf.size for leaf in others if leaf.itemsize == 1]  # codes; scales are the rest
    assert sum(sizes) <= sum(g.size for g in given)
    assert sum(leaf.nbytes for leaf in others if leaf.itemsize > 1) <= sum(sizes)


def test_what_a_compiled_step_holds():
    """Between the passes of a compiled step, layers of a scan hold codes: no float array of all their activations."""
    layers, rows, width = 3, 16, 24
    x, w = unequal(23, (rows, width)), unequal(24, (layers, width, width))

    def loss(w, x, spec):
        step = lambda h, w: (jnp.tanh(h) * ops.dot_general(h, w, MATMUL, spec=spec), None)  # noqa: E731
        return jnp.sum(lax.scan(step, x, w)[0] ** 2)

    program = jax.jit(jax.grad(loss), static_argnums=2)
    plain, held = (
        present(program.lower(w, x, spec).compile().as_text()).count(f"f32[{layers},{rows},{width}]{{")
        for spec in (None, recipes.w8a8())
    )
    assert "s8[" in present(program.lower(w, x, recipes.w8a8()).compile().as_text())
    assert held <= plain


@pytest.mark.parametrize("along", [(2, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_with_scales_along_the_summed_axis(along, dtype):
    """A chip that decodes in its product, and one that scales the other operand, compute the same sums."""
    rng, k = np.random.default_rng(0), 48
    g = jnp.asarray(rng.normal(size=(2, 128, k)) * np.logspace(-1, 1, k), dtype)
    codes = jnp.asarray(rng.integers(-127, 128, (2, k, 24)), jnp.int8)
    scale = jnp.asarray(rng.uniform(0.1, 3, (2, 1, k)), jnp.float32)
    want = np.einsum("bmk,bk,bkn->bmn", np.asarray(g, np.float64), np.asarray(scale[:, 0], np.float64), codes)
    product = _ProductOfCodes(along, None)
    for target in (Target("tpu", V5E), Target("tpu", V6E), Target("cpu")):
        got = product.on(target, g, codes if along[1] == 1 else jnp.swapaxes(codes, 1, 2), scale)
        assert error(np.asarray(got, np.float64), want) <= (1e-6 if dtype == jnp.float32 else 2**-8)

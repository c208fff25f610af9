"""Activations in bfloat16 and float16: what is multiplied in that dtype, and what that costs in accuracy."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops_reference import INTEGER, MATMUL, WEIGHT_ONLY, dot, dot_error, kernel_of, quantized, slow_but, spec_of, unequal

from jaxquant import OpSpec, ops, recipes
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernel import kernel
from jaxquant.ops.kernels import dequantized
from jaxquant.ops.kernels.cpu import floats
from jaxquant.ops.kernels.cpu import machine as cpu
from jaxquant.ops.problem import Product

ROUNDED = 2**-8  # what rounding to bfloat16 changes a number by, at most, relative to it

EXACT = {
    "int8": recipes.w8a16(),
    "uint8": OpSpec(spec_of("uint8", symmetric=False)),
    "int4": recipes.w4a16(None),
    "int4 two-level": recipes.w4a16(8, two_level=True),
    "fp8": OpSpec(spec_of("float8_e4m3fn")),
    "fp4": OpSpec(spec_of("float4_e2m1fn")),
    "mxfp8": OpSpec(spec_of("mxfp8")),
    "mxfp4": recipes.mxfp4(),
}
GROUPS = {
    "int4 in groups": recipes.w4a16(8, symmetric=False),
    "int3 in groups": OpSpec(spec_of("int3", "per_group")),
    "nf4": recipes.nf4(8),
    "nvfp4": recipes.nvfp4(),
}
WIDE = jnp.float32


def operands(spec, rows=32, dtype=jnp.bfloat16, weight=jnp.bfloat16):
    return unequal(0, (rows, 64), dtype), quantized(unequal(1, (64, 24), weight), spec.weight)


def product(x, q, precision=None):
    """In float32, whatever the operands' dtypes."""
    return jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL, precision, preferred_element_type=WIDE))(x, q)


def exact_operands(x, q) -> tuple[Any, Any]:
    return exact_values(x, q.dequantize(WIDE))


def exact_values(x, w) -> tuple[Any, Any]:
    return np.asarray(x, np.float64), np.asarray(w, np.float64)


@pytest.mark.parametrize("name", slow_but([*EXACT], "int8"))
@pytest.mark.parametrize("weight", [jnp.float32, jnp.bfloat16])
def test_what_bfloat16_holds(name, weight):
    """Codes are exact in bfloat16 (MX formats with their scales), products in float32: nothing is lost."""
    x, q = operands(EXACT[name], weight=weight)
    assert dot_error(product(x, q), *exact_operands(x, q), MATMUL) <= INTEGER


@pytest.fixture(params=["tiles", "vectors", "none"])
def machine(request, monkeypatch):
    """A processor with such instructions for int8, and either with or without those for bfloat16."""
    monkeypatch.setattr(cpu, "int8_dots", lambda: request.param)
    return request.param


ROWS = {"tiles": 51, "vectors": 53, "none": 55}  # no other test has them, so no program of another machine is found


@pytest.mark.every
@pytest.mark.parametrize("bfloat16", [True, False])
def test_no_digits_where_bfloat16_is_exact(machine, bfloat16, monkeypatch):
    """Digits at few rows, where reading the weight is all that counts; at many they would only lose accuracy."""
    monkeypatch.setattr(cpu, "bfloat16_dots", lambda: bfloat16)
    for name in ("int8", "int4", "int4 two-level"):
        for rows, exact in ((12, machine == "none"), (13, True), (40, True)):
            x, w = shapes(EXACT[name], rows, jnp.bfloat16, jnp.bfloat16)
            assert kernel_of(x, w) == ("Blocked" if exact else "ResidualSplit")
    x, q = operands(EXACT["int8"], ROWS[machine] + bfloat16)
    assert dot_error(product(x, q), *exact_operands(x, q), MATMUL) <= INTEGER


@pytest.mark.parametrize("name", slow_but([*GROUPS], "int4 in groups"))
def test_groups(name):
    """Each of the weight's values is rounded to bfloat16, the weight's own dtype."""
    x, q = operands(GROUPS[name])
    left, right = exact_operands(x, q)
    off = np.abs(np.asarray(product(x, q), np.float64) - dot(left, right, MATMUL))
    assert np.all(off <= (ROUNDED + INTEGER) * dot(np.abs(left), np.abs(right), MATMUL))


@pytest.mark.parametrize("name", [*EXACT, *GROUPS])
@pytest.mark.parametrize("rows", [1, 2, 13, 40, 200])
def test_rows(name, rows):
    spec = {**EXACT, **GROUPS}[name]
    x, q = operands(spec, rows)
    assert dot_error(product(x, q), *exact_operands(x, q), MATMUL) <= (WEIGHT_ONLY if name in EXACT else ROUNDED)
    assert dot_error(product(x, q, "highest"), *exact_operands(x, q), MATMUL) <= INTEGER
    x = x.astype(jnp.float16)  # float32 on the CPU
    assert dot_error(product(x, q), *exact_operands(x, q), MATMUL) <= WEIGHT_ONLY


@pytest.mark.parametrize("name", [*GROUPS])
def test_a_float32_weight_is_not_rounded(name):
    x, q = operands(GROUPS[name], weight=jnp.float32)
    assert dot_error(product(x, q), *exact_operands(x, q), MATMUL) <= INTEGER


@pytest.mark.parametrize("spec", slow_but([recipes.mxfp8(), recipes.mxfp4(act=True)], recipes.mxfp8()))
@pytest.mark.parametrize("rows", slow_but([8, 32, 100], 32))
def test_mx_formats_on_both_sides(spec, rows):
    """Powers of two leave significands short: bfloat16 has the values of float32 operands too, in training as well."""
    x, w = unequal(0, (rows, 64)), unequal(1, (64, 24))
    q = quantized(w, spec.weight)
    values = quantized(x, spec.act, (-1,)).dequantize(), q.dequantize()
    for weight in (w, q):
        got = jax.jit(lambda x, w: ops.dot_general(x, w, MATMUL, spec=spec))(x, weight)
        assert dot_error(got, *exact_values(*values), MATMUL) <= INTEGER
    for dtype, scale in (("bf16", q.scale), ("f32", jnp.full(q.scale.shape, 0.3, jnp.float32))):
        program = jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec)).trace(x, q.replace(scale=scale))
        text = program.lower(lowering_platforms=("cuda",)).as_text()
        (found,) = re.findall(r"stablehlo.dot_general.* : (.*)", text)
        assert re.fullmatch(rf"\(tensor<[\dx]*{dtype}>, tensor<[\dx]*{dtype}>\) -> tensor<[\dx]*f32>.*", found)


@pytest.mark.parametrize("name", ["int8", "int4 in groups"])
def test_transformations(name):
    """Under vmap over weights, and with a weight on the left."""
    spec = {**EXACT, **GROUPS}[name]
    x, q = operands(spec)
    one = product(x, q)
    assert one.dtype == jnp.float32
    assert ops.dot_general(x, q, MATMUL).dtype == jnp.bfloat16
    stack = jax.tree.map(lambda v: jnp.stack([v, v]), q)
    assert dot_error(jax.vmap(lambda q: product(x, q))(stack)[1], *exact_operands(x, q), MATMUL) <= ROUNDED
    turned = ops.dot_general(q, x, (((0,), (1,)), ((), ())), preferred_element_type=WIDE)
    np.testing.assert_allclose(turned.T, one, rtol=1e-6, atol=1e-6 * float(np.abs(one).max()))


@pytest.mark.parametrize("spec", slow_but([recipes.w8a16(), recipes.w8a8(), recipes.w4a16(8)], recipes.w8a16()))
def test_training(spec):
    """Gradients of bfloat16 operands: rounded once as operands, summed in float32, rounded once as results."""
    x, w, g = (unequal(i, shape, jnp.bfloat16) for i, shape in enumerate(((32, 64), (64, 24), (32, 24))))
    loss = jax.jit(jax.grad(lambda x, w: jnp.sum(ops.dot_general(x, w, MATMUL, spec=spec) * g), (0, 1)))
    dx, dw = loss(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    values = quantized(w, spec.weight).dequantize(WIDE)
    left = x if spec.act is None else quantized(x, spec.act, (-1,)).dequantize(WIDE)
    left, right, g = (np.asarray(v, np.float64) for v in (left, values, g))
    for got, a, b in ((dx, g, right.T), (dw, left.T, g)):
        off = np.abs(np.asarray(got, np.float64) - a @ b)
        assert np.all(off <= ROUNDED * np.abs(a @ b) + 2 * ROUNDED * (np.abs(a) @ np.abs(b)))


def shapes(spec, rows, dtype, weight) -> tuple[Any, Any]:
    """Operands without values."""
    shapes = jax.ShapeDtypeStruct((rows, 64), dtype), jax.ShapeDtypeStruct((64, 16), weight)
    return jax.eval_shape(lambda x, w: (x, quantized(w, spec.weight)), *shapes)


def chosen(platform, name, rows, dtype=jnp.bfloat16, weight=jnp.bfloat16, precision=None):
    spec = {**EXACT, **GROUPS}[name]
    rule = floats if platform == "cpu" else dequantized
    axes = Axes((), (0,), (1,)), Axes((), (1,), (0,))
    return jnp.dtype(rule.value_dtype(Product.of(*shapes(spec, rows, dtype, weight), *axes, precision, dtype))).name


def test_the_dtype_of_a_product(monkeypatch):
    monkeypatch.setattr(cpu, "bfloat16_dots", lambda: True)
    for platform in ("cpu", "gpu"):
        for weight in (jnp.float32, jnp.bfloat16):
            assert chosen(platform, "int8", 64, weight=weight) == "bfloat16"
        assert chosen(platform, "nf4", 64) == "bfloat16"
        assert chosen(platform, "nf4", 64, weight=jnp.float32) == "float32"
        assert chosen(platform, "nf4", 64, weight=jnp.float16) == "float32"
        assert chosen(platform, "int8", 64, precision="highest") == "float32"
        assert chosen(platform, "int8", 64, precision=jax.lax.DotAlgorithmPreset.F32_F32_F32) == "float32"
        assert chosen(platform, "int8", 64, dtype=jnp.float32) == "float32"
    assert chosen("gpu", "nf4", 1) == "bfloat16"
    assert chosen("cpu", "nf4", 8) == chosen("cpu", "int8", 1) == "float32"
    assert chosen("gpu", "int8", 64, dtype=jnp.float16) == "float16"
    assert chosen("cpu", "int8", 64, dtype=jnp.float16) == "float32"
    monkeypatch.setattr(cpu, "bfloat16_dots", lambda: False)
    assert chosen("cpu", "int8", 64) == "float32"
    assert chosen("gpu", "int8", 64) == "bfloat16"


@pytest.mark.parametrize("dtype, letters", [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_what_a_gpu_is_asked_for(dtype, letters):
    x, q = operands(recipes.w4a16(8), dtype=dtype, weight=dtype)
    program = jax.jit(lambda x, q: ops.dot_general(x, q, MATMUL)).trace(x, q).lower(lowering_platforms=("cuda",))
    (dots,) = re.findall(r"stablehlo.dot_general.* : (.*)", program.as_text())
    assert re.fullmatch(rf"\(tensor<[\dx]*{letters}>, tensor<[\dx]*{letters}>\) -> tensor<[\dx]*f32>.*", dots)


@pytest.mark.parametrize("op", ["conv", "ragged"])
def test_a_gpu_multiplies_in_the_dtype_of_the_float_program(op):
    x, w, spec = {
        "conv": (jnp.ones((2, 6, 5, 8), jnp.float32), jnp.ones((3, 3, 8, 4), jnp.float32), recipes.w4a16(8)),
        "ragged": (jnp.ones((6, 16), jnp.float32), jnp.ones((3, 16, 4), jnp.float32), recipes.w4a16(8)),
    }[op]

    def multiply(x, w, **rest):
        if op == "ragged":
            return ops.ragged_dot(x, w, jnp.array([1, 2, 3]), **rest)
        return ops.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **rest)

    def operands(platform, x, w, **rest):
        def gradient(x, w):
            return jax.grad(lambda x: multiply(x, w, **rest).astype(jnp.float32).sum())(x)

        text = jax.jit(lambda x, w: (multiply(x, w, **rest), gradient(x, w))).trace(x, w)
        products = r"(?:convolution|dot_general|ragged_dot).*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>"
        found = re.findall(products, text.lower(lowering_platforms=(platform,)).as_text())
        assert len(found) >= 2  # and what only the compiler sees that nothing reads
        return {dtype for pair in found for dtype in pair}

    narrow = x.astype(jnp.bfloat16)
    q = quantized(w.astype(jnp.bfloat16), spec.weight, (-2,))
    assert operands("cuda", narrow, q) == {"bf16"}
    assert operands("cpu", narrow, q) == {"f32"}
    assert operands("cuda", narrow, q, precision="highest") == {"f32"}
    assert operands("cuda", narrow, q, preferred_element_type=jnp.float32) == {"f32"}
    assert operands("cuda", x, q) == {"f32"}


def test_the_kernel_column():
    name = "bfloat16" if cpu.bfloat16_dots() and jax.default_backend() == "cpu" else "float32"
    if jax.default_backend() == "cpu":
        assert kernel(64, 64, 64, recipes.nf4(), "bfloat16") == f"{name} blocks"
    assert kernel(64, 64, 64, recipes.nf4(), "float32").startswith("float32")

"""Products of decoded codes, as TPUs and GPUs have them: parity with the float product, and what is lowered for them.

The branch for those platforms runs here, on the CPU; how it compiles there is read in tests/programs.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from narrowed import present

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.core.by_platform import Platform, Target
from jaxquant.core.relayout import laid_out
from jaxquant.ops.axes import Axes
from jaxquant.ops.problem import Product
from jaxquant.ops.select import select

GROUPED = {"granularity": "per_group", "group_size": 8}
SPECS = {
    "int4": jq.QuantSpec("int4", **GROUPED),
    "uint4": jq.QuantSpec("uint4", symmetric=False, **GROUPED),
    "int3": jq.QuantSpec("int3", **GROUPED),
    "channel": jq.QuantSpec("int4"),
    "zero": jq.QuantSpec("uint4", symmetric=False),
    "nf4": jq.QuantSpec("nf4", **GROUPED),
    "fp4": jq.QuantSpec("fp4", **GROUPED),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "int8": jq.QuantSpec("int8", **GROUPED),
}


def array(shape, seed, dtype=jnp.float32):
    values = np.random.default_rng(seed).standard_normal(shape) * np.linspace(0.5, 2, shape[-1])
    return jax.device_put(np.asarray(values, dtype))


def decoded(x, w, x_axes, w_axes, platform: Platform = "other"):
    """The kernel off the CPU, and its problem."""
    problem = Product.of(x, w, x_axes, w_axes, None, jnp.float32)
    kernel = select(problem, Target(platform))
    assert "ecoded" in type(kernel).__name__
    return kernel, problem


def both(x, w, numbers, spec, act=None, platform: Platform = "other"):
    """The product of decoded codes, and the float one in float64."""
    (xc, wc), (xb, wb) = numbers
    axes = Axes.of(x.ndim, xb, xc), Axes.of(w.ndim, wb, wc)

    @jax.jit  # one program: each operation on its own would be compiled for every shape
    def products(x, w):
        q = laid_out(jq.quantize(w, spec, reduce_axes=tuple(i - w.ndim for i in wc)), "elements")
        xq = x if act is None else jq.quantize(x, act, reduce_axes=tuple(i - x.ndim for i in xc))
        kernel, problem = decoded(xq, q, *axes, platform)
        return kernel.run(problem), [v.dequantize(jnp.float32) if isinstance(v, jq.QTensor) else v for v in (xq, q)]

    out, real = products(x, w)
    left, right = (np.asarray(v, np.float64) for v in real)
    return np.asarray(out, np.float64), in_numpy(left, right, numbers)


def in_numpy(left, right, numbers):
    """`jax.lax.dot_general` in NumPy, which has float64 everywhere."""
    (lc, rc), (lb, rb) = numbers
    names = dict(zip((*rc, *rb), (*lc, *lb), strict=True))
    mine, its = list(range(left.ndim)), [names.get(i, left.ndim + i) for i in range(right.ndim)]
    batch, rows = list(lb), [i for i in mine if i not in (*lc, *lb)]
    return np.einsum(left, mine, right, its, [*batch, *rows, *(i for i in its if i >= left.ndim)])


def error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_float32_is_exact(name, rows):
    found, wanted = both(array((rows, 64), 0), array((64, 24), 1), (((1,), (0,)), ((), ())), SPECS[name])
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("name", SPECS)
def test_bfloat16_rounds_each_value_once(name):
    """Each value of the weight is off by 2**-9 of itself at most, and so is the result."""
    x, w = array((5, 64), 0, jnp.bfloat16), array((64, 24), 1, jnp.bfloat16)
    found, wanted = both(x, w, (((1,), (0,)), ((), ())), SPECS[name])
    assert error(found, wanted) < 2**-8


@pytest.mark.parametrize("act", [jq.QuantSpec("int8"), jq.QuantSpec("mxfp8"), jq.QuantSpec("uint8", symmetric=False)])
@pytest.mark.parametrize("name", ["int4", "channel", "nf4"])
def test_quantized_activations(name, act):
    x, w, numbers = array((5, 64), 0), array((64, 24), 1), (((1,), (0,)), ((), ()))
    found, wanted = both(x, w, numbers, SPECS[name], act)
    assert error(found, wanted) < 1e-6


@settings(max_examples=12, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(SPECS)))
def test_any_layout(data, name):
    """Batches, several rows, several contracted axes, in any order; the weight left or right."""
    count = {"batch": data.draw(st.integers(0, 1)), "rows": data.draw(st.integers(0, 2)), "columns": 2, "contract": 2}
    sizes = {"batch": [3], "rows": [1, 2], "columns": [3, 2], "contract": [2, 32]}
    x_axes = [(kind, i) for kind in ("batch", "rows", "contract") for i in range(count[kind])]
    w_axes = [(kind, i) for kind in ("batch", "contract", "columns") for i in range(count[kind])]
    x_axes, w_axes = data.draw(st.permutations(x_axes)), data.draw(st.permutations(w_axes))
    # The last contracted axis has the groups, and those run along what is stored last of them.
    inner = [a for a in w_axes if a[0] == "contract"]
    if inner != [("contract", 0), ("contract", 1)]:
        w_axes = [("contract", 1 - i) if kind == "contract" else (kind, i) for kind, i in w_axes]
    shape = lambda axes: tuple(sizes[kind][i] for kind, i in axes)  # noqa: E731
    at = lambda axes, kind: tuple(axes.index((kind, i)) for i in range(count[kind]))  # noqa: E731
    numbers = ((at(x_axes, "contract"), at(w_axes, "contract")), (at(x_axes, "batch"), at(w_axes, "batch")))
    x, w = array(shape(x_axes), 0), array(shape(w_axes), 1)
    if name == "mxfp8":  # a group is a whole axis here: these are plain codes of 8 bits
        return
    found, wanted = both(x, w, numbers, SPECS[name])
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-6


LONG = {"granularity": "per_group", "group_size": 128}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("act", [None, jq.QuantSpec("int8")])
@pytest.mark.parametrize("qtype", ["int4", "int3", "int8", "float4_e2m1fn", "float8_e4m3fn"])
def test_one_dot_for_each_group(qtype, act, rows):
    """The branch for a TPU, which has few rows so."""
    numbers, spec = (((1,), (0,)), ((), ())), jq.QuantSpec(qtype, **LONG)
    found, wanted = both(array((rows, 256), 0), array((256, 24), 1), numbers, spec, act, "tpu")
    assert found.shape == wanted.shape
    assert error(found, wanted) < 1e-6


@pytest.mark.parametrize("qtype", ["int4", "int8", "float8_e4m3fn", "nf4"])
def test_scales_along_what_is_contracted(qtype):
    """A cache with a scale per token, in any order of axes: the scales go into the activation."""
    w, x = array((3, 64, 24), 1) * jnp.linspace(1, 9, 64).reshape(1, 64, 1), array((64, 5, 3), 0)
    axes = Axes((2,), (1,), (0,)), Axes((0,), (2,), (1,))
    q = laid_out(jq.quantize(w, jq.QuantSpec(qtype), reduce_axes=(-1,)), "elements")
    problem = Product.of(x, q, *axes, None, jnp.float32)
    kernel = select(problem, Target("other"))
    assert type(kernel).__name__ == ("ScaledActivation" if q.type.bits == 8 else "Decoded")
    wanted = in_numpy(np.asarray(x, np.float64), np.asarray(q.dequantize(), np.float64), (((0,), (1,)), ((2,), (0,))))
    assert error(kernel.run(problem), wanted) < 1e-6


def test_the_weight_on_the_left():
    spec = SPECS["int4"]
    w, x = array((24, 64), 1), array((3, 64), 0)
    q = laid_out(jq.quantize(w, spec, reduce_axes=(-1,)), "elements")
    kernel, problem = decoded(q, x, Axes.of(2, (), (1,)), Axes.of(2, (), (1,)))
    assert problem.weight_first
    out = kernel.run(problem)
    np.testing.assert_allclose(out, q.dequantize() @ x.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int4", "nf4", "channel"])
@pytest.mark.parametrize("spec", [None, "act"])
def test_the_same_on_a_cpu(name, spec):
    """In the layout of another platform a CPU computes the same, as does everything above `dot_general`."""
    x, w = array((5, 64), 0), array((64, 24), 1)
    q = jq.quantize(w, SPECS[name], reduce_axes=(-2,)).store((-2,))
    op = jq.OpSpec(SPECS[name], jq.QuantSpec("int8") if spec else None)
    product = lambda q, x: ops.einsum("bk,kn->bn", x, q, spec=op)  # noqa: E731
    wanted = product(q, x)
    there = laid_out(q, "elements")
    np.testing.assert_allclose(jax.jit(product)(there, x), wanted, rtol=2e-4, atol=2e-4)
    gradient = jax.grad(lambda x, q: product(q, x).sum())
    np.testing.assert_allclose(gradient(x, there), gradient(x, q), rtol=2e-4, atol=2e-4)
    stacked = jax.tree.map(lambda v: jnp.stack([v, v]), there)
    _, outs = lax.scan(lambda c, q: (c, product(q, x)), 0, stacked)
    np.testing.assert_allclose(outs[1], wanted, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(jax.vmap(product, (0, None))(stacked, x)[1], wanted, rtol=2e-4, atol=2e-4)


def lowered(fn, *args, platform):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_what_is_lowered_for_other_platforms(platform, rows):
    """One dot of the codes as they lie: no loop, no gather, no array of the weight's shape. A barrier is behind it."""
    spec = recipes.w4a16(32)
    w = laid_out(jq.quantize(array((64, 24), 1, jnp.bfloat16), present(spec.weight), reduce_axes=(-2,)), "elements")
    fn = lambda q, x: ops.einsum("bk,kn->bn", x, q, spec=spec)  # noqa: E731
    x = array((rows, 64), 0, jnp.bfloat16)
    text = lowered(fn, w, x, platform=platform)
    assert text.count("stablehlo.dot_general") == 1
    assert "tensor<2x32x24xi4>" in text
    assert re.findall(r"optimization_barrier .* : (.*)", text) == [f"tensor<{rows}x24xbf16>"] * (platform == "tpu")
    for absent in ("while", "gather", "custom_call", "tensor<64x24xf32>", "tensor<64x24xbf16>"):
        assert absent not in text, absent

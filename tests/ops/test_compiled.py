"""What the programs compile to on CPU: int8 dots on the library's path, and no float copy of a weight.

Nothing here runs or is timed. `__ynn_fusion` marks what XLA:CPU hands to its library of fast kernels.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_settings import needs_jit
from narrowed import present
from ops_reference import MATMUL, quantized, slow_but, spec_of

from jaxquant import OpSpec, ops, recipes
from jaxquant.ops.kernels.cpu import blocks
from jaxquant.ops.kernels.cpu.machine import bfloat16_dots, cores, int8_dots

pytestmark = needs_jit  # else a loop over blocks is its equations

K, N = 1024, 1280  # no multiple of a number of rows
FAST = "__ynn_fusion"


@functools.cache
def library():
    """Whether XLA has the library here: it serves a plain int8 dot."""
    one = jax.ShapeDtypeStruct((64, 64), jnp.int8)
    return FAST in compiled(lambda a, b: lax.dot_general(a, b, MATMUL, preferred_element_type=jnp.int32), one, one)[0]


@pytest.fixture(autouse=True)
def needs_the_library():
    if jax.default_backend() != "cpu" or not library():
        pytest.skip(f"XLA does not serve int8 dots with {FAST} here")


def compiled(f, *args):
    """The optimized program as text, and the bytes of its temporaries."""
    program = jax.jit(f).lower(*args).compile()
    return present(program.as_text()), present(program.memory_analysis()).temp_size_in_bytes


def weight(spec, k=K, n=N):
    return quantized(jnp.asarray(np.random.default_rng(0).standard_normal((k, n), np.float32)), spec.weight)


def float_dots(text, sizes):
    """Float dots that read an array with all of the sizes among its dimensions."""
    found = []
    for line in text.splitlines():
        if re.search(r"= (f32|bf16)\[[^=]* dot\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]|bf16\[([\d,]*)\]", line)
            found += [s for pair in shapes for s in pair if set(map(str, sizes)) <= set(s.split(","))]
    return found


SCHEMES = {
    "w8a8": recipes.w8a8(),
    "w8a16": recipes.w8a16(),
    "w8a16 in groups": recipes.w8a16(128),
    "w4a16 by channel": recipes.w4a16(None),
    "w4a16 two-level": recipes.w4a16(128, two_level=True),
    "w4a8 two-level": recipes.w4a8(128, two_level=True),
    "w4a16 in groups": recipes.w4a16(128, symmetric=False),
    "w4a8 in groups": recipes.w4a8(128),
    "nf4": recipes.nf4(64),
    "mxfp4": recipes.mxfp4(),
    "nvfp4": recipes.nvfp4(),
    "w2a16": OpSpec(spec_of("int2")),
    "w3a16": OpSpec(spec_of("int3", "per_group", group=64)),
    "w3a16 by channel": OpSpec(spec_of("int3")),
    "uint8": OpSpec(spec_of("uint8", symmetric=False)),
    "fp8 weights": OpSpec(spec_of("float8_e4m3fn")),
    "fp8": recipes.fp8(),
    "mxfp8": OpSpec(spec_of("mxfp8")),
}
FEW = [("w8a8", 1), ("w8a16", 1), ("w8a16", 256), ("w4a16 two-level", 2), ("w4a8 in groups", 33), ("nf4", 1)]
INTEGERS = ("w8a8", "w4a8 two-level")


def check(text, temporaries, k, n, activations, stack=1):
    """The library multiplies, the float weight never exists, and temporaries are small beside it."""
    assert FAST in text
    if k * n > blocks.SMALLEST:
        assert not re.search(rf"(f32|bf16)\[(1,|{stack},)?({k},{n}|{n},{k})\]", text)
    assert temporaries <= 0.1 * 4 * k * n * stack + activations


@pytest.mark.parametrize(
    "name, m",
    [
        pytest.param(name, m, marks=() if (name, m) in FEW else pytest.mark.slow)
        for name in SCHEMES
        for m in (1, 2, 8, 32, 33, 64, 256)
    ],
)
def test_dots(name, m):
    spec = SCHEMES[name]
    q, x = weight(spec), jax.ShapeDtypeStruct((m, K), jnp.float32)
    text, temporaries = compiled(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec), x, q)
    # Beside a block of the weight there are activations: padded, in planes, as digits; and the products of a block.
    check(text, temporaries, K, N, 4 * max(m, 2) * (4 * K + 3 * N))
    by_blocks = int8_dots() == "vectors" and bfloat16_dots() and cores() == 1
    if name in INTEGERS and m >= 64 and by_blocks:  # of codes, in bfloat16
        assert re.search(r"bf16\[[\d,]*\].*= |= bf16\[", text)
        assert "s32[" not in "".join(line for line in text.splitlines() if " dot(" in line)
    elif name in INTEGERS or (name in ("w8a16", "w4a16 two-level") and m <= 8):
        assert re.search(r"s32\[[\d,]*\].* (dot|fusion)\(", text)
        assert not float_dots(text, (K, N))


@pytest.mark.parametrize("name", slow_but([*SCHEMES], "w4a16 in groups"))
def test_bfloat16(name):
    """Where the machine multiplies bfloat16, weights beside such activations are that; what is integer stays so."""
    if not bfloat16_dots():
        pytest.skip("no fast bfloat16 dots here")
    m, spec = 64, SCHEMES[name]
    w = np.random.default_rng(0).standard_normal((K, N), np.float32)
    q, x = quantized(jnp.asarray(w, jnp.bfloat16), spec.weight), jax.ShapeDtypeStruct((m, K), jnp.bfloat16)
    text, temporaries = compiled(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec), x, q)
    check(text, temporaries, K, N, 4 * m * (4 * K + 3 * N))
    if spec.act is None:
        (kind,) = set(re.findall(r"\(param_0[\w.]*: (\w+)\[[\d,]*\], param_1[\w.]*: \1\[[\d,]*\]\) -> f32", text))
        assert kind == "bf16"


@pytest.mark.parametrize("name", slow_but([*SCHEMES], "w4a16 two-level"))
@pytest.mark.parametrize("k, n", [(640, 37), (768, 1000)])
def test_odd_sizes(name, k, n):
    """Blocks of rows that do not divide the weight; and a weight that is one block."""
    spec = SCHEMES[name]
    q, x = weight(spec, k, n), jax.ShapeDtypeStruct((3, k), jnp.float32)
    text, temporaries = compiled(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec), x, q)
    check(text, temporaries, k, n, 4 * 3 * (4 * k + 3 * n) + (1 << 19))


@pytest.mark.parametrize("name", slow_but([*SCHEMES], "w4a16 in groups"))
def test_stacks(name):
    """A batch of weights, and layers of a scan: the slice of a layer is a copy of its codes.

    (Not of fp8: to cut them, XLA's CPU backend turns the codes of all layers into float16 first.)
    """
    spec, e, m = SCHEMES[name], 6, 4
    q = jax.vmap(lambda w: quantized(w, spec.weight))(jnp.ones((e, K, 256), jnp.float32))
    x = jax.ShapeDtypeStruct((e, m, K), jnp.float32)
    numbers = (((2,), (1,)), ((0,), (0,)))
    text, temporaries = compiled(lambda x, q: ops.dot_general(x, q, numbers, spec=spec), x, q)
    check(text, temporaries, K, 256, 4 * e * m * (4 * K + 3 * 256), e)

    if present(spec.weight).qtype in ("float8_e4m3fn", "mxfp8"):
        return

    def layers(x, q):
        return lax.scan(lambda x, q: (jnp.tile(ops.dot_general(x, q, MATMUL, spec=spec), (1, K // 256)), None), x, q)[0]

    text, temporaries = compiled(layers, jax.ShapeDtypeStruct((m, K), jnp.float32), q)
    layer = q.nbytes // e
    check(text, temporaries, K, 256, 4 * m * (6 * K + 3 * 256) + layer + (1 << 18), e)


@pytest.mark.parametrize("m, n", [(1, 64), (64, 1), (7, 3), (3, 7)])
def test_odd_shapes(m, n):
    """One row and one column are padded to two."""
    for spec in (recipes.w8a8(), recipes.w8a16()):
        x, q = jax.ShapeDtypeStruct((m, K), jnp.float32), weight(spec, K, n)
        assert FAST in compiled(lambda x, q, spec=spec: ops.dot_general(x, q, MATMUL, spec=spec), x, q)[0]


def test_weights_that_are_trained():
    """The forward of quantization-aware training is the int8 dot too."""
    x, w = jax.ShapeDtypeStruct((32, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)
    text, _ = compiled(lambda x, w: ops.dot_general(x, w, MATMUL, spec=recipes.w8a8()), x, w)
    assert FAST in text
    assert "s32[" in text
    assert not float_dots(text, (K, N))


def test_vectors_and_batches():
    spec = recipes.w8a8()
    x = jax.ShapeDtypeStruct((K,), jnp.float32)
    text, _ = compiled(lambda x, q: ops.dot_general(x, q, (((0,), (0,)), ((), ())), spec=spec), x, weight(spec))
    assert FAST in text
    q = quantized(jnp.ones((4, K, 64)), spec.weight)
    x = jax.ShapeDtypeStruct((4, 3, K), jnp.float32)
    numbers = (((2,), (1,)), ((0,), (0,)))
    assert FAST in compiled(lambda x, q: ops.dot_general(x, q, numbers, spec=spec), x, q)[0]


def test_uint8_is_shifted():
    """u8 operands fall off the path; shifted to s8 they stay on it."""
    spec = OpSpec(spec_of("uint8", symmetric=False), spec_of("uint8", symmetric=False))
    x = jax.ShapeDtypeStruct((32, K), jnp.float32)
    text, _ = compiled(lambda x, q: ops.dot_general(x, q, MATMUL, spec=spec), x, weight(spec))
    assert FAST in text
    assert not float_dots(text, (K, N))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NWC"])
@pytest.mark.parametrize("stored", ["contraction-minor", "as the float kernel"])
def test_convolutions(layout, stored):
    """Images and kernels in any order of axes, rank 1 included, and kernels in either storage."""
    spatial = layout.replace("N", "").replace("C", "")
    kernel = "OI" + spatial if layout == "NCHW" else spatial + "IO"
    shapes = {"N": 2, "C": 64, "H": 16, "W": 16}
    x = jax.ShapeDtypeStruct([shapes[c] for c in layout], jnp.float32)
    w = jnp.ones([{"O": 32, "I": 64}.get(c, 3) for c in kernel])
    for spec in (recipes.w8a8(), recipes.w8a16()):
        q = quantized(w, spec.weight, [i for i, c in enumerate(kernel) if c != "O"])
        q = q if stored == "contraction-minor" else q.store(())

        def f(x, q, spec=spec):
            numbers, strides = (layout, kernel, layout), (1,) * len(spatial)
            return ops.conv_general_dilated(x, q, strides, "SAME", dimension_numbers=numbers, spec=spec)

        text, _ = compiled(f, x, q)
        assert FAST in text
        assert not re.search(r"= f32\[[\d,]*\]\S* convolution\(", text)


def test_dilated_images():
    x = jax.ShapeDtypeStruct((2, 16, 16, 64), jnp.float32)
    q = quantized(jnp.ones((3, 3, 64, 32)), spec_of("int8"), (0, 1, 2))

    def f(x, q):
        numbers, pads = ("NHWC", "HWIO", "NHWC"), ((2, 2), (2, 2))
        return ops.conv_general_dilated(x, q, (1, 1), pads, (2, 2), dimension_numbers=numbers, spec=recipes.w8a8())

    assert FAST in compiled(f, x, q)[0]


def test_float_dots_are_found():
    """The check itself: a dequantized product has what the tests above exclude."""
    spec = recipes.w8a8()
    x = jax.ShapeDtypeStruct((32, K), jnp.float32)
    text, _ = compiled(lambda x, q: x @ q.dequantize(), x, weight(spec))
    assert re.search(rf"f32\[(1,)?({K},{N}|{N},{K})\]", text)

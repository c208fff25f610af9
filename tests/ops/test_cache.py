"""Products with quantized keys and values: a scale per token is in the result, or goes into the activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from narrowed import present
from ops_reference import INTEGER, WEIGHT_ONLY, dot_error, error, kernel_of, quantized, real, slow_but, spec_of

from jaxquant import QTensor, ops
from jaxquant.ops.kernels.cpu.machine import FAST, int8_dots

HEADS, WIDTH = 3, 16
LAYOUTS = {"[tokens, width]": (1, 2), "[width, tokens]": (2, 1)}  # the axes of tokens and of the width
SPECS = {
    "int8": spec_of("int8"),
    "asymmetric": spec_of("uint8", symmetric=False),
    "int4": spec_of("int4"),
    "in groups": spec_of("int8", "per_group"),
    "nf4": spec_of("nf4"),
}
PRECISIONS = {None: WEIGHT_ONLY, lax.Precision.HIGHEST: INTEGER}
CASES = [(name, layout, 17) for name in SPECS for layout in LAYOUTS] + [("int8", layout, 512) for layout in LAYOUTS]


def arrays(tokens, width=WIDTH, heads=HEADS, queries=1):
    """Queries, what a softmax gives, and keys or values [heads, tokens, width]: no two tokens or channels are alike."""
    rng = np.random.default_rng(0)
    q, p, kv = (rng.standard_normal((heads, *s)) for s in ((queries, width), (queries, tokens), (tokens, width)))
    kv = kv * np.exp(rng.normal(0, 0.5, (heads, tokens, 1))) * np.exp(rng.normal(0, 0.5, (heads, 1, width)))
    p = np.exp(p) / np.exp(p).sum(axis=2, keepdims=True)
    return q.astype(np.float32), p.astype(np.float32), kv.astype(np.float32)


def cache(kv, spec, layout):
    """One scale per token, or per group of its channels; the codes lie as in the float array."""
    width = LAYOUTS[layout][1]
    return quantized(kv if width == 2 else jnp.swapaxes(kv, 1, 2), spec, (width,)).store(())


def numbers(axis):
    return ((2,), (axis,)), ((0,), (0,))


@pytest.mark.parametrize("case", slow_but(CASES, ("int8", "[tokens, width]", 17)), ids=str)
def test_products(case):
    """Scores and outputs are those of the values that the codes stand for."""
    name, layout, tokens = case
    q, p, kv = arrays(tokens)
    of_tokens, of_width = map(numbers, LAYOUTS[layout])

    @jax.jit
    def products(q, p, kv):
        kept = cache(kv, SPECS[name], layout)
        how = [(x, n, precision) for x, n in ((p, of_tokens), (q, of_width)) for precision in PRECISIONS]
        return kept, [ops.dot_general(x, kept, n, precision) for x, n, precision in how]

    kept, found = products(q, p, kv)
    for (x, n), pair in zip(((p, of_tokens), (q, of_width)), (found[:2], found[2:]), strict=True):
        for got, bound in zip(pair, PRECISIONS.values(), strict=True):
            assert dot_error(got, real(x), real(kept), n) <= bound


@pytest.mark.skipif(int8_dots() == "none", reason="another machine")
def test_the_formulation():
    """A scale, and an integer zero point, that is the same for all rows and changes along what is contracted."""

    _, p, kv = arrays(16, queries=2)

    def chosen(name, contract=1, change=lambda q: {}, layout="[tokens, width]"):
        def run(x, kv):
            q = cache(kv, SPECS[name], layout)
            found.append(kernel_of(x, q.replace(**change(q)), numbers(contract)))

        found = []
        jax.eval_shape(run, p, kv)
        return found[0]

    assert chosen("int8") == chosen("asymmetric") == "ScaledResidualSplit"
    assert (
        chosen("int8", 2, layout="[width, tokens]")
        == chosen("asymmetric", 2, layout="[width, tokens]")
        == "ScaledResidualSplit"
    )
    assert chosen("int8", change=lambda q: {"scale": q.scale[:, ::8]}) == "ScaledResidualSplit"  # of eight tokens
    assert chosen("int8", 2) == "ResidualSplit"
    assert chosen("int8", change=lambda q: {"zero_point": q.scale}) == "Blocked"  # no integers
    assert chosen("int8", change=lambda q: {"offset": q.scale}) == "Blocked"
    assert chosen("nf4") == chosen("in groups") == "Blocked"


def test_transformations():
    """Under jit and vmap, and the gradients of the float product."""
    _, p, kv = arrays(8)

    def f(p, values):
        return ops.einsum("hqk,hkd->hqd", p, values)

    def each(p, values):
        return ops.einsum("qk,kd->qd", p, values)

    def slopes(f, p, values):
        g = jnp.cos(jnp.arange(WIDTH, dtype=jnp.float32))[None, None]
        return jax.grad(lambda p, s: jnp.sum(f(p, values.replace(scale=s)) * g), (0, 1))(p, values.scale)

    @jax.jit
    def run(p, kv):
        values = cache(kv, SPECS["int8"], "[tokens, width]")
        in_float = lambda p, values: jnp.matmul(p, values.dequantize())  # noqa: E731
        return f(p, values), jax.vmap(each)(p, values), slopes(f, p, values), slopes(in_float, p, values)

    got, mapped, *gradients = run(p, kv)
    np.testing.assert_array_equal(got, mapped)
    for a, b in zip(*gradients, strict=True):
        assert error(a, b) <= INTEGER


def test_long_sums():
    """Sums that could overflow are cut, and so are zero points that there is one of per token.

    Where XLA serves no int8 dots the sum is one of float32.
    """
    k = 70_000
    codes = jnp.full((1, k, 1), 255, jnp.uint8)
    zero = jax.device_put(np.asarray(np.random.default_rng(0).integers(0, 2, (1, k, 1)), jnp.uint8))
    w = QTensor(codes, jnp.ones((1, k, 1)), zero, qtype="uint8", dtype=jnp.float32)
    got = ops.einsum("hqk,hkd->hqd", jnp.ones((1, 1, k)), w)
    bound = WEIGHT_ONLY if int8_dots() == "none" else INTEGER
    np.testing.assert_allclose(got.item(), 255 * k - int(np.asarray(zero, np.int64).sum()), rtol=bound)


@pytest.mark.skipif(jax.default_backend() != "cpu" or int8_dots() == "none", reason="what another machine compiles")
@pytest.mark.parametrize("layout", slow_but(LAYOUTS, "[tokens, width]"))
def test_compiled(layout):
    """Attention over a cache is int8 dots of the codes as they lie: no copy of them, in float or turned."""
    tokens, width = LAYOUTS[layout]
    q, p, kv = arrays(512, 64, 8)
    kept = jax.eval_shape(lambda kv: cache(kv, SPECS["int8"], layout), kv)

    def attend(q, p, keys, values):
        return ops.dot_general(q, keys, numbers(width)), ops.dot_general(p, values, numbers(tokens))

    program = jax.jit(attend).lower(q, p, kept, kept).compile()
    text = present(program.as_text())
    assert text.count(FAST) >= 2
    assert "f32[8,512,64]" not in text
    assert "f32[8,64,512]" not in text
    assert present(program.memory_analysis()).temp_size_in_bytes < kept.codes.size / 2

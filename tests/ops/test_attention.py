"""Attention over a cache: the softmax of its definition, in every form, and the kernel of TPUs in the interpreter."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax_settings import needs_jit, promotes

import jaxquant as jq
from jaxquant import ops
from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.ops.attention import Scores
from jaxquant.ops.kernels.tpu import attention as tpu

B, H, G, T, S, D = 2, 6, 2, 3, 20, 16
INT8 = jq.QuantSpec("int8")


def normal(key: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(key).normal(size=shape), dtype)


def operands(dtype: Any = jnp.float32, b: int = B, h: int = H, g: int = G, t: int = T, s: int = S, d: int = D) -> Any:
    q, k, v = normal(0, b, h, t, d, dtype=dtype), normal(1, b, g, s, d, dtype=dtype), normal(2, b, g, d, s, dtype=dtype)
    return q, k, v, jnp.asarray(np.random.default_rng(3).random((b, s)) > 0.2)


def coded(k: jax.Array, v: jax.Array, qtype: str, *, each: bool = True) -> tuple[QTensor, QTensor]:
    """Keys and values in codes, with a scale for each head and place, or with one for all."""
    spec = jq.QuantSpec(qtype, granularity=jq.PerChannel() if each else jq.PerTensor())
    every = tuple(range(-k.ndim, 0))
    return (
        jq.quantize(k, spec, reduce_axes=(-1,) if each else every),
        jq.quantize(v, spec, reduce_axes=(-2,) if each else every),
    )


def by_definition(
    q: Any, k: Any, v: Any, valid: Any, start: int, cap: float | None = None, window: int | None = None
) -> np.ndarray:
    """In float64, a place at a time."""
    q, k, v = (np.asarray(x.dequantize() if isinstance(x, QTensor) else x, np.float64) for x in (q, k, v))
    valid, out = np.asarray(valid), np.zeros((*q.shape[:3], v.shape[2]))
    for b, h, t in np.ndindex(q.shape[:3]):
        own, g = start + t, h // (q.shape[1] // k.shape[1])
        seen = [s for s in range(own + 1) if s == own or valid[b, s]]
        seen = [s for s in seen if window is None or s > own - window]
        scores = k[b, g][seen] @ q[b, h, t] / q.shape[3] ** 0.5
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        shares = np.exp(scores - scores.max())
        out[b, h, t] = v[b, g][:, seen] @ shares / shares.sum()
    return out


CASES = {
    "the first": {"start": 0},
    "later": {"start": 9},
    "the last": {"start": S - T},
    "window": {"start": 9, "window": 4},
    "cap": {"start": 9, "cap": 1.5},
}


@pytest.mark.parametrize("form", ["float", "int8", "float8_e4m3fn", "int8 for all"])
@pytest.mark.parametrize("case", CASES)
def test_the_softmax_of_its_definition(case, form):
    q, k, v, valid = operands()
    if form != "float":
        k, v = coded(k, v, form.split()[0], each=form != "int8 for all")
    found = jax.jit(functools.partial(ops.cached_attention, **CASES[case]))(q, k, v, valid)
    # A product of floats and codes is within 1e-4 of the float product, and there are two.
    np.testing.assert_allclose(found, by_definition(q, k, v, valid, **CASES[case]), rtol=0, atol=3e-4)


@pytest.mark.parametrize("asymmetric", ["keys", "values"])
def test_zero_points(asymmetric):
    q, k, v, valid = operands()
    spec = jq.QuantSpec("uint8", symmetric=False)
    if asymmetric == "keys":
        k = jq.quantize(k, spec, reduce_axes=(-1,))
    else:
        v = jq.quantize(v, spec, reduce_axes=(-2,))
    found = ops.cached_attention(q, k, v, valid, 9)
    np.testing.assert_allclose(found, by_definition(q, k, v, valid, 9), rtol=0, atol=3e-4)


@pytest.mark.parametrize("shared", ["features of several places", "several places of a feature"])
def test_scales_that_places_share(shared):
    q, k, v, valid = operands()
    spec = jq.QuantSpec("int8", granularity=jq.PerGroup(4))
    k, v = (jq.quantize(x, spec, reduce_axes=(axis,)) for x, axis in ((k, -2), (v, -1)))
    if shared == "features of several places":
        k, v = (x.replace(scale=jnp.max(jnp.asarray(x.scale), axis, keepdims=True)) for x, axis in ((k, -1), (v, -2)))
    found = ops.cached_attention(q, k, v, valid, 9)
    np.testing.assert_allclose(found, by_definition(q, k, v, valid, 9), rtol=0, atol=3e-4)


@pytest.mark.parametrize("form", ["float", "int8"])
def test_transformations(form):
    """A layer of a stack, `vmap`, `scan` over tokens, and the gradient of the two products."""
    q, k, v, valid = operands()
    keys, values = coded(k, v, "int8") if form == "int8" else (k, v)
    run = functools.partial(ops.cached_attention, valid=valid)
    wanted = run(q, keys, values, start=9)
    stacks = jax.tree.map(lambda x: jnp.stack([x, jnp.zeros_like(x)]), (keys, values))
    np.testing.assert_allclose(run(q, *stacks, start=9, layer=0), wanted, rtol=1e-5, atol=1e-6)
    mapped: Any = jax.vmap(lambda q, k, v, start: run(q, k, v, start=start))
    found = mapped(jnp.stack([q, q]), *jax.tree.map(lambda x: jnp.stack([x, x]), (keys, values)), jnp.array([9, 2]))
    np.testing.assert_allclose(found[0], wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], run(q, keys, values, start=2), rtol=1e-5, atol=1e-6)

    def one(at: Any, x: Any) -> Any:
        return at + 1, run(x[:, :, None], keys, values, start=at)[:, :, 0]

    each = jax.lax.scan(one, 9, jnp.moveaxis(q, 2, 0))[1]
    np.testing.assert_allclose(jnp.moveaxis(each, 0, 2), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_gradients_are_those_of_finite_differences(argument):
    q, k, v, valid = operands(b=1, s=5, t=2, d=4)
    given, toward = {"q": q, "k": k, "v": v}, normal(5, *{"q": q, "k": k, "v": v}[argument].shape)

    def along(step: Any) -> jax.Array:
        moved = given | {argument: given[argument] + step * toward}
        return jnp.sum(jnp.sin(ops.cached_attention(**moved, valid=valid, start=2, cap=2.0, window=3)))

    found = jax.jit(jax.grad(along))(0.0)
    np.testing.assert_allclose(jax.jvp(along, (0.0,), (1.0,))[1], found, rtol=1e-4)
    np.testing.assert_allclose((along(1e-2) - along(-1e-2)) / 2e-2, found, rtol=2e-3, atol=2e-3)


def test_gradients_of_scales():
    q, k, v, valid = operands()
    keys, values = coded(k, v, "int8")

    def loss(scales: Any) -> jax.Array:
        return jnp.sum(
            ops.cached_attention(q, keys.replace(scale=scales[0]), values.replace(scale=scales[1]), valid, 9)
        )

    found = jax.grad(loss)((keys.scale, values.scale))
    # The result is linear in the scales of values: their gradient times themselves is the result.
    np.testing.assert_allclose(jnp.sum(found[1] * values.scale), loss((keys.scale, values.scale)), rtol=1e-4)
    assert jnp.any(found[0] != 0)
    assert jnp.all(found[0][:, :, 9 + T :] == 0)  # of places that no token sees


def test_scales_that_heads_share():
    q, *_, valid = operands(h=8, g=4)
    k, v = coded(normal(1, B, 4, S, D), normal(2, B, 4, D, S), "int8")
    k, v = (x.replace(scale=jnp.asarray(x.scale)[:, ::2]) for x in (k, v))
    assert not tpu.takes(q.astype(jnp.bfloat16).reshape(B, 4, 2, T, D), k, v)
    found = ops.cached_attention(q, k, v, valid, 9)
    np.testing.assert_allclose(found, by_definition(q, k, v, valid, 9), rtol=0, atol=3e-4)


def test_a_long_cache_in_float16():
    """Each weight is 2**-15 here. Times the scale of a place it would be 1.6 of float16's smallest numbers."""
    places = 1 << 15
    q, valid = jnp.zeros((1, 1, 1, 4), jnp.float16), jnp.ones((1, places), bool)
    k, v = coded(jnp.ones((1, 1, places, 4), jnp.float16), jnp.full((1, 1, 4, places), 0.37, jnp.float16), "int8")
    np.testing.assert_allclose(ops.cached_attention(q, k, v, valid, places - 1), 0.37, rtol=2e-3)


@needs_jit
@pytest.mark.parametrize("sizes", ["s", "b, s, t"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_symbolic_sizes(sizes, dtype):
    symbols = dict(zip(sizes.split(", "), export.symbolic_shape(sizes), strict=True))
    b, s, t = (symbols.get(name, size) for name, size in (("b", B), ("s", S), ("t", T)))
    shapes = (b, H, t, D), (b, G, s, D), (b, G, D, s)
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    args += [jax.ShapeDtypeStruct((b, s), jnp.bool_), jax.ShapeDtypeStruct((), jnp.int32)]
    exported = export.export(jax.jit(ops.cached_attention), platforms=["cpu", "cuda", "tpu"])(*args)
    q, k, v, valid = operands(dtype)
    wanted = ops.cached_attention(q, k, v, valid, 9).astype(jnp.float32)
    found = exported.call(q, k, v, valid, jnp.int32(9)).astype(jnp.float32)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 if dtype == jnp.float32 else 2**-6)


BAD = {
    "heads": ({"q": jnp.ones((2, 5, 3, 16))}, "the operands do not fit each other"),
    "places": ({"valid": jnp.ones((2, 19), bool)}, "the operands do not fit each other"),
    "more tokens than places": ({"q": jnp.ones((2, 6, 21, 16))}, "the operands do not fit each other"),
    "values as keys": ({"v": jnp.ones((2, 2, 20, 16))}, "the operands do not fit each other"),
    "a mask of integers": ({"valid": jnp.ones((2, 20), int)}, "the operands do not fit each other"),
    "a float start": ({"start": 1.0}, "the operands do not fit each other"),
    "no stack": ({"layer": 0}, "the operands do not fit each other"),
    "a window of nothing": ({"window": 0}, "cap and window must be positive"),
    "a negative cap": ({"cap": -1.0}, "cap and window must be positive"),
    "integer queries": ({"q": jnp.ones((2, 6, 3, 16), int)}, "q must be floats"),
}


@pytest.mark.every
@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    changed, message = BAD[case]
    q, k, v, valid = operands()
    given = {"q": q, "k": k, "v": v, "valid": valid, "start": 0} | changed
    with pytest.raises(QuantError, match=f"^cached_attention: {message}"):
        ops.cached_attention(**given)


# -- the kernel of TPUs ------------------------------------------------------------------------------------------------

KERNEL = {  # sequences, heads, heads of the cache, tokens, places, features; then how
    "one token": ((2, 8, 2, 1, 300, 128), {"start": 250}),
    "the first token": ((1, 8, 8, 1, 300, 128), {"start": 0}),
    "the last token of narrow heads": ((2, 4, 1, 1, 300, 64), {"start": 299}),
    "a few tokens in a window": ((1, 8, 8, 5, 700, 128), {"start": 256, "window": 100}),
    "odd sizes": ((1, 21, 3, 40, 700, 80), {"start": 300, "cap": 5.0}),
    "tiles of tokens": ((1, 8, 2, 200, 1037, 128), {"start": 800, "window": 300, "cap": 5.0}),
    "a whole prompt": ((1, 2, 2, 300, 300, 64), {"start": 0}),
}


def interpreted(q: Any, k: Any, v: Any, valid: Any, start: int, layer: Any = None, **how: Any) -> np.ndarray:
    (b, _, t, d), g = q.shape, k.shape[-3]
    grouped = q.reshape(b, g, -1, t, d)
    assert tpu.takes(grouped, k, v)
    scores = Scores(d**-0.5, **how)
    out = tpu.run(grouped, k, v, valid, jnp.int32(start), layer, scores=scores, interpret=True)
    return np.asarray(out.reshape(q.shape), np.float32)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int8 for all"])
@pytest.mark.parametrize("case", KERNEL)
def test_kernel(case, form):
    """Products of exact bfloat16 with float32 sums: weights and results are rounded to bfloat16, and nothing else."""
    sizes, how = KERNEL[case]
    q, k, v, valid = operands(jnp.bfloat16, *sizes)
    if form != "bfloat16":
        k, v = coded(k, v, form.split()[0], each=form != "int8 for all")
    found = interpreted(q, k, v, valid, **how)
    values = np.abs(np.asarray(v.dequantize() if isinstance(v, QTensor) else v, np.float32)).max()
    np.testing.assert_allclose(found, by_definition(q, k, v, valid, **how), rtol=0, atol=2**-8 * values)


@pytest.mark.parametrize("stored", ["codes as quantize stores them", "places last"])
@pytest.mark.parametrize("each", [True, False])
def test_kernel_reads_a_layer_of_a_stack(stored, each):
    q, *_, valid = operands(jnp.bfloat16, 2, 4, 2, 1, 140, 64)
    layers = [coded(normal(i, 2, 2, 140, 64), normal(9 + i, 2, 2, 64, 140), "int8", each=each) for i in range(3)]
    layers = [tuple(x.store(()) if stored == "places last" else x for x in layer) for layer in layers]
    k, v = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    assert k.dtype == jnp.float32
    for i, layer in enumerate(layers):
        found = interpreted(q, k, v, valid, 100, jnp.int32(i))
        np.testing.assert_array_equal(found, interpreted(q, layer[0], layer[1], valid, 100))


@pytest.mark.parametrize("layer", [jnp.int8(99), jnp.uint8(99), jnp.int32(-1), jnp.int32(1000)], ids=str)
def test_kernel_finds_a_layer_as_an_index_does(layer):
    """Of 100 layers of two sequences the last begins at 198, which int8 does not hold."""
    q, k, v, valid = operands(jnp.bfloat16, 2, 2, 1, 1, 40, 64)
    keys, values = (jnp.zeros((100, *x.shape), x.dtype).at[99].set(x) for x in (k, v))
    np.testing.assert_array_equal(interpreted(q, keys, values, valid, 30, layer), interpreted(q, k, v, valid, 30))


def of_several_places(v: jax.Array) -> QTensor:
    """Values in int8 with one scale for the features of four places."""
    q = jq.quantize(v, jq.QuantSpec("int8", granularity=jq.PerGroup(4)), reduce_axes=(-1,))
    return q.replace(scale=jnp.asarray(q.scale)[:, :, :1])


NOT_TAKEN = {
    "float32 queries": lambda q, k, v: (q.astype(jnp.float32), k, v),
    "float32 keys": lambda q, k, v: (q, k.astype(jnp.float32), v),
    "zero points": lambda q, k, v: (
        q,
        jq.quantize(k, jq.QuantSpec("uint8", symmetric=False), reduce_axes=(-1,)),
        v,
    ),
    "scales of features": lambda q, k, v: (q, jq.quantize(k, INT8, reduce_axes=(-2,)), v),
    "scales of several places": lambda q, k, v: (q, k, of_several_places(v)),
    "four bits": lambda q, k, v: (q, jq.quantize(k, jq.QuantSpec("int4"), reduce_axes=(-1,)), v),
    "groups of features": lambda q, k, v: (
        q,
        jq.quantize(k, jq.QuantSpec("int8", granularity=jq.PerGroup(8)), reduce_axes=(-1,)),
        v,
    ),
}


@needs_jit
@promotes
@pytest.mark.parametrize("case", [None, *NOT_TAKEN])
def test_what_is_lowered_for_a_tpu(case):
    """The kernel, or the products where it does not take the operands; the products alone for others."""
    q, k, v, valid = operands(jnp.bfloat16)
    q, k, v = (q, *coded(k, v, "int8")) if case is None else NOT_TAKEN[case](q, k, v)
    traced: Any = jax.jit(ops.cached_attention)
    traced = traced.trace(q, k, v, valid, 9)
    for platform in ("cpu", "cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == (platform == "tpu" and case is None)
        assert ("dot_general" in text) == (platform != "tpu" or case is not None)

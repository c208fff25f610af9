"""Views of a QTensor: transposed, reshaped, sliced, moved and cast as the float array is, value for value."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core.cases import unequal
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant import QuantSpec
from jaxquant.core import views
from jaxquant.core.layout import stored_order

SPECS = {
    "channel": QuantSpec("int8"),
    "tensor": QuantSpec("uint4", symmetric=False, granularity="per_tensor"),
    "group 2": QuantSpec("int4", granularity="per_group", group_size=2),
    "group 6": QuantSpec("uint3", symmetric=False, granularity="per_group", group_size=6),
    "group 12": QuantSpec("nf4", granularity="per_group", group_size=12),
}
SHAPES = (
    (2, 12, 6),
    (12, 12),
    (144,),
    (2, 6, 12),
    (4, 3, 12),
    (2, 2, 3, 12),
    (1, 144),
    (12, 1, 12),
    (6, 24),
    (24, 6),
    (2, 72),
)
AXES = {
    name: ((-1,), (-2,), (-2, -1)) if name in ("channel", "tensor", "group 2") else ((-1,), (-2, -1)) for name in SPECS
}


@functools.cache
def quantized(name, shape, axes):
    rng = np.random.default_rng(sum(shape))
    x = (rng.standard_normal(shape) * unequal(rng, shape)).astype(np.float32)
    return jq.quantize(x, SPECS[name], reduce_axes=axes)


@st.composite
def cases(draw):
    """The arguments of `quantized`, which compiles: that is no time of drawing."""
    name = draw(st.sampled_from(sorted(SPECS)))
    shape = draw(st.sampled_from([s for s in SHAPES if len(s) > 1]))
    axes = draw(st.sampled_from(AXES[name]))
    size = SPECS[name].group_size
    if size and not _divides(shape, axes, size):
        axes = (-1,) if shape[-1] % size == 0 else (-2, -1)
    return (name if not size or _divides(shape, axes, size) else "channel"), shape, axes


def _divides(shape, axes, size):
    for axis in reversed(axes):
        if size <= shape[axis]:
            return shape[axis] % size == 0
        if size % shape[axis]:
            return False
        size //= shape[axis]
    return size == 1


# Compiled as one: there are many views, and each is taken once.
values = jax.jit(jq.dequantize)


@functools.partial(jax.jit, static_argnums=1)
def reshape(q, shape):
    view = views.reshape(q, shape)
    return view, jq.dequantize(view)


def same_values(view, expected, found=None):
    """``found``: the view's values, where a program has given them already."""
    assert view.shape == expected.shape
    np.testing.assert_array_equal(values(view) if found is None else found, expected)
    assert view.scale.ndim == len(view.shape)
    repr(view)


@given(cases(), st.sampled_from(SHAPES))
@settings(max_examples=12)
def test_reshape(case, shape):
    q = quantized(*case)
    view, found = reshape(q, shape)
    same_values(view, np.asarray(values(q)).reshape(shape), found)


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=10)
def test_transpose(case, random):
    q = quantized(*case)
    permutation = list(range(q.ndim))
    random.shuffle(permutation)
    view = views.transpose(q, tuple(permutation))
    same_values(view, np.asarray(values(q)).transpose(permutation))
    assert view.codes is q.codes  # nothing is moved
    back = views.transpose(view, tuple(int(i) for i in np.argsort(permutation)))
    same_values(back, np.asarray(values(q)))
    assert back.stored_order == q.stored_order
    assert views.transpose(view, tuple(range(q.ndim))).minor == view.minor
    others = [minor for n in range(len(view.minor)) for minor in itertools.permutations(range(-q.ndim, 0), n)]
    assert all(stored_order(q.ndim, minor) != view.stored_order for minor in others)  # kernels compare the shortest


@given(cases(), st.data())
@settings(max_examples=10)
def test_slice(case, data):
    q = quantized(*case)
    axis = data.draw(st.integers(0, q.ndim - 1))
    start = data.draw(st.integers(0, q.shape[axis] - 1))
    size = data.draw(st.integers(1, q.shape[axis] - start))
    expected = np.take(np.asarray(values(q)), range(start, start + size), axis)

    @jax.jit
    def slices(q, at):
        found = [views.slice_along(q, axis, i, size) for i in (start, at)]
        return [(view, jq.dequantize(view)) for view in found]

    for view, found in slices(q, np.int32(start)):
        same_values(view, expected, found)


@given(cases(), st.data())
@settings(max_examples=10)
def test_move(case, data):
    q = quantized(*case)
    axes = data.draw(st.sets(st.integers(0, q.ndim - 1), min_size=1))
    axes = tuple(sorted(a - q.ndim for a in axes) if data.draw(st.booleans()) else sorted(axes))

    @jax.jit
    def moved(q):
        view = views.move(q, lambda a: jnp.flip(a, axes), axes)
        return view, jq.dequantize(view)

    view, found = moved(q)
    same_values(view, np.flip(np.asarray(values(q)), axes), found)


@pytest.mark.parametrize("name", SPECS)
def test_cast(name):
    q = quantized(name, (12, 12), (-1,))
    view = views.cast(q, "bfloat16")
    np.testing.assert_array_equal(view.dequantize(), q.dequantize("bfloat16"))
    assert view.dtype == jnp.bfloat16
    assert view.codes is q.codes


def test_scales_stay_as_few_as_they_can():
    """Blocks are kept where the new axes end on their boundaries."""
    q = quantized("group 12", (6, 24), (-1,))
    assert views.reshape(q, (6, 2, 12)).scale.shape == (6, 2, 1)
    assert views.reshape(q, (2, 3, 24)).scale.shape == (2, 3, 2)
    assert views.reshape(q, (144,)).scale.shape == (12,)
    assert views.reshape(q, (6, 24)) is q
    assert views.slice_along(q, 1, 12, 12).scale.shape == (6, 1)
    assert views.slice_along(q, 1, 0, 24) is q
    assert views.reshape(quantized("channel", (6, 24), (-1,)), (6, 4, 6)).scale.shape == (6, 1, 1)


def test_under_jit_and_with_quantized_scales():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 32)) * unequal(rng, (4, 32))).astype(np.float32)
    q = jq.quantize(x, QuantSpec("nvfp4"), reduce_axes=(-1,))
    y = np.asarray(q.dequantize())
    np.testing.assert_array_equal(jax.jit(lambda a: views.transpose(a, (1, 0)).dequantize())(q), y.T)
    np.testing.assert_array_equal(jax.jit(lambda a: views.reshape(a, (2, 2, 32)).dequantize())(q), y.reshape(2, 2, 32))
    np.testing.assert_array_equal(jax.jit(lambda a, i: views.slice_along(a, 1, i, 16).dequantize())(q, 16), y[:, 16:])

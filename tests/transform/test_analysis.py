"""Axes in pieces, and the walk that the analyses share."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxquant as jq
from jaxquant import recipes
from jaxquant.transform.analysis.axes import aligned, factored, size_of
from jaxquant.transform.analysis.equations import Piece

SHAPES = st.permutations([2, 2, 3, 4, 1]).flatmap(
    lambda factors: st.lists(st.sampled_from(range(1, 5)), max_size=3).map(
        lambda cuts: tuple(int(np.prod(part)) for part in np.split(factors, sorted(cuts)))
    )
)


def cut(piece, outer):
    inner = piece.size // outer
    return piece._replace(size=outer, stride=piece.stride * inner), piece._replace(size=inner)


def merged(a, b):
    return Piece(a.size * b.size)


def indices(dim):
    """Of each entry of an axis: the unknown's entry that every piece stands for, summed by unknown."""
    out = {}
    digits = np.unravel_index(np.arange(size_of(dim)), [piece.size for piece in dim]) if dim else ()
    for piece, digit in zip(dim, digits, strict=True):
        out[piece.unknown] = out.get(piece.unknown, 0) + digit * piece.stride
    return out


@given(SHAPES, SHAPES)
def test_a_reshape_moves_pieces_as_numpy_moves_elements(old, new):
    dims = [(Piece(n, axis, 1),) for axis, n in enumerate(old)]
    found = factored(dims, new, cut, merged)
    assert [size_of(dim) for dim in found] == list(new)
    if any(piece.unknown is None for dim in found for piece in dim):
        return  # an axis ended inside of two pieces, and nothing is said of them
    was = np.unravel_index(np.arange(48).reshape(new), old)
    for axis in range(len(old)):
        total = np.zeros(new, int)
        for place, dim in enumerate(found):
            own = indices(dim).get(axis)
            if own is not None:
                total += np.reshape(own, [n if i == place else 1 for i, n in enumerate(new)])
        np.testing.assert_array_equal(total, was[axis])


@given(SHAPES, SHAPES)
def test_aligned_axes_have_equal_pieces_of_the_same_entries(a, b):
    left, right = ([Piece(n, name, 1) for n in sizes if n > 1] for name, sizes in (("a", a), ("b", b)))
    found = aligned(left, right, cut)
    if found is None:
        return
    assert all(x.size == y.size for x, y in found)
    for side, before in enumerate((left, right)):
        after = [pair[side] for pair in found]
        assert size_of(after) == size_of(before) == 48


def test_what_a_call_holds_is_looked_into():
    """A composite, a remat, a jit, a function with a derivative of its own."""
    params = {"a": np.ones((4, 6), np.float32), "b": np.ones((6, 3), np.float32)}
    unit = lax.composite(lambda y: y * 2, name="jaxquant.twice")
    plan = jq.make_plan(
        lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((2, 4)), rules=[jq.Rule("b", recipes.w8a16())]
    )
    for call in (unit, jax.checkpoint(lambda y: y * 2), jax.jit(lambda y: y * 2), jax.nn.relu):
        fn = lambda p, x, call=call: call(x @ p["a"]) @ p["b"]  # noqa: E731
        assert [str(pair) for pair in jq.invariances.scale_pairs(fn, plan, params, jnp.ones((2, 4)))] == [
            "a[-1]^-1 -> b[-2] (6 channels)"
        ]


def test_a_bias_that_a_scan_hands_out_is_used_elsewhere():
    """Unless it is the very stack that goes in: a module's parameters come out of its transforms."""
    params = {"w": np.ones((2, 6, 6), np.float32), "b": np.ones((2, 1, 6), np.float32)}

    def found(handed_out):
        def fn(p, x):
            step = lambda x, w: (x @ w["w"] + w["b"], handed_out(w["b"]))  # noqa: E731
            x, out = lax.scan(step, x, p)
            return x, jnp.sum(out) if handed_out(1) else None

        plan = jq.make_plan(fn, params, jnp.ones((3, 6)), rules=[jq.Rule("w", recipes.w8a16())])
        return jq.invariances.biases(fn, plan, params, jnp.ones((3, 6)))

    assert found(lambda b: None) == {"w": "b"}
    assert found(lambda b: b) == {}
    assert found(lambda b: b * 2) == {}

"""QTensors as only checkpoint readers make them: permuted, with offsets, with float zero points."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from narrowed import present

import jaxquant as jq
from jaxquant import ops
from jaxquant.core import views
from jaxquant.core.qtensor import QTensor, from_codes

RNG = np.random.default_rng(0)
N, K, GROUP = 6, 32, 8


def permuted(qtype="uint4", **fields):
    """A permuted QTensor [N, K], and the float array it stands for."""
    codes = RNG.integers(0, 16, (N, K)).astype(np.uint8)
    scale = (RNG.random((N, K // GROUP)) * 10.0 ** RNG.integers(-2, 2, (N, 1))).astype(np.float32)
    zero = RNG.integers(0, 16, scale.shape).astype(np.uint8)
    order = RNG.permutation(K)
    stored = (codes - np.repeat(zero, GROUP, 1).astype(np.float32)) * np.repeat(scale, GROUP, 1)
    real = np.empty_like(stored)
    real[:, order] = stored
    q = from_codes(
        jnp.asarray(codes),
        jnp.asarray(scale),
        jnp.asarray(zero),
        None,
        jnp.asarray(order[None].astype(np.int32)),
        qtype=qtype,
        dtype=jnp.float32,
        **fields,
    )
    return q, real


def test_permuted_values():
    q, real = permuted()
    np.testing.assert_array_equal(q.dequantize(), real)
    np.testing.assert_array_equal(q.unpermuted().dequantize(), real)
    np.testing.assert_array_equal(q.store((-2,)).dequantize(), real)
    np.testing.assert_array_equal(jax.jit(jq.dequantize)(q), real)
    assert "permuted" in repr(q)


@pytest.mark.parametrize(
    "view",
    [
        (lambda q: views.transpose(q, (1, 0)), lambda x: x.T),
        (lambda q: views.slice_along(q, 0, 2, 3), lambda x: x[2:5]),
        (lambda q: views.slice_along(q, 1, 8, 16), lambda x: x[:, 8:24]),
        (lambda q: views.slice_along(views.transpose(q, (1, 0)), 1, 1, 2), lambda x: x.T[:, 1:3]),
        (lambda q: views.reshape(q, (2, 3, 4, 8)), lambda x: x.reshape(2, 3, 4, 8)),
        (lambda q: views.move(q, lambda x: jnp.flip(x, 1), (1,)), lambda x: x[:, ::-1]),
        (lambda q: views.cast(q, jnp.bfloat16), lambda x: x.astype(ml_dtypes.bfloat16)),
    ],
    ids=["transpose", "rows", "columns", "rows of the transpose", "reshape", "flip", "cast"],
)
def test_views_of_permuted(view, request):
    q, real = permuted()
    np.testing.assert_array_equal(view[0](q).dequantize(), view[1](real))


@pytest.mark.parametrize("side", ["rhs", "transposed", "lhs", "rows"])
def test_products_with_permuted(side):
    q, real = permuted()
    x = jax.device_put(np.asarray(RNG.normal(size=(3, K)), jnp.float32))
    if side == "rhs":
        found, wanted = ops.dot_general(x, q, (((1,), (1,)), ((), ()))), x @ real.T
    elif side == "transposed":
        found, wanted = ops.einsum("bk,kn->bn", x, views.transpose(q, (1, 0))), x @ real.T
    elif side == "lhs":
        found, wanted = ops.einsum("nk,bk->nb", q, x), real @ x.T
    else:  # the permuted axis is not contracted
        y = jax.device_put(np.asarray(RNG.normal(size=(3, N)), jnp.float32))
        found, wanted = ops.einsum("bn,nk->bk", y, q), y @ real
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_permuted_under_transformations():
    pairs = [permuted() for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(q for q, _ in pairs))
    real = np.stack([r for _, r in pairs])
    np.testing.assert_array_equal(stacked.dequantize(), real)
    np.testing.assert_array_equal(jax.vmap(jq.dequantize)(stacked), real)
    np.testing.assert_array_equal(views.slice_along(stacked, 0, 1, 1).dequantize(), real[1:])
    np.testing.assert_array_equal(jax.lax.map(jq.dequantize, stacked), real)
    x = jax.device_put(np.asarray(RNG.normal(size=(2, 3, K)), jnp.float32))
    wanted = np.einsum("lbk,lnk->lbn", x, real)
    for found in (
        jax.vmap(lambda x, q: ops.einsum("bk,nk->bn", x, q))(x, stacked),
        ops.einsum("lbk,lnk->lbn", x, stacked),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_rows_of_a_permuted_table():
    q, real = permuted()
    np.testing.assert_array_equal(ops.take(q, jnp.array([4, 1]), axis=0), real[[4, 1]])
    np.testing.assert_array_equal(ops.take(q, jnp.array([7, 30]), axis=1), real[:, [7, 30]])


def test_offsets():
    codes = jax.device_put(np.asarray(RNG.integers(0, 16, (N, K)), jnp.uint8))
    scale, offset = (jax.device_put(np.asarray(RNG.normal(size=(N, K // GROUP)), jnp.float32)) for _ in range(2))
    q = from_codes(codes, scale, None, offset, qtype="uint4", dtype=jnp.float32)
    assert not q.symmetric
    wide = lambda v: np.repeat(np.asarray(v), GROUP, 1)  # noqa: E731
    real = np.asarray(codes, np.float32) * wide(scale) + wide(offset)
    np.testing.assert_array_equal(q.dequantize(), real)
    np.testing.assert_array_equal(views.slice_along(q, 1, 4, 8).dequantize(), real[:, 4:12])
    x = jax.device_put(np.asarray(RNG.normal(size=(3, K)), jnp.float32))
    np.testing.assert_allclose(ops.einsum("bk,nk->bn", x, q), x @ real.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(ops.take(q, jnp.array([4, 1]), axis=0), real[[4, 1]])


@pytest.mark.parametrize("jit", [False, True])
def test_narrow_zero_points_and_offsets_round_in_between(jit):
    """HQQ subtracts, and quanto scales, in the dtype of the weight."""
    bf16 = ml_dtypes.bfloat16
    codes = RNG.integers(0, 256, (64, 16)).astype(np.uint8)
    scale, shift = (RNG.normal(size=(64, 1)).astype(bf16) for _ in range(2))
    make = lambda z, o: from_codes(jnp.asarray(codes), jnp.asarray(scale), z, o, qtype="uint8", dtype=bf16)  # noqa: E731
    values = jax.jit(jq.dequantize) if jit else jq.dequantize
    f32 = np.float32
    hqq = ((codes.astype(f32) - shift.astype(f32)).astype(bf16).astype(f32) * scale.astype(f32)).astype(bf16)
    np.testing.assert_array_equal(values(make(jnp.asarray(shift), None)), hqq)
    quanto = ((codes.astype(f32) * scale.astype(f32)).astype(bf16).astype(f32) + shift.astype(f32)).astype(bf16)
    np.testing.assert_array_equal(values(make(None, jnp.asarray(shift))), quanto)


def test_saved_and_loaded(tmp_path):
    q, _ = permuted()
    offset = q.replace(offset=jnp.ones_like(q.scale))
    nested = QTensor(
        jnp.zeros((2, 2), jnp.uint8), jnp.ones((2, 1)), None, jnp.ones((2, 1)), qtype="dynamic8", dtype="float32"
    )
    tree = {
        "a": q,
        "b": offset,
        "c": from_codes(jnp.zeros((2, 8), jnp.uint8), nested, None, qtype="nf4", dtype="float32"),
    }
    path = tmp_path / "model.safetensors"
    jq.io.save(path, tree)
    back = jq.io.load(path)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_bad_fields_are_not_saved(tmp_path):
    q, _ = permuted()
    for bad in (
        q.replace(offset=jnp.ones((N, 1))),
        q.replace(permutation=present(q.permutation).T),
        q.replace(permutation=present(q.permutation).astype(jnp.float32)),
    ):
        with pytest.raises(jq.QuantError, match=r"offset must be|the permutation must|a permutation has"):
            jq.io.save(tmp_path / "x.safetensors", {"w": bad})
    assert not list(tmp_path.iterdir())

"""Double quantization: bitsandbytes' own codes and scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import instance
from ptq_cases import golden, weight

import jaxquant as jq
from jaxquant.core.qtypes import QTYPES
from jaxquant.ptq import double_quantized, rtn

G16 = jq.QuantSpec("nf4", granularity="per_group", group_size=16)


@functools.partial(jax.jit, static_argnums=1)
def both(w, size):
    """Quantized twice, and once."""
    return double_quantized(w, G16, reduce_axes=(-2,), group_size=size), rtn(w, G16, reduce_axes=(-2,))


@pytest.mark.parametrize("qtype", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(qtype):
    ref = golden(f"bnb_{qtype}_48x128_b64_dq_bfloat16")
    of = jq.QuantSpec(qtype, granularity="per_group", group_size=64)
    q = jax.jit(lambda w: double_quantized(w, of, reduce_axes=(-1,)))(ref["orig"])
    pair = ref["weight"].reshape(-1)
    codes = np.stack([pair >> 4, pair & 15], axis=-1).reshape(48, 128)
    grid = np.asarray(QTYPES[qtype].table)  # fp4 has two codes for 0
    np.testing.assert_array_equal(grid[np.asarray(q.logical_codes())], grid[codes])
    np.testing.assert_allclose(
        np.asarray(instance(jq.QTensor, q.scale).scale).reshape(-1), ref["weight.nested_absmax"], rtol=1e-6
    )
    # bitsandbytes finds the code through a table of 65536 entries: it may be the second nearest, just off a middle.
    table = np.asarray(QTYPES["dynamic8"].table, np.float32)
    rank = np.argsort(np.argsort(table, kind="stable"))
    own, theirs = np.asarray(instance(jq.QTensor, q.scale).logical_codes()).reshape(-1), ref["weight.absmax"]
    assert np.abs(rank[own].astype(int) - rank[theirs].astype(int)).max() <= 1
    assert np.mean(own == theirs) > 0.98
    near = np.asarray(q.dequantize(jnp.float32)), ref["ref_dequant"].astype(np.float32)
    np.testing.assert_allclose(*near, rtol=0.01, atol=1e-6)


def test_scales_take_a_quarter_and_hardly_lose():
    w = weight(64, 32)
    q, single = both(w, 32)
    assert q.shape == single.shape
    assert q.nbytes < single.nbytes - 2 * single.scale.size
    found, want = instance(jq.QTensor, q.scale).dequantize(), instance(jax.Array, single.scale)
    np.testing.assert_allclose(found, want, atol=0.03 * float(want.max()))


@pytest.mark.parametrize("shape, size", [((48, 100), 256), ((16 * 5, 103), 256), ((16, 300), 256), ((64, 6), 7)])
def test_groups_over_all_scales_in_their_order(shape, size):
    """The last group is short, and groups end inside of rows."""
    w = weight(*shape)
    q, single = both(w, size)
    scale = np.asarray(single.scale, np.float32).T  # the reduced axis is stored last
    mean = scale.mean(dtype=np.float64)
    flat, table = scale.reshape(-1) - mean, np.asarray(QTYPES["dynamic8"].table, np.float64)
    expected = np.empty_like(flat)
    for start in range(0, flat.size, size):
        part = flat[start : start + size]
        most = np.abs(part).max()
        expected[start : start + size] = most * table[np.abs(part[:, None] / most - table).argmin(1)] if most else 0
    found = np.asarray(instance(jq.QTensor, q.scale).dequantize()).T.reshape(-1)
    np.testing.assert_allclose(found, expected + mean, atol=2e-6 * np.abs(scale).max())


def test_refusals():
    with pytest.raises(jq.QuantError, match="group_size must be a positive integer"):
        double_quantized(weight(48, 100), G16, reduce_axes=(-2,), group_size=0)
    with pytest.raises(jq.QuantError, match="the scales are not floats"):
        double_quantized(weight(64, 4), jq.QuantSpec("nvfp4"), reduce_axes=(-2,))

"""Packing: one little-endian bit stream per row, for every width."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant.core.packing import pack, packed_length, unpack

pack = functools.partial(jax.jit, static_argnums=1)(pack)
unpack = functools.partial(jax.jit, static_argnums=(1, 2))(unpack)


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition: bit b of code k is bit k * bits + b of the row, bits counted from each byte's lowest."""
    each = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(each.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


@pytest.mark.parametrize("bits", range(1, 9))
def test_is_a_bit_stream(bits):
    @settings(max_examples=30)
    @given(st.sampled_from([(1,), (5,), (8,), (3, 7), (2, 3, 24), (33,)]), st.integers(0, 2**32 - 1))
    def law(shape, seed):
        codes = np.random.default_rng(seed).integers(0, 1 << bits, shape).astype(np.uint8)
        packed = np.asarray(pack(codes, bits))
        np.testing.assert_array_equal(packed, stream(codes, bits))
        assert packed.shape == (*shape[:-1], packed_length(shape[-1], bits))
        assert packed.dtype == np.uint8
        np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, shape[-1]), codes)

    law()


@pytest.mark.parametrize("bits", range(1, 9))
def test_is_the_stream_of_compressed_tensors(bits):
    """They pack rows of 64 codes into 32-bit words, offset by half the range."""
    unit = vectors.load("ct_pack_int32_dense")
    codes = (unit[f"b{bits}.values"].astype(np.int32) + (1 << (bits - 1))).astype(np.uint8)
    words = unit[f"b{bits}.d1.packed"]
    packed = np.asarray(pack(codes, bits))
    np.testing.assert_array_equal(packed, np.ascontiguousarray(words).view(np.uint8))
    np.testing.assert_array_equal(unpack(jnp.asarray(packed), bits, codes.shape[-1]), codes)


def test_low_nibble_first():
    np.testing.assert_array_equal(pack(jnp.array([0x1, 0xF, 0x3]), 4), [0xF1, 0x03])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7])
def test_transformations(bits):
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 1 << bits, (4, 3, 10)).astype(np.uint8))
    packed = pack(codes, bits)
    np.testing.assert_array_equal(jax.vmap(lambda c: pack(c, bits))(codes), packed)
    np.testing.assert_array_equal(jax.vmap(lambda p: unpack(p, bits, 10))(packed), codes)
    np.testing.assert_array_equal(jax.lax.map(lambda p: unpack(p, bits, 10), packed), codes)


def test_bytes():
    assert [packed_length(10, bits) for bits in range(1, 9)] == [2, 3, 4, 5, 7, 8, 9, 10]

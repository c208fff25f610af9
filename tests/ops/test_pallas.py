"""The Pallas kernel, in Pallas' interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from ops_reference import error, quantized, spec_of, unequal

from jaxquant import QuantError, QuantSpec
from jaxquant.ops.kernels.gpu.packed import packed_dot


@pytest.mark.parametrize(
    "qtype, group, symmetric",
    [("int4", None, True), ("uint4", 32, False), ("int4", 128, True), ("int4", 64, False), ("int4", 256, True)],
)
def test_the_product_of_the_values(qtype, group, symmetric):
    x = unequal(0, (3, 7, 256))
    spec = QuantSpec(
        qtype, symmetric=symmetric, **({} if group is None else dict(granularity="per_group", group_size=group))
    )
    w = quantized(unequal(1, (256, 48)), spec)
    want = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    assert error(packed_dot(x, w, interpret=True), want) <= 1e-6
    half = jax.jit(lambda x, w: packed_dot(x, w, interpret=True))(x.astype(jnp.bfloat16), w)
    assert half.dtype == jnp.bfloat16
    assert error(half, want) <= 4 * float(jnp.finfo(jnp.bfloat16).eps)


def test_a_row_that_is_padded_is_the_row_alone():
    x, w = unequal(2, (5, 64)), quantized(unequal(3, (64, 16)), spec_of("int4"))
    whole = packed_dot(x, w, interpret=True)
    np.testing.assert_array_equal(whole[1:2], packed_dot(x[1:2], w, interpret=True))


@pytest.mark.parametrize(
    "x, w, says",
    [
        ((2, 64), lambda: jnp.ones((64, 16)), "packed 4-bit"),
        ((2, 64), lambda: quantized(unequal(4, (64, 16)), spec_of("int8")), "packed 4-bit"),
        ((2, 64), lambda: quantized(unequal(4, (64, 16)), spec_of("nf4")), "packed 4-bit"),
        ((2, 32), lambda: quantized(unequal(4, (64, 16)), spec_of("int4")), "not K"),
        ((2, 64), lambda: quantized(unequal(4, (64, 10)), spec_of("int4")), "no blocks"),
        ((2, 64), lambda: quantized(unequal(4, (64, 16)), spec_of("int4", "per_group")), "no blocks"),
    ],
)
def test_refusals(x, w, says):
    with pytest.raises(QuantError, match=says):
        packed_dot(jnp.ones(x), w())


def test_it_lowers_for_an_nvidia_gpu():
    w = quantized(unequal(5, (256, 64)), spec_of("int4", "per_group", group=64))
    triton = "__gpu$xla.gpu.triton"
    program = export.export(
        jax.jit(lambda x, w: packed_dot(x, w, interpret=False)),
        platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(triton)],
    )(jax.ShapeDtypeStruct((4, 256), jnp.bfloat16), w)
    assert program.mlir_module().count(f"@{triton}") == 1

"""What the compiled programs hold: no copy of the weight. Asserted on the program, not on a clock."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant import QuantSpec

N = 1024


def temporaries(fn, *shapes, dtype=jnp.float32) -> float:
    """Temporary memory of the compiled function, in units of one float32 [N, N]."""
    compiled = jax.jit(fn).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * N * N)


@pytest.mark.parametrize(
    "spec, axes, bound",
    [
        (QuantSpec("int8"), (-1,), 0.05),
        # The codes in logical order, before they are transposed: cheaper than to read the weight across its rows.
        (QuantSpec("int8"), (-2,), 0.26),
        (QuantSpec("int8", granularity="per_tensor"), (-1,), 0.05),
        (QuantSpec("uint8", symmetric=False), (-1,), 0.05),
        (QuantSpec("int4", granularity="per_group", group_size=128), (-1,), 0.05),
        (QuantSpec("int4", granularity="per_group", group_size=128), (-2,), 0.05),
        (QuantSpec("float8_e4m3fn"), (-1,), 0.05),
        (QuantSpec("mxfp4"), (-1,), 0.05),
    ],
    ids=str,
)
def test_quantizing_makes_no_copy_of_the_weight(spec, axes, bound):
    assert temporaries(functools.partial(jq.quantize, spec=spec, reduce_axes=axes), (N, N)) < bound


@pytest.mark.parametrize(
    "spec", [QuantSpec("int8"), QuantSpec("int4", granularity="per_group", group_size=64)], ids=str
)
def test_fake_quant_makes_no_copy(spec):
    fn = functools.partial(jq.fake_quant, spec=spec, reduce_axes=(-1,))
    assert temporaries(fn, (N, N)) < 0.05
    assert temporaries(jax.grad(lambda x: jnp.vdot(fn(x), x)), (N, N)) < 1.05


def test_dequantizing_makes_no_float_copy():
    q = jax.eval_shape(
        functools.partial(jq.quantize, spec=QuantSpec("int8"), reduce_axes=(-1,)),
        jax.ShapeDtypeStruct((N, N), jnp.float32),
    )
    temp = jax.jit(jq.dequantize).lower(q).compile().memory_analysis().temp_size_in_bytes
    assert temp < 0.05 * 4 * N * N

"""The shapes of what `quantize` returns, without quantizing, are those of what it returns."""

import math

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.core.abstract import abstract

SHAPES = [((64, 48), (-2,)), ((64, 48), (-1,)), ((3, 3, 16, 5), (-4, -3, -2)), ((2, 48, 32), (-2,)), ((32,), (-1,))]
PLAIN = ["int2", "int3", "int4", "int5", "int8", "uint4", "uint8", "float8_e4m3fn", "float4_e2m1fn", "nf4", "dynamic8"]


def group(qtype, **kwargs):
    return jq.QuantSpec(qtype, granularity="per_group", group_size=16, **kwargs)


SPECS = [
    *[jq.QuantSpec(qtype, symmetric=not qtype.startswith("u")) for qtype in PLAIN],
    jq.QuantSpec("int8", granularity="per_tensor"),
    jq.QuantSpec("int4", granularity="per_tensor", symmetric=False),
    jq.QuantSpec("int4", scale_dtype=jnp.bfloat16),
    group("int4"), group("uint4", symmetric=False), group("int3", two_level=True),
    group("int8", scale_dtype="float16"),
    jq.QuantSpec("mxfp8"), jq.QuantSpec("mxfp4"), jq.QuantSpec("nvfp4"),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_every_spec(shape):
    sizes, axes = shape
    for i, spec in enumerate(SPECS):
        if spec.group_size is not None and math.prod(sizes[axis] for axis in axes) % spec.group_size:
            continue
        dtype = (jnp.float32, jnp.bfloat16)[i % 2]
        x = jax.ShapeDtypeStruct(sizes, dtype)
        real = jax.eval_shape(lambda x, spec=spec: jq.quantize(x, spec, reduce_axes=axes), x)
        found = abstract(sizes, dtype, spec, axes)
        assert jax.tree.structure(found) == jax.tree.structure(real), spec
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(real), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), spec
        if spec.type.packed:
            own = abstract(sizes, dtype, spec, axes, minor=())
            assert own.nbytes == jax.eval_shape(lambda q: q.store(()), real).nbytes, spec

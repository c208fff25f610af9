"""Codes of large arrays are written in parts, and ranges of arrays with NaN and infinities found by parts."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan, needs_jit
from narrowed import present

import jaxquant as jq
from jaxquant import QuantSpec
from jaxquant.ops.kernels.cpu import quantizing

CASES = [
    (QuantSpec("int8"), (-2,)),
    (QuantSpec("int4"), (-1,)),
    (QuantSpec("uint8", symmetric=False), (-2,)),
    (QuantSpec("int8", granularity="per_group", group_size=4), (-2,)),
    (QuantSpec("int8", granularity="per_tensor"), (-2,)),
    (QuantSpec("int3", granularity="per_group", group_size=8), (-1,)),
    (QuantSpec("nvfp4"), (-1,)),
    (QuantSpec("int4", granularity="per_group", group_size=16, two_level=True), (-1,)),
]
CASES = [case if i < 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)]


def array(axes):
    """Shapes that no other test has: what is compiled here is cut."""
    x = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) * np.linspace(0.1, 3, 2048, dtype="f")
    return jnp.asarray(x if axes == (-2,) else x.T)


@pytest.mark.every
@pytest.mark.parametrize("spec, axes", CASES)
def test_codes(spec, axes, monkeypatch):
    """They are those of the whole, as `fake_quant` rounds it."""
    monkeypatch.setattr(quantizing, "_SEVERAL", 1)
    x = array(axes)
    q = jq.quantize(x, spec, reduce_axes=axes)
    np.testing.assert_array_equal(q.dequantize(), jq.fake_quant(x, spec, reduce_axes=axes))


@needs_jit  # runs a compiled program
@pytest.mark.parametrize("spec, axes", CASES)
@pytest.mark.parametrize("part", [P("d", None), P(None, "d")])
def test_sharded(spec, axes, part, monkeypatch):
    """Nothing moves between devices but ranges, and their parts: XLA gathers those that are summed in pairs."""
    monkeypatch.setattr(quantizing, "_SEVERAL", 1)
    if spec.type.scale_format == "e4m3" or spec.two_level:
        pytest.skip("one scale for the whole array")
    mesh = Mesh(np.array(jax.devices()), ("d",))
    if 64 % mesh.size:
        pytest.skip("needs a number of devices that divides the array")
    x = jnp.tile(array(axes), (8, 1) if axes == (-2,) else (1, 8))
    sharded = jax.device_put(x, NamedSharding(mesh, part))
    program = jax.jit(lambda x: jq.quantize(x, spec, reduce_axes=axes)).lower(sharded).compile()
    q = program(sharded)
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", present(program.as_text()))
    parts = mesh.size * q.scale.size
    assert all(math.prod(map(int, shape.split(","))) <= parts < x.size for shape in gathered)
    np.testing.assert_array_equal(q.dequantize(), jq.fake_quant(x, spec, reduce_axes=axes))


@makes_nan
@needs_jit  # where it is known, NaN raises
@pytest.mark.parametrize("axis", [0, 1])
def test_ranges(axis):
    """Infinities count as 0, NaN gives NaN, in an array that is too large to be written once more."""
    x = np.random.default_rng(0).standard_normal((512, 640)).astype(np.float32)
    x[3, 5], x[7, 9], x[9, 11] = np.nan, np.inf, -np.inf
    asymmetric = QuantSpec("uint8", symmetric=False)

    @jax.jit
    def scales(x):
        return [jq.quantize(x, spec, reduce_axes=(axis,)).scale for spec in (QuantSpec("int8"), asymmetric)]

    finite = np.where(np.isinf(x), 0, x)
    wide = np.maximum(finite.max(axis, keepdims=True), 0) - np.minimum(finite.min(axis, keepdims=True), 0)
    for got, want in zip(scales(x), (np.abs(finite).max(axis, keepdims=True) / 127, wide / 255), strict=True):
        assert np.isnan(want).sum() == 1
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.every
def test_the_packed_axis_stays_whole(monkeypatch):
    """With nothing reduced the longest axis is the one that codes are packed along."""
    monkeypatch.setattr(quantizing, "_SEVERAL", 1)
    x = array((-2,))
    q = jq.quantize(x, QuantSpec("int4", granularity="per_tensor"), reduce_axes=())
    np.testing.assert_array_equal(q.dequantize(), jq.fake_quant(x, QuantSpec("int4"), reduce_axes=(0, 1)))


def test_each_element_a_range_of_its_own():
    x = jnp.linspace(-1.0, 1.0, 1 << 18).reshape(512, 512)
    np.testing.assert_allclose(jq.quantize(x, QuantSpec("int8"), reduce_axes=()).dequantize(), x, rtol=1e-6)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="an older JAX")
@pytest.mark.parametrize("part", [P("d", None), P(None, "d")])
def test_explicit_meshes(part, monkeypatch):
    monkeypatch.setattr(quantizing, "_SEVERAL", 1)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, spec = array((-1,)), QuantSpec("int4")
    with jax.set_mesh(mesh):
        q = jax.jit(lambda x: jq.quantize(x, spec, reduce_axes=(-1,)))(jax.device_put(x, NamedSharding(mesh, part)))
    np.testing.assert_array_equal(jax.device_get(q).dequantize(), jq.fake_quant(x, spec, reduce_axes=(-1,)))

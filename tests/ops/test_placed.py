"""Products of the parts that each device of an explicit mesh has: their sum is the product of the whole arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrowed import present

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core.affine import as_codes
from jaxquant.core.qtensor import QTensor
from jaxquant.core.stack import Layer
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.tpu.quantize import in_parts
from jaxquant.ops.placed import Placed
from jaxquant.ops.problem import Product
from jaxquant.ops.select import run
from jaxquant.ops.shardings import leaf_specs

MATMUL = (((1,), (0,)), ((), ()))
EXPERTS = (((2,), (1,)), ((0,), (0,)))
KINDS = (AxisType.Explicit, AxisType.Explicit)


def on_devices(fn, operands):
    """``fn`` jitted over eight devices with automatic axes, as where a program's own types are left."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    either: Any = jax.sharding  # JAX 0.6 has use_mesh, and later ones use_abstract_mesh
    newer = hasattr(either, "use_abstract_mesh")
    with either.use_abstract_mesh(mesh.abstract_mesh) if newer else either.use_mesh(mesh):
        return jax.jit(fn)(jax.device_put(operands, NamedSharding(mesh, P())))


def placed(lhs, rhs, numbers=MATMUL, kinds=KINDS, result=None):
    where = AbstractMesh((2, 4), ("data", "model"), axis_types=kinds)
    ndim = 3 if numbers is EXPERTS else 2
    left, right = ((None if spec is None else NamedSharding(where, spec), ndim) for spec in (lhs, rhs))
    return Placed.of(left, right, numbers, None if result is None else NamedSharding(where, result))


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "summed"),
    [
        (P("data"), P(None, "model"), P(("data",), ("model",)), ()),
        (P("data", "model"), P("model"), P(("data",), None), ("model",)),
        (P("data"), P("model"), P(("data",), None), ("model",)),  # a part of x on each device
        (P(None, ("data", "model")), P(("data", "model")), P(None, None), ("data", "model")),
        (None, P(None, "model"), P(None, ("model",)), ()),
    ],
)
def test_how_a_result_lies(lhs, rhs, out, summed):
    found = present(placed(lhs, rhs))
    assert found.out.spec == out
    assert found.summed == summed


@pytest.mark.parametrize(
    ("result", "out", "scattered"),
    [
        (P("data", "model"), P(("data",), ("model",)), 1),
        (P(("data", "model")), P(("data",), None), None),  # rows are cut already: the program moves the sum
        (P("data"), P(("data",), None), None),
        (P(), P(("data",), None), None),
    ],
)
def test_a_sum_goes_where_the_program_wants_it(result, out, scattered):
    found = present(placed(P("data", "model"), P("model"), result=result))
    assert found.out.spec == out
    assert found.scattered == scattered


@pytest.mark.parametrize(
    ("lhs", "rhs"),
    [
        (P(), P()),  # nothing to do
        (P("data"), P(None, "data")),  # both would be cut over the same devices
        (P("data"), P("data")),  # FSDP: rows, and the axis that is summed
        (P(None, "data"), P("model")),  # cut otherwise
    ],
)
def test_products_that_xla_partitions(lhs, rhs):
    assert placed(lhs, rhs) is None


def test_automatic_axes_say_nothing():
    assert placed(P("data"), P(None, "model"), kinds=(AxisType.Explicit, AxisType.Auto)) is None
    assert placed(None, None) is None


@pytest.mark.parametrize(
    ("spec", "rhs", "fits"),
    [
        (recipes.w4a16(32), P("model"), True),
        (recipes.w4a16(32), P(("data", "model")), False),  # 16 rows of groups of 32
        (recipes.w4a16(None), P(("data", "model")), True),  # one scale per column
        (jq.OpSpec(jq.QuantSpec("int3", granularity="per_group", group_size=4)), P(("data", "model")), True),
        (jq.OpSpec(jq.QuantSpec("int3", granularity="per_group", group_size=4)), P(None, "model"), True),
    ],
)
def test_whole_blocks_and_bytes(spec, rhs, fits):
    w = jq.quantize(jnp.ones((128, 64)), spec.weight, reduce_axes=(0,))
    assert present(placed(None, rhs)).rhs.fits(w) == fits


def test_bytes_of_packed_codes_are_not_cut():
    w = jq.quantize(jnp.ones((20, 64)), jq.QuantSpec("int4"), reduce_axes=(0,))
    assert w.layout == "packed"
    assert not present(placed(None, P("model"))).rhs.fits(w)  # 5 codes of 4 bits


SPECS = {
    "w8a8": recipes.w8a8(),
    "w4a16": recipes.w4a16(16),
    "two-level": recipes.w4a16(16, two_level=True),
    "zero points": recipes.w4a16(16, symmetric=False),
    "nf4": recipes.nf4(32),
    "mxfp8": recipes.mxfp8(),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("target", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize(
    ("lhs", "rhs", "result"),
    [
        (P("data"), P(None, "model"), None),
        (P("data", "model"), P("model"), None),
        (P("data", "model"), P("model"), P("data", "model")),
        (P(None, "model"), P("model"), P("model")),
    ],
)
def test_the_sum_of_the_parts_is_the_whole(name, target, lhs, rhs, result):
    spec, how = SPECS[name], present(placed(lhs, rhs, result=result))
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 512), (512, 128)]))
    w = jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(0,)), target)
    x = x if spec.act is None else as_codes(x, spec.act, (-1,))
    whole = Product.of(x, w, Axes.of(2, (), (1,)), Axes.of(2, (), (0,)), None, jnp.dtype("float32"))
    assert how.fits(x, w)
    parts = dataclasses.replace(whole, placed=how)
    found = on_devices(lambda p: p.on_each_device(run), parts)
    x, w = (np.asarray(v.dequantize() if isinstance(v, QTensor) else v, np.float64) for v in (x, w))
    assert np.linalg.norm(found - x @ w) < 1e-4 * np.linalg.norm(x @ w)


def test_experts_and_a_weight_on_the_left():
    how = present(placed(P("model", None, "data"), P("model", "data"), EXPERTS))
    assert how.out.spec == P(("model",), None, None)
    assert how.summed == ("data",)
    w, x = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(4, 8, 64), (4, 64, 16)]))
    q = jq.quantize(w, present(recipes.w8a16().weight), reduce_axes=(2,))
    whole = Product.of(q, x, Axes.of(3, (0,), (2,)), Axes.of(3, (0,), (1,)), None, jnp.dtype("float32"))
    assert whole.weight_first
    found = on_devices(lambda p: p.on_each_device(run), dataclasses.replace(whole, placed=how))
    expected = np.einsum("emk,ekn->emn", np.asarray(q.dequantize(), np.float64), np.asarray(x, np.float64))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["w8a8", "fp8"])
def test_codes_of_parts_are_those_of_the_whole(name):
    spec, x = getattr(recipes, name)().act, jax.random.normal(jax.random.key(0), (4, 256))
    how = present(placed(P("data"), P(None, "model"))).lhs
    found = on_devices(lambda x: in_parts(x, spec=spec, axes=(-1,), parts=how), x)
    expected = as_codes(x, spec, (-1,))
    assert isinstance(found, QTensor)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_parts_of_a_layer_stay_in_the_stack():
    """A copy of the layer would take as long as reading it."""
    stack = jq.quantize(jnp.ones((3, 64, 32)), present(recipes.w8a16().weight), reduce_axes=(-2,))
    how = present(placed(None, P("model"))).rhs

    def part(stack, index):
        layer = jax.tree.map(lambda v: v[0], stack).layer_of(stack, index)
        assert isinstance(leaf_specs(layer, how.cut).kept, Layer)
        return how.cut.local(layer)

    made = jax.make_jaxpr(part)(stack, 1)
    assert stack.codes.shape in [v.aval.shape for v in made.jaxpr.outvars]

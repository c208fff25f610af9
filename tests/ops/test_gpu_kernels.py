"""The kernels for GPUs, in Pallas' interpreter: parity with float64, whatever the codes, sizes and axes.

How they compile for an H100, and what they write to memory there, is read in tests/programs.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan
from narrowed import instance, present
from ops_reference import dot_error, real, slow_but, unequal

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core import views
from jaxquant.core.affine import as_codes
from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import flat
from jaxquant.core.relayout import laid_out
from jaxquant.ops import select as selection
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernel import kernel as predicted
from jaxquant.ops.kernels.gpu.decoded import TritonDecoded, TritonLayer, run, weight_arrays
from jaxquant.ops.kernels.gpu.quantizing import rows_at_once
from jaxquant.ops.kernels.gpu.scaled import TritonFloat8, TritonInt8
from jaxquant.ops.kernels.gpu.tiling import Decoding, blocks
from jaxquant.ops.problem import Product
from jaxquant.ops.select import select

GROUPS: dict[str, Any] = {"granularity": "per_group"}
SPECS = {
    "int4 g128": jq.QuantSpec("int4", group_size=128, **GROUPS),
    "int4 g32": jq.QuantSpec("int4", group_size=32, **GROUPS),
    "int4 g48": jq.QuantSpec("int4", group_size=48, **GROUPS),
    "uint4 g64 zero": jq.QuantSpec("uint4", group_size=64, symmetric=False, **GROUPS),
    "uint4 g16 zero": jq.QuantSpec("uint4", group_size=16, symmetric=False, **GROUPS),
    "uint4 zero": jq.QuantSpec("uint4", symmetric=False),
    "int3 g64": jq.QuantSpec("int3", group_size=64, **GROUPS),
    "int2 g16": jq.QuantSpec("int2", group_size=16, **GROUPS),
    "int8 g64": jq.QuantSpec("int8", group_size=64, **GROUPS),
    "uint8 g64 zero": jq.QuantSpec("uint8", group_size=64, symmetric=False, **GROUPS),
    "two-level": recipes.w4a16(64, two_level=True).weight,
    "nf4": jq.QuantSpec("nf4", group_size=64, **GROUPS),
    "nf4 channel": jq.QuantSpec("nf4"),
    "fp4": jq.QuantSpec("fp4", group_size=32, **GROUPS),
    "iq4": jq.QuantSpec("iq4_nl", group_size=32, **GROUPS),
    "dynamic8": jq.QuantSpec("dynamic8", group_size=64, **GROUPS),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "e5m2": jq.QuantSpec("float8_e5m2", group_size=32, **GROUPS),
}
EXACT = {name for name, spec in SPECS.items() if spec.type.kind != "table"} - {"int2 g16", "uint4 g16 zero"}
INT8, E4M3 = jq.QuantSpec("int8"), jq.QuantSpec("float8_e4m3fn")


def problem_of(spec, rows, k, n, *, lead=(), k_last=False, act=None, dtype=jnp.float32, seed=0):
    """A product of `rows` rows with a quantized weight, as it is stored on a GPU, and the kernel for it."""
    axis = -1 if k_last else -2
    w = unequal(seed, (*lead, n, k) if k_last else (*lead, k, n))
    q = jax.jit(lambda w: laid_out(jq.quantize(w, spec, reduce_axes=(axis,)), "elements"))(w).replace(dtype=dtype)
    x = unequal(seed + 1, (*lead, rows, k), dtype)
    x = x if act is None else jq.quantize(x, act, reduce_axes=(-1,))
    batch = tuple(range(len(lead)))
    axes = Axes.of(x.ndim, batch, (x.ndim - 1,)), Axes.of(q.ndim, batch, (q.ndim + axis,))
    problem = Product.of(x, q, *axes, None, jnp.float32)
    kernel = select(problem, Target("cuda"))
    assert isinstance(kernel, TritonDecoded)
    numbers = (axes[0].contract, axes[1].contract), (axes[0].batch, axes[1].batch)
    return problem, kernel, numbers


def ran(problem, dtype):
    """A product in the interpreter, as one program: each operation on its own would be compiled."""
    axes = problem.x_axes, problem.w_axes
    fn = lambda x, w: run(Product.of(x, w, *axes, None, jnp.float32), dtype, interpret=True)  # noqa: E731
    return jax.jit(fn)(problem.x, problem.w)


def off(problem, kernel, numbers):
    """The error of a product, in the natural magnitude of each entry."""
    return dot_error(ran(problem, kernel.dtype), real(problem.x), real(problem.w), numbers)


@pytest.mark.parametrize("name", slow_but(SPECS, "int4 g128", "uint4 g16 zero", "nf4", "mxfp4", "nvfp4", "mxfp8"))
def test_every_type_of_number(name):
    assert off(*problem_of(SPECS[name], 3, 192 if "g48" in name else 256, 34)) <= 1e-6


@pytest.mark.parametrize("name", slow_but(SPECS, "int4 g32", "two-level", "e5m2"))
def test_in_bfloat16(name):
    """Values are what they are, or rounded to bfloat16 once, and so are those of tables."""
    bound = 1e-6 if name in EXACT and name not in ("int4 g32", "fp4", "e5m2", "int4 g48") else 2**-8
    assert off(*problem_of(SPECS[name], 8, 192 if "g48" in name else 256, 32, dtype=jnp.bfloat16)) <= bound


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_float_zero_points(dtype):
    """As HQQ has them: differences are rounded to their dtype, which is that of the values."""
    q = laid_out(jq.quantize(unequal(0, (256, 34)), SPECS["uint4 g64 zero"], reduce_axes=(-2,)), "elements")
    zero = present(q.zero_point).astype(dtype) + jnp.asarray(0.3, dtype)
    problem = Product.of(
        unequal(1, (8, 256), dtype), q.replace(zero_point=zero, dtype=dtype), Axes.of(2, (), (1,)),
        Axes.of(2, (), (0,)), None, jnp.float32,
    )  # fmt: skip
    kernel = select(problem, Target("cuda"))
    assert isinstance(kernel, TritonDecoded)
    numbers = (((1,), (0,)), ((), ()))
    assert off(problem, kernel, numbers) <= (2**-8 if dtype == jnp.bfloat16 else 1e-6)
    other = dataclasses.replace(problem, w=problem.weight.replace(zero_point=zero.astype(jnp.float16)))
    assert not isinstance(select(other, Target("cuda")), TritonDecoded)


@pytest.mark.parametrize("k_last", [False, True])
def test_blocks_of_rows_and_columns(k_last):
    """As of DeepSeek's fp8: each row gets the scales of its blocks."""
    axis = -1 if k_last else -2
    q = jq.quantize(unequal(0, (64, 256) if k_last else (256, 64)), SPECS["e5m2"], reduce_axes=(axis,))
    scale = flat(q.scale)
    q = jq.ops.lay_out(q.replace(scale=scale[::32] if k_last else scale[:, ::32]), "gpu")
    axes = Axes.of(2, (), (1,)), Axes.of(2, (), (axis + 2,))
    problem = Product.of(unequal(1, (8, 256)), q, *axes, None, jnp.float32).with_groups_on_one_axis()
    kernel = select(problem, Target("cuda"))
    assert isinstance(kernel, TritonDecoded)
    assert off(problem, kernel, (((1,), (axis + 2,)), ((), ()))) <= 1e-6


@pytest.mark.parametrize("name", slow_but(SPECS, "int4 g32", "uint4 zero", "int8 g64"))
def test_int8_activations(name):
    """Integers are multiplied as integers: exact. Others by their values."""
    case = problem_of(SPECS[name], 5, 192 if "g48" in name else 256, 32, act=INT8)
    assert off(*case) <= 1e-6


@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.slow), 300])
@pytest.mark.parametrize("sizes", slow_but([(64, 16), (208, 33), (1040, 70)], (208, 33)))
def test_rows_and_odd_sizes(rows, sizes):
    """No block divides them: edges are masked, of all axes, in parts of k too."""
    assert off(*problem_of(SPECS["uint4 g16 zero"], rows, *sizes, dtype=jnp.bfloat16)) <= 2**-8


@pytest.mark.parametrize("name", slow_but(SPECS, "uint4 g64 zero", "two-level"))
@pytest.mark.parametrize("sizes", [(192, 33)])
def test_weights_whose_contracted_axis_is_stored_last(name, sizes):
    assert off(*problem_of(SPECS[name], 3, *((384, 33) if "g128" in name else sizes), k_last=True)) <= 1e-6


@pytest.mark.parametrize("name", slow_but(["uint4 g64 zero", "nvfp4", "two-level"], "uint4 g64 zero"))
def test_weights_seen_through_a_transpose(name):
    """A model's ``x @ w.T``: codes and scales stay in the order of [outputs, inputs]."""
    problem, kernel, _ = problem_of(SPECS[name], 3, 192, 34, k_last=True)
    w = views.transpose(problem.weight, (1, 0))
    axes = problem.x_axes, Axes.of(2, (), (0,))
    turned = Product.of(problem.x, w, *axes, None, jnp.float32)
    assert select(turned, Target("cuda")) == kernel
    np.testing.assert_array_equal(ran(turned, kernel.dtype), ran(problem, kernel.dtype))
    assert off(turned, kernel, (((1,), (0,)), ((), ()))) <= 1e-6


def test_a_batch_and_experts_of_odd_size():
    with jax.checking_leaks():  # nothing of the trace is kept by rules of batching and partitioning
        assert off(*problem_of(SPECS["nvfp4"], 9, 64, 17, lead=(2,))) <= 1e-6


def test_parts_of_k_are_summed():
    """One row of few columns: k is cut, and scales are applied to the sums of all parts."""
    problem, kernel, numbers = problem_of(SPECS["two-level"], 1, 4096, 32, act=INT8)
    assert (
        blocks(1, Decoding(problem.weight.type, "nibbles", k_last=False, length=4096, columns=32, groups=64)).parts > 1
    )
    assert off(problem, kernel, numbers) <= 1e-6


def test_offsets():
    """Formats with minima instead of zero points."""
    problem, kernel, numbers = problem_of(SPECS["uint4 g64 zero"], 3, 128, 32)
    w = problem.weight.replace(zero_point=None, offset=unequal(3, problem.weight.scale.shape))
    problem = Product.of(problem.x, w, problem.x_axes, problem.w_axes, None, jnp.float32)
    assert off(problem, kernel, numbers) <= 1e-6


def test_a_row_is_the_same_beside_others():
    problem, kernel, _ = problem_of(SPECS["int4 g32"], 5, 64, 32)
    whole = ran(problem, kernel.dtype)
    row = instance(jax.Array, problem.x)[1:2]
    one = Product.of(row, problem.w, problem.x_axes, problem.w_axes, None, jnp.float32)
    np.testing.assert_array_equal(whole[1:2], ran(one, kernel.dtype))


def test_several_axes_and_transformations():
    """Heads are contracted with their features, under vmap, scan and remat."""
    w = laid_out(jq.quantize(unequal(0, (2, 4, 32, 24)), SPECS["int4 g32"], reduce_axes=(-2,)), "elements")
    x = unequal(1, (3, 4, 32))
    axes = Axes.of(3, (), (1, 2)), Axes.of(3, (), (0, 1))

    def one(q, x):
        problem = Product.of(x, q, *axes, None, jnp.float32)
        kernel = select(problem, Target("cuda"))
        assert isinstance(kernel, TritonDecoded)
        return run(problem, kernel.dtype, interpret=True)

    wanted = np.stack([np.tensordot(np.asarray(x, np.float64), v, ((1, 2), (0, 1))) for v in real(w)])
    mapped = jax.jit(jax.vmap(one, in_axes=(0, None)))(w, x)
    scanned = jax.jit(lambda w, x: lax.scan(lambda c, q: (c, jax.checkpoint(one)(q, x)), 0, w)[1])(w, x)
    for found in (mapped, scanned):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


LAYERS = 3


def stack_of(spec, k, n, *, lead=(), k_last=False, dtype=jnp.float32, seed=0):
    """Layers of weights, as they are stored on a GPU."""
    axis = -1 if k_last else -2
    w = unequal(seed, (LAYERS, *lead, n, k) if k_last else (LAYERS, *lead, k, n))
    make = jax.vmap(lambda w: laid_out(jq.quantize(w, spec, reduce_axes=(axis,)), "elements").replace(dtype=dtype))
    return jax.jit(make)(w)


def layer_of(stack, index):
    """A layer, with its codes in the stack, as a scan of `jq.quantized` hands it to a product."""
    return jax.tree.map(lambda v: v[index], stack).layer_of(stack, index)


def by_layer(x, w, *, contract=-2, dtype=jnp.float32):
    """The product of rows by a weight with batch axes in front, or by a layer of a stack of such."""
    batch = tuple(range(w.ndim - 2))
    axes = Axes.of(x.ndim, batch, (x.ndim - 1,)), Axes.of(w.ndim, batch, (w.ndim + contract,))
    return run(Product.of(x, w, *axes, None, jnp.float32), dtype, interpret=True)


@pytest.mark.parametrize("name", slow_but(SPECS, "int4 g32", "uint4 zero", "two-level", "mxfp4", "nf4"))
def test_a_layer_of_a_stack(name):
    """As the layer alone, to the bit: of all types of numbers, zero points and scales."""
    stack, x = stack_of(SPECS[name], 192 if "g48" in name else 256, 34), unequal(1, (3, 192 if "g48" in name else 256))
    alone = jax.jit(by_layer)
    layers = jax.jit(lambda x, stack, i: by_layer(x, layer_of(stack, i)))
    for i in (0, LAYERS - 1):
        one = jax.tree.map(lambda v: v[i], stack)  # noqa: B023
        found = layers(x, stack, jnp.int32(i))
        np.testing.assert_array_equal(found, alone(x, one))
        assert dot_error(found, real(x), real(one), (((1,), (0,)), ((), ()))) <= 1e-6


@pytest.mark.parametrize("k_last", [False, True])
@pytest.mark.parametrize("name", slow_but(["int4 g32", "two-level", "nvfp4", "uint4 zero"], "uint4 zero"))
def test_nothing_is_cut_out_of_a_stack(name, k_last):
    """All arrays of the weight are those of the stack, in the order of its axes and of a transpose's."""
    stack = stack_of(SPECS[name], 256, 34, k_last=k_last)
    layer = layer_of(stack, 1)
    turned = views.transpose(layer, (1, 0))
    axis = 1 if k_last else 0
    for w, axes in (layer, Axes.of(2, (), (axis,))), (views.in_stored_order(turned), Axes.of(2, (), (axis,))):
        weight, _, of = weight_arrays(w, axes)
        mine, whole = ({k: v for k, v in arrays._asdict().items() if v is not None} for arrays in (weight, of["stack"]))
        assert whole.keys() == mine.keys() - {"table"}
        assert all(v.shape == (LAYERS, *mine[name].shape[1:]) for name, v in whole.items())


@pytest.mark.parametrize("k_last", [False, True])
@pytest.mark.parametrize("sizes", slow_but([(208, 33), (1040, 70)], (208, 33)))
def test_odd_sizes_in_a_stack(sizes, k_last):
    stack = stack_of(SPECS["uint4 g16 zero"], *sizes, k_last=k_last, dtype=jnp.bfloat16)
    x, one = unequal(1, (5, sizes[0]), jnp.bfloat16), jax.tree.map(lambda v: v[2], stack)
    product = functools.partial(by_layer, contract=-1 if k_last else -2, dtype=jnp.bfloat16)
    found = jax.jit(lambda x, stack, i: product(x, layer_of(stack, i)))(x, stack, jnp.int32(2))
    np.testing.assert_array_equal(found, jax.jit(product)(x, one))
    assert dot_error(found, real(x), real(one), (((1,), (1 if k_last else 0,)), ((), ()))) <= 2**-8


def test_parts_of_k_in_a_stack():
    """Scales that are the same along k, those of the layer, are applied to the sums of all parts."""
    stack, x = stack_of(SPECS["two-level"], 4096, 32), unequal(1, (1, 4096))
    found = jax.jit(lambda x, stack, i: by_layer(x, layer_of(stack, i)))(x, stack, jnp.int32(1))
    np.testing.assert_array_equal(found, jax.jit(by_layer)(x, jax.tree.map(lambda v: v[1], stack)))


@pytest.mark.parametrize("lead", [(), (2,)])
def test_a_layer_under_vmap(lead):
    """Of activations, of layers of one stack, and of several stacks, twice: of matrices and of experts."""
    spec, sizes = SPECS["uint4 g16 zero"], (64, 18)
    stacks = jax.tree.map(lambda *v: jnp.stack(v), *(stack_of(spec, *sizes, lead=lead, seed=s) for s in range(4)))
    x, places = unequal(9, (4, *lead, 3, 64)), jnp.array([2, 0, 1, 2], jnp.int32)
    one = lambda x, stack, i: by_layer(x, layer_of(stack, i))  # noqa: E731

    on_host = jax.tree.map(np.asarray, stacks)

    def wanted(j, s, i):
        return real(x)[j] @ real(jax.tree.map(lambda v: jnp.asarray(v[s, i]), on_host))

    first, other = jax.tree.map(lambda v: v[0], stacks), jax.tree.map(lambda v: v[1], stacks)
    found = {
        "activations": (jax.jit(jax.vmap(one, (0, None, None)))(x, other, jnp.int32(2)), [(j, 1, 2) for j in range(4)]),
        "layers": (jax.jit(jax.vmap(one, (0, None, 0)))(x, first, places), [(j, 0, int(places[j])) for j in range(4)]),
        "stacks": (jax.jit(jax.vmap(one, (None, 0, None)))(x[0], stacks, jnp.int32(1)), [(0, s, 1) for s in range(4)]),
        "both": (jax.jit(jax.vmap(one))(x, stacks, places), [(j, j, int(places[j])) for j in range(4)]),
    }
    for name, (got, cases) in found.items():
        want = np.stack([wanted(*case) for case in cases])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max(), err_msg=name)
    twice = jax.jit(jax.vmap(jax.vmap(one, (0, None, None)), (None, 0, None)))(x[:2], stacks, jnp.int32(2))
    want = np.stack([np.stack([wanted(j, s, 2) for j in range(2)]) for s in range(4)])
    np.testing.assert_allclose(twice, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.fixture
def layers_met(monkeypatch):
    """Runs the kernels of a GPU on a CPU, and lists for each product whether its weight is a layer of a stack."""
    found = []

    def interpreted(kind):
        class Interpreted(kind):
            platforms = ("cpu",)

            def run(self, problem):
                found.append(problem.weight.layer is not None)
                return run(problem, self.dtype, interpret=True)

        return Interpreted

    monkeypatch.setattr(selection, "TABLE", (*map(interpreted, (TritonDecoded, TritonLayer)), *selection.TABLE))
    return found


def model(layer: Any = lambda x, w: x @ w, **how: Any) -> Any:
    """A scan over the layers of a stack."""
    return lambda p, x: lax.scan(lambda x, w: (jnp.tanh(layer(x, w)), None), x, p["w"], **how)[0]


MODELS: dict[str, Any] = {
    "forward": model(),
    "transposed and in reverse": model(lambda x, w: x @ w.T, reverse=True),
    "remat": model(jax.checkpoint(lambda x, w: x @ w)),
    "a scan of scans": lambda p, x: lax.scan(lambda x, w: (model()({"w": w}, x), None), x, p["w"])[0],
}


@pytest.mark.parametrize("name", slow_but(MODELS, "transposed and in reverse"))
@pytest.mark.parametrize("scheme", slow_but(["w4a16:g32", "w8a16", "nf4"], "w4a16:g32"))
def test_a_scan_finds_its_layers(name, scheme, layers_met):
    """A model and its gradient, vmapped too, are those by the values of its weights."""
    fn, x = MODELS[name], unequal(1, (2, 3, 64))
    params = {"w": unequal(0, (2, 2, 64, 64) if name == "a scan of scans" else (3, 64, 64), decades=0.5) / 8}
    plan = jq.make_plan(fn, params, x[0], rules=[jq.Rule(".*", scheme)])
    stored = jq.quantize_params(params, plan, target="gpu")
    quantized = jq.quantized(fn, plan)

    def both(fn, p):
        one = jax.value_and_grad(lambda x: jnp.sum(fn(p, x)))
        return jax.jit(jax.vmap(one))(x)

    (got, slopes), (want, exact) = both(quantized, stored), both(fn, jq.dequantize_params(stored))
    assert layers_met
    assert all(layers_met)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


def on_devices(value, mesh, spec):
    return jax.device_put(value, NamedSharding(mesh, spec))


@pytest.mark.skipif(
    "factor_sizes" not in inspect.signature(custom_partitioning.def_partition).parameters,
    reason="the partitioner of an older JAX cannot be told which axes go together",
)
@pytest.mark.parametrize("cut", ["columns", "contracted", "rows"])
def test_weights_stay_where_they_are(cut):
    """Partial sums along the contracted axis, and nothing else, go from device to device."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("t",))
    k, n, m = {"columns": (None, "t", None), "contracted": ("t", None, None), "rows": (None, None, "t")}[cut]
    problem, kernel, _ = problem_of(SPECS["two-level"], 4, 128, 32)
    w = jax.tree.map(
        lambda v: on_devices(v, mesh, P(k if v.shape[0] > 1 else None, *(None,) * (v.ndim - 2), n)), problem.w
    )
    x = on_devices(problem.x, mesh, P(m, k))

    def fn(w, x):
        here = Product.of(x, w, problem.x_axes, problem.w_axes, None, jnp.float32)
        return run(here, kernel.dtype, interpret=True)

    text = present(jax.jit(fn).lower(w, x).compile().as_text())
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert ("all-reduce" in text) == (cut == "contracted")
    whole = jax.jit(fn)(problem.w, problem.x)
    np.testing.assert_allclose(jax.jit(fn)(w, x), whole, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(
    "factor_sizes" not in inspect.signature(custom_partitioning.def_partition).parameters,
    reason="the partitioner of an older JAX cannot be told which axes go together",
)
@pytest.mark.parametrize("cut", slow_but(["columns", "contracted", "experts"], "contracted"))
def test_stacks_stay_where_they_are(cut):
    """Each device reads its part of a layer in its part of the stack."""
    mesh, lead = Mesh(np.asarray(jax.devices()[:2]), ("t",)), (2,) if cut == "experts" else ()
    k, n, b = {"columns": (None, "t", ()), "contracted": ("t", None, ()), "experts": (None, None, ("t",))}[cut]
    stack, x = stack_of(SPECS["uint4 g64 zero"], 256, 32, lead=lead), unequal(1, (*lead, 3, 256))
    placed = jax.tree.map(lambda v: on_devices(v, mesh, P(None, *b, k, *(None,) * (v.ndim - 3 - len(b)), n)), stack)
    rows = on_devices(x, mesh, P(*b, None, k))

    def fn(x, stack):
        return lax.scan(lambda i, _: (i + 1, by_layer(x, layer_of(stack, i))), jnp.int32(0), length=LAYERS)[1]

    text = present(jax.jit(fn).lower(rows, placed).compile().as_text())
    assert "all-gather" not in text
    assert "all-to-all" not in text
    assert ("all-reduce" in text) == (cut == "contracted")
    np.testing.assert_allclose(jax.jit(fn)(rows, placed), jax.jit(fn)(x, stack), rtol=1e-5, atol=1e-4)


def test_a_stack_in_a_shard_map():
    """Rows differ between devices, the stack and the index do not."""
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("t",))
    stack, x = stack_of(SPECS["uint4 g64 zero"], 128, 32), unequal(1, (4, 128))
    fn = lambda x, stack: by_layer(x, layer_of(stack, jnp.int32(1)))  # noqa: E731
    whole = jax.jit(fn)(x, stack)
    # Pallas' interpreter does not keep track of what varies.
    each = jax.shard_map(fn, mesh=mesh, in_specs=(P("t"), P()), out_specs=P("t"), check_vma=False)
    np.testing.assert_allclose(jax.jit(each)(x, stack), whole, rtol=1e-6, atol=1e-6 * np.abs(whole).max())


def test_rows_are_quantized_where_they_are():
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("d",))
    x = unequal(0, (4, 3, 48))
    fn = lambda x: rows_at_once(x, INT8, (-1,), interpret=True)  # noqa: E731
    placed = on_devices(x, mesh, P("d"))
    text = present(jax.jit(fn).lower(placed).compile().as_text())
    assert "all-gather" not in text
    wanted = jax.jit(fn)(x)
    for found in (jax.jit(fn)(placed), jax.jit(jax.vmap(fn))(x)):
        np.testing.assert_array_equal(found.codes, wanted.codes)
        np.testing.assert_array_equal(found.scale, wanted.scale)


def kernel_of(spec, k=64, n=32, *, dtype=jnp.bfloat16, axes=None, act=None):
    """What is chosen for CUDA, from shapes."""
    q = jax.eval_shape(
        lambda: laid_out(jq.quantize(jnp.zeros((k, n)), spec, reduce_axes=(-2,)), "elements").replace(dtype=dtype)
    )
    x: Any = jax.ShapeDtypeStruct((8, k), dtype)
    left, right = axes or (Axes((), (0,), (1,)), Axes((), (1,), (0,)))
    return select(Product.of(x, q, left, right, None, dtype), Target("cuda"))


@pytest.mark.parametrize("name", SPECS)
def test_what_is_taken(name):
    assert kernel_of(SPECS[name], 384).name == "bfloat16, decoded by Triton"


def test_what_is_left_to_xla():
    """One conversion is fused into the product. What the kernel has no blocks for is not lost either."""
    assert kernel_of(jq.QuantSpec("int4")).name == "bfloat16, decoded"
    assert "Triton" not in kernel_of(jq.QuantSpec("int8")).name
    assert "Triton" not in kernel_of(jq.QuantSpec("int4", group_size=8, **GROUPS)).name
    assert kernel_of(SPECS["int4 g32"], dtype=jnp.float32).name == "float32, decoded by Triton"


def layer_kernel(spec, rows=8, act=None):
    """What is chosen for CUDA, for a layer of a stack."""
    stack = jax.eval_shape(lambda: stack_of(spec, 512, 32, dtype=jnp.bfloat16))
    w = jax.eval_shape(layer_of, stack, jax.ShapeDtypeStruct((), jnp.int32))
    x: Any = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
    x = x if act is None else jax.eval_shape(lambda x: jq.quantize(x, act, reduce_axes=(-1,)), x)
    return select(
        Product.of(x, w, Axes((), (0,), (1,)), Axes((), (1,), (0,)), None, jnp.bfloat16), Target("cuda", "H100")
    )


def test_what_is_taken_of_a_stack():
    """Few rows by 8-bit codes, which XLA multiplies where they are no layer; all rows by int4."""
    for spec in (INT8, E4M3, jq.QuantSpec("uint8", symmetric=False), jq.QuantSpec("dynamic8")):
        assert layer_kernel(spec).name == "bfloat16, decoded by Triton"
        assert "Triton" not in layer_kernel(spec, 300).name
    assert layer_kernel(jq.QuantSpec("int4"), 300).name == "bfloat16, decoded by Triton"
    assert isinstance(layer_kernel(INT8, act=INT8), TritonInt8)
    assert isinstance(layer_kernel(E4M3, act=E4M3), TritonFloat8)
    for spec, where in ((recipes.w8a16(), True), (recipes.w4a16(None), True), (recipes.w8a16(), False)):
        name = predicted(8, 512, 512, spec, "bfloat16", target=Target("cuda", "H100"), in_stack=where)
        assert ("Triton" in name) == where


@pytest.mark.parametrize(
    "spec", slow_but([jq.QuantSpec("int8"), jq.QuantSpec("uint8", symmetric=False)], jq.QuantSpec("int8"))
)
@pytest.mark.parametrize("act", slow_but([None, jq.QuantSpec("int8")], None))
def test_bytes_of_a_layer(spec, act):
    """One scale per column, with zero points too, and int8 activations: exact sums."""
    stack, x = stack_of(spec, 96, 40), unequal(1, (5, 96))
    x = x if act is None else jq.quantize(x, act, reduce_axes=(-1,))
    found = jax.jit(lambda x, stack, i: by_layer(x, layer_of(stack, i)))(x, stack, jnp.int32(2))
    one = jax.tree.map(lambda v: v[2], stack)
    assert dot_error(found, real(x), real(one), (((1,), (0,)), ((), ()))) <= 1e-6


@pytest.mark.parametrize("minor", [(), (-2,)])
def test_int8_on_both_sides(minor):
    """As codes are stored, along either axis: exact sums, scaled before they are written."""
    q = jq.quantize(unequal(0, (96, 40)), INT8, reduce_axes=(-2,)).store(minor)
    x = jq.quantize(unequal(1, (70, 96)), INT8, reduce_axes=(-1,))
    axes = Axes((), (0,), (1,)), Axes((), (1,), (0,))
    problem = Product.of(x, q, *axes, None, jnp.float32)
    assert isinstance(select(problem, Target("cuda")), TritonInt8)
    assert dot_error(ran(problem, jnp.float32), real(x), real(q), (((1,), (0,)), ((), ()))) <= 1e-6
    row: Any = jax.ShapeDtypeStruct((1, 96), jnp.float32)
    few = Product.of(row, q, *axes, None, jnp.float32)
    assert not isinstance(select(few, Target("cuda")), TritonInt8)


@pytest.mark.parametrize("minor", slow_but([(), (-2,)], (-2,)))
def test_float8_on_both_sides(minor):
    """Codes are multiplied as they are. Only chips that multiply float8 run it: Triton aborts for others."""
    q = jax.jit(lambda w: jq.quantize(w, E4M3, reduce_axes=(-2,)).store(minor))(unequal(0, (96, 40)))
    x = jax.jit(lambda x: jq.quantize(x, E4M3, reduce_axes=(-1,)))(unequal(1, (70, 96)))
    axes = Axes((), (0,), (1,)), Axes((), (1,), (0,))
    problem = Product.of(x, q, *axes, None, jnp.float32)
    for chip in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA L4", "NVIDIA GeForce RTX 4090"):
        assert isinstance(select(problem, Target("cuda", chip)), TritonFloat8)
    for chip in (None, "NVIDIA A100-SXM4-80GB", "NVIDIA L4000", "NVIDIA GeForce RTX 3090"):
        assert not isinstance(select(problem, Target("cuda", chip)), TritonFloat8)
    highest = Product.of(x, q, *axes, lax.Precision.HIGHEST, jnp.float32)
    assert not isinstance(select(highest, Target("cuda", "NVIDIA H200")), TritonFloat8)
    assert dot_error(ran(problem, jnp.float8_e4m3fn), real(x), real(q), (((1,), (0,)), ((), ()))) <= 1e-6


ROWS = slow_but([(5, 300), (3, 7, 1000), (40, 16), (1, 64)], (40, 16))


@makes_nan
@pytest.mark.parametrize("dtype", slow_but([jnp.float32, jnp.bfloat16, jnp.float16], jnp.bfloat16))
@pytest.mark.parametrize("shape", ROWS)
def test_rows_are_quantized_as_everywhere(shape, dtype):
    """To the bit: ties, infinities, zeros, NaN, numbers at both ends of float32."""
    x = np.array(unequal(0, shape, decades=4.0)).reshape(-1, shape[-1])
    x[0, :3], x[-1, :5] = (np.inf, -np.inf, 0), (1, -1, 127, 63.5, -0.5)
    if len(x) > 8:
        x[3], x[4, 2], x[5], x[6], x[7] = 0, np.nan, 1e-45, 3e38, 1e-38
    with np.errstate(over="ignore"):  # of float16, where 3e38 is infinite
        x = jax.device_put(x.reshape(shape).astype(dtype))
    wanted = jax.jit(lambda x: as_codes(x, INT8, (-1,)))(x)
    found = jax.jit(lambda x: rows_at_once(x, INT8, (-1,), interpret=True))(x)
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.scale, wanted.scale)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)


def test_blocks_follow_the_processor():
    """Few rows: programs for all processors, and sums of parts that are small beside the weight."""
    w = functools.partial(Decoding, jq.QuantSpec("int4").type, "nibbles", k_last=False)
    for rows in (1, 8, 64, 512, 4096):
        for k, n in ((4096, 4096), (14336, 4096), (4096, 512), (192, 48)):
            b = blocks(rows, w(length=k, columns=n, groups=k // 64 if k % 64 == 0 else 1))
            assert b.depth * b.slices <= 2 * k
            assert 8 * b.parts * rows * n <= k * n / 2 / 16 or b.parts == 1
            assert b.rows * b.slices <= 128
    assert blocks(1, w(length=4096, columns=4096, groups=32)).parts > 1
    assert blocks(4096, w(length=4096, columns=4096, groups=32)).rows == 128

"""The ragged product of GPUs, in Pallas' interpreter: each row times the dequantized matrix of its own expert.

How it compiles for an H100 is read in tests/programs.
"""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from narrowed import present
from ops_reference import slow_but, unequal
from ragged_reference import SIZES, by_expert, grouped

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core import views
from jaxquant.core.by_platform import Target
from jaxquant.ops import select as selection
from jaxquant.ops.kernel import kernel as predicted
from jaxquant.ops.kernels.gpu.ragged import TritonExperts, TritonFloat8Experts, run
from jaxquant.ops.kernels.segments import Segments, most_tiles
from jaxquant.ops.problem import RaggedProduct
from jaxquant.ops.select import select

SPECS = {
    "int8": jq.QuantSpec("int8"),
    "int4": jq.QuantSpec("int4"),
    "int4 g64": grouped("int4", 64),
    "uint4 g16 zero": grouped("uint4", 16, symmetric=False),
    "uint8 zero": jq.QuantSpec("uint8", symmetric=False),
    "two-level": recipes.w4a16(64, two_level=True).weight,
    "float8_e4m3fn": jq.QuantSpec("float8_e4m3fn"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "nf4": grouped("nf4", 64),
}
E4M3 = jq.QuantSpec("float8_e4m3fn")
K, N, LAYERS = 128, 34, 3
CUDA, H100 = Target("cuda"), Target("cuda", "NVIDIA H100 80GB HBM3")


def experts(name: str, *lead: int, k: int = K, n: int = N, dtype: Any = jnp.float32, seed: int = 0) -> jq.QTensor:
    make = lambda w: jq.quantize(w, SPECS[name], reduce_axes=(-2,))  # noqa: E731
    for _ in lead:
        make = jax.vmap(make)
    return jq.ops.lay_out(jax.jit(make)(unequal(seed, (*lead, 4, k, n))), "gpu").replace(dtype=jnp.dtype(dtype))


def ran(x: Any, w: jq.QTensor, sizes: Any, target: Target = CUDA) -> np.ndarray:
    """The product in the interpreter, by the kernel that is chosen for a GPU."""

    def fn(x: Any, w: jq.QTensor, sizes: jax.Array) -> jax.Array:
        problem = RaggedProduct(x, w, None, jnp.float32, sizes)
        kernel = select(problem, target)
        assert isinstance(kernel, TritonExperts)
        return run(problem, kernel.dtype, interpret=True)

    return np.asarray(jax.jit(fn)(x, w, jnp.asarray(sizes)), np.float64)


@pytest.mark.parametrize("rows", slow_but(SIZES, "few", "none"))
@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("name", slow_but(SPECS, "int8", "uint4 g16 zero", "nf4"))
def test_each_row_by_its_expert(name: str, act: str | None, rows: str):
    m, sizes = SIZES[rows]
    x, w = unequal(1, (m, K)), experts(name)
    x = x if act is None else jq.quantize(x, jq.QuantSpec(act), reduce_axes=(-1,))
    got, (want, terms) = ran(x, w, sizes), by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)
    assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("name", slow_but(SPECS, "int8", "int4 g64"))
def test_experts_as_checkpoints_have_them(name: str):
    """[experts, outputs, inputs], seen as [experts, inputs, outputs]."""
    m, sizes = SIZES["few"]
    q = jq.ops.lay_out(jq.quantize(unequal(0, (4, N, K)), SPECS[name], reduce_axes=(-1,)), "gpu")
    x, w = unequal(1, (m, K)), views.transpose(q, (0, 2, 1))
    got, (want, terms) = ran(x, w, sizes), by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


@pytest.mark.parametrize("name", slow_but(SPECS, "int4 g64"))
def test_in_bfloat16(name: str):
    m, sizes = SIZES["few"]
    x, w = unequal(1, (m, K), jnp.bfloat16), experts(name, dtype=jnp.bfloat16)
    got, (want, terms) = ran(x, w, sizes), by_expert(x, w, sizes)
    exact = name in ("int8", "int4", "int4 g64", "float8_e4m3fn", "mxfp8", "mxfp4")
    assert np.all(np.abs(got - want) <= (1e-6 if exact else 2**-8) * terms)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "mxfp8"])
def test_activations_in_fp8(name: str):
    """With one scale on each side as float8, on chips that multiply it; otherwise as values."""
    m, sizes = SIZES["few"]
    x, w = jq.quantize(unequal(1, (m, K)), E4M3, reduce_axes=(-1,)), experts(name)
    want, terms = by_expert(x, w, sizes)
    for target in (CUDA, H100):
        kernel = select(RaggedProduct(x, w, None, jnp.float32, jnp.asarray(sizes)), target)
        assert isinstance(kernel, TritonFloat8Experts) == (name == "float8_e4m3fn" and target is H100)
        assert np.all(np.abs(ran(x, w, sizes, target) - want) <= 1e-6 * terms)


@pytest.mark.parametrize("sizes", [(1056, 33), (4096, 32)])
def test_odd_sizes_and_parts_of_k(sizes: tuple[int, int]):
    """Where k is in parts, each is scaled before they are summed."""
    k, n = sizes
    x, w = unequal(1, (3, k)), experts("two-level" if k == 4096 else "uint4 g16 zero", k=k, n=n)
    got, (want, terms) = ran(x, w, (1, 0, 2, 0)), by_expert(x, w, (1, 0, 2, 0))
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


def test_experts_whose_contracted_axis_is_stored_last():
    w = jq.quantize(unequal(0, (4, N, K)), SPECS["int4 g64"], reduce_axes=(-1,))
    turned = jax.jit(lambda w: views.transpose(jq.ops.lay_out(w, "gpu"), (0, 2, 1)))(w)
    x, (m, sizes) = unequal(1, (10, K)), SIZES["few"]
    got, (want, terms) = ran(x, turned, sizes), by_expert(x, turned, sizes)
    assert m == len(x)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


def in_layer(x: Any, stack: jq.QTensor, index: Any, sizes: Any) -> jax.Array:
    """The product by the experts of a layer, with codes in the stack."""
    w = jax.tree.map(lambda v: v[index], stack).layer_of(stack, index)
    return run(RaggedProduct(x, w, None, jnp.float32, sizes), jnp.float32, interpret=True)


@pytest.mark.parametrize("name", slow_but(SPECS, "int8", "two-level"))
def test_a_layer_of_a_stack(name: str):
    m, sizes = SIZES["few"]
    x, stack = unequal(1, (m, K)), experts(name, LAYERS)
    got = jax.jit(in_layer)(x, stack, jnp.int32(2), jnp.asarray(sizes))
    np.testing.assert_array_equal(got, ran(x, jax.tree.map(lambda v: v[2], stack), sizes))


VMAPPED = {  # whether rows, stacks, layers and sizes are mapped
    "rows": (0, None, None, 0),
    "sizes": (None, None, None, 0),
    "stacks": (None, 0, None, None),
    "layers": (0, None, 0, None),
    "all": (0, 0, 0, 0),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", slow_but(VMAPPED, "rows", "all"))
def test_vmap(name: str, stacked: bool):
    """Each as on its own, with codes in the stack or cut out."""
    x, sizes = unequal(9, (3, 10, 32)), jnp.asarray([(3, 0, 4, 1), (0, 0, 0, 12), (1, 2, 3, 4)])  # 12 of 10 rows: all
    each = [experts("uint4 g16 zero", LAYERS, k=32, n=6, seed=s) for s in range(3)]
    args = x, jax.tree.map(lambda *v: jnp.stack(v), *each), jnp.array([2, 0, 1], jnp.int32), sizes
    mapped = VMAPPED[name]

    def one(x: Any, stack: jq.QTensor, index: Any, sizes: Any) -> jax.Array:
        if stacked:
            return in_layer(x, stack, index, sizes)
        w = jax.tree.map(lambda v: v[index], stack)
        return run(RaggedProduct(x, w, None, jnp.float32, sizes), jnp.float32, interpret=True)

    given = [v if i == 0 else jax.tree.map(lambda v: v[0], v) for v, i in zip(args, mapped, strict=True)]
    got = jax.jit(jax.vmap(one, mapped))(*given)
    for j in range(3):
        row, stack, index, size = (
            jax.tree.map(lambda v: v[j if i == 0 else 0], v)  # noqa: B023
            for v, i in zip(args, mapped, strict=True)
        )
        want, terms = by_expert(row, jax.tree.map(lambda v: v[index], stack), tuple(int(n) for n in size))  # noqa: B023
        assert np.all(np.abs(np.asarray(got[j], np.float64) - want) <= 1e-6 * terms)


@pytest.mark.skipif(
    "factor_sizes" not in inspect.signature(custom_partitioning.def_partition).parameters,
    reason="the partitioner of an older JAX cannot be told which axes go together",
)
@pytest.mark.parametrize("cut", slow_but(["columns", "contracted", "experts", "rows"], "experts", "rows"))
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_stay_where_they_are(cut: str, stacked: bool):
    """Each device multiplies by its part of the experts; sums, and results of other experts, are added."""
    mesh, (m, sizes) = Mesh(np.asarray(jax.devices()[:2]), ("t",)), SIZES["few"]
    e, k, n, rows = (("t" if cut == name else None) for name in ("experts", "contracted", "columns", "rows"))
    stack, x = experts("uint4 g16 zero", LAYERS, k=2 * K, n=32), unequal(1, (m, 2 * K))
    put = lambda v, *axes: jax.device_put(v, NamedSharding(mesh, P(*axes)))  # noqa: E731
    placed = jax.tree.map(lambda v: put(v, None, e, k, *(None,) * (v.ndim - 4), n), stack)

    def fn(x: Any, stack: jq.QTensor, sizes: Any) -> jax.Array:
        if stacked:
            return in_layer(x, stack, jnp.int32(1), sizes)
        w = jax.tree.map(lambda v: v[1], stack)
        return run(RaggedProduct(x, w, None, jnp.float32, sizes), jnp.float32, interpret=True)

    args = put(x, rows, k), placed, put(jnp.asarray(sizes))
    text = present(jax.jit(fn).lower(*args).compile().as_text())
    assert set(re.findall(r"= (\w+)\[.* all-gather\(", text)) <= {"s32", "s64"}  # the rows of each expert
    assert "all-to-all" not in text
    assert ("all-reduce" in text) == (cut in ("contracted", "experts"))
    want, terms = by_expert(x, jax.tree.map(lambda v: v[1], stack), sizes)
    assert np.all(np.abs(np.asarray(jax.jit(fn)(*args), np.float64) - want) <= 1e-6 * terms)


def test_a_shard_map():
    """Rows and sizes differ between devices; experts do not."""
    mesh, w, x = Mesh(np.asarray(jax.devices()[:2]), ("t",)), experts("int4 g64"), unequal(1, (8, K))
    sizes = jnp.asarray([(3, 0, 1, 0), (0, 2, 1, 1)])

    def fn(x: Any, w: jq.QTensor, sizes: Any) -> jax.Array:
        return run(RaggedProduct(x, w, None, jnp.float32, sizes[0]), jnp.float32, interpret=True)

    # Pallas' interpreter does not keep track of what varies.
    each = jax.shard_map(fn, mesh=mesh, in_specs=(P("t"), P(), P("t")), out_specs=P("t"), check_vma=False)
    got = np.asarray(jax.jit(each)(x, w, sizes), np.float64)
    for i in range(2):
        want, terms = by_expert(x[4 * i : 4 * i + 4], w, tuple(int(n) for n in sizes[i]))
        assert np.all(np.abs(got[4 * i : 4 * i + 4] - want) <= 1e-6 * terms)


def test_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch):
    """A scan over layers of experts finds them in their stack; its value and gradient are the float model's."""
    met = []

    class Interpreted(TritonExperts):
        platforms = ("cpu",)

        def run(self, problem: RaggedProduct) -> jax.Array:
            met.append(problem.weight.layer is not None)
            return run(problem, self.dtype, interpret=True)

    monkeypatch.setattr(selection, "TABLE", (Interpreted, *selection.TABLE))
    sizes = jnp.asarray([2, 0, 3, 1])

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(lax.ragged_dot(x, w, sizes)), None), x, p["w"])[0]

    params, x = {"w": unequal(0, (LAYERS, 4, 64, 64), decades=0.5) / 8}, unequal(1, (6, 64))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w4a16(32))])
    stored = jq.quantize_params(params, plan, target="gpu")

    def both(fn: Any, p: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(fn(p, x))))(x)

    (got, slope), (want, exact) = both(jq.quantized(fn, plan), stored), both(fn, jq.dequantize_params(stored))
    assert met
    assert all(met)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("size", [8, 128])
def test_tiles_have_every_row_once(rows: str, size: int):
    m, sizes = SIZES[rows]
    end = jnp.cumsum(jnp.asarray(sizes, jnp.int32))
    expert = jnp.arange(4, dtype=jnp.int32)
    segments = Segments(end - jnp.asarray(sizes), end, expert, expert + 8)
    tiles = np.asarray(segments.tiles(m, size))
    assert len(tiles) == most_tiles(m, 4, size)
    seen = np.full(m, -1)
    for e, place, first, stop in tiles:
        at = np.arange(first, min(stop, first + size))
        assert place == e + 8
        assert np.all(seen[at] == -1)
        seen[at] = e
    np.testing.assert_array_equal(seen[: sum(sizes)], np.repeat(np.arange(4), sizes))
    assert np.all(seen[sum(sizes) :] == -1)
    np.testing.assert_array_equal(segments.cover(jnp.arange(m)), seen >= 0)


def test_what_is_taken():
    """The plan names the kernel; others are left to XLA."""
    x, sizes = jnp.ones((6, K), jnp.float32), jnp.asarray([2, 2, 0, 2])
    name = lambda x, w: select(RaggedProduct(x, w, None, jnp.float32, sizes), CUDA).name  # noqa: E731
    codes = jq.quantize(x, jq.QuantSpec("int8"), reduce_axes=(-1,))
    assert name(x, experts("int4 g64")) == "float32, decoded by Triton"
    assert name(codes, experts("int8")) == "int8, scaled by Triton"
    packed = jq.quantize(jnp.ones((4, K, N)), SPECS["int4 g64"], reduce_axes=(-2,))
    assert "Triton" not in name(x, packed)
    assert "Triton" not in name(x, jnp.ones((4, K, N)))
    group = jq.ops.lay_out(jq.quantize(jnp.ones((4, 120, N)), grouped("int4", 24), reduce_axes=(-2,)), "gpu")
    assert "Triton" not in name(jnp.ones((6, 120)), group)
    assert predicted(8, 64, 128, recipes.w4a16(64), "bfloat16", "ragged_dot", target=CUDA) == (
        "bfloat16, decoded by Triton"
    )

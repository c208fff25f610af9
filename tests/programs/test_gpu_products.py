"""Products as the GPU compiler makes them for an H100: codes are what is read, and no float weight is written."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import ops, recipes

plugins = importlib.util.find_spec("jax_plugins")
pytestmark = [
    pytest.mark.every,
    pytest.mark.skipif(
        plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None, reason="needs aot-gpu"
    ),
]

K, N = 1024, 2048
MATMUL = (((1,), (0,)), ((), ()))
GROUPS = {"granularity": "per_group", "group_size": 64}
SCHEMES: dict[str, Any] = {
    "w4a16 g128": recipes.w4a16(128),
    "w4a16 g32 zero": recipes.w4a16(32, symmetric=False),
    "two-level": recipes.w4a16(128, two_level=True),
    "w4a8": recipes.w4a8(128),
    "nf4": recipes.nf4(64),
    "mxfp4": recipes.mxfp4(),
    "nvfp4": recipes.nvfp4(),
    "mxfp8": recipes.mxfp8(),
    "int3": jq.OpSpec(jq.QuantSpec("int3", **GROUPS)),
}


def weight(spec: Any, *lead: int, k: int = K, n: int = N) -> Any:
    def make(w: jax.Array) -> Any:
        return jq.quantize(w, spec.weight, reduce_axes=(-2,)).store((-2,))

    for _ in lead:
        make = jax.vmap(make)
    return jax.eval_shape(lambda w: jq.ops.lay_out(make(w), "gpu"), jax.ShapeDtypeStruct((*lead, k, n), jnp.bfloat16))


def x(rows: int, k: int = K) -> Any:
    return jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)


def product(spec: Any) -> Any:
    return lambda p, x: ops.dot_general(x, p["w"], MATMUL, spec=spec)


def traffic(found: Any) -> float:
    """Bytes moved, in units of what must be."""
    return 1 + 2 * found.temporaries / (found.arguments + found.results)


@pytest.mark.parametrize("name", SCHEMES)
def test_few_rows(name: str):
    found: Any = jq.explain(product(SCHEMES[name]), {"w": weight(SCHEMES[name])}, x(8), target="h100")
    assert found["w"].written == 0
    assert found["w"].kernels == ("quantized_product",)
    assert traffic(found) <= 1.1


@pytest.mark.parametrize("rows", [1, 64, 512])
def test_other_rows(rows: int):
    found: Any = jq.explain(product(SCHEMES["nvfp4"]), {"w": weight(SCHEMES["nvfp4"])}, x(rows), target="h100")
    assert found["w"].written == 0
    assert found["w"].floor == pytest.approx(max(found["w"].nbytes / 3350e9, 2 * rows * K * N / 989e12))
    assert traffic(found) <= 1.1


def test_int8_activations():
    """An activation is read once and its codes are written and read: nothing else is, and no sum in int32."""
    spec, rows = recipes.w8a8(), 1024
    found: Any = jq.explain(product(spec), {"w": weight(spec)}, x(rows), target="h100")
    assert found.temporaries <= 1.01 * rows * K
    assert found["w"].floor == pytest.approx(2 * rows * K * N / 1979e12)


def test_float8_activations():
    """As int8, on a chip that multiplies float8; an older one multiplies bfloat16."""
    spec, rows = recipes.fp8(), 1024
    found: Any = jq.explain(product(spec), {"w": weight(spec)}, x(rows), target="h100")
    assert found["w"].kernels == ("quantized_product",)
    assert found.temporaries <= 1.01 * rows * K
    assert found["w"].floor == pytest.approx(2 * rows * K * N / 1979e12)
    older: Any = jq.explain(product(spec), {"w": weight(spec)}, x(rows), target="a100")
    assert "bfloat16" in older["w"].kernels
    assert older["w"].floor == pytest.approx(2 * rows * K * N / 312e12)


def test_sizes_that_no_block_divides():
    spec = SCHEMES["w4a16 g32 zero"]
    found: Any = jq.explain(product(spec), {"w": weight(spec, k=1056, n=2047)}, x(3, 1056), target="h100")
    assert found["w"].written == 0
    assert traffic(found) <= 1.1


def test_an_older_gpu():
    found: Any = jq.explain(product(SCHEMES["mxfp8"]), {"w": weight(SCHEMES["mxfp8"])}, x(8), target="a100")
    assert traffic(found) <= 1.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_activations(dtype: Any):
    args = {"w": weight(SCHEMES["nf4"]).replace(dtype=dtype)}, jax.ShapeDtypeStruct((8, K), dtype)
    found: Any = jq.explain(product(SCHEMES["nf4"]), *args, target="h100")
    assert traffic(found) <= 1.1


def test_experts_are_not_decoded_in_memory():
    spec = SCHEMES["w4a16 g128"]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return ops.dot_general(x, p["w"], (((2,), (1,)), ((0,), (0,))), spec=spec)

    args = {"w": weight(spec, 4)}, jax.ShapeDtypeStruct((4, 256, K), jnp.bfloat16)
    found: Any = jq.explain(fn, *args, target="h100")
    assert traffic(found) <= 1.1
    assert found["w"].floor == pytest.approx(4 * 2 * 256 * K * N / 989e12)


RAGGED: dict[str, Any] = SCHEMES | {"w8a16": recipes.w8a16(), "w8a8": recipes.w8a8(), "fp8": recipes.fp8()}


@pytest.mark.parametrize("name", RAGGED)
def test_rows_are_multiplied_by_their_own_expert(name: str):
    """Experts are not decoded in memory, and no row is multiplied by all of them."""
    spec, rows = RAGGED[name], 512

    def fn(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return ops.ragged_dot(x, p["w"], sizes, spec=spec)

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    found: Any = jq.explain(fn, {"w": weight(spec, 4)}, x(rows), sizes, target="h100")
    assert found["w"].kernels == ("quantized_product",)
    assert found["w"].written == 0
    assert found.temporaries <= 2 * rows * K + 8 * rows  # an activation, quantized
    peak = 989e12 if spec.act is None else 1979e12
    assert found["w"].floor == pytest.approx(max(found["w"].nbytes / 3350e9, 2 * rows * K * N / peak))


def test_experts_are_read_in_their_stack():
    sizes = jnp.arange(4, dtype=jnp.int32)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (lax.ragged_dot(x, w, sizes), None), x, p["w"])[0]

    apply, params = scanned(SCHEMES["w4a16 g128"], fn, (LAYERS, 4, K, K))
    found: Any = jq.explain(apply, params, x(8), target="h100")
    assert found["w"].kernels == ("quantized_product",)
    assert found.temporaries <= 0.02 * 2 * 4 * K * K


@pytest.mark.parametrize(("axis", "moved"), [(0, "all-reduce"), (1, "all-reduce"), (2, None)])
def test_experts_on_several_devices(axis: int, moved: str | None):
    """Experts, contracted channels or columns on each device; codes and scales stay where they are."""
    mesh, spec = AbstractMesh((2,), ("t",)), SCHEMES["w4a16 g128"]

    def placed(v: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P(*axes)))

    def of_weight(v: Any) -> Any:
        e, k, n = ("t" if axis == i else None for i in range(3))
        return placed(v, e, k, *(None,) * (v.ndim - 3), n)

    def fn(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
        return ops.ragged_dot(x, p["w"], sizes, spec=spec)

    sizes = jax.ShapeDtypeStruct((4,), jnp.int32, sharding=NamedSharding(mesh, P()))
    rows = placed(x(8), None, "t" if axis == 1 else None)
    found: Any = jq.explain(fn, {"w": jax.tree.map(of_weight, weight(spec, 4))}, rows, sizes, target="h100")
    assert {c.kind for c in found.collectives} == ({moved} if moved else set())
    assert found["w"].kernels == ("quantized_product",)
    assert found.temporaries <= 0.02 * 2 * 4 * K * N


LAYERS = 6
STACKED: dict[str, Any] = SCHEMES | {
    "w4a16 channel": recipes.w4a16(None),
    "w8a16": recipes.w8a16(),
    "w8a8": recipes.w8a8(),
    "fp8": recipes.fp8(),
    "uint8": jq.OpSpec(jq.QuantSpec("uint8", symmetric=False)),
}


def scanned(spec: Any, fn: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """A model with one weight, and its weights as a GPU has them."""
    w = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    plan = jq.make_plan(fn, w, x(8, shape[-1]), rules=[jq.Rule(".*", spec)])
    return jq.quantized(fn, plan), jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="gpu"), w)


def forward(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]


def backward(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (x @ w.T, None), x, p["w"], reverse=True)[0]


def copies(found: Any) -> float:
    """Bytes of temporaries, in units of a layer in bfloat16."""
    return found.temporaries / (2 * N * N)


@pytest.mark.parametrize("name", STACKED)
@pytest.mark.parametrize("fn", [forward, backward])
def test_layers_are_read_in_their_stack(name: str, fn: Any):
    """Nothing of the size of a layer is written, in any order of the weight's axes: what is are sums of parts of k."""
    apply, params = scanned(STACKED[name], fn, (LAYERS, N, N))
    found: Any = jq.explain(apply, params, x(8, N), target="h100")
    assert found["w"].kernels == ("quantized_product",)
    assert found["w"].written == 0
    assert copies(found) < 0.03
    assert traffic(found) <= 1.1


def test_a_gradient_reads_layers_in_their_stack():
    """In the forward product. Those by the transpose of a layer are XLA's, which decodes one layer at a time."""
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]  # noqa: E731
    apply, params = scanned(STACKED["w4a16 g128"], fn, (LAYERS, N, N))

    def slope(p: Any, x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(apply(p, x).astype(jnp.float32)))(x)

    found: Any = jq.explain(slope, params, x(8, N), target="h100")
    assert "quantized_product" in found["w"].kernels
    assert copies(found) < 1.5


@pytest.mark.parametrize("layers, is_copied", [(16, False), (20, True), (40, False)])
def test_stacks_beyond_the_numbers_of_int32(layers: int, is_copied: bool):
    """Pallas counts bytes in 64 bits from 4 GiB on, and in 32 with a sign below."""
    width = 16384
    apply, params = scanned(STACKED["w4a16 g128"], forward, (layers, width, width))
    found: Any = jq.explain(apply, params, x(8, width), target="h100")
    assert (found.temporaries > width * width / 2) == is_copied
    assert found["w"].kernels == ("quantized_product",)


@pytest.mark.parametrize(
    "k, n, m, moved",
    [
        (None, "t", None, set()),
        ("t", None, None, {("reduce-scatter", "bf16")}),
        ("t", None, "t", {("all-gather", "u8"), ("all-gather", "f32")}),
    ],
)
def test_a_stack_on_several_devices(k: Any, n: Any, m: Any, moved: set[tuple[str, str]]):
    """Each device reads its part of a layer in its part of the stack; what is gathered is one layer at a time."""
    mesh = AbstractMesh((2,), ("t",))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        put = lambda x: lax.with_sharding_constraint(x, NamedSharding(mesh, P(m, None if m else n)))  # noqa: E731
        return lax.scan(lambda x, w: (put(x @ w), None), x, p["w"])[0]

    def placed(v: Any, axes: P) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, axes))

    apply, params = scanned(STACKED["w4a16 g128"], fn, (LAYERS, N, N))
    params = jax.tree.map(lambda v: placed(v, P(None, k, *(None,) * (v.ndim - 3), n)), params)
    found: Any = jq.explain(apply, params, placed(x(8, N), P(m)), target="h100")
    kinds = {(c.kind, c.dtype) for c in found.collectives}
    assert {kind for kind in kinds if kind != ("all-gather", "bf16")} == moved  # activations are gathered
    assert found["w"].kernels == ("quantized_product",)
    assert all(c.nbytes <= LAYERS * N * N / 2 for c in found.collectives)
    assert copies(found) < (0.03 if m is None else 0.5)


def test_a_stack_in_a_shard_map():
    """Rows differ between devices, the stack and the index do not."""
    mesh = AbstractMesh((2,), ("t",))

    def fn(p: Any, x: jax.Array) -> jax.Array:
        each = jax.shard_map(forward, mesh=mesh, in_specs=({"w": P()}, P("t")), out_specs=P("t"))
        return each(p, x)

    def placed(v: Any, axes: P) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, axes))

    apply, params = scanned(STACKED["w4a16 g128"], fn, (LAYERS, N, N))
    params = jax.tree.map(lambda v: placed(v, P()), params)
    found: Any = jq.explain(apply, params, placed(x(8, N), P("t")), target="h100")
    assert found["w"].written == 0
    assert copies(found) < 0.03


def test_layers_that_a_plain_scan_slices_are_not_decoded_in_memory():
    """Without `jq.quantized` a layer is copied out of the stack, as it is: XLA hands no kernel a part of an array."""
    spec = SCHEMES["w4a16 g128"]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, q: (ops.dot_general(x, q, MATMUL, spec=spec), None), x, p["w"])[0]

    found: Any = jq.explain(fn, {"w": weight(spec, 6, k=N)}, x(8, N), target="h100")
    assert found.temporaries < 0.4 * 2 * N * N  # a layer in four bits is a quarter of its bfloat16


@pytest.mark.parametrize("k, n", [(None, "t"), ("t", None)])
def test_several_devices(k: Any, n: Any):
    """Codes are not gathered, and what is reduced is what the bfloat16 program reduces."""
    spec, mesh = SCHEMES["w4a16 g128"], AbstractMesh((2,), ("t",))

    def placed(v: Any, axes: P) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, axes))

    w = jax.tree.map(lambda v: placed(v, P(k, *(None,) * (v.ndim - 2), n)), weight(spec))
    found: Any = jq.explain(product(spec), {"w": w}, placed(x(8), P(None, k)), target="h100")
    assert found["w"].written == 0
    kinds = {(c.kind, c.dtype) for c in found.collectives}
    assert kinds == (set() if k is None else {("all-reduce", "bf16")})


def test_shard_map():
    spec, mesh = SCHEMES["w4a8"], AbstractMesh((2,), ("t",))
    w = weight(spec)
    axes = jax.tree.map(lambda v: P(*(None,) * (v.ndim - 1), "t"), w)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.shard_map(
            lambda q, x: ops.dot_general(x, q, MATMUL, spec=spec),
            mesh=mesh,
            in_specs=(axes, P()),
            out_specs=P(None, "t"),
        )(p["w"], x)

    w = jax.tree.map(lambda v, a: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, a)), w, axes)
    found: Any = jq.explain(fn, {"w": w}, x(8), target="h100")
    assert found["w"].written == 0
    assert not found.collectives

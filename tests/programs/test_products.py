"""Products as the TPU compiler makes them: codes are what is read, no float weight is written, and four bits pay."""

import importlib.util
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from narrowed import present

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.costs import products
from jaxquant.programs.estimates import estimate
from jaxquant.programs.hlo import Program

pytestmark = [
    pytest.mark.every,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxquant[aot-tpu]"),
]

SIZE = 2048
MATMUL = (((1,), (0,)), ((), ()))
SCHEMES = {
    "w8a16": recipes.w8a16(),
    "w4a16": recipes.w4a16(None),
    "w4a16 g128": recipes.w4a16(128),
    "w4a16 g64": recipes.w4a16(64),
    "w4a16 g32 zero": recipes.w4a16(32, symmetric=False),
    "w4a8 g128": recipes.w4a8(128),
    "two-level": recipes.w4a16(128, two_level=True),
    "mxfp4": recipes.mxfp4(),
    "fp8": recipes.fp8(),
    "fp8 weights": jq.OpSpec(jq.QuantSpec("float8_e4m3fn")),
    "nf4": recipes.nf4(64),
    "int3": jq.OpSpec(jq.QuantSpec("int3", granularity="per_group", group_size=64)),
}
FASTER = ("w8a16", "fp8 weights", "w4a16")  # by XLA's own product at eight rows, than bfloat16


def weight(spec: jq.OpSpec, *lead: int) -> Any:
    def make(w: jax.Array) -> Any:
        return jq.quantize(w, present(spec.weight), reduce_axes=(-2,)).store((-2,))

    for _ in lead:
        make = jax.vmap(make)
    shape = jax.ShapeDtypeStruct((*lead, SIZE, SIZE), jnp.bfloat16)
    return jax.eval_shape(lambda w: jq.ops.lay_out(make(w), "tpu"), shape)


def x(rows: int) -> Any:
    return jax.ShapeDtypeStruct((rows, SIZE), jnp.bfloat16)


def product(spec: jq.OpSpec) -> Any:
    return lambda p, x: ops.dot_general(x, p["w"], MATMUL, spec=spec)


@pytest.fixture(scope="module")
def float_seconds() -> float:
    args = x(8), jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16)
    found = estimate(compiled_for("test", "tpu v5e", jnp.dot, args)).seconds
    assert found is not None
    return found


@pytest.mark.parametrize("name", SCHEMES)
def test_few_rows(name: str, float_seconds: float):
    spec = SCHEMES[name]
    q = weight(spec)
    found: Any = jq.explain(product(spec), {"w": q}, x(8), target="tpu v5e")
    assert found["w"].written == 0
    assert "dequantized" not in found["w"].kernels
    assert found.temporaries < 0.02 * 2 * SIZE * SIZE
    read = q.nbytes + 2 * 8 * SIZE * 2
    assert found.arguments + found.results < 1.15 * read  # 4 bits are half a byte there, and so is the rest of it
    if found["w"].kernels == ("grouped_sums",) or SCHEMES[name].act is not None:
        assert found.missing.endswith("not asked for")
    elif name in FASTER:
        assert found.seconds < float_seconds


@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_one_row_is_multiplied_in_the_matrix_unit(name: str):
    """The bfloat16 program of one row is not: it takes several times as long as that of eight."""
    params = {"w": weight(SCHEMES[name])}
    one, eight = (jq.explain(product(SCHEMES[name]), params, x(m), target="tpu v5e").seconds for m in (1, 8))
    assert one is not None
    assert eight is not None
    assert one < 1.2 * eight


@pytest.mark.parametrize("name", ["w4a16 g128", "w4a16 g32 zero", "mxfp4", "fp8 weights"])
def test_layers_of_a_stack_are_neither_copied_nor_decoded(name: str):
    spec = SCHEMES[name]

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, q: (ops.dot_general(x, q, MATMUL, spec=spec), None), x, p["w"])[0]

    found: Any = jq.explain(fn, {"w": weight(spec, 6)}, x(8), target="tpu v5e")
    assert found["w"].written == 0
    assert found.temporaries < 0.02 * 2 * SIZE * SIZE


@pytest.mark.usefixtures("scheduled")
def test_a_kernel_is_estimated_by_its_own_schedule(float_seconds: float):
    """Four bits in groups are 2.5 times as fast as bfloat16 at least, and not below the floor."""
    spec = SCHEMES["w4a16 g128"]
    found: Any = jq.explain(product(spec), {"w": weight(spec)}, x(8), target="tpu v5e")
    assert found.missing == ""
    assert found.floor <= found.seconds < float_seconds / 2.5
    assert found["w"].floor <= found["w"].seconds <= found.seconds
    assert found.target.compiler.endswith("of kernels their own schedules")


@pytest.mark.parametrize(
    ("target", "name", "chip", "dtype"),
    [("tpu", "w4a16 g128", "tpu v5e", "bfloat16"), ("tpu", "w4a8 g128", "tpu v6e", "int8")],
)
def test_the_floor_of_a_kernel_is_that_of_the_product_by_xla(target: Literal["tpu"], name: str, chip: str, dtype: str):
    """The arithmetic counts once, at the peak of what the scheme multiplies; of three examples in a `vmap`, thrice."""
    spec, shape, rows = SCHEMES[name], (512, 512), (3, 256)
    q = jax.eval_shape(
        lambda w: jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)), target),
        jax.ShapeDtypeStruct(shape, jnp.bfloat16),
    )
    of_kernel = jax.vmap(product(spec), (None, 0))
    given = jax.ShapeDtypeStruct((*rows, shape[0]), jnp.bfloat16)
    use = jq.explain(of_kernel, {"w": q}, given, target=chip)["w"]
    assert use.kernels == ("grouped_values",)
    codes = tuple(jax.ShapeDtypeStruct(s, dtype) for s in ((math.prod(rows), shape[0]), shape))
    (plain,) = (p for *_, p in products(Program(compiled_for("test", chip, jnp.dot, codes).executable.as_text())))
    assert use.floor == pytest.approx(plain.operations / CHIPS[chip].peak(plain.dtype))
    assert present(use.floor) > use.nbytes / CHIPS[chip].bandwidth


@pytest.mark.slow
def test_many_rows_by_a_table_where_bytes_are_gathered():
    """A v6e decodes in a kernel; XLA would transpose the result in memory there. A v5e has no such operation."""
    spec = SCHEMES["nf4"]
    kernels = {
        chip: jq.explain(product(spec), {"w": weight(spec)}, x(256), target=chip)["w"].kernels
        for chip in ("tpu v5e", "tpu v6e")
    }
    assert kernels["tpu v6e"] == ("grouped_values",)
    assert "grouped_values" not in kernels["tpu v5e"]


def test_columns_that_are_not_stored_last():
    """As of a vocabulary over four devices: XLA stores another axis last, and that order stays."""
    spec, shape = SCHEMES["w4a16 g128"], jax.ShapeDtypeStruct((512, 576), jnp.bfloat16)
    q = jax.eval_shape(lambda w: jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)), "tpu"), shape)
    args = {"w": q}, jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    program = Program(compiled_for("test", "tpu v5e", product(spec), args).executable.as_text())
    steps = [i for body in program.computations.values() for i in body.values()]
    columns_last = [i for i in steps if i.arrays[0].size >= shape.size and "{2,1,0:" in i.type]
    assert not columns_last


@pytest.mark.parametrize(
    ("name", "transposed"), [("w4a16 g32 zero", False), ("two-level", False), ("w4a16", False), ("w4a16 g128", True)]
)
def test_kernels_find_layers_in_their_stack(name: str, transposed: bool):
    """A scan takes no layer out of codes, scales or zero points, also of weights that it casts: the kernel has all."""
    shape, args = jax.ShapeDtypeStruct((6, SIZE, SIZE), jnp.float32), x(8)
    turned = (lambda w: w.T) if transposed else (lambda w: w)
    fn = lambda p, x: lax.scan(lambda x, w: (x @ turned(w.astype(x.dtype)), None), x, p["w"])[0]  # noqa: E731
    plan = jq.make_plan(fn, {"w": shape}, args, rules=[jq.Rule("w", SCHEMES[name])])
    params = jax.eval_shape(lambda w: jq.quantize_params({"w": w}, plan, target="tpu"), shape)
    compiled = compiled_for("test", "tpu v5e", jq.quantized(fn, plan), (params, args))
    program = Program(compiled.executable.as_text())
    steps = [(name, i) for name, body in program.computations.items() for i in body.values()]
    (kernel,) = [(name, i) for name, i in steps if i.is_kernel]
    assert (6, SIZE // 128, 128, SIZE) in [a.shape for a in program.operands_of(*kernel)]
    assert not [i for _, i in steps if i.opcode == "dynamic-slice"]
    assert not [i for _, i in steps if i.opcode == "copy" and i.arrays[0].size >= SIZE * SIZE]


@pytest.mark.parametrize(
    ("name", "rows", "chip"), [("w8a8", 2048, "tpu v6e"), ("w8a8", 8, "tpu v5e"), ("w8a16", 8, "tpu v5e")]
)
def test_a_kernel_of_int8_has_the_codes_of_all_layers(name: str, rows: int, chip: str):
    """XLA takes 1.8 times as long as its arithmetic for many rows, and 1.4 to 1.7 times as long as reading for few."""
    spec = recipes.w8a8() if name == "w8a8" else SCHEMES[name]
    shape, args = jax.ShapeDtypeStruct((6, SIZE, SIZE), jnp.bfloat16), x(rows)
    fn = lambda p, x: lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]  # noqa: E731
    plan = jq.make_plan(fn, {"w": shape}, args, rules=[jq.Rule("w", spec)])
    params = jax.eval_shape(lambda w: jq.quantize_params({"w": w}, plan, target="tpu"), shape)
    compiled = compiled_for("test", chip, jq.quantized(fn, plan), (params, args))
    program = Program(compiled.executable.as_text())
    steps = [(name, i) for name, body in program.computations.items() for i in body.values()]
    (kernel,) = [(name, i) for name, i in steps if i.is_kernel and not i.name.startswith("quantized")]
    assert (6, SIZE, SIZE) in [a.shape for a in program.operands_of(*kernel)]
    assert not [i for _, i in steps if i.opcode == "dynamic-slice"]
    assert not [i for _, i in steps if i.opcode == "copy" and i.arrays[0].size >= SIZE * SIZE]
    assert compiled.executable.memory_analysis().temp_size_in_bytes < SIZE * SIZE * 2 * 0.02
    read = (6 * SIZE * (SIZE + 4) + 4 * rows * SIZE) / CHIPS[chip].bandwidth
    multiplied = 6 * 2 * rows * SIZE * SIZE / CHIPS[chip].peak("s8")
    assert estimate(compiled).floor == pytest.approx(max(read, multiplied), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_of_two_bytes(dtype: str):
    """As checkpoints have them; a TPU has no registers of float16."""
    spec = jq.OpSpec(jq.QuantSpec("uint4", granularity=jq.PerGroup(128), symmetric=False, scale_dtype=dtype))
    shape = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    q = jax.eval_shape(lambda w: jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)), "tpu"), shape)
    found: Any = jq.explain(product(spec), {"w": q}, jax.ShapeDtypeStruct((8, 256), jnp.bfloat16), target="tpu v5e")
    assert found["w"].kernels == ("grouped_sums",)


def test_scattered_groups_are_read_by_the_kernel():
    """GPTQ's act-order: the activation is permuted, and no code is."""
    spec, shape = SCHEMES["w4a16 g128"], jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)

    def stored(w: jax.Array) -> jq.QTensor:
        q = jq.quantize(w, present(spec.weight), reduce_axes=(-2,))
        return jq.ops.lay_out(q.store((-2,)).replace(permutation=jnp.arange(256)[:, None]), "tpu")

    args = {"w": jax.eval_shape(stored, shape)}, jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    found: Any = jq.explain(product(spec), *args, target="tpu v5e")
    assert found["w"].kernels == ("grouped_sums",)
    assert found["w"].written == 0


@pytest.mark.parametrize("name", ["w4a16 g128", "w8a16", "mxfp8", "fp8 weights"])
def test_heads_in_a_stack_are_read_there(name: str):
    """As of Flax's attention: the axes of heads, input or output, are joined without a copy of codes."""
    d, heads, size, layers = 1024, 8, 128, 3

    def block(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
        return x + jnp.einsum("bhs,hsd->bd", jnp.einsum("bd,dhs->bhs", x, w["in"]), w["out"]), None

    shapes = {"in": (layers, d, heads, size), "out": (layers, heads, size, d)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}
    fn, args = (lambda p, x: lax.scan(block, x, p)[0]), jax.ShapeDtypeStruct((8, d), jnp.bfloat16)
    plan = jq.make_plan(fn, params, args, rules=[jq.Rule(".*", SCHEMES.get(name, recipes.mxfp8()))])
    stored = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="tpu"), params)
    compiled = compiled_for("test", "tpu v5e", jq.quantized(fn, plan), (stored, args))
    program = Program(compiled.executable.as_text())
    steps = [(name, i) for name, body in program.computations.items() for i in body.values()]
    read = [a for at, i in steps if i.is_kernel for a in program.operands_of(at, i)]
    assert [a.size for a in read].count(layers * d * d) == 2
    moves = [i for _, i in steps if i.opcode in ("dynamic-slice", "copy", "reshape", "transpose")]
    assert not [i for i in moves if i.arrays[0].size >= d * d]


@pytest.mark.parametrize("name", ["w8a8", "w4a16 g128"])
def test_many_heads_are_joined_in_one_pass(name: str):
    """As of Flax's attention in a prefill: no operand has its rows last, which would double an int8 product's time."""
    heads, rows, size, d = 8, 1024, 128, 1024
    shapes = {"w": jax.ShapeDtypeStruct((heads, size, d), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, heads, rows, size), jnp.bfloat16)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.einsum("bshw,hwd->bsd", jnp.swapaxes(x * jnp.bfloat16(2), 1, 2), p["w"])

    plan = jq.make_plan(fn, shapes, x, rules=[jq.Rule(".*", SCHEMES.get(name, recipes.w8a8()))])
    stored = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="tpu"), shapes)
    program = Program(compiled_for("test", "tpu v5e", jq.quantized(fn, plan), (stored, x)).executable.as_text())
    steps = [i for at, body in program.computations.items() if at not in program.fused for i in body.values()]
    passes = [i for i in steps if i.opcode in ("fusion", "copy", "transpose") and i.arrays[0].shape[-1] != d]
    moved = [i for i in steps if i.opcode in ("fusion", "copy", "transpose", "reshape") and "bf16" in i.type]
    assert not [i for i in passes if i.arrays[0].size >= rows * heads * size]
    assert len([i for i in moved if i.arrays[0].size >= rows * heads * size]) <= (2 if name == "w8a8" else 1)


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "fp8", "w4a16 g128"])
def test_sequences_are_split_into_heads_in_one_pass(name: str):
    """The product, by XLA or a kernel, writes tiles of all rows; the pass after it puts them in order."""
    (batch, rows), heads, size, d = (2, 512), 8, 128, 1024
    spec = recipes.w8a8() if name == "w8a8" else SCHEMES[name]
    w, x = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((d, heads * size), (batch, rows, d)))

    def stored(w: jax.Array) -> Any:
        return jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)).store((-2,)), "tpu")

    def fn(w: Any, x: jax.Array) -> jax.Array:
        y = ops.dot_general(x, w, (((2,), (0,)), ((), ())), spec=spec)
        return jnp.swapaxes(y.reshape(batch, rows, heads, size), 1, 2)

    program = Program(compiled_for("test", "tpu v5e", fn, (jax.eval_shape(stored, w), x)).executable.as_text())
    steps = [i for at, body in program.computations.items() if at not in program.fused for i in body.values()]
    moved = [i for i in steps if i.opcode in ("fusion", "copy", "transpose", "reshape", "convolution", "custom-call")]
    assert len([i for i in moved if "s8" not in i.type and i.arrays[0].size == batch * rows * d]) == 2


@pytest.mark.parametrize("name", ["w8a16", "w4a16 g128"])
def test_experts_in_a_stack_are_read_there(name: str):
    shape, args = jax.ShapeDtypeStruct((3, 4, 512, 512), jnp.bfloat16), jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    fn = lambda p, x, n: lax.scan(lambda x, w: (lax.ragged_dot(x, w, n), None), x, p["w"])[0]  # noqa: E731
    plan = jq.make_plan(fn, {"w": shape}, args, sizes, rules=[jq.Rule("w", SCHEMES[name])])
    params = jax.eval_shape(lambda w: jq.quantize_params({"w": w}, plan, target="tpu"), shape)
    compiled = compiled_for("test", "tpu v5e", jq.quantized(fn, plan), (params, args, sizes))
    program = Program(compiled.executable.as_text())
    steps = [(name, i) for name, body in program.computations.items() for i in body.values()]
    kernels = [found for found in steps if found[1].is_kernel and found[1].arrays[0].shape == (8, 512)]
    assert 12 * 512 * 512 in [a.size for kernel in kernels for a in program.operands_of(*kernel)]
    assert not [i for _, i in steps if i.opcode == "dynamic-slice"]
    assert not [i for _, i in steps if i.opcode == "copy" and i.arrays[0].size >= 4 * 512 * 512]


def test_a_kernel_in_a_sharded_program():
    """XLA divides no kernel: in a `shard_map` it runs, elsewhere a product that XLA divides. No weight is gathered."""
    mesh, spec = AbstractMesh((4, 4), ("data", "model")), SCHEMES["w4a16 g128"]

    def place(v: Any, *axes: Any) -> Any:
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, P(*axes)))

    q = weight(spec)
    q = q.replace(codes=place(q.stored, "model"), scale=place(q.scale, "model"))
    args = {"w": q}, place(x(64), "data", "model")
    found: Any = jq.explain(product(spec), *args, target="tpu v5e")
    assert found["w"].kernels == ("bfloat16",)
    assert {(c.kind, c.dtype) for c in found.collectives} == {("all-reduce", "bf16")}

    def part(p: Any, x: jax.Array) -> jax.Array:
        return lax.psum(product(spec)(p, x), "model")

    specs = {"w": jax.tree.map(lambda _: P("model"), q)}, P("data", "model")
    mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P("data"))
    found = jq.explain(mapped, *args, target="tpu v5e")
    assert found["w"].kernels == ("grouped_sums",)
    assert {(c.kind, c.dtype) for c in found.collectives} == {("all-reduce", "bf16")}


def on_explicit_axes(spec: jq.OpSpec, where: P, of_x: P, out: P, *lead: int) -> Any:
    """`explain` of a product, or of a scan of products, whose operands lie on a mesh of explicit axes."""
    mesh = AbstractMesh((4, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    at = lambda v, axes: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, axes))  # noqa: E731

    def once(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return lax.dot_general(x, w, MATMUL, out_sharding=out), None

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(once, x, p["w"])[0] if lead else once(x, p["w"])[0]

    where = P(*(None for _ in lead), *where)
    shape = jax.ShapeDtypeStruct((*lead, SIZE, SIZE), jnp.bfloat16)
    params, args = {"w": at(shape, where)}, at(x(64), of_x)
    with jax.sharding.use_abstract_mesh(mesh):
        plan = jq.make_plan(fn, params, args, rules=[jq.Rule("w", spec)])
    q = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="tpu"), {"w": shape})
    placed = jax.tree.map(lambda v, s: at(v, s.spec), q, jq.ops.shardings(q, NamedSharding(mesh, where)))
    return jq.explain(jq.quantized(fn, plan), placed, args, target="tpu v5e")


@pytest.mark.parametrize("name", ["w8a8", "w4a16 g128", "w4a8 g128", "two-level", "mxfp4"])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_kernels_on_explicit_axes(name: str, lead: tuple[int, ...]):
    """Types say how operands lie: under `jax.jit` each device runs a kernel on its part."""
    spec = recipes.w8a8() if name == "w8a8" else SCHEMES[name]
    rows = on_explicit_axes(spec, P("model", None), P("data", "model"), P("data", "model" if lead else None), *lead)
    columns = on_explicit_axes(spec, P(None, "model"), P("data"), P("data", None if lead else "model"), *lead)
    made = {kernel for found in (rows, columns) for kernel in found["w"].kernels}
    if name == "w8a8":
        assert made == ({"int8_blocks"} if lead else {"int8"})
    else:
        assert len(made) == 1
        assert made <= {"grouped_sums", "grouped_values"}
    moved = SIZE * 16 * 2  # bytes of an activation's rows on a device
    assert all(c.dtype == "bf16" or c.nbytes <= c.count * 16 * 4 for c in rows.collectives)  # and maxima of rows
    assert all(c.nbytes <= c.count * moved for c in (*rows.collectives, *columns.collectives))


@pytest.mark.slow
@pytest.mark.usefixtures("scheduled")
def test_the_schedule_of_a_kernel_whose_scales_xla_stores_in_another_order():
    """Of 28 groups, as a quarter of Mixtral's hidden axis has: a copy in the chip's memory had ended the compiler."""
    spec = SCHEMES["w4a16 g128"]
    make = jax.vmap(lambda w: jq.quantize(w, present(spec.weight), reduce_axes=(-2,)))
    q = jax.eval_shape(lambda w: jq.ops.lay_out(make(w), "tpu"), jax.ShapeDtypeStruct((8, 3584, 4096), jnp.bfloat16))
    fn = lambda p, x, sizes: ops.ragged_dot(x, p["w"], sizes, spec=spec)  # noqa: E731
    args = jax.ShapeDtypeStruct((2, 3584), jnp.bfloat16), jax.ShapeDtypeStruct((8,), jnp.int32)
    assert jq.explain(fn, {"w": q}, *args, target="tpu v5e").missing == ""


@pytest.mark.parametrize("name", ["w8a8", "w8a16", "w4a16 g128"])
def test_experts_are_neither_decoded_nor_transposed(name: str):
    """A ragged product reads the codes of its experts, and writes nothing of their size."""
    spec = recipes.w8a8() if name == "w8a8" else SCHEMES[name]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    fn = lambda p, x, sizes: ops.ragged_dot(x, p["w"], sizes, spec=spec)  # noqa: E731
    compiled = compiled_for("test", "tpu v5e", fn, ({"w": weight(spec, 4)}, x(40), sizes))
    found = estimate(compiled)
    assert found.temporaries < 0.02 * 4 * SIZE * SIZE
    kernels = [i for body in Program(compiled.executable.as_text()).computations.values() for i in body.values()]
    assert any(i.is_kernel and i.arrays[0].shape == (40, SIZE) for i in kernels)


@pytest.mark.parametrize("name", ["w8a16", "w4a16 g128", "mxfp4"])
def test_a_table_for_lookups_and_products(name: str):
    """Neither the lookup nor the product copies or decodes it."""
    spec = recipes.w8a16() if name == "w8a16" else SCHEMES[name]
    table = jax.eval_shape(
        lambda: jq.ops.lay_out(
            jq.quantize(jnp.zeros((SIZE, SIZE), jnp.bfloat16), present(spec.weight), reduce_axes=(-1,)), "tpu"
        )
    )

    def fn(p: Any, tokens: jax.Array) -> jax.Array:
        h = ops.take(p["w"], tokens, axis=0)
        return ops.dot_general(h, p["w"], (((1,), (1,)), ((), ())), spec=spec)

    found: Any = jq.explain(fn, {"w": table}, jax.ShapeDtypeStruct((8,), jnp.int32), target="tpu v5e")
    assert found["w"].written == 0
    assert found.temporaries < 0.02 * 2 * SIZE * SIZE
    assert name == "w8a16" or found["w"].kernels == ("columns", "grouped_sums")


@pytest.mark.parametrize("name", ["w8a16", "w4a16", "w4a16 g128", "fp8 weights"])
def test_the_gradient_of_an_activation_decodes_within_its_product(name: str, float_seconds: float):
    """As the product does, in about its time: scales of channels go into the gradient, those of groups to the codes.

    Where a kernel has the product there is no estimate of that, and twice the time of bfloat16 is what it may take.
    """
    spec = SCHEMES[name]

    def back(p: Any, x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: ops.dot_general(x, p["w"], MATMUL, spec=spec), x)[1](g)[0]

    params = {"w": weight(spec)}
    found: Any = jq.explain(back, params, x(8), x(8), target="tpu v5e")
    assert found.temporaries < 0.02 * 2 * SIZE * SIZE
    forward = jq.explain(product(spec), params, x(8), target="tpu v5e").seconds
    assert found.seconds < (2 * float_seconds if forward is None else 1.8 * forward)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "kernels"),
    [
        (recipes.w8a8(), ["quantized_columns", "quantized_rows", "transposed_codes"]),
        (recipes.w8a8g8(), [*["quantized_columns"] * 2, *["quantized_rows"] * 2, "transposed_codes"]),
    ],
)
def test_a_training_step_writes_codes_and_results_alone(spec: jq.OpSpec, kernels: list[str]):
    """Scales and factors are part of kernels and products: no wide array stands between them, also not of many axes.

    Nor does a scaled gradient, or the real values of an operand, where the backward products are in float.
    """
    rows, size = (2, 256), 1024
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((*rows, size), (size, size), (*rows, size))]

    def step(x: jax.Array, w: jax.Array, g: jax.Array) -> Any:
        y, pull = jax.vjp(lambda x, w: ops.dot_general(x, w, (((2,), (0,)), ((), ())), spec=spec), x, w)
        return y, *pull(g)

    program = Program(compiled_for("test", "tpu v5e", step, tuple(args)).executable.as_text())
    steps = [i for name, body in program.computations.items() if name not in program.fused for i in body.values()]
    assert sorted(i.kernel for i in steps if i.is_kernel) == kernels
    wide = [i for i in steps if any(a.dtype in ("bf16", "f32") and a.size >= 512 * size for a in i.arrays)]
    assert len([i for i in wide if i.opcode == "fusion"]) == 3
    assert not [i for i in wide if any(a.dtype == "f32" and a.size >= 512 * size for a in i.arrays)]


def feed_forward(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    wide = x.astype(jnp.float32)
    y = (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype)
    return x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


@pytest.mark.parametrize("scanned", [True, False])
def test_the_backward_pass_is_handed_inputs_and_codes_of_activations(scanned: bool):
    """A scan stacks nothing else; one program quantizes each weight once."""
    layers, rows, width, wide = 3, 512, 1024, 2048
    sizes = {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}
    shape: Any = jax.ShapeDtypeStruct
    lead = (layers,) * scanned
    params = {name: shape((*lead, *size), jnp.bfloat16) for name, size in sizes.items()}

    def fn(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = lax.scan(lambda x, p: (feed_forward(x, p), None), x, p)[0] if scanned else feed_forward(x, p)
        return jnp.mean(x.astype(jnp.float32) ** 2)

    args = params, shape((rows, width), jnp.bfloat16)
    run = jq.quantized(fn, jq.make_plan(fn, *args, rules=[jq.Rule(".*", recipes.w8a8())]))
    program = Program(compiled_for("test", "tpu v5e", jax.grad(run), args).executable.as_text())
    every = [i for body in program.computations.values() for i in body.values()]
    assert sum(i.is_kernel and i.kernel == "quantized_columns" for i in every) == 3 * (1 + scanned)
    loops = [i for i in every if i.opcode == "while"]
    stacked = [(a.dtype, a.shape[1:]) for i in loops[:1] for a in i.arrays if a.shape[:1] == (layers,) and a.size > 1e5]
    made = [a for a in stacked if a[1] not in sizes.values() or a[0] != "bf16"]  # beside weights and their gradients
    assert sorted(set(made)) == scanned * [
        ("bf16", (rows, width)), ("bf16", (rows, wide)), ("s8", (rows, width)), ("s8", (rows, wide)),
    ]  # fmt: skip
    assert made.count(("bf16", (rows, wide))) == 2 * scanned


@pytest.mark.slow
def test_a_long_column_is_quantized_in_one_pass():
    """The weight of a feed-forward network's second product, in training."""
    w = jax.ShapeDtypeStruct((28672, 256), jnp.bfloat16)
    spec = jq.QuantSpec("int8")
    found = compiled_for("test", "tpu v5e", lambda w: jq.quantize(w, spec, reduce_axes=(-2,)), (w,))
    program = Program(found.executable.as_text())
    kernels = [i.kernel for body in program.computations.values() for i in body.values() if i.is_kernel]
    assert "quantized_columns" in kernels


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_attention_reads_a_cache_as_it_is_stored(dtype):
    """A layer of a stack in a scan: no copy of it, and no score in memory."""
    layers, (b, h, g, s, d) = 4, (8, 32, 8, 2048, 128)
    shape: Any = jax.ShapeDtypeStruct
    k, v = shape((layers, b, g, s, d), dtype), shape((layers, b, g, d, s), dtype)
    if dtype == "int8":
        scales = shape((layers, b, g, s, 1), jnp.float32), shape((layers, b, g, 1, s), jnp.float32)
        k, v = (jq.QTensor(x, y, None, qtype="int8", dtype=jnp.bfloat16) for x, y in zip((k, v), scales, strict=True))

    def run(q: Any, k: Any, v: Any, valid: Any, start: Any) -> Any:
        def layer(q: Any, i: Any) -> Any:
            return ops.cached_attention(q, k, v, valid, start, i), None

        return lax.scan(layer, q, jnp.arange(layers))[0]

    q, valid = shape((b, h, 1, d), jnp.bfloat16), shape((b, s), jnp.bool_)
    compiled = compiled_for("attention", "tpu v5e", run, (q, k, v, valid, shape((), jnp.int32)))
    assert "cached_attention" in compiled.executable.as_text()
    assert estimate(compiled).temporaries < 0.01 * estimate(compiled).arguments


def _mlp(p: Any, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    y = wide.astype(x.dtype) * p["norm"][None]
    return (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]


@pytest.mark.parametrize("how", ["one chip", "shard_map", "divided by XLA", "gradient"])
def test_a_norm_and_a_gate_are_computed_where_they_are_quantized(how: str):
    """By one kernel each: of floats with the size of an activation, only three products write any.

    XLA divides no kernel, so that it computes and quantizes activations itself in a program that it divides.
    """
    square, vector = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((SIZE, SIZE), (SIZE,)))
    params: Any = {"norm": vector, **dict.fromkeys(("gate", "up", "down"), square)}
    plan = jq.make_plan(_mlp, params, x(512), rules=[jq.Rule("norm", None), jq.Rule(".*", recipes.w8a8())])
    fn, rows, target, mesh = jq.quantized(_mlp, plan), x(512), "tpu v5e", AbstractMesh((4,), ("x",))
    if how == "gradient":
        fn = jax.grad(lambda p, x, fn=fn: jnp.sum(fn(p, x).astype(jnp.float32)))
    else:
        params = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="tpu"), params)
    if how in ("shard_map", "divided by XLA"):
        target = "tpu v5e:2x2"
        rows = jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=NamedSharding(mesh, P("x")))
    if how == "shard_map":
        fn = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=False)
    program = Program(compiled_for("test", target, fn, (params, rows)).executable.as_text())
    steps = [i for name, body in program.computations.items() if name not in program.fused for i in body.values()]
    kernels = [i.kernel for i in steps if i.is_kernel]
    assert kernels.count("produced_rows") == (0 if how == "divided by XLA" else 2)
    if how in ("one chip", "shard_map"):
        assert "quantized_rows" not in kernels
        size = SIZE * (512 if how == "one chip" else 128)
        made = [i for i in steps if i.opcode in ("fusion", "custom-call", "convolution", "copy")]
        assert sum(a.dtype in ("bf16", "f32") and a.size >= size for i in made for a in i.arrays) == 3


@pytest.mark.slow
def test_a_function_of_many_columns_fits_in_memory():
    """Ten factors of each row, which take 128 lanes each."""
    params = {"w": jax.ShapeDtypeStruct((128, 128), jnp.float32)}
    given = [jax.ShapeDtypeStruct((65536, n), jnp.float32) for n in (128, *[1] * 10)]

    def fn(p: Any, x: jax.Array, *factors: jax.Array) -> jax.Array:
        for factor in factors:
            x = jnp.tanh(x * factor)
        return x @ p["w"]

    run = jq.quantized(fn, jq.make_plan(fn, params, *given, rules=[jq.Rule("w", recipes.w8a8())]))
    assert "produced_rows" in compiled_for("test", "tpu v5e", run, (params, *given)).executable.as_text()

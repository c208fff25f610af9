"""Kernels for TPUs, in Pallas' interpreter: what they compute is the product of the dequantized weight."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan, needs_jit
from narrowed import instance, present

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.core.affine import as_codes
from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import flat
from jaxquant.core.qtypes import QTYPES
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels import integer
from jaxquant.ops.kernels.tpu import decode, grid, grouped, grouped_values
from jaxquant.ops.kernels.tpu import int8 as tpu_int8
from jaxquant.ops.kernels.tpu.blocks import rounded_blocks
from jaxquant.ops.kernels.tpu.columns import columns as columns_of_table
from jaxquant.ops.kernels.tpu.grouped_sums import Sums
from jaxquant.ops.kernels.tpu.groups import Groups
from jaxquant.ops.kernels.tpu.layout import side_by_side, transposed_codes
from jaxquant.ops.kernels.tpu.matrices import as_matrices
from jaxquant.ops.kernels.tpu.quantize import quantized_columns, quantized_rows
from jaxquant.ops.problem import Product
from jaxquant.ops.select import select
from jaxquant.ops.trained import TrainedTensor

MATMUL = (((1,), (0,)), ((), ()))


def few(qtype: str, group: int, **more: Any) -> jq.QuantSpec:
    return jq.QuantSpec(qtype, granularity="per_group", group_size=group, **more)


SPECS = {
    "int4 128": few("int4", 128),
    "int4 32": few("int4", 32),
    "int4 256": few("int4", 256),
    "int4 128 bfloat16 scales": few("int4", 128, scale_dtype="bfloat16"),
    "int4 64 float16 scales": few("int4", 64, scale_dtype="float16"),
    "uint4 64 zero": few("uint4", 64, symmetric=False),
    "uint4 16 zero": few("uint4", 16, symmetric=False),
    "uint4 64": few("uint4", 64),
    "int3 64": few("int3", 64),
    "int2 128": few("int2", 128),
    "two-level": recipes.w4a16(128, two_level=True).weight,
    "nf4": few("nf4", 64),
    "nf4 16": few("nf4", 16),
    "iq4_nl 32": few("iq4_nl", 32),
    "binary 64": few("binary", 64),
    "fp4": few("fp4", 128),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "float8_e4m3fn 64": few("float8_e4m3fn", 64),
    "float8_e5m2 128": few("float8_e5m2", 128),
    "int8 64": few("int8", 64),
    "uint8 64 zero": few("uint8", 64, symmetric=False),
    "int8 32 zero": few("int8", 32, symmetric=False),
}
EXACT = ("mxfp4", "nvfp4", "mxfp8")
V6E, V7X = "TPU v6 lite", "TPU7x"


def normal(key: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Unequal magnitudes along both of the last axes."""
    rng = np.random.default_rng(key)
    size = np.exp(rng.normal(size=(*shape[:-1], 1))) * np.exp(rng.normal(size=shape[-1]))
    return jnp.asarray(rng.normal(size=shape) * size, dtype)


def weight(spec: Any, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jq.QTensor:
    return jq.ops.lay_out(jq.quantize(normal(1, shape, dtype), spec, reduce_axes=(-2,)), "tpu")


def columns(spec: jq.QuantSpec) -> int:
    """200, which 128 does not divide, but for integers in groups of 128 and more, which XLA multiplies then."""
    granularity = spec.granularity
    return 256 if isinstance(granularity, jq.PerGroup) and granularity.size >= 128 and spec.type.kind == "int" else 200


def interpreted(problem: Product, monkeypatch: pytest.MonkeyPatch, chip: str | None = None) -> tuple[str, jax.Array]:
    """What a TPU would run, run here: its name and its result."""
    monkeypatch.setattr(grouped.Grouped, "interpret", True)
    kernel = select(problem, Target("tpu", chip))
    return kernel.name, kernel.run(problem)


def problem_of(x: Any, w: Any, result: Any = jnp.float32) -> Product:
    return Product.of(x, w, Axes.of(2, (), (1,)), Axes.of(2, (), (0,)), None, result)


def assert_close(got: Any, x: Any, w: Any, *, exact: bool, rounded: bool) -> None:
    """Values in bfloat16 are off by 2**-8 of themselves; digits by 1 / 508 of 1 / 127 of a row's largest."""
    real = np.asarray(w.dequantize(jnp.float32) if isinstance(w, jq.QTensor) else w, np.float64)
    x = np.asarray(x, np.float64)
    terms = np.abs(x) @ np.abs(real)
    digits = np.max(np.abs(x), axis=-1, keepdims=True) / (127 * 508) * np.sum(np.abs(real), axis=-2, keepdims=True)
    bound = 1e-6 * terms + (0 if exact else 2**-8 * terms if rounded else 1.01 * digits)
    assert np.all(np.abs(np.asarray(got, np.float64) - x @ real) <= bound)


@pytest.mark.parametrize("rows", [1, 8, 40, 300])
@pytest.mark.parametrize("name", SPECS)
def test_the_product_of_the_dequantized_weight(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Codes of numbers are multiplied exactly or in two digits; values are rounded to bfloat16."""
    w, x = weight(SPECS[name], (512, columns(SPECS[name]))), normal(2, (rows, 512))
    kernel, y = interpreted(problem_of(x, w), monkeypatch)
    many = rows == 300 and (SPECS[name].type.kind == "table" or name in ("mxfp4", "nvfp4"))
    assert many == ("grouped" not in kernel)
    if many:  # XLA decodes these in the order of rows, and takes less time
        return
    rounded = kernel != "grouped_sums" or SPECS[name].type.kind == "table"
    assert_close(y, x, w, exact=name in EXACT, rounded=rounded)


COLUMNS = {
    "int4": jq.QuantSpec("int4"),
    "uint4 zero": jq.QuantSpec("uint4", symmetric=False),
    "int3 zero": jq.QuantSpec("int3", symmetric=False),
    "nf4": jq.QuantSpec("nf4", granularity="per_channel"),
    "fp4": jq.QuantSpec("float4_e2m1fn"),
}


@pytest.mark.parametrize("chip", [None, V6E, "TPU v5"])
@pytest.mark.parametrize("rows", [3, 40, 300])
@pytest.mark.parametrize("name", COLUMNS)
def test_one_scale_per_column(name: str, rows: int, chip: str | None, monkeypatch: pytest.MonkeyPatch):
    """Codes that are stored as a matrix; XLA multiplies int4 without zero points as fast on most chips."""
    w, x = weight(COLUMNS[name], (512, 256)), normal(2, (rows, 512))
    assert w.split is None
    kernel, y = interpreted(problem_of(x, w), monkeypatch, chip)
    plain, tables = name == "int4" and chip is None, name in ("nf4", "fp4")
    many = rows == 300 and tables and chip != V6E
    assert ("grouped" not in kernel) == (plain or many)
    assert_close(y, x, w, exact=False, rounded=name == "nf4")


HEADS = {  # the weight's shape and its reduced axes, that of x, and the contracted axes of x and of the weight
    "in": ((512, 2, 64), (0,), (8, 512), "bd,dhs->bhs", (1,), (0,)),
    "out": ((2, 256, 128), (0, 1), (8, 2, 256), "bhs,hsd->bd", (1, 2), (0, 1)),
    "in, backward": ((512, 2, 128), (0,), (8, 2, 128), "bhs,dhs->bd", (1, 2), (1, 2)),
    "in, weight first": ((512, 2, 64), (0,), (8, 512), "bd,dhs->hsb", (1,), (0,)),
    "transposed": ((128, 512), (1,), (8, 512), "bk,nk->bn", (1,), (1,)),
    "transposed, backward": ((512, 128), (1,), (8, 512), "bn,nk->bk", (1,), (0,)),
}


@pytest.mark.parametrize("name", ["int4 128", "nf4", "uint4 64 zero", "mxfp8", "two-level", "float8 column"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layer", [False, True])
def test_weights_are_multiplied_as_matrices(name: str, heads: str, layer: bool, monkeypatch: pytest.MonkeyPatch):
    (shape, axes, given, formula, *contract), spec = HEADS[heads], SPECS.get(name, jq.QuantSpec("float8_e4m3fn"))
    w = jq.ops.lay_out(jq.quantize(normal(1, shape), spec, reduce_axes=axes), "tpu")
    real, x = np.asarray(w.dequantize(jnp.float32), np.float64), normal(2, given)
    if layer:
        w = w.layer_of(jax.tree.map(lambda v: jnp.stack([jnp.zeros_like(v), v]), w), jnp.int32(1))
    of_x, of_w = (Axes.of(len(v), (), c) for v, c in zip((given, shape), contract, strict=True))
    operands = (w, x, of_w, of_x) if "first" in heads else (x, w, of_x, of_w)
    problem = Product.of(*operands, None, jnp.float32)
    matrices = as_matrices(problem)
    assert matrices.w.ndim == 2
    assert not matrices.weight.minor
    kernel, y = interpreted(matrices, monkeypatch)
    assert "backward" in heads or name == "float8 column" or kernel == "grouped_sums"
    expected = np.einsum(formula, np.asarray(x, np.float64), real)
    found = np.asarray(y, np.float64).reshape(problem.result_shape)
    assert np.linalg.norm(found - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_rows_and_columns(transposed: bool, monkeypatch: pytest.MonkeyPatch):
    """As of DeepSeek's fp8: each row gets the scales of its blocks."""
    axis = -1 if transposed else -2
    w = jq.quantize(normal(1, (128, 512) if transposed else (512, 128)), SPECS["float8_e5m2 128"], reduce_axes=(axis,))
    scale = flat(w.scale)
    w = jq.ops.lay_out(w.replace(scale=scale[::64] if transposed else scale[:, ::64]), "tpu")
    x = normal(2, (8, 512))
    problem = Product.of(x, w, Axes.of(2, (), (1,)), Axes.of(2, (), (axis + 2,)), None, jnp.float32)
    kernel, y = interpreted(as_matrices(problem.with_groups_on_one_axis()), monkeypatch)
    assert kernel == "grouped_sums"
    real = w.dequantize(jnp.float32)
    assert_close(y, x, real.T if transposed else real, exact=False, rounded=True)


@pytest.mark.parametrize("name", ["int4 64 float16 scales", "uint4 64 zero", "mxfp4"])
def test_activations_in_float16(name: str, monkeypatch: pytest.MonkeyPatch):
    """A TPU has no registers of them: the kernel gets float32, in which they are exact."""
    w, x = weight(SPECS[name], (512, 200), jnp.float16), normal(2, (8, 512), jnp.float16)
    kernel, y = interpreted(problem_of(x, w, jnp.float16), monkeypatch)
    assert kernel == "grouped_sums"
    assert y.dtype == jnp.float16
    expected = np.asarray(x, np.float64) @ np.asarray(w.dequantize(jnp.float32), np.float64)
    assert np.linalg.norm(np.asarray(y, np.float64) - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("zero", ["bfloat16", "float16", "float32"])
def test_float_zero_points(zero: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """As HQQ has them: values are off by no more than where a product of this dtype rounds them."""
    q, x = weight(few("uint4", 64, symmetric=False), (512, 200)), normal(2, (rows, 512))
    w = q.replace(zero_point=present(q.zero_point).astype(zero) + jnp.asarray(0.3, zero))
    kernel, y = interpreted(problem_of(x, w), monkeypatch)
    assert kernel == ("grouped_sums" if rows == 3 else "grouped_values")
    assert_close(y, x, w, exact=False, rounded=True)
    wide = problem_of(x.astype(jnp.float32), w.replace(dtype=jnp.float32))
    assert (select(wide, Target("tpu")).name == "grouped_sums") == (zero == "float32" and rows == 3)


@pytest.mark.parametrize(
    ("dtype", "rows", "count"), [("int4", 128, 9), ("int4", 64, 130), ("int8", 64, 3), ("float8_e4m3fn", 32, 140)]
)
def test_columns_of_a_table(dtype: str, rows: int, count: int):
    rng = np.random.default_rng(0)
    codes, indices = rng.integers(-8, 8, (rows, 300)), rng.integers(0, 300, count)
    found = columns_of_table(jnp.asarray(codes).astype(dtype), jnp.asarray(indices), interpret=True)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found.astype(jnp.float32)), codes[:, indices])


@pytest.mark.parametrize("qtype", ["int4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("rows", [8, 300])
def test_a_layer_of_columns(rows: int, qtype: str, monkeypatch: pytest.MonkeyPatch):
    """XLA takes such a layer out of its stack slowly, so that the kernel multiplies all kinds on all chips."""
    w, x = weight(jq.QuantSpec(qtype), (256, 128)), normal(2, (rows, 256))
    stack = jax.tree.map(lambda v: jnp.stack([jnp.flip(v, -1), v]), w)
    kernel, y = interpreted(problem_of(x, w.layer_of(stack, jnp.int32(1))), monkeypatch)
    many = "grouped_values" if qtype == "int4" else "bfloat16, decoded"
    assert kernel == ("grouped_sums" if rows == 8 else many)
    assert_close(y, x, w, exact=False, rounded=False)
    both = jq.quantize(x, jq.QuantSpec("float8_e4m3fn"), reduce_axes=(-1,))
    if rows > 128 and qtype != "int4":  # a v7x multiplies fp8 as such
        names = {None: many, V6E: "grouped_values", "TPU7x": many}
        of_stack = problem_of(both, w.layer_of(stack, jnp.int32(1)))
        assert {chip: select(of_stack, Target("tpu", chip)).name for chip in names} == names
    if qtype != "int4":  # alone, XLA's product takes as long as reading it
        assert select(problem_of(x, w), Target("tpu")).name == "bfloat16, decoded"


@pytest.mark.parametrize("rows", [3, 40, 300])
@pytest.mark.parametrize(
    "name",
    [
        "nf4",
        "nf4 16",
        "iq4_nl 32",
        "binary 64",
        "fp4",
        "mxfp4",
        "nvfp4",
        "mxfp8",
        "float4 64",
        "float4 32",
        "float8 64",
    ],
)
def test_a_chip_that_gathers_bytes(name: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    """It reads all 4-bit floats from tables, decodes 8-bit floats as bytes, and computes what others do."""
    types = {"float4": "float4_e2m1fn", "float8": "float8_e4m3fn"}
    spec = SPECS.get(name) or few(types[name.split()[0]], int(name.split()[1]))
    w, x = weight(spec, (512, 200)), normal(2, (rows, 512))
    problem, others = problem_of(x, w), ("nf4 16", "float4 32") if rows == 40 else ("nf4 16",)
    chosen = "ManyRows" if spec.type.bits == 8 and rows > 128 else "Byte"
    assert type(select(problem, Target("tpu", V6E))).__name__.startswith(chosen) or name in others
    kernel, y = interpreted(problem, monkeypatch, V6E)
    rounded = kernel != "grouped_sums" or spec.type.kind == "table"
    assert_close(y, x, w, exact=name in EXACT, rounded=rounded)


@pytest.mark.every
@pytest.mark.parametrize("rows", [3, 300])
def test_a_chip_with_two_cores(rows: int, monkeypatch: pytest.MonkeyPatch):
    """Each step prepares what it reads, since a core runs only some of them; the product is the same to the bit."""
    problem = problem_of(normal(2, (rows, 256)), weight(SPECS["int4 32"], (256, 2304)))
    kernel = select(problem, Target("tpu", "TPU v5"))
    assert isinstance(kernel, grouped.Grouped)
    assert (kernel.cores, kernel.on(Target("tpu")).cores) == (2, 1)
    (_, one), (_, two) = (interpreted(problem, monkeypatch, chip) for chip in (None, "TPU v5"))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
@pytest.mark.parametrize("rows", [3, 100, 300])
@pytest.mark.parametrize("name", ["int4 128", "int4 32", "uint4 64 zero", "two-level", "int8 64"])
def test_a_chip_without_products_of_integers(name: str, rows: int, dtype: Any, monkeypatch: pytest.MonkeyPatch):
    """It multiplies integers as bfloat16: exactly at few rows, also float32 in two terms, and codes of x."""
    w, x = (
        weight(SPECS[name], (512, columns(SPECS[name]))),
        normal(2, (rows, 512), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16),
    )
    if dtype == jnp.int8:
        x = jq.quantize(x, jq.QuantSpec("int8"), reduce_axes=(-1,))
    problem = problem_of(x, w)
    summed = isinstance(select(problem, Target("tpu", V7X)), grouped.FloatSums)
    assert summed if rows == 3 else not summed or rows == 100
    _, y = interpreted(problem, monkeypatch, V7X)
    real, rounded = x.dequantize(jnp.float32) if isinstance(x, jq.QTensor) else x, not summed
    assert_close(y, real, w, exact=not rounded and dtype != jnp.float32, rounded=rounded)


@pytest.mark.every
@pytest.mark.parametrize("qtype", ["nf4", "iq4_nl", "binary", "float4_e2m1fn"])
@pytest.mark.parametrize("bytewise", [False, True])
def test_every_code_of_four_bits(qtype: str, bytewise: bool):
    """Its value in bfloat16, in the place that the decoder says; -0 may be 0."""
    how, kind = decode.decoder(QTYPES[qtype]), QTYPES[qtype]
    how = how.in_bytes() if bytewise else how
    bits = np.arange(128)[:, None] * 5 + np.arange(128) * 3 & 15
    entries = np.zeros(16)
    if kind.kind == "table":
        entries[: len(kind.table or ())] = kind.table
        wanted = entries[bits ^ 8]  # stored less 8
    else:
        wanted = bits.astype(np.uint8).view(jnp.float4_e2m1fn).astype(np.float64)
    wanted = wanted.astype(jnp.bfloat16).astype(np.float64)[np.asarray(how.source(jnp.arange(128)))]

    def kernel(codes: Any, out: Any) -> None:
        out[...] = how.numbers(codes[...], jnp.bfloat16, interpret=True) * how.factor

    run = pl.pallas_call(kernel, jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), interpret=True)
    found = np.asarray(run(jnp.asarray(bits - 16 * (bits > 7), jnp.int4)), np.float64)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-37)


@makes_nan
@pytest.mark.parametrize("bytewise", [False, True])
def test_every_code_of_eight_bits(bytewise: bool):
    """Its value, NaN included; -0 may be 0."""
    how = decode.decoder(QTYPES["float8_e4m3fn"])
    how = how.in_bytes() if bytewise else how
    bits = np.arange(128 * 128).reshape(128, 128).astype(np.uint8)

    def kernel(codes: Any, out: Any) -> None:
        out[...] = how.numbers(codes[...], jnp.bfloat16, interpret=True) * how.factor

    run = pl.pallas_call(kernel, jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), interpret=True)
    found = np.asarray(run(jnp.asarray(bits.view(jnp.float8_e4m3fn))), np.float32)
    np.testing.assert_array_equal(found, bits.view(jnp.float8_e4m3fn).astype(np.float32))


@pytest.mark.parametrize("n", [200, 1000, 1024, 3584, 8192, 151936])
def test_blocks_of_sums_are_equal_and_two_at_least(n: int):
    """While the first is read nothing runs, and a part of a block takes as long as a whole one."""
    groups = Groups(128, decode.Decoder("integers"))
    body = Sums(groups, (jnp.dtype(jnp.bfloat16),), jnp.float32)
    for m, k in ((8, 512), (8, 4096), (64, 14336), (512, 4096)):
        columns = body.blocks(m, k, n)[1]
        count = -(-n // columns)
        assert count > 1 or n <= 256
        assert columns % 128 == 0
        assert columns * count < n + 128 * count
        assert columns <= 1024 or columns * k <= 4 << 20


@pytest.mark.parametrize("name", ["nf4", "fp4", "iq4_nl"])
def test_words_of_a_table(name: str):
    """A word, shifted by 16 if bit 3 of the stored code is set, rounds to the entry of the code, or is near it."""
    table = few(name, 64).type.table
    assert table is not None
    near = jnp.asarray(table, jnp.bfloat16).astype(jnp.float32).tolist()
    for rounded in (True, False):
        words = decode.table_words(table, rounded=rounded)
        for code, value in enumerate(near if rounded else table):
            stored = (code - 8) & 15
            word = np.uint32((words[stored & 7] << (16 if stored & 8 else 0)) & 0xFFFFFFFF)
            got = word.view(np.float32)
            if rounded:
                assert float(jnp.asarray(got).astype(jnp.bfloat16)) == pytest.approx(value, rel=0, abs=1e-37)
            else:
                assert float(got) == pytest.approx(value, rel=2**-8, abs=1e-37)


@pytest.mark.parametrize("rows", [3, 300])
def test_a_layer_of_a_stack(rows: int, monkeypatch: pytest.MonkeyPatch):
    """The kernel finds it by its number: the product is that of the layer alone, to the bit."""
    w, x = weight(SPECS["uint4 64 zero"], (256, 128)), normal(2, (rows, 256))
    w = w.replace(offset=0.1 * instance(jax.Array, w.scale))
    layers = [w, jax.tree.map(lambda v: jnp.flip(v, -1), w)]  # no array is that of the other layer
    stack = jax.tree.map(lambda *v: jnp.stack(v), *layers)
    for i, alone in enumerate(layers):
        layer = alone.layer_of(stack, jnp.int32(i))
        assert layer.shape == alone.shape
        np.testing.assert_array_equal(layer.apart().stored, alone.stored)
        (name, got), (other, want) = (interpreted(problem_of(x, w), monkeypatch) for w in (layer, alone))
        assert name == other
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ["uint4 64 zero", "two-level", "mxfp4"])
def test_experts(name: str, monkeypatch: pytest.MonkeyPatch):
    """One kernel for all of a batch, alone and as a layer of a stack: each product is that of its own weight."""
    make = lambda key: jq.quantize(normal(key, (2, 256, 128)), SPECS[name], reduce_axes=(-2,))  # noqa: E731
    experts, other = (jq.ops.lay_out(make(key), "tpu") for key in (1, 5))
    stack = jax.tree.map(lambda *v: jnp.stack(v), other, experts)
    x, axes = normal(2, (2, 3, 256)), (Axes.of(3, (0,), (2,)), Axes.of(3, (0,), (1,)))
    results = []
    for w in (experts, experts.layer_of(stack, jnp.int32(1))):
        kernel, y = interpreted(Product.of(x, w, *axes, None, jnp.float32), monkeypatch)
        assert kernel == "grouped_sums"
        results.append(y)
    np.testing.assert_array_equal(*results)
    for i in range(2):
        one = jax.tree.map(lambda v, i=i: v[i], experts)
        assert_close(results[0][i], x[i], one, exact=name in EXACT, rounded=False)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("rows", [3, 300])
def test_int8_activations(group: int, rows: int, monkeypatch: pytest.MonkeyPatch):
    """Exact where sums are scaled; x has a scale for each row."""
    spec = recipes.w4a8(group)
    w = weight(spec.weight, (256, 128))
    assert spec.act is not None
    x = jq.quantize(normal(2, (rows, 256)), spec.act, reduce_axes=(-1,))
    kernel, y = interpreted(problem_of(x, w), monkeypatch)
    assert kernel == ("grouped_values" if (rows, group) == (300, 32) else "grouped_sums")
    real = x.dequantize(jnp.float32)
    assert_close(y, real, w, exact=kernel == "grouped_sums", rounded=True)


@pytest.mark.every
@pytest.mark.parametrize("act", [False, True])
def test_many_rows_on_a_chip_that_sums_256_products(act: bool, monkeypatch: pytest.MonkeyPatch):
    """Values are multiplied beside int8 rows too. Where memory is short, K is cut into parts, which are added."""
    monkeypatch.setattr(grid, "MEMORY", 2 << 20)
    monkeypatch.setattr(grouped_values, "_PART", 256)
    spec = recipes.w4a8(128)
    assert spec.act is not None
    w, x = weight(spec.weight, (512, 256)), normal(2, (260, 512))
    problem = problem_of(jq.quantize(x, spec.act, reduce_axes=(-1,)) if act else x, w)
    kernel = select(problem, Target("tpu", V6E))
    assert isinstance(kernel, grouped.ManyRows)
    assert kernel.body(kernel.groups, (jnp.dtype(jnp.bfloat16),), jnp.float32).blocks(260, 512, 256)[2] == 256
    _, y = interpreted(problem, monkeypatch, V6E)
    assert_close(y, instance(jq.QTensor, problem.x).dequantize(jnp.float32) if act else x, w, exact=False, rounded=True)


def test_float32_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch):
    """Few rows: two digits, or two terms in bfloat16. Many rows, and tables, would be rounded: others take them."""
    for name in ("int4 64", "mxfp4"):
        spec = SPECS.get(name, few("int4", 64))
        w, x = weight(spec, (256, 128), jnp.float32), normal(2, (3, 256), jnp.float32)
        kernel, y = interpreted(problem_of(x, w), monkeypatch)
        assert kernel == "grouped_sums"
        assert y.dtype == jnp.float32
        assert_close(y, x, w, exact=False, rounded=False)
        assert "grouped" not in select(problem_of(normal(2, (300, 256), jnp.float32), w), Target("tpu")).name
    w = weight(SPECS["nf4"], (256, 128), jnp.float32)
    assert "grouped" not in select(problem_of(x, w), Target("tpu")).name


def test_what_others_take():
    """HIGHEST, a length that no block divides, channels without groups, few columns, and codes in other forms."""
    x = normal(2, (3, 256))

    def name_of(w: Any, x: Any = x, precision: Any = None) -> str:
        axes = Axes.of(2, (), (1,)), Axes.of(2, (), (0,))
        return select(Product.of(x, w, *axes, precision, jnp.float32), Target("tpu")).name

    w = weight(few("int4", 64), (256, 128))
    assert name_of(w) == "grouped_sums"
    assert "grouped" not in name_of(w, precision="highest")
    assert "grouped" not in name_of(weight(few("int4", 32), (96, 128)), normal(2, (3, 96)))
    assert "grouped" not in name_of(weight(jq.QuantSpec("int4"), (256, 128)))
    assert "grouped" not in name_of(weight(few("int4", 64), (256, 64)))
    assert "grouped" not in name_of(weight(few("int4", 128), (256, 192)))  # XLA would copy the codes for it
    assert name_of(weight(few("int4", 64), (256, 192))) == "grouped_sums"  # and be slower without
    assert "grouped" not in name_of(jq.ops.lay_out(w, "cpu"))


def test_vmap(monkeypatch: pytest.MonkeyPatch):
    """Of both, and of one weight for all."""
    spec = few("int4", 64)
    w = jax.vmap(lambda w: jq.ops.lay_out(jq.quantize(w, spec, reduce_axes=(-2,)), "tpu"))(normal(1, (3, 256, 128)))
    x, one = normal(2, (3, 5, 256)), jax.tree.map(lambda v: v[1], w)
    run = lambda x, w: interpreted(problem_of(x, w), monkeypatch)[1]  # noqa: E731
    mapped, shared = jax.vmap(run)(x, w), jax.vmap(run, (0, None))(x, one)
    for i in range(3):
        assert_close(mapped[i], x[i], jax.tree.map(lambda v, i=i: v[i], w), exact=False, rounded=False)
        assert_close(shared[i], x[i], one, exact=False, rounded=False)


@needs_jit  # runs a compiled program
def test_sharded(monkeypatch: pytest.MonkeyPatch):
    """In a `shard_map` each device runs the kernel; what XLA divides by itself is computed by what it can divide."""
    mesh = Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    w, x = weight(few("int8", 64), (512, 256)), normal(2, (4, 512))
    put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, P(*spec)))  # noqa: E731
    placed = w.replace(codes=put(w.stored, "a", None, "b"), scale=put(w.scale, "a", "b"))
    run = lambda x, w: interpreted(problem_of(x, w), monkeypatch)[1]  # noqa: E731
    with jax.checking_leaks():  # the equation keeps its functions, which close over no array
        compiled = jax.jit(run).lower(put(x, None, "a"), placed).compile()
    assert_close(compiled(put(x, None, "a"), placed), x, w, exact=False, rounded=True)
    assert "grouped_sums" not in str(compiled.as_text())

    def part(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
        return jax.lax.psum(run(x, w.replace(codes=codes, scale=scale)), "a")

    specs = P(None, "a"), P("a", None, "b"), P("a", "b")
    # (Pallas' interpreter does not know which of its arrays vary over devices.)
    mapped = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P(None, "b"), check_vma=False))
    lowered = mapped.lower(x, placed.stored, placed.scale)
    assert_close(lowered.compile()(x, placed.stored, placed.scale), x, w, exact=False, rounded=False)


@makes_nan
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_code_of_fp8(qtype: str):
    """-0, subnormal numbers, infinities and NaN too, from bytes and from the dtype itself."""
    how = decode.decoder(QTYPES[qtype])
    patterns = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 128))
    wanted = np.ascontiguousarray(patterns).view(QTYPES[qtype].code_dtype).astype(np.float32)

    def kernel(codes: Any, out: Any) -> None:
        out[...] = how.numbers(codes[...], jnp.float32) * how.factor

    for codes in (jnp.asarray(patterns), jnp.asarray(np.ascontiguousarray(patterns).view(QTYPES[qtype].code_dtype))):
        run = pl.pallas_call(kernel, jax.ShapeDtypeStruct((256, 128), jnp.float32), interpret=True)
        np.testing.assert_array_equal(run(codes), wanted)


def test_gradients_are_those_of_the_float_product():
    """The kernel stands inside the rule for derivatives: they need none of its own."""
    spec = jq.OpSpec(few("int4", 64))
    w, x = weight(spec.weight, (256, 128), jnp.float32), normal(2, (3, 256), jnp.float32)
    got = jax.grad(lambda x: jnp.sum(jax.checkpoint(lambda x: ops.dot_general(x, w, MATMUL, spec=spec))(x)))(x)
    want = jnp.broadcast_to(jnp.sum(w.dequantize(), axis=1), x.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(np.max(np.abs(want))))


LEAST = {"int8": 1.0, "float8_e4m3fn": 2.0**-9, "float8_e5m2": 2.0**-16}
"""The smallest number of a grid."""


@makes_nan
@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_codes_and_scales_in_one_pass(qtype: str, dtype: Any, axis: int):
    """To the bit what `quantize` finds: zeros, infinities, the least numbers, ties, and a NaN that stays visible."""
    kernel, spec = quantized_rows if axis else quantized_columns, jq.QuantSpec(qtype)
    x = normal(3, (32, 256), dtype).at[3].set(0).at[4, 5].set(jnp.inf).at[5].set(1e-39)
    x = x.at[6].set(jnp.asarray(np.arange(256) - 128, dtype) / 2)
    # Multiples of half the least grid value up to the largest, then of other powers of two.
    x = x.at[8].set(jnp.asarray(np.r_[spec.type.qmax, LEAST[qtype] * np.arange(-127, 128) / 2], dtype))
    x = x.at[9].set(jnp.asarray(np.r_[spec.type.qmax, np.arange(-127, 128) * spec.type.qmax / 224], dtype))
    x = x if axis else x.T
    codes, scale = kernel(x, qtype=spec.type, interpret=True)
    want = jq.quantize(x, spec, reduce_axes=(axis,))
    np.testing.assert_array_equal(codes, np.asarray(want.logical_codes()).view(np.int8))
    np.testing.assert_array_equal(scale, want.scale)
    _, scale = kernel(x.at[(7, 1) if axis else (1, 7)].set(jnp.nan), qtype=spec.type, interpret=True)
    np.testing.assert_array_equal(np.isnan(np.ravel(scale)), np.arange(32) == 7)


@pytest.mark.parametrize("axis", [1, 0])
def test_codes_of_values_times_factors_in_one_pass(axis: int):
    """To the bit what the array of the products is quantized to."""
    kernel = quantized_rows if axis else quantized_columns
    x, times = normal(3, (64, 384), jnp.bfloat16), jnp.exp(normal(4, (1, 384) if axis else (64, 1), jnp.float32))
    codes, scale = kernel(x, times, qtype=QTYPES["int8"], interpret=True)
    want = jq.quantize(x.astype(jnp.float32) * times, jq.QuantSpec("int8"), reduce_axes=(axis,))
    np.testing.assert_array_equal(codes, want.logical_codes())
    np.testing.assert_array_equal(scale, want.scale)


@pytest.mark.parametrize("shape", [(2, 512, 3, 128), (520, 2, 256), (512, 2, 2, 128), (2, 8, 4, 128), (512, 2, 64)])
def test_heads_side_by_side(shape: tuple[int, ...]):
    """Tiles of 8 rows and 128 elements move, where there are such; else the reshape is left to XLA."""
    count = 3 if shape == (512, 2, 2, 128) else 2
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    np.testing.assert_array_equal(side_by_side(x, count), x.reshape(*shape[:-count], -1))


def test_codes_of_heads_in_one_pass():
    """To the bit what `quantize` finds over both axes, for as many rows as the kernel takes."""
    x, spec = normal(3, (1, 512, 4, 128), jnp.bfloat16), jq.QuantSpec("int8")
    want = jq.quantize(x, spec, reduce_axes=(-2, -1))
    codes, scale = quantized_rows(side_by_side(x, 2)[0], qtype=spec.type, interpret=True)
    np.testing.assert_array_equal(codes, want.logical_codes().reshape(512, 512))
    np.testing.assert_array_equal(scale, np.asarray(want.scale).reshape(512, 1))


@needs_jit  # where it is known, NaN raises
@makes_nan
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("qtype", ["mxfp8", "mxfp4"])
def test_values_in_blocks(qtype: str, dtype: Any):
    """Exact, for 70 rows, which no block divides, of all magnitudes, with NaN, infinities and zeros."""
    spec, rng = jq.QuantSpec(qtype), np.random.default_rng(0)
    x = rng.normal(size=(70, 512)) * np.exp2(rng.integers(-100, 100, (70, 64))).repeat(8, 1)
    x[3, 5], x[4, 40], x[5, 64:96], x[6, 70], x[9, :32], x[10, 3:40] = np.nan, np.inf, 0, -np.inf, np.inf, -0.0
    x = jnp.asarray(x, dtype)
    want = jax.jit(lambda x: jq.quantize(x, spec, reduce_axes=(-1,)).dequantize())(x)
    got = rounded_blocks(x, qtype=spec.type, interpret=True)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_an_activation_in_blocks_is_rounded_by_the_kernel(platform: str):
    """On a TPU, by one kernel that also serves a batch of products."""
    x, w = (
        normal(0, (4, 2, 3, 128), jnp.bfloat16),
        jq.quantize(normal(1, (128, 64)), jq.QuantSpec("mxfp8"), reduce_axes=0),
    )
    product = jax.jit(jax.vmap(lambda x: ops.einsum("bsk,kn->bsn", x, w, spec=recipes.mxfp8())))
    text = product.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert text.count('kernel_name = "rounded_blocks"') == (platform == "tpu")


def test_transposed_codes():
    """Of several blocks, the last of them cut."""
    x = np.arange(1152 * 256, dtype=np.int32).astype(np.int8).reshape(1152, 256)
    np.testing.assert_array_equal(transposed_codes(jax.device_put(x), interpret=True), x.T)


INT8 = jq.QuantSpec("int8")


def int8_problem(x: Any, w: Any, minor: bool, result: Any = jnp.bfloat16) -> Product:
    """A product of codes with a scale per row on both sides, of a stored weight or of one in training."""
    w = jq.quantize(w, INT8, reduce_axes=(-2,)) if minor else TrainedTensor(as_codes(w, INT8, (-2,)), None)
    x = jq.quantize(x, INT8, reduce_axes=(-1,))
    lead = tuple(range(x.ndim - 2))
    return Product.of(
        x, w, Axes.of(x.ndim, lead, (x.ndim - 1,)), Axes.of(w.ndim, lead, (w.ndim - 2,)), None, jnp.dtype(result)
    )


@pytest.mark.every
@pytest.mark.parametrize(("lead", "minor"), [((), True), ((), False), ((2,), True)])
def test_many_rows_of_int8_are_what_one_dot_gives(lead: tuple[int, ...], minor: bool, monkeypatch: pytest.MonkeyPatch):
    """To the bit, for sizes that no block divides and for weights stored either way."""
    problem = int8_problem(normal(1, (*lead, 1030, 128)), normal(2, (*lead, 128, 1200)), minor, jnp.float32)
    monkeypatch.setattr(tpu_int8.Int8Blocks, "interpret", True)
    kernel = select(problem, Target("tpu", V6E))
    assert kernel.name == "int8_blocks"
    assert select(problem, Target("tpu")).name == "int8"
    want = jax.jit(integer.Int8().run)(problem)
    np.testing.assert_array_equal(jax.jit(kernel.run)(problem), want)


@pytest.mark.every
def test_few_rows_of_int8_by_a_layer_of_a_stack(monkeypatch: pytest.MonkeyPatch):
    """To the bit what one dot gives, from the stack; many rows, and a weight of its own, are XLA's."""
    problem = int8_problem(normal(1, (3, 128)), normal(2, (128, 1200)), minor=True, result=jnp.float32)
    stack = jax.tree.map(lambda v: jnp.stack([jnp.flip(v), v]), problem.w)
    layer = dataclasses.replace(problem, w=problem.weight.layer_of(stack, jnp.int32(1)))
    monkeypatch.setattr(tpu_int8.Int8Blocks, "interpret", True)
    kernel = select(layer, Target("tpu"))
    assert (kernel.name, select(problem, Target("tpu")).name) == ("int8_blocks", "int8")
    np.testing.assert_array_equal(jax.jit(kernel.run)(layer), jax.jit(integer.Int8().run)(problem))
    many = int8_problem(normal(1, (65, 128)), normal(2, (128, 1200)), minor=True)
    many = dataclasses.replace(many, w=many.weight.layer_of(stack, jnp.int32(1)))
    assert select(many, Target("tpu")).name == "int8"


@pytest.mark.parametrize("minor", [True, False])
def test_few_rows_of_floats_by_a_layer_of_a_stack(minor: bool, monkeypatch: pytest.MonkeyPatch):
    """Codes and activation are exact in bfloat16; float32 activations, and a weight of its own, are XLA's."""
    w, x = (
        jq.quantize(normal(2, (256, 300)), INT8, reduce_axes=(-2,)).store((-2,) if minor else ()),
        normal(1, (3, 256)),
    )
    stack = jax.tree.map(lambda v: jnp.stack([jnp.flip(v), v]), w)
    layer = w.layer_of(stack, jnp.int32(1))
    monkeypatch.setattr(tpu_int8.Int8Blocks, "interpret", True)
    for chip, name in ((None, "digits_layer"), ("TPU7x", "bfloat16_layer")):
        kernel = select(problem_of(x, layer), Target("tpu", chip))
        assert kernel.name == name
        exact = name == "bfloat16_layer"
        assert_close(jax.jit(kernel.run)(problem_of(x, layer)), x, w, exact=exact, rounded=False)
        for other in (problem_of(x, w), problem_of(normal(1, (65, 256)), layer)):
            assert "layer" not in select(other, Target("tpu", chip)).name
    floats = problem_of(x.astype(jnp.float32), layer)
    assert select(floats, Target("tpu")).name == "digits_layer"
    for chip, precision in (("TPU7x", None), (None, lax.Precision.HIGHEST)):
        assert "layer" not in select(dataclasses.replace(floats, precision=precision), Target("tpu", chip)).name


@pytest.mark.parametrize(
    ("spec", "name"),
    [(recipes.w8a8(), "int8_blocks"), (recipes.w8a16(), "digits_layer"), (recipes.w4a16(None), "grouped_sums")],
)
def test_weights_that_the_near_memory_does_not_hold(spec: jq.OpSpec, name: str):
    """As of a vocabulary: XLA reads such a weight within its product, slowly."""
    x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16)
    if spec.act is not None:
        x = TrainedTensor(jax.eval_shape(lambda x: as_codes(x, INT8, (-1,)), x), None)

    def kernel_of(columns: int) -> str:
        w = jax.ShapeDtypeStruct((4096, columns), jnp.bfloat16)
        w = jax.eval_shape(lambda w: jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)), "tpu"), w)
        return select(problem_of(x, w), Target("tpu")).name

    assert kernel_of(128256) == name
    assert kernel_of(8192) != name


@pytest.mark.every
@pytest.mark.parametrize(
    "spec",
    [recipes.w8a16(), recipes.w4a16(None), recipes.w4a16(None, symmetric=False), jq.OpSpec(COLUMNS["nf4"])],
    ids=["w8a16", "w4a16", "zero points", "nf4"],
)
def test_weights_of_symbolic_size(spec: jq.OpSpec):
    """As in a program that is exported for every width: no kernel has blocks for them, and none fails to say so."""
    k, n = jax.export.symbolic_shape("128*k, 128*n")
    w = jax.eval_shape(
        lambda w: jq.ops.lay_out(jq.quantize(w, present(spec.weight), reduce_axes=(-2,)), "tpu"),
        jax.ShapeDtypeStruct((k, n), jnp.bfloat16),
    )
    for chip in (None, V6E, V7X, "TPU v5"):
        kernel = select(problem_of(jax.ShapeDtypeStruct((8, k), jnp.bfloat16), w), Target("tpu", chip))
        assert "grouped" not in kernel.name
        assert "layer" not in kernel.name

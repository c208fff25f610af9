"""Codes as a platform reads them: the same values to the bit, through everything that takes a QTensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import promotes
from narrowed import untyped

import jaxquant as jq
from jaxquant import QuantError, ops, recipes
from jaxquant.core.qtensor import flat
from jaxquant.core.relayout import is_laid_out, laid_out
from jaxquant.core.views import by_layer, slice_along, transpose

SPECS = {
    "int4 g8": jq.QuantSpec("int4", granularity="per_group", group_size=8),
    "uint4 g8": jq.QuantSpec("uint4", granularity="per_group", group_size=8, symmetric=False),
    "int3 g8": jq.QuantSpec("int3", granularity="per_group", group_size=8),
    "uint2": jq.QuantSpec("uint2", symmetric=False),
    "int5 g8": jq.QuantSpec("int5", granularity="per_group", group_size=8),
    "int4": jq.QuantSpec("int4"),
    "int8 g8": jq.QuantSpec("int8", granularity="per_group", group_size=8),
    "int8": jq.QuantSpec("int8"),
    "nf4 g8": jq.QuantSpec("nf4", granularity="per_group", group_size=8),
    "float4 g8": jq.QuantSpec("float4_e2m1fn", granularity="per_group", group_size=8),
    "mxfp4": jq.QuantSpec("mxfp4"),
    "nvfp4": jq.QuantSpec("nvfp4"),
    "mxfp8": jq.QuantSpec("mxfp8"),
    "float8": jq.QuantSpec("float8_e4m3fn"),
    "float8 e5m2 g8": jq.QuantSpec("float8_e5m2", granularity="per_group", group_size=8),
}


def weight(name, shape=(64, 24), axes=(-2,), seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) * np.linspace(0.5, 2, shape[-1])
    return jax.jit(lambda w: jq.quantize(w, SPECS[name], reduce_axes=axes).store(axes))(np.asarray(values, np.float32))


def all_equal(function, q, wanted):
    """Each array that a function makes of a weight is the one that is wanted. They are one program."""
    found = jax.jit(function)(q)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.every
@pytest.mark.parametrize("name", SPECS)
def test_there_and_back(name):
    q = weight(name)
    there = jq.ops.lay_out(q, "tpu")
    np.testing.assert_array_equal(there.dequantize(), q.dequantize())
    same(jq.ops.lay_out(there, "cpu"), q)
    on_gpu = jq.ops.lay_out(there, "gpu")
    if there.seal is None:
        assert on_gpu is there
    same(jq.ops.lay_out(on_gpu, "tpu"), there)
    np.testing.assert_array_equal(jq.ops.lay_out(on_gpu, "cpu").dequantize(), q.dequantize())
    assert there.shape == q.shape
    sealed = 0 if there.seal is None else there.seal.size
    assert there.nbytes <= q.nbytes * (8 / q.type.bits if q.type.packed else 1) + sealed
    if q.type.bits == 4:
        assert there.nbytes == q.nbytes
        assert "one code per element" in repr(there)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    lead=st.lists(st.integers(1, 3), max_size=1),
    heads=st.sampled_from([(), (2,)]),
    contracted=st.sampled_from([(32,), (2, 32)]),
)
def test_any_shape(name, lead, heads, contracted):
    shape = (*lead, *contracted, *heads, 3)
    axes = tuple(range(-len(contracted) - len(heads) - 1, -len(heads) - 1))
    q = weight(name, shape, axes)

    @jax.jit  # one program: each operation on its own would be compiled for every shape
    def values(q):
        there = laid_out(q, "native")
        return q.dequantize(), there.dequantize(), laid_out(there, "packed", axes).dequantize()

    wanted, there, back = values(q)
    np.testing.assert_array_equal(there, wanted)
    np.testing.assert_array_equal(back, wanted)


@pytest.mark.every
@pytest.mark.parametrize(("shape", "axes", "there"), [
    ((4, 8, 24), (-3, -2), (4, 8, 24)),  # attention's output projection
    ((2, 4, 8, 24), (-3, -2), (2, 4, 8, 24)),  # in a stack
    ((24, 4, 8), (-2, -1), (4, 8, 24)),
    ((8, 4, 24), (-3,), (4, 24, 8)),  # one axis: as elsewhere
])  # fmt: skip
def test_axes_that_share_scales_are_joined_without_a_copy(shape, axes, there):
    q = weight("int8", shape, axes)
    native = laid_out(q, "native")
    assert native.kept.shape == there
    assert is_laid_out(native, "native")
    np.testing.assert_array_equal(native.dequantize(), q.dequantize())


@pytest.mark.every
@pytest.mark.parametrize("name", ["int4 g8", "int4", "mxfp8", "float8"])
def test_last_axes_with_scales_are_stored_as_one(name):
    q = weight(name, (2, 64, 3, 16), (-3,))
    there, values = laid_out(q, "native"), np.asarray(q.dequantize())
    assert there.kept.shape[-1] == 3 * 16
    assert (there.shape, there.ndim, there.joined) == (q.shape, q.ndim, 2)
    assert is_laid_out(there, "native")
    assert not is_laid_out(there, "packed")
    assert "one code per element" in repr(there) or "fp8" in repr(there)
    taken = ((1, np.array([5, 0])), (2, np.array([2, 1, 0])), (3, np.array([7])))

    def others(there):
        apart = (there.unjoined(), there.whole(), laid_out(there, "packed"), laid_out(there, "elements"))
        assert [q.joined for q in apart] == [0] * 4
        _, layers = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, there)
        return [*(q.dequantize() for q in apart), layers, *(ops.take(there, rows, axis=axis) for axis, rows in taken)]

    all_equal(others, there, [values] * 5 + [np.take(values, rows, axis=axis) for axis, rows in taken])


@pytest.mark.every
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("name", ["int4 g8", "int4", "nf4 g8", "nvfp4", "mxfp8"])
def test_outputs_are_stored_after_inputs(name, lead):
    """[N, K] as of a table, or of a weight that is multiplied transposed: kernels read [K, N]."""
    q = weight(name, (*lead, 24, 64), (-1,))
    there, values = laid_out(q, "native"), np.asarray(q.dequantize())
    assert (there.kept.shape[-1], there.shape) == (24, q.shape)
    assert is_laid_out(there, "native")
    turned = transpose(there, (*range(len(lead)), len(lead) + 1, len(lead)))
    assert turned.minor == ()
    assert turned.split == (None if name == "int4" else -2)
    rows = np.array([[5, 0], [23, 7]])

    def others(there):
        kept = (laid_out(there, "packed"), laid_out(there, "elements"), laid_out(there, "native", ()))
        turned = transpose(there, (*range(len(lead)), len(lead) + 1, len(lead)))
        taken = [ops.take(there, rows, axis=axis) for axis in (-1, -2)]
        return [*(q.dequantize() for q in (there, there.whole(), *kept, turned)), *taken]

    taken = [np.take(values, rows, axis=axis) for axis in (-1, -2)]
    all_equal(others, there, [values] * 5 + [np.swapaxes(values, -1, -2), *taken])


@pytest.mark.every
@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ["int4 g8", "uint4 g8", "int8 g8"])
def test_scattered_groups(name, axis, target):
    """As of GPTQ's act-order: codes lie in groups, and the product permutes the activation."""
    q = weight(name, (64, 64), (axis,))
    order = np.random.default_rng(1).permutation(64).astype(np.int32)
    q = q.replace(permutation=jnp.asarray(order).reshape((1, 64) if axis == -1 else (64, 1)))
    values, there = np.asarray(q.dequantize()), jq.ops.lay_out(q, target)
    assert there.layout == "elements"
    assert there.split == axis
    same(jq.ops.lay_out(there, "cpu"), q)
    rows = np.array([3, 0, 31])

    def others(there):
        kept = (there, there.whole(), there.unpermuted(), laid_out(there, "packed", ()), laid_out(there, "native"))
        views = (transpose(there, (1, 0)), slice_along(there, 0, 8, 16), slice_along(there, 1, 3, 7))
        return [*(q.dequantize() for q in (*kept, *views)), *(ops.take(there, rows, axis=along) for along in (0, 1))]

    views = [values.T, values[8:24], values[:, 3:10], *(np.take(values, rows, axis=along) for along in (0, 1))]
    all_equal(others, there, [values] * 5 + views)
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    products = jax.jit(lambda q: [ops.dot_general(x, q, (((1,), (other,)), ((), ()))) for other in (0, 1)])
    for other, found in enumerate(products(there)):
        np.testing.assert_allclose(found, np.tensordot(x, values, (1, other)), rtol=1e-3, atol=5e-3)


@pytest.mark.every
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", ["float8", "int8 g8", "mxfp8"])
def test_blocks_along_two_axes(name, axis):
    """As of DeepSeek's fp8: the axis that products sum over is stored last, and so is known."""
    spec = jq.QuantSpec(SPECS[name].qtype, granularity=jq.PerGroup(32)) if name != "mxfp8" else SPECS[name]
    w = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    q = jq.quantize(w, spec, reduce_axes=(axis,))
    scale = flat(q.scale)
    q = q.replace(scale=scale[::32] if axis == -1 else scale[:, ::32])
    values, there = np.asarray(q.dequantize()), laid_out(q, "native")
    assert is_laid_out(there, "native")
    assert there.split == axis
    assert there.kept.shape == ((3, 32, 64) if axis == -1 else (2, 32, 96))
    same(laid_out(there, "packed"), q)
    assert laid_out(there, "elements").split == axis
    np.testing.assert_array_equal(there.dequantize(), values)
    x = np.random.default_rng(1).standard_normal((3, 96 if axis == -1 else 64)).astype(np.float32)
    found = ops.dot_general(x, there, (((1,), (axis + 2,)), ((), ())))
    np.testing.assert_allclose(found, np.tensordot(x, values, (1, axis)), rtol=1e-3, atol=2e-3)


@pytest.mark.every
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        *((name, (24,)) for name in ("int4 g8", "nf4 g8", "uint2", "mxfp8", "float8")),
        ("int4 g8", (3, 8)),
        ("mxfp8", (3, 8)),
    ],
)
def test_views(name, heads):
    q = weight(name, (3, 64, *heads), (-len(heads) - 1,))
    there, values = laid_out(q, "native"), np.asarray(q.dequantize())
    turned = (0, *range(2, q.ndim), 1)

    def others(there):
        layer = jax.tree.map(lambda v: v[1], by_layer(there))
        views = (transpose(there, turned), slice_along(there, 1, 8, 16), slice_along(there, 1, 3, 7), layer)
        stacked = jax.tree.map(lambda *v: jnp.stack(v), there, there)
        _, layers = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, there)
        return [*(q.dequantize() for q in views), jax.vmap(lambda q: q.dequantize())(stacked)[1], layers]

    all_equal(others, there, [values.transpose(turned), values[:, 8:24], values[:, 3:10], values[1], values, values])


@pytest.mark.every
@pytest.mark.parametrize("axis", [0, 1])
def test_lookups(axis):
    q = weight("int4 g8", (32, 64), (-1,))
    there = laid_out(q, "elements")
    rows = jnp.array([3, 0, 31])
    np.testing.assert_array_equal(ops.take(there, rows, axis=axis), jnp.take(q.dequantize(), rows, axis=axis))


@pytest.mark.every
@pytest.mark.parametrize("name", ["int4 g8", "int8"])
def test_tables_that_are_only_looked_up_keep_their_rows(name):
    """Devices that share a lookup gather rows; columns would be copied."""
    table, tokens = jnp.asarray(np.random.default_rng(0).standard_normal((24, 64)), jnp.float32), jnp.array([3, 0])
    for fn, rows in ((lambda p, t: p["w"][t], True), (lambda p, t: p["w"][t] @ p["w"].T, name == "int8")):
        plan = jq.make_plan(fn, {"w": table}, tokens, rules=[jq.Rule("w", jq.OpSpec(SPECS[name]))])
        there = jq.quantize_params({"w": table}, plan, target="tpu")["w"]
        assert (there.kept.shape[0] == 24) == rows
        wanted = fn({"w": there.dequantize()}, tokens)
        np.testing.assert_allclose(jq.quantized(fn, plan)({"w": there}, tokens), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.every
@pytest.mark.parametrize("name", ["int4 g8", "int4", "nf4 g8", "int8", "float8", "mxfp8"])
def test_quantize_params_lays_out_for_its_target(name):
    w = jax.device_put(np.asarray(np.random.default_rng(1).standard_normal((64, 16)), jnp.float32))
    fn, x = (lambda p, x: x @ p["w"]), jnp.ones((2, 64))
    plan = jq.make_plan(fn, {"w": w}, x, rules=[jq.Rule("w", jq.OpSpec(SPECS[name]))])
    here, there = (jq.quantize_params({"w": w}, plan, target=target)["w"] for target in ("cpu", "tpu"))
    np.testing.assert_array_equal(here.dequantize(), there.dequantize())
    assert here.layout == "packed"
    shapes = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target="tpu"), {"w": w})["w"]
    assert jax.tree.structure(shapes) == jax.tree.structure(there)
    assert shapes.nbytes == there.nbytes
    np.testing.assert_allclose(jq.quantized(fn, plan)({"w": there}, x), x @ here.dequantize(), rtol=2e-4, atol=2e-4)


def test_files_have_packed_codes(tmp_path):
    params = {name: weight(name) for name in ("int4 g8", "nf4 g8", "int8", "mxfp4", "mxfp8", "float8")}
    there = jq.ops.lay_out(params, "tpu")
    jq.io.save(tmp_path / "here.safetensors", params)
    jq.io.save(tmp_path / "there.safetensors", there)
    assert (tmp_path / "here.safetensors").read_bytes() == (tmp_path / "there.safetensors").read_bytes()
    same(jq.io.load(tmp_path / "there.safetensors"), params)
    same(jq.io.load(tmp_path / "there.safetensors", target="tpu"), there)
    with pytest.raises(QuantError, match="must be a platform"):
        untyped.io.load(tmp_path / "there.safetensors", target="v5e")


def test_checkpoints_of_others(tmp_path):
    spec = jq.QuantSpec("int4", granularity="per_group", group_size=32, scale_dtype="float16")
    w = jq.quantize(
        jax.device_put(np.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)),
        spec,
        reduce_axes=(-1,),
    )
    params = {"lm_head.weight": w, "norm.weight": jnp.ones(64)}
    there = jq.ops.lay_out(params, "tpu")
    jq.io.save_hf(tmp_path / "here", params)
    jq.io.save_hf(tmp_path / "there", there)
    names = [f.name for f in (tmp_path / "here").glob("*.safetensors")]
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    found, _ = jq.io.load_hf(tmp_path / "there", target="tpu")
    assert found["lm_head.weight"].layout == "elements"
    np.testing.assert_array_equal(found["lm_head.weight"].dequantize(jnp.float32), w.dequantize())
    metadata = {"general.architecture": "llama"}
    jq.io.save_gguf(tmp_path / "m.gguf", {"output.weight": there["lm_head.weight"]}, metadata=metadata)
    found, _ = jq.io.load_gguf(tmp_path / "m.gguf", target="tpu")
    np.testing.assert_array_equal(found["output.weight"].dequantize(), w.dequantize())


def test_shardings_cut_whole_groups():
    mesh = AbstractMesh((4, 2), ("data", "model"))
    q = laid_out(weight("int4 g8", (64, 24)), "elements")
    found = jq.ops.shardings({"w": q}, {"w": NamedSharding(mesh, P("data", "model"))})["w"]
    assert tuple(found.codes.spec) == ("data", None, "model")
    assert tuple(found.scale.spec) == ("data", "model")
    uneven = laid_out(weight("int4 g8", (48, 24)), "elements")
    with pytest.raises(QuantError, match="6 blocks"):
        jq.ops.shardings({"w": uneven}, {"w": NamedSharding(mesh, P("data"))})


def test_targets_that_are_none():
    with pytest.raises(QuantError, match="must be a platform"):
        untyped.ops.lay_out(weight("int4"), "tpu v5e")
    with pytest.raises(QuantError, match="must be a platform"):
        untyped.quantize_params({"kernel": jnp.ones((4, 4))}, [jq.Rule(".*", recipes.w8a16())], target="cuda")


def test_arithmetic_on_int4_is_refused():
    q = laid_out(weight("int4 g8"), "elements")
    with pytest.raises(QuantError, match="computed with them"):
        jax.tree.map(lambda v: v.astype(jnp.float32) * 0.5, q).dequantize()


@promotes
@pytest.mark.parametrize("name", ["float8", "mxfp8", "float8 e5m2 g8"])
def test_arithmetic_on_fp8_is_refused(name):
    """fp8 keeps its dtype in ``a * 0.5``; the seal does not."""
    q, x = laid_out(weight(name), "native"), jnp.ones((2, 64))
    assert q.stored.dtype == q.type.code_dtype
    for change in (lambda a: a * 0.5, lambda a: 0.9 * a + 0.1 * a, lambda a: jnp.sqrt(jnp.abs(a)), lambda a: a * 2):
        changed = jax.tree.map(change, q)
        for use in (changed.dequantize, lambda c=changed: jq.quantized(lambda p, x: x @ p)(c, x)):
            with pytest.raises(QuantError, match="something has computed with them"):
                use()
    grads = jax.grad(lambda q: jnp.sum(ops.dot_general(x, q, (((1,), (0,)), ((), ())))), allow_int=True)(q)
    with pytest.raises(QuantError, match="have no gradient"):
        jax.tree.map(lambda p, g: p - 0.1 * g, q, grads)


@pytest.mark.parametrize("name", ["float8", "mxfp8"])
def test_fp8_in_its_own_dtype_is_a_leaf_like_others(name):
    """Stacks, slices of them, mapped axes and shardings have a seal that fits."""
    q = weight(name, (3, 64, 24))
    there, values = laid_out(q, "native"), np.asarray(q.dequantize())
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[1], there).dequantize(), values[1])
    rows = laid_out(weight(name, (24, 64), (-1,)), "native", ())
    if name == "float8":
        np.testing.assert_array_equal(jax.vmap(lambda q: q.dequantize())(rows), rows.dequantize())
    mesh = AbstractMesh((4, 2), ("data", "model"))
    flat = laid_out(weight(name, (512, 24)), "native")  # mxfp8: pieces of 128
    found = jq.ops.shardings({"w": flat}, {"w": NamedSharding(mesh, P("data", "model"))})["w"]
    assert jax.tree.structure(found) == jax.tree.structure(flat)
    assert tuple(found.seal.spec) == (None, "model")
    shapes = jax.eval_shape(lambda q: ops.lay_out(q, "tpu"), laid_out(flat, "packed"))
    assert jax.tree.structure(shapes) == jax.tree.structure(flat)
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [leaf.dtype for leaf in jax.tree.leaves(flat)]


@pytest.mark.every
@pytest.mark.parametrize("name", ["int4 g8", "nf4 g8", "int8", "float8"])
def test_other_products(name):
    """Convolutions and ragged products take every layout."""
    q = weight(name, (2, 16, 24), (-2,))
    x, sizes = (
        jax.device_put(np.asarray(np.random.default_rng(3).standard_normal((5, 16)), jnp.float32)),
        jnp.array([2, 3]),
    )
    wanted = ops.ragged_dot(x, q, sizes)
    np.testing.assert_allclose(ops.ragged_dot(x, jq.ops.lay_out(q, "tpu"), sizes), wanted, rtol=1e-5, atol=1e-5)
    kernel = weight(name, (3, 8, 24), (-3, -2)).store(())
    x = jax.device_put(np.asarray(np.random.default_rng(4).standard_normal((2, 9, 8)), jnp.float32))
    call = lambda w: ops.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))  # noqa: E731
    np.testing.assert_allclose(call(jq.ops.lay_out(kernel, "tpu")), call(kernel), rtol=1e-5, atol=1e-5)

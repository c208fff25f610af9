"""QTensor: a pytree that behaves as the float array it stands for, and never pretends to be one."""

import copy
import io
import math
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from core import reference
from core.cases import unequal
from jax_settings import needs_jit
from narrowed import instance, untyped

import jaxquant as jq
from jaxquant import QTensor, QuantError, QuantSpec
from jaxquant.core.packing import packed_length
from jaxquant.core.qtensor import from_codes, scale_values
from jaxquant.core.qtypes import QTYPES

SPECS = (
    QuantSpec("int8"),
    QuantSpec("int4", granularity="per_group", group_size=8),
    QuantSpec("uint3", symmetric=False),
    QuantSpec("float8_e4m3fn", granularity="per_tensor"),
    QuantSpec("nf4"),
    QuantSpec("nvfp4"),
)


def data(shape=(32, 24), seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * unequal(rng, shape)).astype(np.float32)


def same(a, b):
    """Same structure, same leaves, bit for bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


# -- what a float array would say -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape, axes", [((32, 24), (-2,)), ((24, 32), (-1,)), ((3, 16, 2, 8), (-3, -1))])
def test_shape_dtype_and_bytes(spec, shape, axes):
    x = data(shape).astype(jnp.bfloat16)
    q = jq.quantize(x, spec, reduce_axes=axes)
    assert q.shape == x.shape
    assert q.ndim == x.ndim
    assert q.size == x.size
    assert q.dtype == x.dtype
    assert q.symmetric == spec.symmetric
    assert q.type == QTYPES[spec.qtype]
    assert q.dequantize().shape == x.shape
    assert q.dequantize().dtype == x.dtype
    assert q.logical_codes().shape == x.shape
    assert q.scale.ndim == x.ndim
    # True bytes: rows of packed codes, 4 bytes a scale (1 and one float32 for nvfp4), 1 a zero point.
    row = math.prod(shape[a] for a in axes) if q.minor and len(axes) == 1 else q.unpacked().shape[-1]
    codes = packed_length(row, q.type.bits) * x.size // row
    reduced = math.prod(shape[a] for a in axes)
    blocks = {
        "per_tensor": 1,
        "per_channel": x.size // reduced,
        "per_group": x.size // (spec.group_size or 1),
    }[spec.granularity]
    scales = blocks + 4 if spec.qtype == "nvfp4" else 4 * blocks
    assert q.nbytes == codes + scales + (0 if spec.symmetric else blocks)


def test_codes_are_stored_with_the_reduced_axes_last():
    x = data((3, 16, 2, 8))
    q = jq.quantize(x, QuantSpec("int8"), reduce_axes=(-3, -1))
    assert q.minor == (-3, -1)
    assert q.codes.shape == (3, 2, 16, 8)
    np.testing.assert_array_equal(np.transpose(q.codes, (0, 2, 1, 3)), q.logical_codes())
    assert jq.quantize(x, QuantSpec("int8"), reduce_axes=(-1,)).minor == ()
    assert jq.quantize(x, QuantSpec("int8"), reduce_axes=(-2, -1)).minor == ()
    assert jq.quantize(x, QuantSpec("int8"), reduce_axes=(-4, -3, -2, -1)).minor == ()


@pytest.mark.parametrize(
    "shape, spec, axes, expected",
    [
        ((256, 512), QuantSpec("int4", granularity="per_group", group_size=64), (-2,),
         "QTensor(int4[256, 512] -> float32, group 64 on axis -2, symmetric, 72.0 KiB)"),
        ((1024, 1024), QuantSpec("int8"), (-2,),
         "QTensor(int8[1024, 1024] -> float32, per channel on axis -1, symmetric, 1.0 MiB)"),
        ((8, 6), QuantSpec("uint8", symmetric=False, granularity="per_tensor"), (-1,),
         "QTensor(uint8[8, 6] -> float32, per tensor, asymmetric, 53 B)"),
        ((3, 4, 32, 5), QuantSpec("int8"), (-3, -2),
         "QTensor(int8[3, 4, 32, 5] -> float32, per channel on axes -4, -1, symmetric, 1.9 KiB)"),
        ((4, 8, 6), QuantSpec("int8", granularity="per_group", group_size=16), (-3, -2),
         "QTensor(int8[4, 8, 6] -> float32, group 2 x 8 on axes -3, -2, symmetric, 240 B)"),
        ((4, 64), QuantSpec("nvfp4"), (-1,),
         "QTensor(nvfp4[4, 64] -> float32, group 16 on axis -1, symmetric, 148 B)"),
    ],
)  # fmt: skip
def test_prints_as_one_line(shape, spec, axes, expected):
    assert repr(jq.quantize(data(shape), spec, reduce_axes=axes)) == expected


def test_is_no_array():
    """Using it as a float array raises instead of dequantizing silently."""
    q, x = jq.quantize(data(), QuantSpec("int8"), reduce_axes=(-2,)), jnp.ones((2, 32))
    assert not hasattr(q, "__jax_array__")
    for convert in (np.asarray, np.array, lambda q: np.asarray(q, np.float32), lambda q: np.save(io.BytesIO(), q)):
        with pytest.raises(jq.QuantError, match=r"QTensor: this is no array; got tensor='QTensor\(.*\.dequantize\(\)"):
            convert(q)
    for name in ("T", "astype", "mean", "at", "reshape"):
        assert not hasattr(q, name)
        with pytest.raises(
            AttributeError, match=rf"QTensor has no attribute '{name}'.*\.dequantize\(\).*jaxquant\.quantized"
        ):
            getattr(q, name)
    some: Any = q  # types refuse it, too
    for use in (
        lambda: jnp.asarray(some),
        lambda: jnp.sum(some),
        lambda: x @ some,
        lambda: some @ x,
        lambda: some + 1,
        lambda: 2 * some,
        lambda: jnp.dot(x, some),
        lambda: np.ones((2, 32)) @ some,
        lambda: float(some),
    ):
        with pytest.raises((TypeError, ValueError)):
            use()


# -- dequantize -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", jnp.float8_e4m3fn, np.float32])
def test_dequantize_to_another_dtype_rounds_once(dtype):
    q = jq.quantize(data().clip(-100, 100), QuantSpec("int8"), reduce_axes=(-2,))
    y = q.dequantize(dtype)
    assert y.dtype == np.dtype(dtype)
    exact = np.asarray(q.logical_codes()).astype(np.float64) * reference.expand(q.scale, q.shape)
    np.testing.assert_array_equal(y, exact.astype(np.float32).astype(dtype))
    np.testing.assert_array_equal(jq.dequantize(q, dtype), y)


def test_dequantize_gradient_reaches_the_scale():
    """d/ds = q - z; codes have none."""
    q = jq.quantize(data(), QuantSpec("uint4", symmetric=False), reduce_axes=(-2,))
    g = data(seed=1)

    def loss(scale):
        return jnp.sum(QTensor(q.codes, scale, q.zero_point, qtype=q.qtype, dtype=q.dtype, minor=q.minor,
                               length=q.length).dequantize() * g)  # fmt: skip

    steps = np.asarray(q.logical_codes()).astype(np.float64) - reference.expand(q.zero_point, q.shape)
    np.testing.assert_allclose(jax.grad(loss)(q.scale)[0], np.sum(steps * g, 0), rtol=1e-4, atol=1e-3)


def test_quantized_scales():
    """Double quantization: a scale that is a QTensor itself counts by its real values."""
    x = data((16, 64))
    q = jq.quantize(x, QuantSpec("int4", granularity="per_group", group_size=8), reduce_axes=(-1,))
    scale = jq.quantize(q.scale, QuantSpec("uint8", granularity="per_group", group_size=4), reduce_axes=(-1,))
    two_level = QTensor(q.codes, scale, None, qtype="int4", dtype="float32", length=q.length)
    plain = QTensor(q.codes, scale.dequantize(), None, qtype="int4", dtype="float32", length=q.length)
    np.testing.assert_array_equal(two_level.dequantize(), plain.dequantize())
    assert two_level.nbytes == 16 * 32 + 16 * 8 + 16 * 2 * 4
    given = jq.quantize(x, QuantSpec("int4", granularity="per_group", group_size=8), reduce_axes=(-1,), scale=scale)
    assert isinstance(given.scale, QTensor)
    np.testing.assert_array_equal(
        given.codes,
        jq.quantize(
            x, QuantSpec("int4", granularity="per_group", group_size=8), reduce_axes=(-1,), scale=scale.dequantize()
        ).codes,
    )


# -- a pytree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pytree_round_trip(spec):
    q = jq.quantize(data(), spec, reduce_axes=(-2,))
    leaves, treedef = jax.tree.flatten(q)
    same(jax.tree.unflatten(treedef, leaves), q)
    hash(treedef)
    assert treedef == jax.tree.structure(jq.quantize(data(seed=1), spec, reduce_axes=(-2,)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths[0] == ".codes"
    assert paths[1] == (".scale" if spec.qtype != "nvfp4" else ".scale.codes")
    assert (".zero_point" in paths) == (not spec.symmetric)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_pickle_and_copy(spec):
    q = jq.quantize(data(), spec, reduce_axes=(-2,))
    for other in (pickle.loads(pickle.dumps(q)), copy.copy(q), copy.deepcopy(q)):
        same(other, q)
        assert repr(other) == repr(q)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_stack_slice_scan_and_vmap(spec):
    """A leading axis on every leaf makes a stack, as it does of float arrays; axes are counted from the end."""
    xs = np.stack([data(seed=s) for s in range(3)])
    qs = [jq.quantize(x, spec, reduce_axes=(-2,)) for x in xs]
    ys = np.stack([q.dequantize() for q in qs])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *qs)
    assert stacked.shape == xs.shape
    np.testing.assert_array_equal(stacked.dequantize(), ys)
    same(jax.tree.map(lambda leaf: leaf[1], stacked), qs[1])
    if spec.granularity != "per_tensor" and spec.qtype != "nvfp4":
        same(jq.quantize(xs, spec, reduce_axes=(-2,)), stacked)
    same(jax.vmap(lambda x: jq.quantize(x, spec, reduce_axes=(-2,)))(xs), stacked)
    np.testing.assert_array_equal(jax.vmap(jq.dequantize)(stacked), ys)
    _, scanned = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, stacked)
    np.testing.assert_array_equal(scanned, ys)
    repr(stacked)


@needs_jit
def test_jit_does_not_retrace():
    traces = []

    @jax.jit
    def fn(q):
        traces.append(q.shape)
        return q.dequantize()

    for seed in range(3):
        fn(jq.quantize(data(seed=seed), QuantSpec("int4"), reduce_axes=(-2,)))
    assert traces == [(32, 24)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_abstract_leaves(spec):
    """Shapes, None, axis numbers and anything else that JAX or a user puts in place of arrays."""
    q = jq.quantize(data(), spec, reduce_axes=(-2,))
    abstract = jax.eval_shape(lambda x: jq.quantize(x, spec, reduce_axes=(-2,)), jax.ShapeDtypeStruct(q.shape, q.dtype))
    assert repr(abstract) == repr(q)
    assert (abstract.shape, abstract.nbytes, abstract.dtype) == (q.shape, q.nbytes, q.dtype)
    for put in (None, 0, "x", object(), jax.sharding.PartitionSpec("d"), jnp.float32(1), np.zeros((2, 2, 2, 2))):
        other = jax.tree.map(lambda _, put=put: put, q)
        assert repr(other).startswith(f"QTensor({spec.qtype}")
        jax.tree.flatten(other)
    empty = jax.tree.unflatten(jax.tree.structure(q), [jax.ShapeDtypeStruct((0,), np.uint8)] * len(jax.tree.leaves(q)))
    repr(empty)


def test_inside_a_params_tree():
    params = {"dense": {"kernel": jq.quantize(data(), QuantSpec("int4"), reduce_axes=(-2,)), "bias": jnp.ones((1, 24))}}
    y = jax.jit(lambda p, x: x @ p["dense"]["kernel"].dequantize() + p["dense"]["bias"])(params, jnp.ones((2, 32)))
    expected = np.ones((2, 32)) @ np.asarray(params["dense"]["kernel"].dequantize(), np.float64) + 1
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-2)
    is_q = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    assert sum(map(is_q, jax.tree.leaves(params, is_leaf=is_q))) == 1


# -- other layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_store_keeps_values(spec):
    q = jq.quantize(data((4, 16, 6)), spec, reduce_axes=(-2,))
    for minor in ((), (-3, -2), (-1,)):
        other = q.store(minor)
        assert other.minor == minor
        assert other.shape == q.shape
        np.testing.assert_array_equal(other.logical_codes(), q.logical_codes())
        np.testing.assert_array_equal(other.dequantize(), q.dequantize())
        same(other.store(q.minor), q)
    assert q.store(q.minor) is q


@pytest.mark.parametrize("qtype", QTYPES)
def test_from_codes_keeps_every_code(qtype):
    info, g = QTYPES[qtype], reference.grid(qtype)
    rng = np.random.default_rng(0)
    codes = rng.choice(g.codes, (5, 7, 3))
    codes = (
        codes.astype(info.code_dtype)
        if info.kind == "int" or info.packed
        else codes.astype(np.uint8).view(info.code_dtype)
    )
    scale = (10.0 ** rng.uniform(-3, 3, (5, 1, 3))).astype(np.float32)
    for minor in ((), (-3, -2)):
        q = from_codes(jnp.asarray(codes), jnp.asarray(scale), None, qtype=qtype, dtype="float32", minor=minor)
        np.testing.assert_array_equal(q.logical_codes(), codes)
        assert q.shape == (5, 7, 3)
        bits = codes if codes.dtype.kind in "iu" else codes.view(np.uint8)
        np.testing.assert_array_equal(q.dequantize(), (g.value_of(bits) * scale).astype(np.float32))
        assert (q.length is not None) == (info.bits < 8)
        assert q.codes.dtype == (np.uint8 if info.bits < 8 else info.code_dtype)


def test_scale_values_are_at_least_float32():
    assert scale_values(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
    assert scale_values(jnp.ones(3, jnp.float8_e8m0fnu)).dtype == jnp.float32


def test_sub_byte_codes_are_uint8():
    """XLA never sees a 1-, 2- or 3-bit dtype."""
    for qtype, info in QTYPES.items():
        spec = QuantSpec(qtype)
        q = jax.eval_shape(lambda x, s=spec: jq.quantize(x, s, reduce_axes=(-1,)), jnp.ones((2, 32)))
        assert q.codes.dtype.itemsize == 1
        if info.bits < 8:
            assert q.codes.dtype == jnp.uint8


@pytest.mark.parametrize(
    "call, rule",
    [
        (lambda: untyped.dequantize(jnp.ones(3)), "the operand must be a QTensor"),
        (lambda: jq.quantize(data(), SPECS[0], reduce_axes=0).dequantize(jnp.int8), "dtype must be a float dtype"),
        (lambda: jq.quantize(data(), SPECS[0], reduce_axes=0).dequantize("nonsense"), "dtype must be a float dtype"),
        (lambda: jq.quantize(data(), SPECS[0], reduce_axes=0).store((0,)), "store: minor must be axes counted from"),
        (lambda: jq.quantize(data(), SPECS[0], reduce_axes=0).store((-1, -1)), "store: minor must be axes counted"),
        (lambda: jq.quantize(data(), SPECS[0], reduce_axes=0).store((-9,)), "store: minor must be axes counted from"),
    ],
)
def test_refusals(call, rule):
    with pytest.raises(QuantError, match=rule):
        call()


@pytest.mark.parametrize(
    "use",
    [
        lambda q, x: x @ q,
        lambda q, x: q @ x,
        lambda q, x: 2 * q,
        lambda q, x: -q,
        lambda q, x: q[0],
        lambda q, x: x + q,
    ],
)
def test_operators_say_what_to_do(use):
    q = jq.quantize(jnp.eye(4), jq.QuantSpec("int8"), reduce_axes=(-2,))
    with pytest.raises(jq.QuantError, match=r"operators take arrays, and this is none.*Run the function through"):
        use(q, jnp.ones((4, 4)))


def test_arrays_of_a_layer_are_found_in_its_stack():
    """The very arrays; scales that were computed from those of the layer are none of the stack's."""
    spec = QuantSpec("int4", granularity=jq.PerGroup(16), two_level=True)
    q = jq.quantize(jnp.asarray(unequal(np.random.default_rng(0), (64, 8))), spec, reduce_axes=(-2,))
    stack = jax.tree.map(lambda v: jnp.stack([v, v]), q)
    layer = q.layer_of(stack, jnp.int32(1))
    assert layer.in_stack(layer.kept) is stack.kept
    mine, whole = (instance(QTensor, v.scale) for v in (layer, stack))
    assert layer.in_stack(mine.scale) is whole.scale
    values = scale_values(layer.scale)
    assert layer.replace(scale=values).in_stack(values) is values

"""Equations that are replayed mean what they meant: starts, narrow indices, and where arrays lie on a mesh."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax_settings import needs_jit

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core.indices import clamped, widened

INT8 = jq.OpSpec(weight=jq.QuantSpec("int8"))


def weights(*shape, seed=0):
    """Unequal magnitudes along every axis."""
    w = np.random.default_rng(seed).normal(size=shape)
    for axis, n in enumerate(shape):
        w *= np.exp(np.linspace(-1, 1, n)).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jax.device_put(np.asarray(w, np.float32))


def both(fn, params, *args, spec=INT8):
    """The plan, and the function's values frozen and in training."""
    plan = jq.make_plan(fn, params, *args, rules=[jq.Rule(".", spec)])
    qparams = jq.quantize_params(params, plan)
    run = jax.jit(jq.quantized(fn, plan))
    return run(qparams, *args), run(params, *args), jq.dequantize_params(qparams)


# -- starts ------------------------------------------------------------------------------------------------------------

STARTS = [-100, -9, -8, -1, 0, 3, 4, 5, 7, 100]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
def test_slices_begin_where_the_primitive_begins_them(start, dtype):
    """`lax.dynamic_slice_p` moves a start inside; a wrapper counts a negative one from the end first, once."""
    if dtype[0] == "u" and start < 0:
        pytest.skip("unsigned")
    w, x = weights(8, 6), jnp.ones((1, 4))
    fn = lambda p, x, s: x @ lax.dynamic_slice(p["w"], (s, jnp.zeros_like(s)), (4, 6))  # noqa: E731
    frozen, trained, values = both(fn, {"w": w}, x, jnp.asarray(start, dtype))
    begin = min(max(start + 8 if start < 0 else start, 0), 4)  # numpy's count from the end, and then inside
    right = np.asarray(values["w"], np.float64)[begin : begin + 4].sum(0, keepdims=True)
    np.testing.assert_allclose(frozen, right, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(trained, right, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("group", [None, 2, 4])
@pytest.mark.parametrize("start", [-9, -1, 0, 1, 2, 9])
def test_slices_along_groups_keep_the_scales_of_their_rows(start, group):
    spec = INT8 if group is None else recipes.w4a16(group_size=group)
    w, x = weights(8, 6), jnp.ones((1, 4))
    fn = lambda p, x, s: x @ lax.dynamic_slice_in_dim(p["w"], s, 4, 0)  # noqa: E731
    frozen, trained, values = both(fn, {"w": w}, x, jnp.int32(start), spec=spec)
    begin = min(max(start + 8 if start < 0 else start, 0), 4)
    right = np.asarray(values["w"], np.float64)[begin : begin + 4].sum(0, keepdims=True)
    np.testing.assert_allclose(frozen, right, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(trained, right, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("index", [-7, -4, -1, 0, 2, 3, 9])
def test_one_layer_of_a_stack(index):
    w, x = weights(4, 5, 6), jnp.ones((2, 5))
    fn = lambda p, x, i: x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False)  # noqa: E731
    frozen, trained, values = both(fn, {"w": w}, x, jnp.int32(index))
    layer = min(max(index + 4 if index < 0 else index, 0), 3)
    right = np.asarray(x, np.float64) @ np.asarray(values["w"], np.float64)[layer]
    np.testing.assert_allclose(frozen, right, rtol=2e-4, atol=1e-4)
    np.testing.assert_allclose(trained, right, rtol=2e-4, atol=1e-4)


# -- indices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap", "promise_in_bounds"])
@pytest.mark.parametrize("dtype, rows", [("int8", 200), ("uint8", 300), ("int16", 40_000), ("uint16", 70_000)])
def test_tables_longer_than_their_indices_can_say(dtype, rows, mode):
    """Each row holds its number, so that a wrong one shows; the gradient reaches the rows that were read."""
    top = np.iinfo(dtype).max
    wanted = np.array([[3, 5], [top, top - 1]])
    params = {"e": jnp.tile(jnp.arange(rows, dtype=jnp.float32)[:, None], (1, 2)) + 1.0}
    if mode == "promise_in_bounds":
        fn = lambda p, i: p["e"].at[i.astype(jnp.int32)].get(mode=mode)  # noqa: E731
    else:
        fn = lambda p, i: jnp.take(p["e"], i, axis=0, mode=mode)  # noqa: E731
    indices = jnp.asarray(wanted, dtype)
    try:
        fn(params, indices)
    except OverflowError:  # the size of the axis itself overflows in JAX
        pytest.skip("JAX has no such lookup")
    frozen, trained, _ = both(fn, params, indices)
    np.testing.assert_allclose(frozen[..., 0], wanted + 1, rtol=1e-6)
    np.testing.assert_allclose(trained[..., 0], wanted + 1, rtol=1e-6)
    plan = jq.make_plan(fn, params, indices, rules=[jq.Rule(".", INT8)])
    grads = jax.jit(jax.grad(lambda p: jq.quantized(fn, plan)(p, indices).sum()))(params)["e"]
    counts = np.zeros(rows)
    np.add.at(counts, wanted.reshape(-1), 1)
    np.testing.assert_array_equal(grads[:, 0], counts)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32"])
def test_groups_that_add_up_to_more_than_their_dtype_can_say(dtype):
    sizes = np.array([100, 0, 100, 40])
    x, experts = weights(240, 8), weights(4, 8, 6, seed=1)
    fn = lambda p, x, n: lax.ragged_dot(x, p["w"], n.astype(jnp.int32))  # noqa: E731
    direct = jq.ops.ragged_dot(
        x, jq.quantize(experts, jq.QuantSpec("int8"), reduce_axes=(-2,)), jnp.asarray(sizes, dtype)
    )
    frozen, _, values = both(fn, {"w": experts}, x, jnp.asarray(sizes, dtype))
    owner = np.repeat(np.arange(4), sizes)
    right = np.einsum("mk,mkn->mn", np.asarray(x, np.float64), np.asarray(values["w"], np.float64)[owner])
    for got in (direct, frozen):
        np.testing.assert_allclose(got, right, atol=2e-4 * np.abs(right).max())


@pytest.mark.every
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
def test_widened_indices_say_the_same(dtype):
    info = np.iinfo(dtype)
    given = np.array([info.min, 0, 7, info.max], dtype)
    wide = widened(given)
    assert wide.dtype == np.int32
    np.testing.assert_array_equal(wide, np.minimum(given.astype(np.int64), np.iinfo(np.int32).max))
    assert [int(clamped(jnp.asarray(i), 3, 1000)) for i in given] == [min(max(int(i), 0), 997) for i in given]


# -- meshes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh():
    if not hasattr(jax, "set_mesh"):
        pytest.skip("an older JAX, whose explicit axes are an experiment")
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def layer(p, x):
    return jnp.tanh(x @ p["w"])


PLACED = {  # fn, spec of each parameter, spec of the input
    "rows": (lambda p, x: jnp.einsum("bk,kn->bn", x, p["w"], out_sharding=P("a", None)), P("b", None), P(None, "b")),
    "columns": (layer, P(None, "b"), P("a", None)),
    "data parallel": (layer, P(None, None), P("a", None)),
    "gathered before use": (
        lambda p, x: layer({"w": jax.sharding.reshard(p["w"], P(None, None))}, x), P("a", None), P("a", None)
    ),
    "weight on the left": (lambda p, x: jnp.einsum("kn,bk->nb", p["w"], x), P(None, "b"), P("a", None)),
    "scanned": (
        lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0], P(None, None, None), P("a", None)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "spec", [recipes.w8a16(), recipes.w8a8(), recipes.w4a16(group_size=4)], ids=["a16", "a8", "w4"]
)
@pytest.mark.parametrize("case", PLACED)
def test_results_and_gradients_lie_where_the_program_puts_them(case, spec, mesh):
    fn, where, entering = PLACED[case]
    w = weights(2, 8, 8) if case == "scanned" else weights(8, 16)
    x = weights(8, 8, seed=1)

    def loss(f, *args):
        return jnp.sum(jnp.square(f(*args)))

    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, where))}
        x = jax.device_put(x, NamedSharding(mesh, entering))
        plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", spec)])
        qparams = jq.quantize_params(params, plan)
        run, right = jax.jit(jq.quantized(fn, plan)), jax.jit(fn)(params, x)
        frozen, trained = run(qparams, x), run(params, x)
        values = jq.dequantize_params(qparams)
        near = jax.jit(fn)(values, x)
        grads = jax.jit(jax.grad(lambda p: loss(jq.quantized(fn, plan), p, x)))(params)["w"]
        expected = jax.jit(jax.grad(lambda p: loss(fn, p, x)))(values)["w"]
        stats = jq.calibrate(fn, plan, params, [x])
    assert stats.keys() == {"w"}
    assert frozen.sharding.spec == trained.sharding.spec == right.sharding.spec
    assert grads.sharding.spec == expected.sharding.spec
    np.testing.assert_allclose(trained, frozen, atol=1e-5 * float(jnp.abs(right).max()))
    # An activation is exact to 1e-4, or to half a step of int8, of its largest; tanh takes nothing further apart.
    rounded = 1e-4 if spec.act is None else 1 / 254
    largest = float(jnp.abs(x).max() * jnp.abs(w).sum(-2).max())
    np.testing.assert_allclose(frozen, near, atol=(2 if case == "scanned" else 1) * rounded * largest)
    assert np.linalg.norm(grads - expected) < 30 * rounded * np.linalg.norm(expected)


@needs_jit  # one operation at a time, JAX asks for jax.set_mesh
def test_calibration_follows_arrays_on_a_mesh_that_is_not_set(mesh):
    w, x = weights(8, 6), weights(8, 8, seed=1)
    plan = jq.make_plan(layer, {"w": w}, x, rules=[jq.Rule("w", recipes.w8a8(static=True))])
    sharded = jax.device_put(x, NamedSharding(mesh, P("a", None)))
    state = jq.act_state(plan, jq.calibrate(layer, plan, {"w": w}, [sharded]))
    np.testing.assert_allclose(state["w"]["scale"], np.abs(x).max() / 127, rtol=1e-6)


def test_lookups_lie_where_the_program_puts_them(mesh):
    fn = lambda p, i: p["e"].at[i].get(out_sharding=P("a", None))  # noqa: E731
    w = weights(16, 8)
    with jax.set_mesh(mesh):
        params = {"e": jax.device_put(w, NamedSharding(mesh, P(None, None)))}
        i = jax.device_put(jnp.arange(8)[::-1], NamedSharding(mesh, P("a")))
        frozen, trained, values = both(fn, params, i)
        right = jax.jit(fn)(values, i)
    assert frozen.sharding.spec == trained.sharding.spec == right.sharding.spec
    np.testing.assert_allclose(frozen, np.asarray(values["e"])[::-1][8:], rtol=1e-6)
    np.testing.assert_allclose(trained, frozen, rtol=1e-6)


FIRST_USE = """
import contextlib, sys
import jax, jax.numpy as jnp
import jaxquant as jq
from jaxquant import recipes

def legacy():
    return jax.sharding.Mesh(jax.devices()[:1], ("data",))

def set_mesh(kind):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh)

contexts = {
    "auto": lambda: set_mesh("Auto"), "explicit": lambda: set_mesh("Explicit"), "legacy": legacy,
    "without jit": jax.disable_jit, "x64": lambda: jax.enable_x64(True) if hasattr(jax, "enable_x64")
    else jax.experimental.enable_x64(), "strict": lambda: jax.numpy_dtype_promotion("strict"),
    "in a trace": contextlib.nullcontext,
}
def fn(p, x):
    def body(c, w):
        return jax.checkpoint(lambda c: jnp.tanh(c @ w))(c), None
    return jax.lax.scan(body, jax.nn.relu(x), p["w"])[0]

params, x = {"w": jnp.ones((2, 4, 4)) * 0.25}, jnp.ones((2, 4))
def use(x):
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", recipes.w8a8())])
    return plan, jq.quantized(fn, plan)(jq.quantize_params(params, plan), x)

with contexts[sys.argv[1]]():
    first = jax.jit(lambda x: use(x)[1])(x) if sys.argv[1] == "in a trace" else use(x)[1]
second = use(x)[1]
assert jnp.allclose(first, second, rtol=1e-6), (first, second)
assert jnp.allclose(first, jnp.tanh(jnp.tanh(1.0)), rtol=1e-2), first
print("same")
"""


@pytest.mark.parametrize("context", ["auto", "explicit", "legacy", "without jit", "x64", "strict", "in a trace"])
def test_the_first_use_in_a_process_may_be_anywhere(context):
    """What is looked up once per process must not depend on the mesh, the trace or the settings of the first use."""
    run = subprocess.run([sys.executable, "-c", FIRST_USE, context], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr[-2000:]


@pytest.mark.parametrize("start", [3, 32, -40])
def test_a_slice_of_a_slice_ends_where_the_first_ends(start):
    """Compiled, XLA joins the two in the float program and reads beyond the first; NumPy does not."""
    values = np.random.default_rng(0).normal(size=(6, 4)) * np.exp(np.arange(4))
    params, x, s = {"w": jnp.asarray(values, jnp.float32)}, jnp.ones((1, 6)), jnp.int32(start)
    fn = lambda p, x, s: x @ lax.dynamic_slice_in_dim(lax.dynamic_slice_in_dim(p["w"], -s, 2, 1), s, 1, 1)  # noqa: E731
    plan = jq.make_plan(fn, params, x, s, rules=[jq.Rule("w", jq.OpSpec(jq.QuantSpec("int8")))])
    q = jq.quantize_params(params, plan)
    place = lambda at, n, size: min(max(at + n if at < 0 else at, 0), n - size)  # noqa: E731
    column = place(-start, 4, 2) + place(start, 2, 1)
    want = np.asarray(q["w"].dequantize())[:, column].sum()
    for leaves in (q, params):
        np.testing.assert_allclose(jax.jit(jq.quantized(fn, plan))(leaves, x, s), [[want]], rtol=1e-4)

"""Ragged products by stored experts on the CPU: tiles of rows, each by a kernel for one weight."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax_settings import makes_nan, needs_jit
from narrowed import instance, present
from ops_reference import slow_but, unequal
from ragged_reference import SIZES, by_expert

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.core import views
from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import flat
from jaxquant.ops.kernel import kernel
from jaxquant.ops.kernels.cpu.experts import EachExpert
from jaxquant.ops.problem import Kernel, Product, RaggedProduct
from jaxquant.ops.select import select

SPECS = {
    "w8a8": recipes.w8a8(),
    "w8a16": recipes.w8a16(),
    "w4a16": recipes.w4a16(32),
    "w4a16 zero": recipes.w4a16(32, symmetric=False),
    "nf4": recipes.nf4(32),
}
K, N = 64, 24


def experts(spec: jq.OpSpec, *lead: int, k: int = K, n: int = N) -> jq.QTensor:
    make = lambda w: jq.quantize(w, present(spec.weight), reduce_axes=(-2,))  # noqa: E731
    for _ in lead:
        make = jax.vmap(make)
    return jq.ops.lay_out(jax.jit(make)(unequal(0, (*lead, 4, k, n))), "cpu")


@pytest.mark.parametrize("rows", slow_but(SIZES, "few", "tiles"))
@pytest.mark.parametrize("name", slow_but(SPECS, "w8a8", "w4a16"))
def test_each_row_by_its_expert(name: str, rows: str):
    spec, (m, sizes) = SPECS[name], SIZES[rows]
    x, w = unequal(1, (m, K)), experts(spec)
    given = x if spec.act is None else jq.quantize(x, spec.act, reduce_axes=(-1,))
    assert isinstance(select(RaggedProduct(given, w, None, x.dtype, jnp.asarray(sizes)), Target("cpu")), EachExpert)
    got = np.asarray(jax.jit(ops.ragged_dot)(given, w, jnp.asarray(sizes)), np.float64)
    want, terms = by_expert(given, w, sizes)
    bound = (
        1e-4 if spec.act is None else 1e-6
    )  # an activation in two int8 digits, where a kernel for one weight has them
    assert np.all(np.abs(got - want) <= bound * np.max(terms, axis=1, keepdims=True))
    assert not got[sum(sizes) :].any()


@pytest.mark.parametrize("layout", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", slow_but(SPECS, "w8a8", "w4a16"))
def test_experts_as_checkpoints_have_them(name: str, layout: Any):
    """[experts, outputs, inputs], transposed in the function; alone and in a scan over layers."""
    spec, (m, sizes) = SPECS[name], SIZES["few"]
    given, x = {"w": unequal(0, (2, 4, K, K), decades=0.5)}, unequal(1, (m, K))

    def one(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.ragged_dot(x, jnp.swapaxes(w, 1, 2), jnp.asarray(sizes))

    def layers(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (x, one(x, w)), x, p["w"])[1]

    plan = jq.make_plan(layers, given, x, rules=[jq.Rule("w", spec)])
    params = jq.quantize_params(given, plan, target=layout)
    alone = jq.make_plan(lambda p, x: one(x, p["w"]), {"w": given["w"][1]}, x, rules=[jq.Rule("w", spec)])
    layer = jq.quantize_params({"w": given["w"][1]}, alone, target=layout)
    got = jax.jit(jq.quantized(layers, plan))(params, x)
    last = jax.jit(jq.quantized(lambda p, x: one(x, p["w"]), alone))(layer, x)
    rows = x if spec.act is None else jq.quantize(x, spec.act, reduce_axes=(-1,))
    for y, w in zip([*got, last], [*params["w"].dequantize(), layer["w"].dequantize()], strict=True):
        want, terms = by_expert(rows, jnp.swapaxes(w, 1, 2), sizes)
        assert np.all(np.abs(np.asarray(y, np.float64) - want) <= 1e-4 * np.max(terms, axis=1, keepdims=True))


@makes_nan
def test_an_expert_without_rows_is_not_read():
    spec, (m, sizes) = SPECS["w4a16"], SIZES["few"]
    x, w = unequal(1, (m, K)), experts(spec)
    spoiled = w.replace(scale=jnp.where(jnp.asarray(sizes)[:, None, None] == 0, jnp.nan, flat(w.scale)))
    product = jax.jit(ops.ragged_dot)
    np.testing.assert_array_equal(product(x, spoiled, jnp.asarray(sizes)), product(x, w, jnp.asarray(sizes)))


@pytest.mark.parametrize("count", [1, 4])
def test_permuted_channels(count: int):
    """As GPTQ's act-order has them, an order for each expert."""
    spec, (m, sizes) = SPECS["w4a16"], ((8, (3, 0, 4, 1)) if count == 4 else (8, (8,)))
    values = np.asarray(unequal(0, (count, K, N)))
    orders = np.stack([np.random.default_rng(i).permutation(K) for i in range(count)]).astype(np.int32)
    sorted_by = np.take_along_axis(values, orders[:, :, None], axis=1)
    q = jax.jit(jax.vmap(lambda w: jq.quantize(w, present(spec.weight), reduce_axes=(-2,))))(sorted_by)
    w = q.replace(permutation=jnp.asarray(orders)[:, :, None])
    want = np.empty_like(values)
    np.put_along_axis(want, orders[:, :, None], np.asarray(q.dequantize()), axis=1)
    x = unequal(1, (m, K))
    got = np.asarray(jax.jit(ops.ragged_dot)(x, w, jnp.asarray(sizes)), np.float64)
    out, terms = by_expert(x, want, sizes)
    assert np.all(np.abs(got - out) <= 1e-4 * np.max(terms, axis=1, keepdims=True))


def test_a_shard_map():
    """Rows and sizes differ between devices, experts do not; the types of values say which vary."""
    mesh, w = Mesh(np.asarray(jax.devices()[:2]), ("t",)), experts(SPECS["w4a16"])
    x, sizes = unequal(1, (8, K)), jnp.asarray([3, 0, 1, 0, 0, 2, 1, 1])
    each = jax.shard_map(ops.ragged_dot, mesh=mesh, in_specs=(P("t"), P(), P("t")), out_specs=P("t"))
    got = np.asarray(jax.jit(each)(x, w, sizes), np.float64)
    for i in range(2):
        rows = slice(4 * i, 4 * i + 4)
        want, terms = by_expert(x[rows], w, tuple(int(n) for n in sizes[rows]))
        assert np.all(np.abs(got[rows] - want) <= 1e-4 * np.max(terms, axis=1, keepdims=True))


class Turning(Kernel[Product]):
    """A product that transposes its weight first, every array of it."""

    def run(self, problem: Product) -> jax.Array:
        w = views.transpose(problem.weight, (1, 0))
        return lax.dot_general(instance(jax.Array, problem.x), w.dequantize(), (((1,), (1,)), ((), ())))


def test_an_expert_is_a_whole_weight():
    """fp8 as TPUs have it, beside a seal: a kernel for one weight may read each of its arrays."""
    (m, sizes), x = SIZES["few"], unequal(1, (10, K))
    w = jq.ops.lay_out(experts(recipes.fp8()), "tpu")
    assert w.seal is not None
    problem = RaggedProduct(x, w, None, x.dtype, jnp.asarray(sizes))
    got = np.asarray(jax.jit(EachExpert(Turning(), m).run)(problem), np.float64)
    want, terms = by_expert(x, w, sizes)
    assert np.all(np.abs(got - want) <= 1e-6 * terms)


def test_the_plan_counts_experts():
    """Two rows of eight experts are one for each tile; a product by one weight has two."""
    spec = recipes.w4a16(128)
    asked = [kernel(2, 64, 1024, spec, "float32", "ragged_dot", experts=n) for n in (8, 1)]
    assert asked == [kernel(rows, 64, 1024, spec, "float32") for rows in (1, 2)]
    assert asked[0] != asked[1]


@needs_jit
@pytest.mark.parametrize("name", ["w8a16", "w4a16"])
def test_one_expert_at_a_time(name: str):
    """Of a layer in a stack too: less is copied and decoded than the codes of a layer, 1 MiB in 4 bits."""
    spec, sizes = SPECS[name], jnp.asarray([2, 0, 3, 1] + [0] * 28)

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(lax.ragged_dot(x, w, sizes)), None), x, p["w"])[0]

    params, x = {"w": unequal(0, (3, 32, 256, 256), decades=0.5) / 16}, unequal(1, (6, 256))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", spec)])
    stored = jq.quantize_params(params, plan, target="cpu")
    program = jax.jit(jq.quantized(fn, plan)).lower(stored, x).compile()
    assert present(program.memory_analysis()).temp_size_in_bytes <= 6 * 256 * 256  # an expert in float32, and rows
    want = jax.jit(fn)(jq.dequantize_params(stored), x)
    np.testing.assert_allclose(program(stored, x), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", slow_but(SPECS, "w4a16", "w8a8"))
def test_the_frozen_model_computes_what_was_trained(name: str):
    sizes = jnp.asarray([3, 0, 4, 1])
    fn = lambda p, x: lax.ragged_dot(x, p["w"], sizes)  # noqa: E731
    params, x = {"w": unequal(0, (4, K, N))}, unequal(1, (8, K))
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", SPECS[name])])
    run = jax.jit(jq.quantized(fn, plan))
    np.testing.assert_array_equal(run(params, x), run(jq.quantize_params(params, plan), x))

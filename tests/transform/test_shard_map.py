"""Weights inside of a shard_map, and shardings of QTensors: several devices give the result of one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax_settings import needs_jit
from narrowed import present
from transform_cases import EVERYTHING, SPECS, check, close, planned, unequal

import jaxquant as jq
from jaxquant import recipes

X = unequal((8, 32), 7, 0.3)
PARAMS = {"a": unequal((32, 64), 1, 0.2), "b": unequal((64, 32), 2, 0.2)}


def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def mlp(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def by_hand(p, x, *, check_vma=True, names=("data", "model")):
    """The same, one shard of the batch and of the hidden features per device."""

    @functools.partial(
        jax.shard_map,
        mesh=mesh(),
        in_specs=(P(None, "model"), P("model"), P("data" if "data" in names else None)),
        out_specs=P("data" if "data" in names else None),
        check_vma=check_vma,
        axis_names=set(names),
    )
    def part(a, b, x):
        return lax.psum(jnp.tanh(x @ a) @ b, "model")

    return part(p["a"], p["b"], x)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_shard_map(spec, check_vma):
    expect = {"a": (-2,), "b": (-2,)}
    check(functools.partial(by_hand, check_vma=check_vma), PARAMS, X, spec=spec, expect=expect)


def test_layers_with_groups_in_scans_and_shard_maps():
    """A scan leaves the codes of such layers in their stack; a scan within it, and a shard_map, take them out."""

    def part(x, w):
        return jax.shard_map(lambda x, w: x @ w, mesh=mesh(), in_specs=(P("data"), P()), out_specs=P("data"))(x, w)

    def fn(p, x):
        return lax.scan(lambda x, ws: lax.scan(lambda x, w: (part(x @ w, w), None), x, ws), x, p["w"])[0]

    params = {"w": unequal((2, 3, 32, 32), 1, 0.2)}
    plan = jq.make_plan(fn, params, X, rules=[jq.Rule("w", recipes.w4a16(16))])
    packed, blocks = (jq.quantize_params(params, plan, target=target) for target in ("cpu", "tpu"))
    assert blocks["w"].split == -2
    got, want = (jax.jit(jq.quantized(fn, plan))(q, X) for q in (blocks, packed))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(np.abs(want).max()))


def test_shard_map_equals_the_whole():
    plan, qparams, _ = planned(mlp, PARAMS, X, spec="w8a8")
    whole = jax.jit(jq.quantized(mlp, plan))(qparams, X)
    # A token's scale is taken of the part of it that a device sees, so only the weights are the same to the bit.
    weight_only, _, _ = planned(mlp, PARAMS, X, spec="int8")
    exact = functools.partial(jq.quantized, plan=weight_only, precision="highest")
    close(jax.jit(exact(by_hand))(qparams, X), jax.jit(exact(mlp))(qparams, X), 1e-5)
    close(jax.jit(jq.quantized(by_hand, plan))(qparams, X), whole, 0.03)


def test_shard_map_over_one_axis_of_the_mesh():
    check(functools.partial(by_hand, names=("model",)), PARAMS, X, spec="int8")


def test_groups_that_straddle_devices():
    """3 groups of 32 rows over 2 devices of 48; 3-bit rows of 12 codes that are not whole bytes on each."""
    params = {"a": unequal((32, 96), 1, 0.2), "b": unequal((96, 32), 2, 0.2)}
    check(by_hand, params, X, rules=[EVERYTHING(recipes.w4a16(32))])
    params = {"a": unequal((32, 24), 1, 0.2), "b": unequal((24, 32), 2, 0.2)}
    spec = jq.QuantSpec("int3", symmetric=False, granularity="per_group", group_size=24)
    check(by_hand, params, X, rules=[jq.Rule("b", jq.OpSpec(spec))])


def test_static_ranges_in_a_shard_map():
    plan, qparams, state = planned(mlp, PARAMS, X, spec="static")
    for function in (by_hand, functools.partial(by_hand, check_vma=False)):
        run = jax.jit(jq.quantized(function, plan, state))
        close(run(qparams, X), jax.jit(jq.quantized(mlp, plan, state))(qparams, X), 1e-5)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jq.quantized(by_hand, plan, state)(qparams, x)))))(X)
    expected = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jq.quantized(mlp, plan, state)(qparams, x)))))(X)
    close(slope, expected, 1e-4)


def test_calibration_refuses_a_shard_map():
    plan = jq.make_plan(by_hand, PARAMS, X, rules=[EVERYTHING(SPECS["static"])])
    with pytest.raises(
        jq.QuantError, match=r"calibrate: in a shard_map .*'a', 'b'.* Calibrate the same function without"
    ):
        jq.calibrate(by_hand, plan, PARAMS, [X])


# -- shardings ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "data": {"a": P(), "b": P()},
    "tensor": {"a": P(None, "model"), "b": P("model", None)},
    "fsdp": {"a": P("data", None), "b": P(None, "data")},
    "both": {"a": P("data", "model"), "b": P("model", "data")},
    "two axes on one": {"a": P(None, ("data", "model")), "b": P(("data", "model"))},
}


def float_gathers(text, size):
    """Gathers of whole weights in a compiled program that are not of codes."""
    shapes = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather", text)
    return [(t, s) for t, s in shapes if t[0] in "bf" and np.prod([int(n) for n in s.split(",") if n]) >= size]


@needs_jit  # runs a compiled program
@pytest.mark.parametrize("spec", ["int8", "int4", "w8a8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_mlp(layout, spec):
    plan, qparams, _ = planned(mlp, PARAMS, X, spec=spec)
    expected = jax.jit(jq.quantized(mlp, plan))(qparams, X)
    where = jax.tree.map(lambda s: NamedSharding(mesh(), s), LAYOUTS[layout], is_leaf=lambda s: isinstance(s, P))
    found = jq.ops.shardings(qparams, where)
    assert jax.tree.structure(found) == jax.tree.structure(qparams)
    placed = jax.device_put(qparams, found)
    for name, spec_ in LAYOUTS[layout].items():  # each device holds its part of the codes, not all
        parts = np.prod([mesh().shape[n] for e in spec_ if e for n in (e if isinstance(e, tuple) else (e,))], dtype=int)
        codes = placed[name].codes
        assert codes.addressable_shards[0].data.size * parts == codes.size
    x = jax.device_put(X, NamedSharding(mesh(), P("data")))
    run = jax.jit(jq.quantized(mlp, plan)).lower(placed, x).compile()
    close(run(placed, x), expected, 1e-5)
    if layout in ("data", "tensor"):
        assert not float_gathers(run.as_text(), PARAMS["a"].size)


def test_scales_follow_codes_or_lie_everywhere():
    spec = jq.QuantSpec("int4", granularity="per_group", group_size=8, symmetric=False)
    q = jq.quantize(PARAMS["a"], spec, reduce_axes=(-2,))  # 4 groups of 8
    specs = lambda s: [tuple(leaf.spec) for leaf in jax.tree.leaves(jq.ops.shardings(q, NamedSharding(mesh(), s)))]  # noqa: E731
    assert specs(P("data", "model")) == [("model", "data"), ("data", "model"), ("data", "model")]
    # 8 ways: every group straddles a boundary
    assert specs(P(("data", "model"))) == [(None, ("data", "model")), (None, None), (None, None)]
    assert specs(P()) == [(None, None)] * 3
    one = SingleDeviceSharding(jax.devices()[0])
    assert jax.tree.leaves(jq.ops.shardings({"w": q, "b": X}, one)) == [one] * 4


def test_scales_that_are_quantized_themselves():
    q = jq.quantize(unequal((64, 32), 1), jq.QuantSpec("nvfp4"), reduce_axes=(-2,))
    placed = jax.device_put(q, jq.ops.shardings(q, NamedSharding(mesh(), P("data", "model"))))
    assert tuple(placed.scale.codes.sharding.spec) == ("data", "model")
    np.testing.assert_array_equal(placed.dequantize(), q.dequantize())


def test_stacked_and_abstract():
    spec = present(SPECS["int4"].weight)
    stacked = jax.eval_shape(lambda w: jax.vmap(lambda v: jq.quantize(v, spec, reduce_axes=(-2,)))(w),
                             jax.ShapeDtypeStruct((3, 32, 64), jnp.float32))  # fmt: skip
    found = jq.ops.shardings({"w": stacked}, {"w": NamedSharding(mesh(), P(None, "data", "model"))})["w"]
    assert tuple(found.codes.spec) == (None, "model", "data")
    assert tuple(found.scale.spec) == (None, "data", "model")


BAD = {
    "more entries than axes": (
        {"w": P(None, None, "data")},
        r"^shardings at w: the spec has more entries than the parameter has axes; .*shape=\(12, 10\)\. Give one",
    ),
    "elements that do not divide": ({"w": P(None, "data")}, r"^shardings at w: 10 elements on axis -1 cannot be cut"),
    "bytes that do not divide": (
        {"w": P("data")},
        r"^shardings at w: 12 elements on axis -2, which are 6 bytes of packed codes cannot be cut into 4 equal parts",
    ),
    "another tree": ({"v": P()}, "^shardings: the trees do not match"),
    "no sharding": ({"w": None, "v": 3}, "^shardings at v: a leaf is no sharding; got leaf=3. Pass a tree"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shardings(name):
    tree, message = BAD[name]
    q = {"w": jq.quantize(unequal((12, 10)), jq.QuantSpec("int4"), reduce_axes=(-2,))}
    tree = {k: NamedSharding(mesh(), s) if isinstance(s, P) else s for k, s in tree.items()}
    with pytest.raises(jq.QuantError, match=message):
        jq.ops.shardings(q, tree)


def test_heads_that_are_stored_as_one_axis():
    """Whole heads go to a device. Their elements are no runs of that axis, so that these are not divided."""
    spec = jq.QuantSpec("int4", granularity="per_group", group_size=8)
    q = jq.ops.lay_out(jq.quantize(unequal((32, 8, 4)), spec, reduce_axes=(0,)), "tpu")
    x = unequal((8, 32), 2)
    expected = x @ np.asarray(q.dequantize()).reshape(32, 32)
    for where in (P(None, "model"), P("data", "model")):
        placed = jax.device_put(q, jq.ops.shardings(q, NamedSharding(mesh(), where)))
        assert tuple(placed.kept.sharding.spec)[0::2] == tuple(where)
        found = jax.jit(lambda x, w: jq.ops.einsum("bd,dhs->bhs", x, w))(x, placed)
        close(found.reshape(8, 32), expected, 1e-4)
    with pytest.raises(jq.QuantError, match="the last 2 axes are stored as one, of which the first alone can be cut"):
        jq.ops.shardings(q, NamedSharding(mesh(), P(None, None, "model")))
    part = lambda w, x: jax.lax.psum(jnp.einsum("bd,dhs->bhs", x, w), "data")  # noqa: E731
    each = jax.shard_map(part, mesh=mesh(), in_specs=(P("data", "model"), P(None, "data")), out_specs=P(None, "model"))
    plan = jq.make_plan(each, q, x, rules=[])
    close(jax.jit(jq.quantized(each, plan))(q, x).reshape(8, 32), expected, 1e-4)


def test_quantized_scales_are_divided_with_their_weights():
    """Four bits each, packed along the columns that are divided."""
    spec = recipes.w4a16(8, two_level=True)
    plan = jq.make_plan(by_hand, PARAMS, X, rules=[EVERYTHING(spec)])
    params = jq.quantize_params(PARAMS, plan)
    assert params["a"].scale.layout == "packed"
    real = {name: w.dequantize() for name, w in params.items()}
    close(jax.jit(jq.quantized(by_hand, plan))(params, X), mlp(real, X), 2e-4)

"""Programs that are exported for every size of a batch: the values and plans of those for one size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxquant as jq
from jaxquant import ops, recipes

SPECS = {
    "w8a16": recipes.w8a16(),
    "w8a8": recipes.w8a8(),
    "w8a8 asym": recipes.w8a8(act_symmetric=False),
    "w8a8g8": recipes.w8a8g8(),
    "llm_int8": recipes.llm_int8(),
    "w4a16": recipes.w4a16(16),
    "w4a16 asym": recipes.w4a16(16, symmetric=False),
    "two-level": recipes.w4a16(16, two_level=True),
    "w4a8": recipes.w4a8(16),
    "w4a4": recipes.w4a4(16),
    "nf4": recipes.nf4(16),
    "fp4": recipes.fp4(16),
    "fp8": recipes.fp8(),
    "mxfp8": recipes.mxfp8(),
    "mxfp4": recipes.mxfp4(),
    "mxfp4 act": recipes.mxfp4(act=True),
    "nvfp4": recipes.nvfp4(),
    "nvfp4 act": recipes.nvfp4(act=True),
}
CHEAP = ("w8a8", "w4a16")


def array(*shape, seed=0):
    return jax.device_put(np.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32))


PARAMS = {"w": array(64, 32), "v": array(32, 16, seed=1)}


def model(p, x):
    return jnp.tanh(x @ p["w"] / 8) @ p["v"]


def batch(*shape, dtype=jnp.float32):
    """The shape of an array whose first axis is a batch of unknown size."""
    return jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *shape), dtype)


def exported(fn, *shapes, platforms=("cpu",)):
    return export.export(jax.jit(fn), platforms=platforms)(*shapes)


def close(got, want, bound=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(float(np.max(np.abs(b))), 1e-30)
        np.testing.assert_allclose(np.asarray(a) / scale, np.asarray(b) / scale, rtol=0, atol=bound)


def same(fn, *shape, sizes=(1, 100), bound=1e-5):
    """The exported program gives what the jitted function does, at every size."""
    program, compiled = exported(fn, batch(*shape)), jax.jit(fn)
    for n in sizes:
        x = array(n, *shape, seed=n)
        close(program.call(x), compiled(x), bound)


def quantized(name, fn=model, params=PARAMS, shape=(64,), spec=None):
    plan = jq.make_plan(fn, params, batch(*shape), rules=[jq.Rule(".", spec or SPECS[name])])
    assert len(plan) == len(jax.tree.leaves(params))
    return plan, jq.quantized(fn, plan)


# An activation in digits is off by 4e-5 (at one row, or few), and where the second layer rounds its inputs to few bits,
# the last bit of the first decides a rounding: codes are then off by one, by at most a step of the inputs.
def bound(name):
    coarse = {"w4a4": 0.2, "mxfp4 act": 0.2, "nvfp4 act": 0.2, "fp8": 0.03, "mxfp8": 0.03}
    act = SPECS[name].act
    return coarse.get(name, 2e-4 if act is None else 0.01)


@pytest.mark.parametrize("name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_frozen(name):
    plan, fn = quantized(name)
    q = jq.quantize_params(PARAMS, plan)
    same(lambda x: fn(q, x), 64, sizes=(1, 4, 100), bound=bound(name))


@pytest.mark.parametrize("name", [n if n in CHEAP[:1] else pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_gradients(name):
    """Of the float parameters in training, and of the input."""
    _, fn = quantized(name)

    def loss(p, x):
        return jnp.sum(fn(p, x) ** 2)

    same(lambda x: jax.grad(loss, (0, 1))(PARAMS, x), 64, sizes=(100,), bound=max(bound(name), 1e-3))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", [n if n in CHEAP[:1] else pytest.param(n, marks=pytest.mark.slow) for n in SPECS])
def test_other_platforms(name, platform):
    plan, fn = quantized(name)
    for p in (jq.quantize_params(PARAMS, plan), PARAMS):
        text = exported(lambda x, p=p: fn(p, x), batch(64), platforms=[platform]).mlir_module()
        assert "dot_general" in text
    exported(jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2)), PARAMS, batch(64), platforms=[platform])


@pytest.mark.parametrize("name", SPECS)
def test_plan(name):
    """Rows that are not known count as many: the kernels are those of a large batch."""
    plan, _ = quantized(name)
    large = jq.make_plan(
        model, PARAMS, jax.ShapeDtypeStruct((4096, 64), jnp.float32), rules=[jq.Rule(".", SPECS[name])]
    )
    for path in plan:
        assert plan[path].rows is None
        assert plan[path].kernel == f"{large[path].kernel} (rows unknown)"
        assert f"{large[path].kernel} (rows unknown)" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan


def test_plan_is_that_of_the_other_axes():
    """A symbol that is no row changes nothing of a plan but its rows: q as of a known size."""
    fn = lambda p, x: jnp.einsum("bsd,dk->bsk", x, p["w"])  # noqa: E731
    symbolic, known = (
        jq.make_plan(fn, {"w": PARAMS["w"]}, x, rules=[jq.Rule(".", recipes.w8a8())])
        for x in (batch(8, 64), jnp.zeros((2, 8, 64)))
    )
    assert symbolic["w"].rows is None
    assert known["w"].rows == 16
    q = [jq.quantize_params({"w": PARAMS["w"]}, plan)["w"] for plan in (symbolic, known)]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, q), strict=True))


def convolution(p, x):
    return lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("name", ["w8a16", "w8a8", pytest.param("w8a8 asym", marks=pytest.mark.slow)])
def test_convolution(name):
    params = {"k": array(3, 3, 4, 8)}
    plan, fn = quantized(name, convolution, params, (6, 6, 4))
    q = jq.quantize_params(params, plan)
    same(lambda x: fn(q, x), 6, 6, 4, bound=2e-4)
    exported(jax.grad(lambda p, x: jnp.sum(fn(p, x) ** 2)), params, batch(6, 6, 4))


def experts(p, x):
    n = x.shape[0]
    return lax.ragged_dot(x, p["e"], jnp.array([1, 0, 0], jnp.int32) + jnp.array([0, 0, 1], jnp.int32) * (n - 1))


@pytest.mark.parametrize("name", ["w8a16", "w8a8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_ragged_dot(name):
    params = {"e": array(3, 16, 8)}
    plan, fn = quantized(name, experts, params, (16,))
    q = jq.quantize_params(params, plan)
    same(lambda x: fn(q, x), 16, bound=2e-4)


def test_take():
    """Of a frozen table, one in training, and its gradient."""
    params = {"t": array(32, 16)}
    fn = lambda p, i: p["t"][i]  # noqa: E731
    indices = batch(dtype=jnp.int32)
    plan = jq.make_plan(fn, params, indices, rules=[jq.Rule(".", recipes.w4a16(16))])
    assert plan["t"].kernel == "lookup"
    run, q = jq.quantized(fn, plan), jq.quantize_params(params, plan)
    for p in (q, params):
        program = exported(lambda i, p=p: run(p, i), indices)
        for n in (1, 40):
            i = jnp.arange(n, dtype=jnp.int32) % 32
            close(program.call(i), jax.jit(run)(p, i), 1e-6)
    exported(jax.grad(lambda p, i: jnp.sum(run(p, i) ** 2)), params, indices)


@pytest.mark.parametrize(
    "act",
    [
        jq.QuantSpec("int8", granularity="per_tensor"),
        jq.QuantSpec("int8", granularity="per_group", group_size=16),
        jq.QuantSpec("int8", symmetric=False),
        pytest.param(jq.QuantSpec("mxfp8"), marks=pytest.mark.slow),
        pytest.param(jq.QuantSpec("mxfp4"), marks=pytest.mark.slow),
    ],
    ids=lambda s: f"{s.qtype} {s.granularity} {s.symmetric}",
)
def test_granularities(act):
    spec = jq.OpSpec(weight=jq.QuantSpec("int8"), act=act)
    w = jq.quantize(PARAMS["w"], jq.QuantSpec("int8"), reduce_axes=(-2,))
    same(lambda x: ops.einsum("bk,kn->bn", x, w, spec=spec), 64, bound=2e-4)


def test_static_range():
    spec = recipes.w8a8(static=True)
    w = jq.quantize(PARAMS["w"], jq.QuantSpec("int8"), reduce_axes=(-2,))
    same(lambda x: ops.einsum("bk,kn->bn", x, w, spec=spec, act_scale=jnp.float32(0.02)), 64)


@pytest.mark.parametrize("qtype", ["int8", pytest.param("float8_e4m3fn", marks=pytest.mark.slow)])
def test_cache(qtype):
    """Products with a cache, quantized per token, of which neither the batch nor the number of tokens is known."""
    b, t = export.symbolic_shape("b, t")
    spec = jq.QuantSpec(qtype)

    def attend(query, keys, values):
        k, v = (jq.quantize(x, spec, reduce_axes=(-1,)) for x in (keys, values))
        scores = ops.einsum("bd,btd->bt", query, k)
        return ops.einsum("bt,btd->bd", jax.nn.softmax(scores), v)

    shapes = (b, 16), (b, t, 16), (b, t, 16)
    program = exported(attend, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    for n, m in ((1, 1), (3, 40)):
        args = array(n, 16), array(n, m, 16, seed=1), array(n, m, 16, seed=2)
        close(program.call(*args), jax.jit(attend)(*args), 5e-4)


def test_product_of_two_activations():
    """Both quantized, with sums over an axis of unknown length: the plan names the sizes as the caller does."""
    fn = lambda p, x: jnp.einsum("bk,bn->kn", x @ p["w"], x)  # noqa: E731
    spec = jq.OpSpec(weight=jq.QuantSpec("int8"), act=jq.QuantSpec("int8"))
    params, x = {"w": PARAMS["w"]}, batch(64)
    plan = jq.make_plan(fn, params, x, rules=[jq.OpRule(".*", spec)])
    assert plan.products[0].shapes == (("b", 32), ("b", 64))
    assert "[b, 32] x [b, 64]" in " ".join(str(plan).split())
    assert jq.Plan.from_json(plan.to_json()) == plan
    run = jq.quantized(fn, plan)
    same(lambda x: run(params, x), 64, bound=1e-3)


def test_explain_wants_numbers():
    plan = jq.make_plan(model, PARAMS, batch(64), rules=[jq.Rule(".*", SPECS["w8a8"])])
    with pytest.raises(jq.QuantError, match=r"explain: .*sizes that are numbers; got shape=\(b, 64\)\. Pass arrays"):
        jq.explain(jq.quantized(model, plan), jq.quantize_params(PARAMS, plan), batch(64))

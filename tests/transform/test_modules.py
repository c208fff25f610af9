"""Flax layers as they are: every way they call with collections, flags, streams of random numbers and dtypes."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from narrowed import present
from transform_cases import EVERYTHING, SPECS, check, close, planned, randomized, unequal
from transform_models import MODELS

import jaxquant as jq
from jaxquant import recipes

X = unequal((2, 6, 16), 3, 0.4)
IMAGES = unequal((2, 6, 6, 8), 6, 0.5)


def variables(module, *args, **kwargs):
    init = jax.jit(lambda key: module.init(key, *args, **kwargs))  # one program
    return randomized(init(jax.random.key(0)), 11)


def test_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2)
    params = variables(module, X)
    plan = check(module.apply, params, X)
    axes = {item.path.split("/")[1]: item.reduce_axes for item in plan.items}
    assert axes == {"query": (-3,), "key": (-3,), "value": (-3,), "out": (-3, -2)}


def test_transposed_convolutions():
    for transpose in (False, True):
        module = nn.ConvTranspose(8, (3, 3), strides=(2, 2), transpose_kernel=transpose)
        plan = check(module.apply, variables(module, IMAGES), IMAGES)
        assert plan.items[0].reduce_axes == ((-4, -3, -1) if transpose else (-4, -3, -2))


def test_dense_general_einsum_and_depthwise():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 8), name="a")(x)
            x = nn.DenseGeneral(16, axis=(-2, -1), name="b")(x)
            x = nn.Einsum((16, 4), "btk,kn->btn", name="c")(x)
            return nn.Conv(8, (3,), feature_group_count=4, name="d")(x)

    plan = check(Net().apply, variables(Net(), X), X)
    axes = {item.path.split("/")[1]: item.reduce_axes for item in plan.items}
    assert axes == {"a": (-3,), "b": (-3, -2), "c": (-2,), "d": (-3, -2)}


def test_batch_statistics_flags_and_streams():
    """`train=`, `mutable=` and `rngs=` are what they always are; statistics stay float and come back."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(32)(x))
            return nn.Dense(8)(nn.Dropout(0.5, deterministic=not train)(x))

    module = Net()
    params = variables(module, X, train=False)
    call: Any = dict(train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(3)})
    plan = jq.make_plan(module.apply, params, X, rules=[EVERYTHING(SPECS["int8"])], **call)
    assert {item.path for item in plan.items} == {"params/Dense_0/kernel", "params/Dense_1/kernel"}
    qparams = jq.quantize_params(params, plan)
    run = jq.quantized(module.apply, plan)
    y, updates = jax.jit(lambda p: run(p, X, **call))(qparams)
    want, want_updates = jax.jit(lambda p: module.apply(jq.dequantize_params(p), X, **call))(qparams)
    close(y, want, 1e-4)
    close(updates, want_updates, 1e-4)
    y, want = jax.jit(lambda *both: [run(p, X, train=False) for p in both])(qparams, params)
    close(y, want, 1e-5)


def test_weight_norm_says_why():
    module = nn.WeightNorm(nn.Dense(8))
    message = r"It matches only .*: params/layer_instance/kernel \(multiplied elementwise, not contracted\)\.$"
    with pytest.raises(jq.QuantError, match=message):
        jq.make_plan(module.apply, variables(module, X), X, rules=[jq.Rule("kernel$", recipes.w8a16())])


def test_bfloat16():
    """Computation in bfloat16 of float32 weights, and bfloat16 weights: errors of a few units of bfloat16."""
    for kwargs in (dict(dtype=jnp.bfloat16), dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)):
        module = nn.Sequential([nn.Dense(32, **kwargs), nn.tanh, nn.Dense(8, **kwargs)])
        params = variables(module, X)
        plan, qparams, _ = planned(module.apply, params, X)
        run = jax.jit(jq.quantized(module.apply, plan))
        got = run(qparams, X)
        assert got.dtype == jnp.bfloat16
        close(got, jax.jit(lambda p, module=module: module.apply(jq.dequantize_params(p), X))(qparams), 2**-6)
        close(got, run(params, X), 2**-7)


def test_sharded_transformer():
    """Stacked layers cut over devices by heads and features; eight devices give the result of one."""
    fn, params, tokens = MODELS["plain", "transformer"]()
    plan, qparams, _ = planned(fn, params, tokens)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    cut = {
        "qkv": P(None, None, "model"),
        "out": P(None, "model"),
        "up": P(None, None, "model"),
        "down": P(None, "model"),
    }
    where = {"table": P("model"), "blocks": cut}
    where = jax.tree.map(lambda s: NamedSharding(mesh, s), where, is_leaf=lambda s: isinstance(s, P))
    placed = jax.device_put(qparams, jq.ops.shardings(qparams, where))
    x = jax.device_put(tokens, NamedSharding(mesh, P()))
    run = jax.jit(jq.quantized(fn, plan))
    close(run(placed, x), run(qparams, tokens), 1e-5)
    text = present(run.lower(placed, x).compile().as_text())
    gathers = [
        line for line in text.splitlines() if " all-gather(" in line and ("f32[32,16]" in line or "f32[16,32]" in line)
    ]
    assert not gathers

"""The same four small models in five frameworks, none of which knows of quantization.

`MODELS[framework, name]()` is ``(fn, params, inputs)`` with ``fn(params, inputs)``.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from haiku import experimental
from jax import lax
from transform_cases import randomized, unequal

import jaxquant as jq

WIDTH, HEADS, DEPTH, VOCAB, EXPERTS = 16, 2, 3, 24, 3
FEATURES = unequal((4, WIDTH), 5, 0.5)
IMAGES = unequal((2, 6, 6, 8), 6, 0.5)
TOKENS = jnp.asarray(np.random.default_rng(7).integers(0, VOCAB, (2, 5)))

# Rules in front of the one for everything: what a user would keep in float.
KEEP = {"mlp": [], "cnn": [], "transformer": [], "moe": [jq.Rule("router", None)]}
# The weights that each model has.
WEIGHTS = {"mlp": 2, "cnn": 3, "transformer": 5, "moe": 2}


def attention(qkv):
    """Causal attention of [batch, time, 3 * width]."""
    q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 3
    scores = jnp.where(jnp.tri(qkv.shape[1], dtype=bool)[None, None], scores, -1e9)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*qkv.shape[:2], -1)


def normalized(x):
    return (x - jnp.mean(x, -1, keepdims=True)) * lax.rsqrt(jnp.var(x, axis=-1, keepdims=True) + 1e-5)


def mixture(x, logits, up, down):
    """Each row through the expert with the largest logit."""
    expert = jnp.argmax(logits, -1)
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=EXPERTS).astype(jnp.int32)
    y = lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x[order], up, sizes)), down, sizes)
    return y[jnp.argsort(order)] * jnp.max(jax.nn.softmax(logits), -1, keepdims=True)


# -- plain -------------------------------------------------------------------------------------------------------------


def _shapes(**shapes):
    return randomized({name: jnp.zeros(shape) for name, shape in shapes.items()}, 11)


def plain_mlp():
    params = _shapes(a=(WIDTH, 32), bias=(32,), b=(32, 8))
    return lambda p, x: jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"], params, FEATURES


def plain_cnn():
    params = _shapes(a=(3, 3, 8, 16), b=(3, 3, 16, 8), head=(8, 8))

    def fn(p, x):
        for name, stride in (("a", 1), ("b", 2)):
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jnp.tanh(lax.conv_general_dilated(x, p[name], (stride,) * 2, "SAME", dimension_numbers=numbers))
        return jnp.mean(x, (1, 2)) @ p["head"]

    return fn, params, IMAGES


def plain_transformer():
    blocks = dict(
        qkv=(DEPTH, WIDTH, 3 * WIDTH), out=(DEPTH, WIDTH, WIDTH), up=(DEPTH, WIDTH, 32), down=(DEPTH, 32, WIDTH)
    )
    params = {"table": unequal((VOCAB, WIDTH), 3, 0.3), "blocks": _shapes(**blocks)}

    @jax.checkpoint
    def block(x, p):
        x = x + attention(normalized(x) @ p["qkv"]) @ p["out"]
        return x + jax.nn.gelu(normalized(x) @ p["up"]) @ p["down"], None

    def fn(p, tokens):
        x = lax.scan(block, p["table"][tokens], p["blocks"])[0]
        return normalized(x) @ p["table"].T

    return fn, params, TOKENS


def plain_moe():
    params = _shapes(router=(WIDTH, EXPERTS), up=(EXPERTS, WIDTH, 32), down=(EXPERTS, 32, WIDTH))
    return lambda p, x: x + mixture(x, x @ p["router"], p["up"], p["down"]), params, FEATURES


# -- Flax Linen --------------------------------------------------------------------------------------------------------


def _linen(module, x):
    return module.apply, randomized(jax.jit(module.init)(jax.random.key(0), x), 11), x


def linen_mlp():
    return _linen(nn.Sequential([nn.Dense(32), jnp.tanh, nn.Dense(8)]), FEATURES)


def linen_cnn():
    class Cnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.tanh(nn.Conv(16, (3, 3))(x))
            x = jnp.tanh(nn.Conv(8, (3, 3), strides=2)(x))
            return nn.Dense(8)(jnp.mean(x, (1, 2)))

    return _linen(Cnn(), IMAGES)


def linen_transformer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.Dense(WIDTH, name="out")(attention(nn.Dense(3 * WIDTH, name="qkv")(nn.LayerNorm()(x))))
            return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(32, name="up")(nn.LayerNorm()(x)))), None

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(VOCAB, WIDTH)
            stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH)
            return embed.attend(nn.LayerNorm()(stack()(embed(tokens), None)[0]))

    return _linen(Transformer(), TOKENS)


def linen_moe():
    class Moe(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.normal()
            up = self.param("up", init, (EXPERTS, WIDTH, 32))
            down = self.param("down", init, (EXPERTS, 32, WIDTH))
            return x + mixture(x, nn.Dense(EXPERTS, name="router")(x), up, down)

    return _linen(Moe(), FEATURES)


# -- Flax NNX ----------------------------------------------------------------------------------------------------------


def _nnx(module, x):
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return lambda p, x: nnx.merge(graph, p, rest)(x), randomized(params, 11), x


def nnx_mlp():
    rngs = nnx.Rngs(0)
    return _nnx(nnx.Sequential(nnx.Linear(WIDTH, 32, rngs=rngs), jnp.tanh, nnx.Linear(32, 8, rngs=rngs)), FEATURES)


def nnx_cnn():
    class Cnn(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Conv(8, 16, (3, 3), rngs=rngs)
            self.b = nnx.Conv(16, 8, (3, 3), strides=2, rngs=rngs)
            self.head = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.head(jnp.mean(jnp.tanh(self.b(jnp.tanh(self.a(x)))), (1, 2)))

    return _nnx(Cnn(nnx.Rngs(0)), IMAGES)


def nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.qkv, self.out = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, 32, rngs=rngs), nnx.Linear(32, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.out(attention(self.qkv(normalized(x))))
            return x + self.down(nnx.gelu(self.up(normalized(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            make = nnx.vmap(lambda key: Block(nnx.Rngs(key)), in_axes=0, out_axes=0)
            self.blocks = make(jax.random.split(jax.random.key(0), DEPTH))

        def __call__(self, tokens):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def stack(x, block):
                return block(x)

            return self.embed.attend(normalized(stack(self.embed(tokens), self.blocks)))

    return _nnx(Transformer(nnx.Rngs(0)), TOKENS)


def nnx_moe():
    class Moe(nnx.Module):
        def __init__(self, rngs):
            self.router = nnx.Linear(WIDTH, EXPERTS, rngs=rngs)
            self.up = nnx.Param(jnp.zeros((EXPERTS, WIDTH, 32)))
            self.down = nnx.Param(jnp.zeros((EXPERTS, 32, WIDTH)))

        def __call__(self, x):
            return x + mixture(x, self.router(x), self.up[...], self.down[...])

    return _nnx(Moe(nnx.Rngs(0)), FEATURES)


# -- Haiku -------------------------------------------------------------------------------------------------------------


def _haiku(function, x):
    transformed = hk.without_apply_rng(hk.transform(function))
    return transformed.apply, randomized(jax.jit(transformed.init)(jax.random.key(0), x), 11), x


def haiku_mlp():
    return _haiku(lambda x: hk.nets.MLP([32, 8], activation=jnp.tanh)(x), FEATURES)


def haiku_cnn():
    def cnn(x):
        x = jnp.tanh(hk.Conv2D(16, 3)(x))
        x = jnp.tanh(hk.Conv2D(8, 3, stride=2)(x))
        return hk.Linear(8)(jnp.mean(x, (1, 2)))

    return _haiku(cnn, IMAGES)


def haiku_transformer():
    def block(x):
        x = x + hk.Linear(WIDTH, name="out")(attention(hk.Linear(3 * WIDTH, name="qkv")(normalized(x))))
        return x + hk.Linear(WIDTH, name="down")(jax.nn.gelu(hk.Linear(32, name="up")(normalized(x))))

    def transformer(tokens):
        embed = hk.Embed(VOCAB, WIDTH)
        x = experimental.layer_stack(DEPTH)(hk.remat(block))(embed(tokens))
        return normalized(x) @ embed.embeddings.T

    return _haiku(transformer, TOKENS)


def haiku_moe():
    def moe(x):
        init = hk.initializers.RandomNormal()
        up = hk.get_parameter("up", (EXPERTS, WIDTH, 32), init=init)
        down = hk.get_parameter("down", (EXPERTS, 32, WIDTH), init=init)
        return x + mixture(x, hk.Linear(EXPERTS, name="router")(x), up, down)

    return _haiku(moe, FEATURES)


# -- Equinox -----------------------------------------------------------------------------------------------------------


def _equinox(module, x):
    params, static = eqx.partition(module, eqx.is_array)
    return lambda p, x: eqx.combine(p, static)(x), randomized(params, 11), x


def equinox_mlp():
    class Mlp(eqx.Module):
        net: eqx.nn.MLP

        def __call__(self, x):
            return jax.vmap(self.net)(x)

    return _equinox(Mlp(eqx.nn.MLP(WIDTH, 8, 32, 1, activation=jnp.tanh, key=jax.random.key(0))), FEATURES)


def equinox_cnn():
    class Cnn(eqx.Module):
        a: eqx.nn.Conv2d
        b: eqx.nn.Conv2d
        head: eqx.nn.Linear

        def __init__(self):
            key = jax.random.key(0)
            self.a = eqx.nn.Conv2d(8, 16, 3, padding=1, key=key)
            self.b = eqx.nn.Conv2d(16, 8, 3, stride=2, key=key)
            self.head = eqx.nn.Linear(8, 8, key=key)

        def __call__(self, x):
            one = lambda x: self.head(jnp.mean(jnp.tanh(self.b(jnp.tanh(self.a(x)))), (1, 2)))  # noqa: E731
            return jax.vmap(one)(jnp.moveaxis(x, -1, 1))

    return _equinox(Cnn(), IMAGES)


def equinox_transformer():
    class Block(eqx.Module):
        qkv: eqx.nn.Linear
        out: eqx.nn.Linear
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            self.qkv, self.out = eqx.nn.Linear(WIDTH, 3 * WIDTH, key=key), eqx.nn.Linear(WIDTH, WIDTH, key=key)
            self.up, self.down = eqx.nn.Linear(WIDTH, 32, key=key), eqx.nn.Linear(32, WIDTH, key=key)

        def __call__(self, x):
            each = lambda layer, x: jax.vmap(jax.vmap(layer))(x)  # noqa: E731
            x = x + each(self.out, attention(each(self.qkv, normalized(x))))
            return x + each(self.down, jax.nn.gelu(each(self.up, normalized(x))))

    class Transformer(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: Block

        def __init__(self):
            self.embed = eqx.nn.Embedding(VOCAB, WIDTH, key=jax.random.key(0))
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(1), DEPTH))

        def __call__(self, tokens):
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            step = jax.checkpoint(lambda x, layer: (eqx.combine(layer, static)(x), None))
            x = lax.scan(step, jax.vmap(jax.vmap(self.embed))(tokens), arrays)[0]
            return normalized(x) @ self.embed.weight.T

    return _equinox(Transformer(), TOKENS)


def equinox_moe():
    class Moe(eqx.Module):
        router: eqx.nn.Linear
        up: jax.Array
        down: jax.Array

        def __init__(self):
            self.router = eqx.nn.Linear(WIDTH, EXPERTS, key=jax.random.key(0))
            self.up, self.down = jnp.zeros((EXPERTS, WIDTH, 32)), jnp.zeros((EXPERTS, 32, WIDTH))

        def __call__(self, x):
            return x + mixture(x, jax.vmap(self.router)(x), self.up, self.down)

    return _equinox(Moe(), FEATURES)


MODELS = {
    (framework, model): functools.cache(globals()[f"{framework}_{model}"])
    for framework in ("plain", "linen", "nnx", "haiku", "equinox")
    for model in ("mlp", "cnn", "transformer", "moe")
}

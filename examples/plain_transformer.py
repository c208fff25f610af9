"""A small language model in plain Flax: nothing here knows of quantization.

Layers are stacked by `nn.scan` and rematerialised by `nn.remat`; queries, keys and values come from one fused kernel;
the output layer is the embedding table once more. A model written elsewhere may well look like this.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
    heads: int = 4

    @nn.compact
    def __call__(self, x, _):
        batch, length, width = x.shape
        qkv = self.param("qkv", nn.initializers.lecun_normal(), (width, 3 * width))
        y = nn.LayerNorm()(x) @ qkv
        q, k, v = (part.reshape(batch, length, self.heads, -1) for part in jnp.split(y, 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(q.shape[-1])
        weights = nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(y), None


class Transformer(nn.Module):
    vocabulary: int = 128
    width: int = 64
    layers: int = 2
    context: int = 64

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        place = self.param("place", nn.initializers.normal(0.02), (self.context, self.width))
        x = embed(tokens) + place[: tokens.shape[1]]
        block = nn.remat(Block, prevent_cse=False)
        stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        x, _ = stack(name="blocks")(x, None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def loss(apply, variables, tokens):
    """Mean cross entropy of the next token, in nats; tokens [batch, length + 1]."""
    logits = apply(variables, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def windows(text, key, batch, length):
    """Random pieces of a text of ASCII characters, [batch, length]."""
    data = jnp.asarray([min(ord(c), 127) for c in text])
    starts = jax.random.randint(key, (batch, 1), 0, len(data) - length)
    return data[starts + jnp.arange(length)[None, :]]


def train(model, text, steps, batch=16):
    """Trains a model on random pieces of a text; returns its variables."""
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, max(steps // 10, 1), max(steps, 2)))

    def step(carry, key):
        variables, state = carry
        tokens = windows(text, key, batch, model.context + 1)
        updates, state = tx.update(jax.grad(lambda v: loss(model.apply, v, tokens))(variables), state)
        return (optax.apply_updates(variables, updates), state), None

    variables = model.init(jax.random.key(0), jnp.zeros((1, model.context), jnp.int32))
    keys = jax.random.split(jax.random.key(1), steps)
    return jax.jit(lambda v: jax.lax.scan(step, (v, tx.init(v)), keys)[0][0])(variables)

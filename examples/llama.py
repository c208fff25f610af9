"""A Llama-style decoder (Llama, Mistral, Qwen 2 and 3) in plain Flax, on a checkpoint of any format.

    python examples/llama.py DIRECTORY --prompt 1,5,9 --tokens 16 --cache int8

The weights stay as they are in the file: `load_hf` (or `load_gguf`) makes QTensors of them, and `quantized` runs the
model on those. The cache is float, or int8 with one scale per token and head; keys are stored [.., token, feature] and
values [.., feature, token], so that both products contract the last axis.
"""

import argparse
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import ops
from jaxquant.io.hf import LLAMA

INT8, ONE = jq.QuantSpec("int8"), jnp.ones((1, 1, 1, 1))
GGUF = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}  # fmt: skip


def rope(x, positions, theta):
    """Rotates pairs of features (i, i + half) of [batch, token, head, feature]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = (f(angle)[None, :, None] for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def empty_cache(config, batch, length, int8):
    """Keys and values of each layer, with their scales if they are int8."""
    kv, size = config["num_key_value_heads"], config["head_dim"]
    dtype = jnp.int8 if int8 else jnp.float32
    layer = {"k": jnp.zeros((batch, kv, length, size), dtype), "v": jnp.zeros((batch, kv, size, length), dtype)}
    if int8:
        layer |= {"k_scale": jnp.ones((batch, kv, length, 1)), "v_scale": jnp.ones((batch, kv, length, 1))}
    return [layer] * config["num_hidden_layers"]


def extended(cache, k, v, start):
    """The cache with [batch, head, token, feature] of new keys and values from position ``start`` on."""
    new = {"k": k, "v": v}
    if "k_scale" in cache:
        for name in ("k", "v"):
            q = jq.quantize(new[name], INT8, reduce_axes=(-1,))
            new |= {name: q.codes, f"{name}_scale": q.scale}
    new["v"] = jnp.swapaxes(new["v"], 2, 3)
    put = jax.lax.dynamic_update_slice_in_dim
    return {name: put(cache[name], x, start, 3 if name == "v" else 2) for name, x in new.items()}


def attention(q, cache, mask):
    """[batch, head, group, token, feature] of queries on a cache; the scales of values go into the weights."""
    k, v, int8 = cache["k"], cache["v"], "k_scale" in cache
    if int8:
        k, v = (jq.QTensor(x, s, None, qtype="int8", dtype=jnp.float32) for x, s in ((k, cache["k_scale"]), (v, ONE)))
    scores = ops.einsum("bkgtd,bksd->bkgts", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    if int8:
        weights = weights * jnp.swapaxes(cache["v_scale"], 2, 3)[:, :, None]
    return ops.einsum("bkgts,bkds->bkgtd", weights, v)


class Part(nn.Module):
    config: dict
    has: frozenset  # which parameters a layer has


class Attention(Part):
    @nn.compact
    def __call__(self, x, start, cache):
        c, size = self.config, self.config["head_dim"]
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        positions = start + jnp.arange(x.shape[1])

        def project(name, count):
            y = nn.Dense(count * size, use_bias=f"self_attn/{name}_proj/bias" in self.has, name=f"{name}_proj")(x)
            y = y.reshape(*x.shape[:2], count, size)
            if f"self_attn/{name}_norm/scale" in self.has:
                y = nn.RMSNorm(epsilon=c["rms_norm_eps"], name=f"{name}_norm")(y)
            return y if name == "v" else rope(y, positions, c["rope_theta"])

        q, k, v = project("q", heads), project("k", kv), project("v", kv)
        cache = extended(cache, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), start)
        q = q.reshape(*x.shape[:2], kv, heads // kv, size).transpose(0, 2, 3, 1, 4)
        stored = jnp.arange(cache["k"].shape[2])
        mask = stored <= positions[:, None]
        if c.get("sliding_window") and c.get("use_sliding_window", True):
            mask &= stored > positions[:, None] - c["sliding_window"]
        y = attention(q, cache, mask).transpose(0, 3, 1, 2, 4).reshape(*x.shape[:2], heads * size)
        return nn.Dense(c["hidden_size"], use_bias="self_attn/o_proj/bias" in self.has, name="o_proj")(y), cache


class MLP(Part):
    @nn.compact
    def __call__(self, x):
        dense = lambda name, size: nn.Dense(size, use_bias=f"mlp/{name}/bias" in self.has, name=name)  # noqa: E731
        wide = self.config["intermediate_size"]
        y = nn.silu(dense("gate_proj", wide)(x)) * dense("up_proj", wide)(x)
        return dense("down_proj", self.config["hidden_size"])(y)


class Layer(Part):
    @nn.compact
    def __call__(self, x, start, cache):
        norm = functools.partial(nn.RMSNorm, epsilon=self.config["rms_norm_eps"])
        y, cache = Attention(self.config, self.has, name="self_attn")(norm(name="input_layernorm")(x), start, cache)
        x = x + y
        return x + MLP(self.config, self.has, name="mlp")(norm(name="post_attention_layernorm")(x)), cache


class Llama(Part):
    """Tokens [batch, n] from position ``start`` on -> (logits [batch, n, vocabulary], cache)."""

    @nn.compact
    def __call__(self, tokens, start, cache):
        c, new = self.config, []
        embed = nn.Embed(c["vocab_size"], c["hidden_size"], name="embed_tokens")
        x = embed(tokens)
        for i, layer in enumerate(cache):
            x, layer = Layer(c, self.has, name=f"layers_{i}")(x, start, layer)
            new.append(layer)
        x = nn.RMSNorm(epsilon=c["rms_norm_eps"], name="norm")(x)
        if "lm_head/kernel" not in self.has:
            return embed.attend(x), new
        return nn.Dense(c["vocab_size"], use_bias="lm_head/bias" in self.has, name="lm_head")(x), new


def load(path, rules=None):
    """The model and its parameters: arrays in float32, weights as the directory or the GGUF file has them."""
    if str(path).endswith(".gguf"):
        params, info = jq.io.load_gguf(path, names="hf")
        params = LLAMA.apply(params)
        config = {name: info.metadata[f"{info.architecture}.{key}"].item() for name, key in GGUF.items()}
        config["vocab_size"] = params["embed_tokens"]["embedding"].shape[0]
    else:
        params, info = jq.io.load_hf(path, names=LLAMA, rules=rules, dtype=jnp.float32)
        config = info.model
    return Llama(*settings(config, params)), {"params": params}, info


def settings(config, params):
    """The configuration with all defaults, and which parameters a layer has."""
    config = dict(config)
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rotation.get("rope_type", rotation.get("type", "default")) != "default":
        raise ValueError(f"this example has no scaled rotary embeddings: {rotation}")
    config["rope_theta"] = rotation.get("rope_theta", config.get("rope_theta", 10000.0))
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, jq.QTensor))
    return config, frozenset(re.sub(r"^layers_\d+/", "", "/".join(key.key for key in path)) for path, _ in leaves)


def generate(model, params, prompt, count, int8=False):
    """Greedy continuation of tokens [batch, n]; one call for the prompt, then one token at a time."""
    apply = jq.quantized(model.apply)
    cache = empty_cache(model.config, len(prompt), prompt.shape[1] + count, int8)
    logits, cache = jax.jit(apply)(params, prompt, 0, cache)

    @jax.jit
    def more(params, token, cache):
        def step(carry, at):
            token, cache = carry
            logits, cache = apply(params, token[:, None], at, cache)
            return (logits[:, -1].argmax(-1), cache), token

        return jax.lax.scan(step, (token, cache), prompt.shape[1] + jnp.arange(count))[1].T

    return more(params, logits[:, -1].argmax(-1), cache)


def main():
    parser = argparse.ArgumentParser(description="A Llama-style decoder on a Hugging Face directory.")
    parser.add_argument("checkpoint", help="a directory, or a GGUF file")
    parser.add_argument("--prompt", default="1", help="token ids, with commas")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--cache", choices=["float", "int8"], default="float")
    args = parser.parse_args()
    model, params, info = load(args.checkpoint)
    print(getattr(info, "types", info))
    prompt = jnp.array([list(map(int, args.prompt.split(",")))])
    print(*generate(model, params, prompt, args.tokens, args.cache == "int8")[0].tolist())


if __name__ == "__main__":
    main()

"""The decoder: functions of parameters by their names in a Hugging Face checkpoint.

Linear weights are [out, in], as they lie in the file, and are contracted along their last axis. Each parameter is an
array or, inside `jaxquant.quantized`, any leaf of quantized parameters.

The cache holds keys as [batch, head, token, feature] and values as [batch, head, feature, token], so that both products
contract the last axis; in int8 with one scale per token and head, or in codes by the scales of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant import ops
from jaxquant.core.affine import quantize
from jaxquant.core.granularity import PerTensor
from jaxquant.core.qtensor import Operand, QTensor, scale_values
from jaxquant.core.specs import QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.models.config import Config, Layer, Mixture
from jaxquant.models.rope import rotated
from jaxquant.ops.attention import Scores, attention

__all__ = ["Cache", "block", "embedded", "empty_cache", "head", "hidden", "logits", "normed"]

Params = Mapping[str, PyTree]
Cache = Sequence[dict[str, jax.Array]]

_INT8 = QuantSpec("int8")
_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def logits(config: Config, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Logits of every token that may follow, without a cache.

    Args:
      config: the architecture.
      params: by name, as `Config.shapes` lists them.
      tokens: int [batch, token].
      mask: bool [batch, token], False where there is padding, on either side; None: all are tokens.

    Returns:
      [batch, token, vocabulary]; arbitrary where there is padding.

    Raises:
      QuantError: if a rotary embedding is scaled dynamically, and there are more tokens than the model is made for.

    Example:
      >>> import functools, jax, jax.numpy as jnp, jaxquant as jq
      >>> sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
      >>> config = jq.models.config_of({"model_type": "llama", "num_hidden_layers": 1, **sizes})
      >>> params = {name: jnp.ones(shape) for name, shape in config.shapes().items()}
      >>> fn = functools.partial(jq.models.logits, config)
      >>> plan = jq.make_plan(fn, params, jnp.ones((1, 4), int), rules=[jq.Rule("_proj", jq.recipes.w8a16())])
      >>> len(plan)
      7
    """
    valid = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    return head(config, params, hidden(config, params, tokens, valid)[0])


def hidden(
    config: Config,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    cache: Cache | None = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """The head's inputs, and the cache with these tokens in it.

    Args:
      config: what is computed.
      params: by name.
      tokens: int [batch, token]; they are written to the cache from place ``start`` on.
      valid: bool [batch, place]: True for places that hold a token, these included, False for padding.
      cache: from `empty_cache`, with the earlier tokens; None: there are no earlier or later tokens.
      start: the place of the first of the tokens.

    Returns:
      [batch, token, feature], and the cache; an empty list without one.
    """
    counts = jnp.cumsum(valid.astype(jnp.int32), axis=-1) - 1
    positions = jnp.maximum(lax.dynamic_slice_in_dim(counts, start, tokens.shape[1], 1), 0)
    x, new = embedded(config, params, tokens), []
    for i in range(len(config.layers)):
        x, stored = block(config, i, params, x, positions, valid, None if cache is None else cache[i], start)
        new.append(stored)
    return normed(config, params, x), [] if cache is None else new


def embedded(config: Config, params: Params, tokens: jax.Array) -> jax.Array:
    """The inputs of the first layer: embeddings [batch, token, feature]."""
    x = jnp.take(params["model.embed_tokens.weight"], tokens, axis=0)
    return x if config.embedding_scale == 1 else x * jnp.asarray(config.embedding_scale, x.dtype)


def normed(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """The head's inputs: the last layer's outputs, normalized."""
    return _norm(config, _Part(params, "model."), "norm", x)


def block(
    config: Config,
    i: int,
    params: Params,
    x: jax.Array,
    positions: jax.Array | None = None,
    valid: jax.Array | None = None,
    cache: dict[str, jax.Array] | None = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer: [batch, token, feature] to the same, and its cache. Without positions and ``valid`` all are tokens."""
    layer, p = config.layers[i], _Part(params, f"model.layers.{i}.")
    if positions is None or valid is None:
        valid = jnp.ones(x.shape[:2], bool)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    y = _norm(config, p, "input_layernorm", x)
    y, stored = _attention(config, layer, p, y, positions, valid, cache, start)
    if config.post_norms:
        x = x + _norm(config, p, "post_attention_layernorm", y)
        y = _feedforward(config, layer, p, _norm(config, p, "pre_feedforward_layernorm", x))
        x = x + _norm(config, p, "post_feedforward_layernorm", y)
    else:
        x = x + y
        x = x + _feedforward(config, layer, p, _norm(config, p, "post_attention_layernorm", x))
    return x, stored


def head(config: Config, params: Params, x: jax.Array) -> jax.Array:
    """Logits [batch, token, vocabulary] from the outputs of `hidden`."""
    w = params["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return _capped(_product(x, w), config.logit_cap)


def empty_cache(config: Config, batch: int, length: int, dtype: DTypeLike) -> list[dict[str, jax.Array]]:
    """Room for ``length`` keys and values in every layer; with ``dtype`` int8 also for their scales."""
    kv, size = config.num_key_value_heads, config.head_dim
    dtype = jnp.uint8 if str(config.cache).startswith("float8") else dtype
    layer = {"k": jnp.zeros((batch, kv, length, size), dtype), "v": jnp.zeros((batch, kv, size, length), dtype)}
    if config.cache is None and jnp.dtype(dtype) == jnp.int8:
        layer |= {f"{x}_scale": jnp.ones((batch, kv, length), jnp.float32) for x in "kv"}
    return [dict(layer) for _ in config.layers]


class _Part:
    """The parameters below one name."""

    def __init__(self, params: Params, prefix: str):
        self._params, self._prefix = params, prefix

    def __getitem__(self, name: str) -> PyTree:
        return self._params[self._prefix + name]

    def linear(self, name: str, x: jax.Array) -> jax.Array:
        """[.., in] to [.., out]."""
        y = _product(x, self[f"{name}.weight"])
        bias = self._params.get(f"{self._prefix}{name}.bias")
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape).astype(y.dtype)


def _product(x: jax.Array, w: PyTree) -> jax.Array:
    return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (w.ndim - 1,)), ((), ())))


def _norm(config: Config, p: _Part, name: str, x: jax.Array) -> jax.Array:
    weight = p[f"{name}.weight"].reshape((1,) * (x.ndim - 1) + (-1,))
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.rms_norm_eps)
    if config.norm_offset:  # Gemma rounds at the end, the others before the weight
        return (wide * (weight.astype(jnp.float32) + config.norm_offset)).astype(x.dtype)
    return wide.astype(x.dtype) * weight.astype(x.dtype)


def _capped(x: jax.Array, cap: float | None) -> jax.Array:
    return x if cap is None else jnp.tanh(x / cap) * cap


def _attention(
    config: Config,
    layer: Layer,
    p: _Part,
    x: jax.Array,
    positions: jax.Array,
    valid: jax.Array,
    cache: dict[str, jax.Array] | None,
    start: jax.Array | int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    batch, count = x.shape[:2]
    kv, size = config.num_key_value_heads, config.head_dim

    def project(name: str) -> jax.Array:
        y = p.linear(f"self_attn.{name}_proj", x).reshape(batch, count, -1, size)
        if name == "v":
            return y
        if config.query_key_norms:
            y = _norm(config, p, f"self_attn.{name}_norm", y)
        return rotated(layer.rope, y, positions)

    q, k, v = map(project, "qkv")
    q = jnp.swapaxes(q, 1, 2)
    stored = {"k": jnp.swapaxes(k, 1, 2), "v": v.transpose(0, 2, 3, 1)}
    scales = {f"{x}_scale": p[f"self_attn.{x}_scale"].reshape(1, 1, 1) for x in "kv"} if config.cache else {}
    stored = {name: _coded(config, x, scales.get(f"{name}_scale")) for name, x in stored.items()}
    if cache is not None:
        stored = _extended(cache, stored, start)
    k, v = _operands(config, stored | scales, q.dtype)
    if cache is not None:
        how = {"scale": config.query_scale, "cap": config.score_cap, "window": layer.window}
        y = ops.cached_attention(q, k, v, valid, start, **how)
    else:
        scores = Scores(config.query_scale, config.score_cap, layer.window)
        y = attention(q.reshape(batch, kv, -1, count, size), k, v, valid, 0, scores=scores).reshape(q.shape)
    return p.linear("self_attn.o_proj", jnp.swapaxes(y, 1, 2).reshape(batch, count, -1)), stored


def _coded(config: Config, x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Keys or values as they are stored: the codes by the scale of the checkpoint, or themselves.

    Codes of fp8 are patterns in uint8: only these does a TPU read without a conversion of the whole cache.
    """
    if config.cache is None or scale is None:
        return x
    spec = QuantSpec(config.cache, granularity=PerTensor(), narrow_range=False if config.cache == "int8" else None)
    kept = quantize(x, spec, reduce_axes=(-4, -3, -2, -1), scale=scale[..., None]).kept
    assert isinstance(kept, jax.Array)
    return kept


def _extended(cache: dict[str, jax.Array], new: dict[str, jax.Array], start: jax.Array | int) -> dict[str, jax.Array]:
    """The cache with new keys and values from the place ``start`` on."""
    if "k_scale" in cache:
        k, v = (quantize(x, _INT8, reduce_axes=(-1,)) for x in (new["k"], jnp.swapaxes(new["v"], 2, 3)))
        scales = {f"{name}_scale": scale_values(x.scale)[..., 0] for name, x in (("k", k), ("v", v))}
        new = {"k": k.codes, "v": jnp.swapaxes(v.codes, 2, 3), **scales}

    def put(name: str, x: jax.Array) -> jax.Array:
        x = x.astype(cache[name].dtype)
        return lax.dynamic_update_slice_in_dim(cache[name], x, start, 3 if name == "v" else 2)

    return {name: put(name, x) for name, x in new.items()}


def _operands(config: Config, stored: dict[str, jax.Array], dtype: DTypeLike) -> tuple[Operand, Operand]:
    """The stored keys and values as operands of attention. Scales are [batch, head, token], or a single one."""
    k, v = stored["k"], stored["v"]
    if "k_scale" not in stored:
        return k, v
    how = {"qtype": config.cache or "int8", "dtype": dtype}
    scales = stored["k_scale"][..., None], stored["v_scale"][:, :, None]
    return QTensor(k, scales[0], None, **how), QTensor(v, scales[1], None, **how)


def _feedforward(config: Config, layer: Layer, p: _Part, x: jax.Array) -> jax.Array:
    if layer.mixture is None:
        return _mlp(config, lambda name, x: p.linear(f"mlp.{name}", x), x)
    return _mixed(config, layer.mixture, p, x)


def _mlp(config: Config, linear: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return linear("down_proj", _ACTIVATIONS[config.activation](linear("gate_proj", x)) * linear("up_proj", x))


def _mixed(config: Config, mixture: Mixture, p: _Part, x: jax.Array) -> jax.Array:
    weights, chosen = lax.top_k(jax.nn.softmax(p.linear("mlp.gate", x).astype(jnp.float32)), mixture.chosen)
    if mixture.normalized:
        weights = weights / weights.sum(-1, keepdims=True)
    names = ("gate_up_proj", "down_proj") if mixture.fused else ("gate_proj", "up_proj", "down_proj")
    experts = {name: p[f"mlp.experts.{name}.weight"] for name in names}
    through = _sorted if mixture.sorted else _one_by_one
    y = through(config, mixture, experts, x, weights, chosen)
    if mixture.shared:
        every = _mlp(config, lambda name, x: p.linear(f"mlp.shared_expert.{name}", x), x)
        y = y + jax.nn.sigmoid(p.linear("mlp.shared_expert_gate", x)) * every
    return y


def _one_by_one(
    config: Config, mixture: Mixture, experts: Params, x: jax.Array, weights: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Experts one after another, each with all tokens; one that no token has chosen is not computed."""
    shares = (jax.nn.one_hot(chosen, mixture.experts) * weights[..., None]).sum(-2).astype(x.dtype)

    def add(total: jax.Array, expert: tuple[jax.Array, dict[str, PyTree]]) -> tuple[jax.Array, None]:
        share, w = expert

        def compute(x: jax.Array) -> jax.Array:
            mine = share[..., None]
            own = jnp.where(mine == 0, 0, x)  # ranges and statistics: of its own tokens
            return _expert(config, mixture, lambda name, x: _product(x, w[name]), own) * mine

        return total + lax.cond(jnp.any(share != 0), compute, jnp.zeros_like, x), None

    return lax.scan(add, jnp.zeros_like(x), (jnp.moveaxis(shares, -1, 0), dict(experts)))[0]


def _sorted(
    config: Config, mixture: Mixture, experts: Params, x: jax.Array, weights: jax.Array, chosen: jax.Array
) -> jax.Array:
    """Each token once for every expert that it has chosen, sorted by experts, in a product of all of them."""
    tokens, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=mixture.experts)

    def linear(name: str, x: jax.Array) -> jax.Array:
        return lax.ragged_dot(x, jnp.swapaxes(experts[name].astype(x.dtype), 1, 2), sizes)

    y = _expert(config, mixture, linear, jnp.take(tokens, order // mixture.chosen, axis=0))
    y = jnp.take(y, jnp.argsort(order), axis=0).reshape(*weights.shape, -1)
    return jnp.sum(y * weights[..., None].astype(x.dtype), axis=-2)


def _expert(config: Config, mixture: Mixture, linear: Callable[[str, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    if not mixture.fused:
        return _mlp(config, linear, x)
    gate, up = jnp.split(linear("gate_up_proj", x), 2, axis=-1)
    return linear("down_proj", _ACTIVATIONS[config.activation](gate) * up)

"""The architecture of a decoder, read from ``config.json``.

Every field of a configuration is used here, or known not to affect the logits, or refused by name: an unknown field
might change the arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.io.strict_json import Json
from jaxquant.models.rope import Rope, rope_of

__all__ = ["ARCHITECTURES", "Config", "Layer", "Mixture", "config_of"]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of experts.

    Attributes:
      experts: how many there are.
      chosen: how many of them a token goes through.
      intermediate_size: hidden features of one.
      shared: hidden features of the expert that all tokens go through; 0 if there is none.
      normalized: whether the weights of the chosen ones are made to sum to 1.
      fused: whether the gates and what they gate are one weight, ``gate_up_proj``.
      sorted: whether tokens are sorted by their experts, whose weights `jax.lax.ragged_dot` multiplies: faster for
        quantized experts. Otherwise each expert that a token has chosen multiplies all tokens: faster for float
        experts, all of which XLA reads or copies for a ragged product; and it takes masks in calibration, and static
        ranges for each expert.
    """

    experts: int
    chosen: int
    intermediate_size: int
    shared: int
    normalized: bool
    fused: bool = False
    sorted: bool = False


@dataclasses.dataclass(frozen=True)
class Layer:
    """Where layers of one model differ.

    Attributes:
      window: how many tokens a token attends to, itself included; None for all before it.
      rope: the rotary embedding.
      mixture: the mixture of experts in the place of an MLP, or None.
    """

    window: int | None
    rope: Rope
    mixture: Mixture | None


@dataclasses.dataclass(frozen=True)
class Config:
    """The architecture of a decoder; the sizes have Hugging Face's names.

    Attributes:
      architecture: ``model_type``.
      activation: of the MLP: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``.
      query_scale: what the products of queries and keys are multiplied by.
      biases: the projections that have a bias: ``"self_attn.q_proj"`` and so on.
      query_key_norms: whether the heads of queries and keys are normalised.
      post_norms: whether what the attention and the MLP return is normalised too, as in Gemma 2 and 3.
      norm_offset: what is added to the weight of a norm: 1 in Gemma, else 0.
      embedding_scale: what embeddings are multiplied by.
      score_cap: ``c`` in ``c * tanh(x / c)`` of attention scores, or None.
      logit_cap: the same of logits.
      tied: whether the head is the embedding.
      context: the longest sequence the model is made for, or None.
      layers: one entry per layer.
      cache: number type in which keys and values are stored, with one scale for each layer: ``self_attn.k_scale`` and
        ``self_attn.v_scale`` of the parameters; None: as they are.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    activation: str
    query_scale: float
    biases: frozenset[str]
    query_key_norms: bool
    post_norms: bool
    norm_offset: float
    embedding_scale: float
    score_cap: float | None
    logit_cap: float | None
    tied: bool
    context: int | None
    layers: tuple[Layer, ...]
    cache: str | None = None

    def with_mixtures(self, **fields: bool) -> Config:
        """The same with other fields in the mixtures of all layers.

        Example:
          >>> import jaxquant as jq
          >>> config = jq.models.config_of({"model_type": "mixtral", "num_hidden_layers": 1})
          >>> config.with_mixtures(sorted=True).layers[0].mixture.sorted
          True
        """

        def layer(x: Layer) -> Layer:
            return x if x.mixture is None else dataclasses.replace(x, mixture=dataclasses.replace(x.mixture, **fields))

        return dataclasses.replace(self, layers=tuple(map(layer, self.layers)))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters by name and their shapes; linear weights are [out, in], stacked experts [expert, out, in].

        Example:
          >>> import jaxquant as jq
          >>> config = jq.models.config_of({"model_type": "llama", "num_hidden_layers": 1})
          >>> config.shapes()["model.layers.0.mlp.up_proj.weight"]
          (11008, 4096)
        """
        d, heads, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i, layer in enumerate(self.layers):
            linear = {
                "self_attn.q_proj": (heads, d),
                "self_attn.k_proj": (kv * self.head_dim, d),
                "self_attn.v_proj": (kv * self.head_dim, d),
                "self_attn.o_proj": (d, heads),
            }
            if layer.mixture is None:
                linear |= _mlp("mlp", self.intermediate_size, d)
            else:
                m = layer.mixture
                linear["mlp.gate"] = (m.experts, d)
                experts = _mlp("mlp.experts", m.intermediate_size, d)
                if m.fused:
                    up = experts.pop("mlp.experts.gate_proj"), experts.pop("mlp.experts.up_proj")
                    experts["mlp.experts.gate_up_proj"] = (sum(n for n, _ in up), d)
                linear |= {name: (m.experts, *shape) for name, shape in experts.items()}
                if m.shared:
                    linear |= {"mlp.shared_expert_gate": (1, d), **_mlp("mlp.shared_expert", m.shared, d)}
            one = {f"{name}.weight": shape for name, shape in linear.items()}
            one |= {f"{name}.bias": shape[:1] for name, shape in linear.items() if name in self.biases}
            one |= {f"{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}
            if self.post_norms:
                one |= {f"{when}_feedforward_layernorm.weight": (d,) for when in ("pre", "post")}
            if self.query_key_norms:
                one |= {f"self_attn.{x}_norm.weight": (self.head_dim,) for x in "qk"}
            if self.cache is not None:
                one |= {f"self_attn.{x}_scale": () for x in "kv"}
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in one.items()}
        shapes["model.norm.weight"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes


def _mlp(name: str, wide: int, d: int) -> dict[str, tuple[int, int]]:
    return {f"{name}.gate_proj": (wide, d), f"{name}.up_proj": (wide, d), f"{name}.down_proj": (d, wide)}


@dataclasses.dataclass(frozen=True)
class _Family:
    """Properties that the models of one ``model_type`` share, and the defaults of their configurations."""

    defaults: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    query_key_norms: bool = False
    gemma: bool = False
    post_norms: bool = False
    moe: bool = False


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_COMMON = {"num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_LLAMA = {
    **_COMMON, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_MISTRAL = {
    **_COMMON, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
_MIXTRAL = {
    **_MISTRAL, "sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2,
    "num_local_experts": 8,
}  # fmt: skip
_QWEN = {
    **_COMMON, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
_QWEN_MOE = {
    **_QWEN, "hidden_size": 2048, "num_hidden_layers": 24, "decoder_sparse_step": 1, "norm_topk_prob": False,
    "mlp_only_layers": None,
}  # fmt: skip
_GEMMA = {
    **_COMMON, "vocab_size": 256000, "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 256,
    "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "max_position_embeddings": 8192,
    "hidden_act": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA2 = {
    **_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304, "intermediate_size": 9216,
    "num_hidden_layers": 26, "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
#: transformers reads a cap of scores here, too, and does not use it: another value than null is refused as unknown.
_GEMMA3 = {key: value for key, value in _GEMMA2.items() if key != "attn_logit_softcapping"} | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None, "rope_theta": 1e6,
    "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6,
}  # fmt: skip

_FAMILIES = {
    "llama": _Family(_LLAMA),
    "mistral": _Family(_MISTRAL),
    "mixtral": _Family(_MIXTRAL, moe=True),
    "qwen2": _Family(_QWEN, biases=_QKV),
    "qwen3": _Family({**_QWEN, "head_dim": 128, "attention_bias": False}, query_key_norms=True),
    "qwen2_moe": _Family(
        {
            **_QWEN_MOE, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
            "num_experts": 60, "qkv_bias": True,
        },
        moe=True,
    ),
    "qwen3_moe": _Family(
        {
            **_QWEN_MOE, "intermediate_size": 6144, "num_key_value_heads": 4, "moe_intermediate_size": 768,
            "num_experts_per_tok": 8, "num_experts": 128, "num_local_experts": None, "attention_bias": False,
        },
        query_key_norms=True, moe=True,
    ),
    "gemma": _Family(_GEMMA, gemma=True),
    "gemma2": _Family(_GEMMA2, gemma=True, post_norms=True),
    "gemma3_text": _Family(_GEMMA3, gemma=True, post_norms=True, query_key_norms=True),
}  # fmt: skip

#: The values of ``model_type`` that are supported.
ARCHITECTURES = tuple(_FAMILIES)

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
#: Fields that every configuration may have and that are read here.
_READ = {
    "num_key_value_heads", "head_dim", "rope_parameters", "rope_scaling", "layer_types", "tie_word_embeddings",
    "original_max_position_embeddings", "partial_rotary_factor", "hidden_activation",
}  # fmt: skip
#: Fields that are refused unless they are off.
_OFF = {
    "use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention", "pruned_heads", "use_mrope",
    "rope_interleaved",
}  # fmt: skip
#: Fields that say something about training, storage, generation or programs, and nothing about logits.
_IDLE = re.compile(
    r"""_.*|model_type|is_llama_config|is_decoder|architectures|quantization|transformers\.js_config|max_sequence_length
    |.*pdrop|.*version.*|.*dtype|.*_token_ids?|.*dropout|initializer.*|use_cache|pretraining_tp
    |auto_map|quantization_config|compression_config|cache_implementation|torchscript|.*router_logits|router_aux_loss_coef
    |router_jitter_noise|tie_encoder_decoder|output_attentions|output_hidden_states|return_dict.*|id2label|label2id
    |problem_type|finetuning_task|task_specific_params|tokenizer_class|prefix|chunk_size_feed_forward|name_or_path
    |(min|max)_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature
    |top_k|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size
    |bad_words_ids|num_return_sequences|output_scores|remove_invalid_values|exponential_decay_length_penalty
    |suppress_tokens|begin_suppress_tokens|use_bfloat16|tf_legacy_loss|model_name|description|license
    |.*gradient_checkpointing.*|unsloth_fixed|neftune.*|base_model.*""",
    re.VERBOSE,
)


def config_of(config: Mapping[str, Json], *, ignore: Collection[str] = (), path: str | None = None) -> Config:
    """The decoder that a ``config.json`` describes.

    Args:
      config: its object.
      ignore: fields that are known not to change the result, although this package does not know them.
      path: where it comes from, for messages.

    Raises:
      QuantError: for an architecture, or a field that is not supported; it names them.

    Example:
      >>> import jaxquant as jq
      >>> config = jq.models.config_of({"model_type": "gemma2", "num_hidden_layers": 4, "transformers_version": "5.0"})
      >>> [layer.window for layer in config.layers], config.logit_cap
      ([4096, None, 4096, None], 30.0)

    Source: transformers 5.24, the configurations and modules of each architecture.
    """
    error = functools.partial(quant_error, "models", path=path)
    kind = config.get("model_type")
    if kind == "gemma3" and isinstance(config.get("text_config"), Mapping):
        config, kind = config["text_config"], "gemma3_text"
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        todo = f"Supported are {', '.join(ARCHITECTURES)}"
        raise error("the architecture is not supported", todo=todo, model_type=kind)
    _check_known(config, family, ignore, error)
    config = {key: value for key, value in config.items() if key not in ignore}
    c = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    for key in ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"):
        if key in config:  # where null has a meaning
            c[key] = config[key]
    if config.get("num_key_value_heads", 0) is None:
        c.pop("num_key_value_heads", None)
    _check_sizes(c, error)
    for key in sorted(_OFF):
        if c.get(key):
            raise error("this is not supported", todo="Run it with another program", **{key: c[key]})
    heads = c["num_attention_heads"]
    c.setdefault("num_key_value_heads", heads)
    c.setdefault("head_dim", c["hidden_size"] // heads)
    if heads % c["num_key_value_heads"] or c["head_dim"] % 2:
        todo = "The configuration is damaged: heads of queries are whole multiples of those of keys, of an even size"
        sizes = {key: c[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")}
        raise error("the heads do not fit", todo=todo, **sizes)
    biases = set(family.biases) | (set(_QKV) if c.get("qkv_bias") or c.get("attention_bias") else set())
    biases |= {"self_attn.o_proj"} if c.get("attention_bias") else set()
    biases |= set(_MLP) if c.get("mlp_bias") else set()
    scale = c.get("query_pre_attn_scalar", c["head_dim"])
    return Config(
        architecture=str(kind),
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_attention_heads=heads,
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        rms_norm_eps=float(c["rms_norm_eps"]),
        activation=_activation(c, family, error),
        query_scale=float(scale) ** -0.5,
        biases=frozenset(biases),
        query_key_norms=family.query_key_norms,
        post_norms=family.post_norms,
        norm_offset=float(family.gemma),
        embedding_scale=float(c["hidden_size"]) ** 0.5 if family.gemma else 1.0,
        score_cap=c.get("attn_logit_softcapping"),
        logit_cap=c.get("final_logit_softcapping"),
        tied=bool(c.get("tie_word_embeddings", False)),
        context=c.get("max_position_embeddings"),
        layers=_layers(c, str(kind), family, error),
    )


def _check_known(
    config: Mapping[str, Json], family: _Family, ignore: Collection[str], error: Callable[..., QuantError]
) -> None:
    known = _READ | _OFF | family.defaults.keys() | set(ignore)
    unknown = [k for k, v in config.items() if v is not None and k not in known and not _IDLE.fullmatch(k)]
    if family.gemma and "sliding_window" in family.defaults:  # another name, which Gemma 2's own files have too
        unknown = [k for k in unknown if k != "sliding_window_size" or config[k] != config.get("sliding_window")]
    if unknown:
        todo = "If they leave the logits as they are, ignore them by name: load(..., ignore=[...]), --ignore-field NAME"
        raise error(f"unknown fields of the configuration: {', '.join(sorted(unknown))}", todo=todo)


def _check_sizes(c: Mapping[str, Json], error: Callable[..., QuantError]) -> None:
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    names += [
        n for n in ("num_key_value_heads", "head_dim", "num_experts", "num_local_experts") if c.get(n) is not None
    ]
    for name in names:
        if type(c[name]) is not int or c[name] < 1:
            raise error("a size must be a positive integer", todo="The configuration is damaged", **{name: c[name]})


def _activation(c: Mapping[str, Json], family: _Family, error: Callable[..., QuantError]) -> str:
    name = c.get("hidden_activation", c["hidden_act"]) if family.gemma else c["hidden_act"]
    if family.gemma and name == "gelu":  # what Gemma's first files say, and do not mean
        return "gelu_tanh"
    if name not in _ACTIVATIONS:
        todo = f"Supported are {', '.join(_ACTIVATIONS)}"
        raise error("the activation is not supported", todo=todo, hidden_act=name)
    return _ACTIVATIONS[name]


def _layers(c: Mapping[str, Json], kind: str, family: _Family, error: Callable[..., QuantError]) -> tuple[Layer, ...]:
    sliding = _sliding(c, kind, error)
    if any(sliding) and not c.get("sliding_window"):
        todo = "Add sliding_window to the configuration"
        raise error("layers have a sliding window of unknown size", todo=todo, sliding_window=c.get("sliding_window"))
    ropes = {one: _rope(c, one, error) for one in set(sliding)}
    moe = _mixture(c, kind) if family.moe else None
    return tuple(
        Layer(c["sliding_window"] if one else None, ropes[one], moe if _sparse(c, i) else None)
        for i, one in enumerate(sliding)
    )


def _sliding(c: Mapping[str, Json], kind: str, error: Callable[..., QuantError]) -> list[bool]:
    """Which layers have a sliding window."""
    count, window, every = c["num_hidden_layers"], c.get("sliding_window"), range(c["num_hidden_layers"])
    found = [False] * count
    if kind in ("mistral", "mixtral"):
        found = [window is not None] * count
    elif kind == "qwen3_moe":
        found = [bool(c["use_sliding_window"])] * count
    elif kind == "qwen2_moe":
        found = [bool(c["use_sliding_window"]) and i % 2 == 0 and i < c["max_window_layers"] for i in every]
    elif kind in ("qwen2", "qwen3"):
        found = [bool(c["use_sliding_window"]) and i >= c["max_window_layers"] for i in every]
    elif kind == "gemma2":
        found = [i % 2 == 0 for i in every]
    elif kind == "gemma3_text":
        found = [(i + 1) % c["sliding_window_pattern"] != 0 for i in every]
    stated = c.get("layer_types")
    if stated is None:
        return found
    names = {"full_attention": False, "sliding_attention": True}
    if not isinstance(stated, list) or len(stated) != count or not set(stated) <= names.keys():
        todo = f"Give one of {', '.join(names)} for each of the {count} layers"
        raise error("layer_types must name a kind of attention for each layer", todo=todo, layer_types=stated)
    listed = [names[name] for name in stated]
    if kind in ("llama", "mistral", "mixtral", "gemma", "qwen3_moe") and listed != found:
        todo = "In this architecture all layers are alike"
        raise error("layer_types contradict the rest of the configuration", todo=todo, layer_types=tuple(stated))
    if kind in ("qwen2", "qwen3", "qwen2_moe") and any(listed) and not c["use_sliding_window"]:
        todo = "Set use_sliding_window, or make all layers full_attention"
        raise error("layer_types have sliding windows and use_sliding_window is off", todo=todo)
    return listed


def _rope(c: Mapping[str, Json], sliding: bool, error: Callable[..., QuantError]) -> Rope:
    """The rotary embedding of the layers with a sliding window, or of those without one."""
    stated = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta, local = c["rope_theta"], sliding and "rope_local_base_freq" in c
    nested = {"full_attention", "sliding_attention"} & stated.keys()
    if nested:
        stated = stated.get("sliding_attention" if sliding else "full_attention") or {}
    elif local:  # scaling is for the layers that see everything
        stated = {}
    base = {"rope_theta": c["rope_local_base_freq"] if local else theta}
    if c.get("partial_rotary_factor") is not None:
        base["partial_rotary_factor"] = c["partial_rotary_factor"]
    parameters = {**base, **{key: value for key, value in stated.items() if value is not None}}
    context = c.get("original_max_position_embeddings")
    if context is not None and parameters.get("rope_type", parameters.get("type")) in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = context
    return rope_of(parameters, c["head_dim"], c["max_position_embeddings"], error)


def _mixture(c: Mapping[str, Json], kind: str) -> Mixture:
    if kind == "mixtral":
        return Mixture(c["num_local_experts"], c["num_experts_per_tok"], c["intermediate_size"], 0, True)
    count = c.get("num_local_experts") or c["num_experts"]  # Qwen 3 has two names for it
    shared = c.get("shared_expert_intermediate_size", 0)
    return Mixture(count, c["num_experts_per_tok"], c["moe_intermediate_size"], shared, bool(c["norm_topk_prob"]))


def _sparse(c: Mapping[str, Json], i: int) -> bool:
    return i not in (c.get("mlp_only_layers") or ()) and (i + 1) % c.get("decoder_sparse_step", 1) == 0

"""The configuration and the tensors of a GGUF file, as those of a Hugging Face checkpoint.

Source: llama.cpp's keys (gguf 0.19.0) and what its models do where a file does not say: the windows and the base
frequency of Gemma's layers, which mixtures weigh their experts to a sum of 1, and the scale of queries of Gemma's
27B models.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping

import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.types import PyTree
from jaxquant.io.gguf.container import Value
from jaxquant.io.strict_json import Json
from jaxquant.models.rope import magnitude_of

__all__ = ["EXPERTS", "LAYERS_OF_27B", "MODEL_TYPES", "configuration", "renamed"]

#: llama.cpp's name of an architecture -> ``model_type``.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "attention.sliding_window_pattern": "sliding_window_pattern",
}
_ROPE = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_SCALING = "rope.scaling."
#: Checked, not taken over; or without effect.
_OTHER = {"attention.value_length", "rope.dimension_count", "vocab_size", "rope.scaling.finetuned"}
#: Layers of the models with 27B parameters, whose queries are scaled by the size of all heads together.
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def configuration(
    metadata: Mapping[str, Value], tensors: Mapping[str, PyTree], *, ignore: Collection[str] = (), path: str
) -> dict[str, Json]:
    """The model's configuration, as ``config.json`` would have it.

    Args:
      metadata: of the file.
      tensors: by Hugging Face's names, from `renamed`.
      ignore: keys, without the architecture, that are known not to change the result.
      path: for messages.
    """
    error = functools.partial(quant_error, "models", path=path)
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        todo = f"Supported are {', '.join(MODEL_TYPES)}"
        raise error("the architecture is not supported", todo=todo, architecture=architecture)
    start = f"{architecture}."
    own = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
    values = {key: value.item() if isinstance(value, np.generic) else value for key, value in own.items()}
    rope = {key.removeprefix(_SCALING): value for key, value in values.items() if key.startswith(_SCALING)}
    rest = values.keys() - _KEYS.keys() - _OTHER - {_SCALING + key for key in _ROPE} - set(ignore)
    if rest:
        todo = "If they leave the logits as they are, ignore them by name: load(..., ignore=[...]), --ignore-field NAME"
        raise error(f"unknown keys of {architecture}: {', '.join(sorted(rest))}", todo=todo)
    lists = {key: value for key, value in values.items() if isinstance(value, np.ndarray | list) and key in _KEYS}
    for key, value in lists.items():  # one number per layer
        if key == "attention.sliding_window_pattern":
            continue
        if len(set(map(int, value))) != 1:
            raise error("layers that differ are not supported", todo="Run it with llama.cpp", key=key)
        values[key] = int(value[0])
    config = {_KEYS[key]: value for key, value in values.items() if key in _KEYS}
    config["model_type"] = MODEL_TYPES[architecture]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, np.ndarray | list):
        del config["sliding_window_pattern"]
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in pattern]
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "rms_norm_eps"):
        if key not in config:
            todo = "The file is damaged"
            raise error("the metadata lack a size", todo=todo, key=next(k for k, v in _KEYS.items() if v == key))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("max_position_embeddings", 2048)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, config["head_dim"]) != config["head_dim"]:
            sizes = {"head_dim": config["head_dim"], key.split(".")[1]: values[key]}
            raise error("heads must have one size", todo="Run it with llama.cpp", **sizes)
    embedding = tensors.get("model.embed_tokens.weight")
    config["vocab_size"] = 1 if embedding is None else embedding.shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    _rotary(config, rope)
    _as_family(config, architecture, tensors)
    if config["num_hidden_layers"] == LAYERS_OF_27B.get(architecture):
        config["query_pre_attn_scalar"] = config["hidden_size"] / config["num_attention_heads"]
    elif architecture in ("gemma2", "gemma3"):
        config["query_pre_attn_scalar"] = config["head_dim"]
    return config


def _rotary(config: dict[str, Json], rope: Mapping[str, Value]) -> None:
    stated = {_ROPE[key]: value for key, value in rope.items() if key in _ROPE}
    if stated.get("rope_type") == "none" or not stated.keys() - {"original_max_position_embeddings"}:
        return
    if stated["rope_type"] != "yarn":
        stated.pop("original_max_position_embeddings", None)
    if "attention_factor" in stated:  # llama.cpp multiplies its own magnitude by it
        stated["attention_factor"] *= magnitude_of(stated["factor"])
    config["rope_scaling"] = stated


def _as_family(config: dict[str, Json], architecture: str, tensors: Mapping[str, PyTree]) -> None:
    """Hugging Face's name of an architecture of llama.cpp, and the properties that its files leave implicit."""
    if architecture == "llama":
        if config.get("num_experts", 0):
            config |= {"model_type": "mixtral", "num_local_experts": config.pop("num_experts")}
        elif "sliding_window" in config:
            config["model_type"] = "mistral"
    elif architecture == "qwen2moe":
        config.setdefault("norm_topk_prob", False)
        config.setdefault("shared_expert_intermediate_size", config["intermediate_size"])
    elif architecture == "qwen3moe":
        config.setdefault("norm_topk_prob", True)
    if architecture.startswith("qwen"):
        config["use_sliding_window"] = False
        config.pop("sliding_window", None)
        config.pop("max_window_layers", None)
    if architecture.endswith("moe"):
        layers = range(config["num_hidden_layers"])
        config["mlp_only_layers"] = [i for i in layers if f"model.layers.{i}.mlp.gate.weight" not in tensors]


#: llama.cpp's names of the weights of mixtures -> those of `Config.shapes`.
EXPERTS = {
    "ffn_gate_inp": "gate",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_gate_inp_shexp": "shared_expert_gate",
    "ffn_gate_shexp": "shared_expert.gate_proj",
    "ffn_up_shexp": "shared_expert.up_proj",
    "ffn_down_shexp": "shared_expert.down_proj",
}


def renamed(tensors: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Experts too by Hugging Face's names, and the one gate of a shared expert as [1, in]."""
    result = {}
    for name, leaf in tensors.items():
        found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if found and found[2] in EXPERTS:
            name = f"model.layers.{found[1]}.mlp.{EXPERTS[found[2]]}.weight"
            leaf = jnp.reshape(leaf, (1, -1)) if found[2] == "ffn_gate_inp_shexp" else leaf
        result[name] = leaf
    return result

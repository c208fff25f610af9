"""The metadata of a GGUF file, from a model's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.core.errors import quant_error

__all__ = ["metadata_of"]

_KEYS = {
    "block_count": ("num_hidden_layers", np.uint32),
    "context_length": ("max_position_embeddings", np.uint32),
    "embedding_length": ("hidden_size", np.uint32),
    "feed_forward_length": ("intermediate_size", np.uint32),
    "attention.head_count": ("num_attention_heads", np.uint32),
    "attention.head_count_kv": ("num_key_value_heads", np.uint32),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", np.float32),
    "attention.key_length": ("head_dim", np.uint32),
    "attention.value_length": ("head_dim", np.uint32),
    "rope.freq_base": ("rope_theta", np.float32),
    "vocab_size": ("vocab_size", np.uint32),
}


def metadata_of(config: Mapping[str, Any], architecture: str | None, *, function: str) -> dict[str, Any]:
    """The metadata of a decoder from its ``config.json``; the tokenizer is not part of it."""
    known = {"mistral": "llama", "phi": "phi2", "gemma3_text": "gemma3"}
    name = architecture or known.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str):
        todo = "Say which it is with --architecture, for example llama"
        raise quant_error(function, "the architecture is not known", todo=todo, model_type=config.get("model_type"))
    metadata: dict[str, Any] = {"general.architecture": name}
    for key, (field, dtype) in _KEYS.items():
        if isinstance(config.get(field), int | float):
            metadata[f"{name}.{key}"] = dtype(config[field])
    return metadata

"""The metadata of a GGUF file of any architecture, from a model's ``config.json``.

`jaxquant.models.to_gguf` writes those of the decoders that the package runs, scaled rotary embeddings among them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.gguf.container import Value
from jaxquant.io.strict_json import Json

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


def metadata_of(config: Mapping[str, Json], architecture: str | None, *, function: str) -> dict[str, Value]:
    """The metadata of a decoder from its ``config.json``.

    Args:
      config: its object.
      architecture: llama.cpp's name; None: that of ``model_type``.
      function: for messages.

    Raises:
      QuantError: if neither names the architecture, or rotary embeddings are scaled or rotate a part of a head.
    """
    known = {"phi": "phi2"}
    name = architecture or known.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str):
        todo = "Say which it is with --architecture, for example llama"
        raise quant_error(function, "the architecture is not known", todo=todo, model_type=config.get("model_type"))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {**config, **{key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    if scaled or config.get("partial_rotary_factor") not in (None, 1.0):
        rule = "rotary embeddings that are scaled, or rotate a part of a head, cannot be written for this architecture"
        raise quant_error(function, rule, todo="Use llama.cpp's converter", architecture=name)
    metadata: dict[str, Value] = {"general.architecture": name}
    for key, (field, dtype) in _KEYS.items():
        if isinstance(config.get(field), int | float):
            metadata[f"{name}.{key}"] = dtype(config[field])
    return metadata

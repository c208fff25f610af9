"""Names and row order of decoders: what llama.cpp's converter changes on the way from a Hugging Face checkpoint.

    token_embd             model.embed_tokens              blk.N.attn_q, attn_k, attn_v   ...self_attn.q_proj, ...
    output_norm, output    model.norm, lm_head             blk.N.attn_output              ...self_attn.o_proj
    blk.N.attn_norm        ...input_layernorm              blk.N.ffn_gate, ffn_up, ...    ...mlp.gate_proj, ...
    blk.N.ffn_norm         ...post_attention_layernorm     blk.N.attn_q_norm, attn_k_norm ...self_attn.q_norm, ...

For architectures of Llama's kind the rows of attn_q and attn_k are in another order: those of a head, of which
Hugging Face has the first half rotated against the second, are interleaved. Both directions are here.

Source: llama.cpp's convert_hf_to_gguf.py (``permute``) and gguf 0.19.0 (``tensor_mapping``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["heads_of", "interleave", "separate", "to_gguf", "to_hugging_face"]

#: Architectures whose converter interleaves. Verified here for llama; the others as llama.cpp has them.
_INTERLEAVED = {"llama", "mistral3", "granite", "granitemoe", "minicpm", "baichuan", "xverse", "deepseek", "arctic"}

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BACK_OUTSIDE = {value: key for key, value in _OUTSIDE.items()}
_BACK_INSIDE = {value: key for key, value in _INSIDE.items()}


def _renamed(name: str, outside: Mapping[str, str], layer: str, inside: Mapping[str, str], renamed: str) -> str | None:
    """A tensor's name by the tables of stems outside of layers and inside of them; None if they have none."""
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    match = re.fullmatch(layer, stem)
    found = match and inside.get(match[2])
    return f"{renamed}.{match[1]}.{found}.{kind}" if match and found else None


def to_hugging_face(name: str, metadata: Mapping[str, Any]) -> str | None:
    """Hugging Face's name of a tensor; None if the table has none."""
    return _renamed(name, _OUTSIDE, r"blk\.(\d+)\.(\w+)", _INSIDE, "model.layers")


def to_gguf(name: str, metadata: Mapping[str, Any]) -> str | None:
    """Inverse of `to_hugging_face`."""
    return _renamed(name, _BACK_OUTSIDE, r"model\.layers\.(\d+)\.(.+)", _BACK_INSIDE, "blk")


def heads_of(name: str, metadata: Mapping[str, Any]) -> int | None:
    """Heads of a tensor whose rows are interleaved; None for all others.

    0 if they are interleaved but the metadata does not say how many heads there are.
    """
    architecture = metadata.get("general.architecture")
    match = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(weight|bias)", name)
    if not match or not isinstance(architecture, str) or architecture not in _INTERLEAVED:
        return None
    heads = metadata.get(f"{architecture}.attention.head_count")
    if match[2] == "k":
        heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, np.ndarray):  # one number per layer
        layer = int(match[1])
        heads = heads[layer] if layer < heads.size else 0
    return max(int(heads), 0) if isinstance(heads, np.integer) else 0


def separate(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows as Hugging Face orders them, from a file's; [heads * head size, ...]."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `separate`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

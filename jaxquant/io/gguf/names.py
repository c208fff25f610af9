"""Names, row order and norms of decoders: the changes that llama.cpp's converter makes to a Hugging Face checkpoint.

    token_embd             model.embed_tokens              blk.N.attn_q, attn_k, attn_v   ...self_attn.q_proj, ...
    output_norm, output    model.norm, lm_head             blk.N.attn_output              ...self_attn.o_proj
    blk.N.attn_norm        ...input_layernorm              blk.N.ffn_gate, ffn_up, ...    ...mlp.gate_proj, ...
    blk.N.ffn_norm         ...post_attention_layernorm     blk.N.attn_q_norm, attn_k_norm ...self_attn.q_norm, ...

and other names in some architectures. Names are translated only for the architectures in the tables here, because one
name of llama.cpp's can mean two things (``ffn_norm`` of llama and of gemma2).

For architectures of Llama's kind the rows of attn_q and attn_k are reordered: Hugging Face rotates the first half of a
head's rows against the second half, and llama.cpp interleaves the halves. The norms of Gemma multiply by 1 plus their
weight; llama.cpp stores the sum. This module converts in both directions.

Source: llama.cpp's convert_hf_to_gguf.py (``permute``, ``undo_permute``, the classes of Gemma) and gguf 0.19.0
(``tensor_mapping``), against which the tests compare the tables.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

from jaxquant.io.gguf.container import Value

__all__ = [
    "ARCHITECTURES",
    "has_names",
    "heads_of",
    "interleave",
    "norm_of_gemma",
    "separate",
    "to_gguf",
    "to_hugging_face",
]

#: Architectures whose converter interleaves: verified by tests for llama, taken from llama.cpp for the others.
_INTERLEAVED = {
    "llama", "mistral3", "granite", "granitemoe", "minicpm", "baichuan", "xverse", "deepseek", "arctic", "deci", "olmo",
    "internlm2", "smollm3", "arcee",
}  # fmt: skip
_GEMMA = {"gemma", "gemma2", "gemma3"}

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
_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LIKE_LLAMA = (
    "llama", "mistral3", "granite", "smollm3", "minicpm", "olmo", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "stablelm",
    "gemma",
)  # fmt: skip
#: Architecture -> the names of its tensors that differ from those above.
ARCHITECTURES: dict[str, dict[str, str]] = {
    **{name: {} for name in _LIKE_LLAMA},
    "gemma2": _AROUND,
    "gemma3": _AROUND,
    "olmo2": {key: name for key, name in _AROUND.items() if key != "ffn_norm"},
    "phi2": {
        "attn_output": "self_attn.dense",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
        "output_norm": "model.final_layernorm",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}


def _architecture(metadata: Mapping[str, Value]) -> str:
    found = metadata.get("general.architecture")
    return found if isinstance(found, str) else ""


def has_names(metadata: Mapping[str, Value]) -> bool:
    """Whether Hugging Face's names of the architecture are known."""
    return _architecture(metadata) in ARCHITECTURES


@functools.cache
def _stems(architecture: str) -> tuple[dict[str, str], dict[str, str]]:
    """llama.cpp's stem -> Hugging Face's, outside layers and inside layers."""
    own = ARCHITECTURES.get(architecture)
    if own is None:
        return {}, {}
    outside = _OUTSIDE | {key: name for key, name in own.items() if key in _OUTSIDE}
    inside = _INSIDE | {key: name for key, name in own.items() if key not in _OUTSIDE}
    if architecture == "olmo2":
        del inside["ffn_norm"]  # these architectures normalise the attention's output instead
    return outside, inside


def _renamed(name: str, outside: Mapping[str, str], layer: str, inside: Mapping[str, str], renamed: str) -> str | None:
    """A tensor's name by the tables of stems outside and inside layers; None if the tables have none."""
    stem, _, kind = name.rpartition(".")
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    match = re.fullmatch(layer, stem)
    found = match and inside.get(match[2])
    return f"{renamed}.{match[1]}.{found}.{kind}" if match and found else None


def to_hugging_face(name: str, metadata: Mapping[str, Value]) -> str | None:
    """Hugging Face's name of a tensor; None if the table has none."""
    outside, inside = _stems(_architecture(metadata))
    return _renamed(name, outside, r"blk\.(\d+)\.(\w+)", inside, "model.layers")


def to_gguf(name: str, metadata: Mapping[str, Value]) -> str | None:
    """Inverse of `to_hugging_face`."""
    outside, inside = ({new: old for old, new in table.items()} for table in _stems(_architecture(metadata)))
    return _renamed(name, outside, r"model\.layers\.(\d+)\.(.+)", inside, "blk")


def norm_of_gemma(name: str, metadata: Mapping[str, Value]) -> bool:
    """Whether a tensor, by its name in the file, is a norm's weight plus 1."""
    return _architecture(metadata) in _GEMMA and name.endswith("norm.weight")


def heads_of(name: str, metadata: Mapping[str, Value]) -> int | None:
    """The number of heads of a tensor whose rows are interleaved; None for all others.

    0 if the rows are interleaved but the metadata does not give the number of heads.
    """
    architecture = _architecture(metadata)
    match = re.fullmatch(r"blk\.(\d+)\.attn_([qk])\.(weight|bias)", name)
    if not match or architecture not in _INTERLEAVED:
        return None
    heads = metadata.get(f"{architecture}.attention.head_count")
    if match[2] == "k":
        heads = metadata.get(f"{architecture}.attention.head_count_kv", heads)
    if isinstance(heads, np.ndarray):  # one number per layer
        layer = int(match[1])
        heads = heads[layer] if layer < heads.size else 0
    return max(int(heads), 0) if isinstance(heads, np.integer) else 0


def separate(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a file in Hugging Face's order; [heads * head size, ...]."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Inverse of `separate`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

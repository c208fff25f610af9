"""A decoder of a Hugging Face directory as a GGUF file: metadata, tokenizer, names, and what llama.cpp cannot say.

llama.cpp computes what the architecture implies: a file cannot state every field of ``config.json``. A field that it
would compute in another way is refused; one that changes long texts only, a sliding window, becomes a note.

Source: llama.cpp's keys (gguf 0.19.0), and what its models do where a file does not say, as in `jaxquant.models.gguf`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.io.arrays import Values
from jaxquant.io.gguf.container import Value
from jaxquant.io.gguf.metadata import metadata_of
from jaxquant.io.strict_json import Json
from jaxquant.models.config import ARCHITECTURES, Config, Layer, config_of
from jaxquant.models.gguf import EXPERTS, LAYERS_OF_27B, MODEL_TYPES
from jaxquant.models.load import IMAGES, renamed, stacked
from jaxquant.models.rope import magnitude_of
from jaxquant.models.tokenizer import gguf_tokenizer

__all__ = ["Described", "described"]

_NAMES = {ours: theirs for theirs, ours in MODEL_TYPES.items()} | {"mistral": "llama", "mixtral": "llama"}
_QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
#: Projections whose biases llama.cpp reads.
_BIASES = {
    "llama": {*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "qwen2": _QKV,
    "qwen2moe": _QKV,
}
_NORMALIZED = {"mixtral": True, "qwen2_moe": False, "qwen3_moe": True}


@dataclasses.dataclass(frozen=True)
class Described:
    """A checkpoint in the form that `save_gguf` takes.

    Attributes:
      leaves: the leaves, those of experts as stacks under llama.cpp's names; each is read when it is asked for.
      metadata: the model's, and the tokenizer's where it can be written.
      notes: what the file does not say: its name in the directory -> a sentence.
    """

    leaves: Mapping[str, Values]
    metadata: dict[str, Value]
    notes: dict[str, str]


def described(
    leaves: Mapping[str, Values],
    config: Mapping[str, Json],
    directory: str | os.PathLike[str],
    architecture: str | None = None,
    *,
    function: str,
) -> Described:
    """The leaves of a directory as a GGUF file has them.

    Args:
      leaves: under the names of the files.
      config: of ``config.json``.
      directory: where ``tokenizer.json`` is.
      architecture: llama.cpp's name; None: that of ``model_type``.
      function: for messages.

    Raises:
      QuantError: if the architecture is not known, or llama.cpp would compute something else than the model.
    """
    kind = config.get("model_type")
    kind = "gemma3_text" if kind == "gemma3" and "text_config" in config else kind
    name = architecture or _NAMES.get(str(kind), "")
    tokenizer, notes = gguf_tokenizer(directory, config)
    if kind not in ARCHITECTURES or name != _NAMES[str(kind)]:
        metadata = metadata_of(config, architecture, function=function)
        return Described(_Grouped(leaves, {}, os.fspath(directory)), {**metadata, **tokenizer}, notes)
    found = config_of(config, path=os.fspath(directory))
    wrong = list(_unsaid(found, name))
    if wrong:
        todo = "Run it with jaxquant generate or transformers, or write another layout"
        rule = f"llama.cpp computes its architecture {name} otherwise than this model: {'; '.join(wrong)}"
        raise quant_error(function, rule, todo=todo, path=os.fspath(directory))
    windows = [layer.window for layer in found.layers if layer.window is not None]
    if windows and not name.startswith("gemma"):
        width = f"{min(windows)} tokens"
        notes["config.json"] = f"llama.cpp attends to all tokens, and this model to the last {width}; texts of up to "
        notes["config.json"] += f"{width} are computed alike"
    images = [leaf for leaf in leaves if IMAGES.match(renamed(leaf)[0])]
    if images:
        notes[images[0]] = f"the {len(images)} tensors of the encoder of images are left out"
    grouped = _Grouped(leaves, _factors(found), os.fspath(directory))
    return Described(grouped, {**_metadata(found, name), **tokenizer}, notes)


# -- the model ---------------------------------------------------------------------------------------------------------


def _unsaid(config: Config, name: str) -> Iterator[str]:
    """In what llama.cpp's architecture differs from the model."""
    gemma, rope = name.startswith("gemma"), config.layers[0].rope
    full = next((layer.rope for layer in config.layers if layer.window is None), rope)
    heads = config.num_attention_heads
    size = config.hidden_size / heads if len(config.layers) == LAYERS_OF_27B.get(name) else config.head_dim
    if not math.isclose(config.query_scale, size**-0.5, rel_tol=1e-6):
        yield f"queries are scaled by {size:g}**-0.5, here by {config.query_scale:.4g}"
    if config.activation != ("gelu_tanh" if gemma else "silu"):
        yield f"its activation is not {config.activation}"
    if extra := config.biases - _BIASES.get(name, set()):
        yield f"it has no biases of {', '.join(sorted(extra))}"
    caps = (config.score_cap, config.logit_cap)
    if (None in caps) if name == "gemma2" else any(caps):
        yield "its caps of scores and logits are not those of the model"
    if any(layer.rope.stated["rope_type"] == "llama3" for layer in config.layers) and name != "llama":
        yield "it does not scale rotary embeddings as Llama 3 does"
    if not full.stated.get("truncate", True):
        yield "it rounds the bounds of yarn"
    if name == "gemma2" and [layer.window is not None for layer in config.layers] != _every(2, config.layers):
        yield "its second layers see all tokens"
    mixtures = {layer.mixture for layer in config.layers}
    if len(mixtures) > 1:
        yield "all of its layers are mixtures of experts"
    if any(m and m.normalized != _NORMALIZED[config.architecture] for m in mixtures):
        yield "the weights of its experts are" + ("" if _NORMALIZED[config.architecture] else " not") + " normalized"


def _every(period: int, layers: Sequence[Layer]) -> list[bool]:
    """Which layers have a window, if each last one of a period has none."""
    return [(i + 1) % period != 0 for i in range(len(layers))]


def _metadata(config: Config, name: str) -> dict[str, Value]:
    sizes = {
        "block_count": len(config.layers),
        "context_length": config.context or 2048,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    mixture = config.layers[0].mixture
    if mixture is not None:
        sizes |= {"expert_count": mixture.experts, "expert_used_count": mixture.chosen}
        if config.architecture != "mixtral":
            sizes["expert_feed_forward_length"] = mixture.intermediate_size
        if mixture.shared:
            sizes["expert_shared_feed_forward_length"] = mixture.shared
    windows = [layer.window for layer in config.layers]
    width = next((w for w in windows if w is not None), None)
    own: dict[str, Value] = {key: np.uint32(value) for key, value in sizes.items()}
    if width is not None and (name.startswith("gemma") or config.architecture in ("mistral", "mixtral")):
        own["attention.sliding_window"] = np.uint32(width)
    if name == "gemma3":
        sliding = [w is not None for w in windows]
        period = next((n for n in range(1, len(sliding) + 2) if _every(n, config.layers) == sliding), None)
        own["attention.sliding_window_pattern"] = np.array(sliding) if period is None else np.uint32(period)
    own["attention.layer_norm_rms_epsilon"] = np.float32(config.rms_norm_eps)
    caps = {"attn_logit_softcapping": config.score_cap, "final_logit_softcapping": config.logit_cap}
    own |= {key: np.float32(cap) for key, cap in caps.items() if cap is not None}
    own |= _rotary(config)
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in own.items()}


def _rotary(config: Config) -> dict[str, Value]:
    """The keys of the rotary embedding of layers that see all tokens, and the base of those with a window."""
    rope = next((layer.rope for layer in config.layers if layer.window is None), config.layers[0].rope)
    local = next((layer.rope for layer in config.layers if layer.window is not None), rope)
    found: dict[str, Value] = {"rope.freq_base": np.float32(rope.stated["rope_theta"])}
    if config.architecture == "gemma3_text":
        found["rope.freq_base_swa"] = np.float32(local.stated["rope_theta"])
    kind = rope.stated["rope_type"]
    if kind not in ("linear", "yarn"):
        return found
    factor = rope.stated["factor"]
    scaling: dict[str, Value] = {"type": kind, "factor": np.float32(factor)}
    if kind == "yarn":
        scaling["original_context_length"] = np.uint32(rope.stated["original_max_position_embeddings"])
        # llama.cpp multiplies its own magnitude by this one.
        scaling["attn_factor"] = np.float32(rope.magnitude / magnitude_of(factor))
        betas = {f"yarn_{key}": rope.stated.get(key) for key in ("beta_fast", "beta_slow")}
        scaling |= {key: np.float32(value) for key, value in betas.items() if value}
    return found | {f"rope.scaling.{key}": value for key, value in scaling.items()}


def _factors(config: Config) -> dict[str, np.ndarray]:
    """By what Llama 3 divides its frequencies: a tensor, in llama.cpp."""
    rope = config.layers[0].rope
    if rope.stated["rope_type"] != "llama3":
        return {}
    size = 2 * len(rope.frequencies)
    plain = 1.0 / rope.stated["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)
    return {"rope_freqs.weight": (plain / np.asarray(rope.frequencies)).astype(np.float32)}


class _Grouped(Mapping[str, Values]):
    """Leaves under names that `save_gguf` knows, with the experts of a layer as one; each is read when asked for."""

    def __init__(self, leaves: Mapping[str, Values], more: Mapping[str, np.ndarray], path: str):
        self._leaves, self._more, self._path = leaves, more, path
        self._members: dict[str, dict[int | None, str]] = {name: {} for name in more}
        for name in leaves:
            whole, expert = renamed(name)
            if not whole.endswith("rotary_emb.inv_freq") and not IMAGES.match(whole):
                self._members.setdefault(_in_gguf(whole), {})[expert] = name

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, name: str) -> Values:
        if name in self._more:
            return self._more[name]
        members = self._members[name]
        if None in members:
            leaf = self._leaves[members[None]]
            if name.endswith("ffn_gate_inp_shexp.weight"):
                if isinstance(leaf, QTensor):
                    rule, todo = "llama.cpp has this gate in float", "Quantize with Rule('shared_expert_gate', None)"
                    raise quant_error(
                        "models", rule, todo=todo, path=f"{self._path}, {members[None]}", weight=repr(leaf)
                    )
                leaf = leaf.reshape(-1)
            vector = len(leaf.shape) == 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
            return np.asarray(leaf).astype(np.float32) if vector else leaf  # in which llama.cpp computes norms
        return stacked(name, {i: self._leaves[n] for i, n in members.items() if i is not None}, self._path)


def _in_gguf(name: str) -> str:
    """llama.cpp's name of a weight of experts; all others unchanged."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(.+)\.weight", name)
    stem = found and _STEMS.get(found[2])
    return f"blk.{found[1]}.{stem}.weight" if found and stem else name


_STEMS = {ours: theirs for theirs, ours in EXPERTS.items()}

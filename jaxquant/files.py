"""What the command line does with checkpoints of any kind: summaries, rules from TOML, conversion, comparison."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec, QuantSpec, Rule
from jaxquant.io import load, load_gguf, load_hf, save, save_gguf, save_hf
from jaxquant.io.gguf.container import GGUFFile
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.formats import detect
from jaxquant.io.safetensors import SafetensorsFile
from jaxquant.io.sharded import Checkpoint

__all__ = ["Comparison", "Summary", "compare", "convert", "read_rules", "summary", "without_idle_keeps"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` found: the format, the tensors, and with ``deep`` what each weight is and what is wrong."""

    format: str
    nbytes: int
    tensors: list[Tensor]
    weights: dict[str, str]
    problems: list[str]


def _kind(path: Path) -> str:
    """``"gguf"``, ``"jaxquant"`` or ``"hf"``."""
    if path.is_dir():
        return "hf"
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return "gguf"
    return "jaxquant" if "jaxquant" in SafetensorsFile(path, function="inspect").metadata else "hf"


def summary(path: Path, *, deep: bool = False) -> Summary:
    """What a checkpoint holds, from its headers; with ``deep`` its weights are read too."""
    kind = _kind(path)
    if kind == "gguf":
        file = GGUFFile(path, function="inspect")
        tensors = [Tensor(name, info.type.name, info.shape, info.nbytes) for name, info in file.tensors.items()]
        unread = sorted({i.type.name for i in file.tensors.values() if i.type.refused})
        problems = [f"tensors of type {name} cannot be read" for name in unread]
        name = f"GGUF {file.version}, {file.metadata.get('general.architecture', 'no architecture')}"
    else:
        checkpoint = HFCheckpoint(path, function="inspect")
        tensors = [Tensor(n, s.dtype.name, s.shape, s.nbytes) for n, s in checkpoint.tensors.items()]
        form = None if kind == "jaxquant" else detect(checkpoint)[0]
        name = "jaxquant" if kind == "jaxquant" else "float" if form is None else form.name
        problems = []
    weights: dict[str, str] = {}
    if deep:
        if kind == "hf":
            info = load_hf(path)[1]
            weights, problems = dict(info.modules), [*problems, *info.problems]
        else:
            leaves = _params(path)
            weights = {n: repr(leaf) for n, leaf in leaves.items() if isinstance(leaf, QTensor)}
    return Summary(name, sum(t.nbytes for t in tensors), tensors, weights, problems)


# -- rules -------------------------------------------------------------------------------------------------------------


def read_rules(path: Path) -> list[Rule]:
    """Rules from a TOML file: ``[[rule]]`` tables with ``pattern`` and either ``keep = true`` or ``weight = {...}``.

    The fields of ``weight`` are those of `QuantSpec`.
    """

    def error(rule: str, todo: str, **got: Any) -> Exception:
        return quant_error("rules", rule, todo=todo, path=os.fspath(path), **got)

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise error(f"the file is not TOML ({reason})", "Correct it") from None
    tables = content.get("rule")
    if set(content) != {"rule"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise error(
            "the file must hold [[rule]] tables and nothing else", "Write [[rule]] above each", keys=tuple(content)
        )
    rules = []
    for table in tables:
        fields = set(table)
        if fields == {"pattern", "keep"} and table["keep"] is True:
            rules.append(Rule(table["pattern"], None))
        elif fields == {"pattern", "weight"}:
            rules.append(Rule(table["pattern"], OpSpec(QuantSpec.from_dict(table["weight"]))))
        else:
            todo = 'Write pattern = "..." and keep = true, or weight = { qtype = "int4", group_size = 64, ... }'
            raise error("a rule has a pattern, and either keep or weight", todo, fields=tuple(sorted(fields)))
    return rules


def without_idle_keeps(source: Path, rules: Sequence[Rule], *, required: Sequence[str]) -> list[Rule]:
    """The rules without those that keep nothing in float, unless the user asked for them."""
    names = Checkpoint(source, function="quantize").tensors
    return [
        rule
        for rule in rules
        if rule.spec is not None or rule.pattern in required or any(rule.matches(name) for name in names)
    ]


# -- conversion --------------------------------------------------------------------------------------------------------


def _params(path: Path) -> dict[str, Any]:
    """A flat dict of a checkpoint's leaves, under Hugging Face's names where there are any."""
    kind = _kind(path)
    if kind == "gguf":
        return load_gguf(path, names="hf")[0]
    return _flat(load(path)) if kind == "jaxquant" else load_hf(path)[0]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {} if tree is None else {prefix: tree}
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}/{key}" if prefix else str(key)).items()}


def convert(source: Path, destination: Path, format: str, *, architecture: str | None = None) -> None:
    """Writes a checkpoint in another layout, with the same codes."""
    kind = _kind(source)
    if format == "gguf":
        metadata: dict[str, Any] = dict(GGUFFile(source).metadata) if kind == "gguf" else {}
        config = HFCheckpoint(source).config if kind == "hf" else {}
        save_gguf(destination, _params(source), metadata=metadata or _gguf_metadata(config, architecture), names="hf")
    elif format == "jaxquant":
        save(destination, _params(source))
    else:
        config = HFCheckpoint(source).config if kind == "hf" else {}
        save_hf(destination, _params(source), format=format, config=config)  # type: ignore[arg-type]


_GGUF_KEYS = {
    "block_count": ("num_hidden_layers", np.uint32),
    "context_length": ("max_position_embeddings", np.uint32),
    "embedding_length": ("hidden_size", np.uint32),
    "feed_forward_length": ("intermediate_size", np.uint32),
    "attention.head_count": ("num_attention_heads", np.uint32),
    "attention.head_count_kv": ("num_key_value_heads", np.uint32),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", np.float32),
    "rope.freq_base": ("rope_theta", np.float32),
    "vocab_size": ("vocab_size", np.uint32),
}


def _gguf_metadata(config: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """The metadata of a decoder from its ``config.json``; the tokenizer is not part of it."""
    name = architecture or {"mistral": "llama"}.get(str(config.get("model_type")), config.get("model_type"))
    if not isinstance(name, str):
        todo = "Say which it is with --architecture, for example llama"
        raise quant_error("convert", "the architecture is not known", todo=todo, model_type=config.get("model_type"))
    metadata: dict[str, Any] = {"general.architecture": name}
    for key, (field, dtype) in _GGUF_KEYS.items():
        if isinstance(config.get(field), int | float):
            metadata[f"{name}.{key}"] = dtype(config[field])
    return metadata


# -- comparison --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the values of a tensor are apart: the largest, and the norm relative to that of the first."""

    name: str
    first: str
    second: str
    largest: float
    relative: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    tensors: list[Difference]
    only_first: list[str]
    only_second: list[str]
    equal: bool


def _values(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.dequantize(jnp.float32) if isinstance(leaf, QTensor) else leaf, np.float32)


def _type(leaf: Any) -> str:
    return leaf.qtype if isinstance(leaf, QTensor) else np.dtype(leaf.dtype).name


def compare(first: Path, second: Path) -> Comparison:
    """The values of two checkpoints in float32, tensor by tensor; names must be the same, formats need not."""
    a, b = _params(first), _params(second)
    found = []
    for name in (n for n in a if n in b):
        if a[name].shape != b[name].shape:
            rule, todo = "a tensor has two shapes", "Compare checkpoints of one model"
            raise quant_error("compare", rule, todo=todo, path=name, first=a[name].shape, second=b[name].shape)
        x, y = _values(a[name]), _values(b[name])
        difference = np.abs(y - x)
        size = float(np.linalg.norm(x)) or 1.0
        found.append(
            Difference(
                name,
                _type(a[name]),
                _type(b[name]),
                float(difference.max(initial=0)),
                float(np.linalg.norm(difference)) / size,
            )
        )
    only_first, only_second = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    equal = not only_first and not only_second and all(d.largest == 0 for d in found)
    return Comparison(found, only_first, only_second, equal)

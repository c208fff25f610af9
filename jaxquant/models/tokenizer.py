"""Text to tokens and back: ``tokenizer.json`` of a directory, or what the metadata of a GGUF file allow to build."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.gguf.container import Value
from jaxquant.io.sharded import read_json
from jaxquant.io.strict_json import Json

__all__ = ["Tokenizer", "ends_of", "gguf_tokenizer", "tokenizer_of", "tokenizer_of_gguf"]


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        todo = "Run: pip install 'jaxquant[generate]'"
        raise quant_error("models", f"{name} is not installed, which texts need", todo=todo) from None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids of tokens and back.

    Attributes:
      inner: a ``tokenizers.Tokenizer``.
      path: where it comes from.
      bos: id of the token that begins a text, or None.
      add_bos: whether a text begins with it; None: as ``inner`` does by itself.
      template: Jinja template of a chat, or None.
      special: names of special tokens for the template: ``bos_token`` and so on.
    """

    inner: Any
    path: str
    bos: int | None = None
    add_bos: bool | None = None
    template: str | None = None
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def encode(self, text: str, *, chat: bool = False) -> list[int]:
        """Ids of a text; of a rendered chat, which has its special tokens already, without further ones."""
        ids = self.inner.encode(text, add_special_tokens=not chat).ids
        if self.add_bos is not None and self.bos is not None and not chat:
            ids = ids[1:] if ids[:1] == [self.bos] else ids
            ids = [self.bos, *ids] if self.add_bos else ids
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come: what is complete after each, "" where a character is not.

        Together they are the text of all ids but the bytes of a last character that never became complete.
        """
        done: list[int] = []
        shown = 0  # ids whose text is out
        before = 0  # where the ids begin that are decoded along, since the text of a token depends on the one before it
        for i in ids:
            done.append(i)
            context, text = self.decode(done[before:shown]), self.decode(done[before:])
            if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(context):
                yield ""
                continue
            before, shown = shown, len(done)
            yield text[len(context) :]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a chat, up to where the model answers.

        Args:
          messages: each with ``role`` and ``content``.

        Raises:
          QuantError: if the checkpoint has no template of a chat, or the template refuses the messages.
        """
        if self.template is None:
            todo = "Give a prompt as the model was trained on, without --chat"
            raise quant_error("models", "the checkpoint has no chat template", todo=todo, path=self.path)
        jinja2, sandbox = _library("jinja2"), _library("jinja2.sandbox")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        # Tags around the trained part of a conversation; they do not change the text.
        template = re.sub(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}", r"{#\1 \2#}", self.template)
        try:
            return environment.from_string(template).render(
                messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **self.special
            )
        except jinja2.TemplateError as reason:
            todo = "Give a prompt as the model was trained on, without --chat"
            raise quant_error("models", f"the chat template fails ({reason})", todo=todo, path=self.path) from None


def ends_of(directory: Path, config: Mapping[str, Json]) -> frozenset[int]:
    """Ids of the tokens that end a text, as the directory states them."""
    stated = None
    if (directory / "generation_config.json").exists():
        stated = read_json(directory / "generation_config.json", function="models").get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    ids = stated if isinstance(stated, list) else [stated]
    return frozenset(i for i in ids if type(i) is int)


def read_text(path: str | os.PathLike[str], *, function: str) -> str:
    """A text in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as reason:
        todo = "Convert it to UTF-8"
        raise quant_error(function, f"the text is not UTF-8 ({reason})", todo=todo, path=os.fspath(path)) from None


def tokenizer_of(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a directory."""
    place = Path(directory)
    file = place / "tokenizer.json"
    if not file.exists():
        todo = "Copy tokenizer.json there from where the model comes from"
        if (place / "tokenizer.model").exists() or (place / "vocab.json").exists():
            there = repr(str(place))
            todo = f"Make one: transformers.AutoTokenizer.from_pretrained({there}).save_pretrained({there})"
        raise quant_error("models", "there is no tokenizer.json", todo=todo, path=str(place))
    library = _library("tokenizers")
    try:
        inner = library.Tokenizer.from_file(str(file))
    except Exception as reason:  # the library raises nothing narrower
        todo = "The file is damaged, or needs a newer version of tokenizers"
        raise quant_error("models", f"tokenizer.json cannot be read ({reason})", todo=todo, path=str(place)) from None
    inner.no_padding()
    inner.no_truncation()
    stated = _json(place / "tokenizer_config.json")
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _text(stated[name]) for name in names if stated.get(name)}
    bos = inner.token_to_id(special["bos_token"]) if "bos_token" in special else None
    add = stated.get("add_bos_token")
    return Tokenizer(inner, str(place), bos, add if isinstance(add, bool) else None, _template(place, stated), special)


def _json(path: Path) -> dict[str, Json]:
    return read_json(path, function="models") if path.exists() else {}


def _text(token: Json) -> str:
    return token["content"] if isinstance(token, Mapping) else str(token)


def _template(place: Path, stated: Mapping[str, Json]) -> str | None:
    file = place / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = _json(place / "chat_template.json").get("chat_template", stated.get("chat_template"))
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found if isinstance(found, str) else None


# -- GGUF --------------------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How a text is split before its bytes are paired, by ``tokenizer.ggml.pre``; None: as GPT-2 does.
_SPLITS = {
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
    "gpt-2": None,
    "default": None,
}
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)


def tokenizer_of_gguf(metadata: Mapping[str, Value], path: str) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describe: byte pairs (``gpt2``) or SentencePiece (``llama``)."""
    error = functools.partial(quant_error, "models", path=path)
    key = "tokenizer.ggml."
    own = {name.removeprefix(key): value for name, value in metadata.items() if name.startswith(key)}
    library, kind, tokens = _library("tokenizers"), own.get("model"), own.get("tokens")
    todo = "Give the directory of the model's tokenizer.json: load(..., tokenizer=...), --tokenizer DIR"
    if tokens is None or kind not in ("gpt2", "llama"):
        raise error("the file has no tokenizer that can be built here", todo=todo, model=kind)
    pre = own.get("pre", "default")
    if kind == "gpt2" and pre not in _SPLITS:
        raise error("the tokenizer splits texts in a way that is not known here", todo=todo, pre=pre)
    inner = _byte_pairs(library, tokens, own, pre) if kind == "gpt2" else _sentence_pieces(library, tokens, own)
    types = np.asarray(own.get("token_type", np.ones(len(tokens), np.int32)))
    added = [library.AddedToken(tokens[i], special=bool(types[i] == _CONTROL), normalized=False)
             for i in np.flatnonzero((types == _CONTROL) | (types == _USER))]  # fmt: skip
    inner.add_special_tokens([token for token in added if token.special])
    inner.add_tokens([token for token in added if not token.special])
    ids = {name: int(own[f"{name}_token_id"]) for name in ("bos", "eos") if f"{name}_token_id" in own}
    add = bool(own.get("add_bos_token", kind == "llama" or pre == "llama-bpe"))
    template = metadata.get("tokenizer.chat_template")
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i < len(tokens)}
    return Tokenizer(inner, path, ids.get("bos"), add, template if isinstance(template, str) else None, special)


def _byte_pairs(library: Any, tokens: Sequence[str], own: Mapping[str, Value], pre: str) -> Any:
    models, pre_tokenizers = library.models, library.pre_tokenizers
    merges = [tuple(merge.split(" ", 1)) for merge in own.get("merges", [])]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = library.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    split = _SPLITS[pre]
    if split is None:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        words = pre_tokenizers.Split(library.Regex(split), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    if pre == "qwen2":
        inner.normalizer = library.normalizers.NFC()
    inner.decoder = library.decoders.ByteLevel()
    return inner


def _halves(token: str, vocabulary: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The pairs of tokens that a token is the union of."""
    for at in range(1, len(token)):
        if token[:at] in vocabulary and token[at:] in vocabulary:
            yield token[:at], token[at:]


def _sentence_pieces(library: Any, tokens: Sequence[str], own: Mapping[str, Value]) -> Any:
    """Pairs whose union is a token, the one with the highest score first, which is what SentencePiece joins."""
    scores, vocabulary = np.asarray(own["scores"], np.float32), {token: i for i, token in enumerate(tokens)}
    ordered = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    types = np.asarray(own.get("token_type", np.ones(len(tokens), np.int32)))
    merges = [pair for i in ordered if types[i] == _NORMAL for pair in _halves(tokens[i], vocabulary)]
    unknown = int(own.get("unknown_token_id", 0))
    inner = library.Tokenizer(
        library.models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(own.get("add_space_prefix", True))
    normalizers, decoders = library.normalizers, library.decoders
    steps = [normalizers.Prepend("▁")] if prefix else []
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def gguf_tokenizer(
    directory: str | os.PathLike[str], config: Mapping[str, Json]
) -> tuple[dict[str, Json], dict[str, str]]:
    """The metadata of a directory's tokenizer, the inverse of `tokenizer_of_gguf`, or a note on why there are none.

    Args:
      directory: where ``tokenizer.json`` and ``tokenizer_config.json`` are.
      config: of ``config.json``: ``vocab_size``, which may count tokens without a text, and what ends a text.

    Returns:
      The metadata; and notes, name of a file -> a sentence.
    """
    place = Path(directory)
    if not (place / "tokenizer.json").exists():
        return {}, {"tokenizer.json": "there is none, and the file has no tokenizer"}
    whole, stated = _json(place / "tokenizer.json"), _json(place / "tokenizer_config.json")
    kind = _sentence_piece_keys(whole) or _byte_pair_keys(whole)
    if kind is None:
        why = "it is none of the kinds that llama.cpp's files can describe here, and the file has no tokenizer"
        return {}, {"tokenizer.json": why}
    vocabulary, added = whole["model"]["vocab"], whole.get("added_tokens") or []
    size = max([config.get("vocab_size") or 0, *(i + 1 for i in vocabulary.values()), *(t["id"] + 1 for t in added)])
    tokens, types = [f"[PAD{i}]" for i in range(size)], np.full(size, _UNUSED, np.int32)
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else _NORMAL
    for token in added:
        tokens[token["id"]], types[token["id"]] = token["content"], _CONTROL if token["special"] else _USER
    ids = {token: i for i, token in enumerate(tokens)}
    if "scores" in kind:
        ranks = kind.pop("scores")
        kind["scores"] = np.array([ranks.get(token, 0.0) for token in tokens], np.float32)
    own = {**kind, "tokens": tokens, "token_type": types}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = ids.get(_text(stated.get(f"{name}_token") or ""))
        own |= {} if token is None else {f"{key}_token_id": np.uint32(token)}
    own["add_bos_token"] = _begins(whole, stated)
    found = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    template = _template(place, stated)
    return found | ({} if template is None else {"tokenizer.chat_template": template}), {}


def _begins(whole: Mapping[str, Json], stated: Mapping[str, Json]) -> bool:
    """Whether a text begins with a special token."""
    if isinstance(stated.get("add_bos_token"), bool):
        return stated["add_bos_token"]
    last = whole.get("post_processor") or {}
    steps = [step for step in last.get("processors", [last]) if step.get("type") == "TemplateProcessing"]
    return any("SpecialToken" in step["single"][0] for step in steps)


def _merges(model: Mapping[str, Json]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _byte_pair_keys(whole: Mapping[str, Json]) -> dict[str, Json] | None:
    """The keys of a tokenizer that pairs bytes, with one of the known ways to split a text; None of another."""
    model, splitter = whole["model"], whole.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    last = steps[-1]
    if model.get("type") != "BPE" or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    split = None
    if len(steps) == 2 and not last.get("use_regex", True):
        word = steps[0]
        split = word.get("pattern", {}).get("Regex")
        if split is None or word.get("behavior") != "Isolated" or word.get("invert"):
            return None
    elif len(steps) != 1 or not last.get("use_regex", True):
        return None
    normal = (whole.get("normalizer") or {}).get("type")
    for pre, pattern in _SPLITS.items():
        known = "NFC" if pre == "qwen2" else None
        if (split, normal, bool(model.get("ignore_merges"))) == (pattern, known, pre == "llama-bpe"):
            return {"model": "gpt2", "pre": pre, "merges": [" ".join(pair) for pair in _merges(model)]}
    return None


def _sentence_piece_keys(whole: Mapping[str, Json]) -> dict[str, Json] | None:
    """The keys of SentencePiece's byte pairs, the scores in the order of the merges; None of another tokenizer."""
    model, normal = whole["model"], whole.get("normalizer") or {}
    steps, splitter = normal.get("normalizers", [normal]), whole.get("pre_tokenizer") or {}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or spaces not in steps:
        return None
    prefix = {"type": "Prepend", "prepend": "▁"} in steps
    # Gemma's splits at spaces, of which none are left.
    if len(steps) != 1 + prefix or splitter.get("type", "Split") != "Split":
        return None
    if splitter and splitter.get("pattern") != {"String": " "}:
        return None
    merges, scores = _merges(model), {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
    if any(set(_halves(token, model["vocab"])) - set(merges) for token in scores):
        return None  # SentencePiece joins all neighbours whose union is a token
    return {"model": "llama", "pre": "default", "add_space_prefix": prefix, "scores": scores}

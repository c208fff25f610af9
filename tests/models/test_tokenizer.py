"""Texts to tokens and back, of directories and of GGUF files."""

import itertools
import json

import numpy as np
import pytest

import jaxquant as jq
from jaxquant.models.tokenizer import ends_of, gguf_tokenizer, tokenizer_of, tokenizer_of_gguf

tokenizers = pytest.importorskip("tokenizers")
pytestmark = pytest.mark.every

TEXTS = ["It is 12345 o'clock.", "  two  spaces\n\nand lines\t", "naïve 東京 🙂!", "<s>not special</s>", ""]


def byte_pairs():
    """A small tokenizer of GPT-2's kind."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["It is twelve, it is the time of two lines and of spaces."] * 3, trainer)
    return inner


def directory(path, inner, **config):
    inner.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(text, tmp_path):
    found = tokenizer_of(directory(tmp_path, byte_pairs()))
    ids = found.encode(text)
    assert found.decode(ids) == text.replace("<s>", "").replace("</s>", "")
    assert "".join(found.pieces(ids)) == found.decode(ids)


def test_a_character_comes_when_it_is_complete(tmp_path):
    found = tokenizer_of(directory(tmp_path, byte_pairs()))
    ids = found.encode("é🙂")
    assert len(ids) == 6  # its bytes
    assert list(found.pieces(ids)) == ["", "é", "", "", "", "🙂"]
    assert "".join(found.pieces(ids[:-1])) == "é"


@pytest.mark.parametrize("add, first", [(True, [0]), (False, []), (None, [])])
def test_the_token_that_begins_a_text(add, first, tmp_path):
    stated = {} if add is None else {"add_bos_token": add}
    found = tokenizer_of(directory(tmp_path, byte_pairs(), bos_token={"content": "<s>"}, **stated))
    plain = found.encode("It", chat=True)
    assert found.encode("It") == [*first, *plain]


TEMPLATE = r"""{% for m in messages %}
{{ bos_token }}{{ m['role'] }}: {{ m['content'] | tojson }}
{%- generation %}{{ '\n' }}{% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.mark.parametrize("place", ["tokenizer_config.json", "list", "chat_template.jinja", "chat_template.json"])
def test_chat(place, tmp_path):
    stated = {"tokenizer_config.json": TEMPLATE, "list": [{"name": "default", "template": TEMPLATE}]}.get(place)
    config = {} if stated is None else {"chat_template": stated}
    directory(tmp_path, byte_pairs(), bos_token="<s>", **config)
    if place == "chat_template.jinja":
        (tmp_path / place).write_text(TEMPLATE)
    if place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": TEMPLATE}))
    text = tokenizer_of(tmp_path).chat([{"role": "user", "content": 'a "b"'}])
    assert text == '<s>user: "a \\"b\\""\nassistant:'


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "the checkpoint has no chat template"),
        ("{{ raise_exception('no system') }}", r"the chat template fails \(no system\)"),
        ("{% for %}", "the chat template fails"),
        ("{{ messages.__class__.__mro__ }}", "the chat template fails"),  # it is a program that nobody vouches for
    ],
)
def test_chat_refuses(template, message, tmp_path):
    found = tokenizer_of(directory(tmp_path, byte_pairs(), chat_template=template))
    with pytest.raises(jq.QuantError, match=message):
        found.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "there is no tokenizer.json. Copy tokenizer.json there"),
        ({"tokenizer.model": b""}, r"there is no tokenizer.json. Make one: transformers.AutoTokenizer"),
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read"),
    ],
)
def test_refusals(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(jq.QuantError, match=message):
        tokenizer_of(tmp_path)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(jq.QuantError, match=r"tokenizers is not installed.* pip install 'jaxquant\[generate\]'"):
        tokenizer_of(tmp_path)


@pytest.mark.parametrize(
    "generation, config, ends",
    [
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}, {1, 106}),
        (None, {"eos_token_id": 2}, {2}),
        ({}, {"eos_token_id": [2, 3]}, {2, 3}),
        (None, {"text_config": {"eos_token_id": 5}}, {5}),
        (None, {}, set()),
    ],
)
def test_what_ends_a_text(generation, config, ends, tmp_path):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert ends_of(tmp_path, config) == ends


# -- GGUF --------------------------------------------------------------------------------------------------------------


def metadata_of(inner, **own):
    state = json.loads(inner.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in state["merges"]]
    types = np.array([3 if token in ("<s>", "</s>") else 1 for token in tokens], np.int32)
    found = {"model": "gpt2", "tokens": tokens, "merges": merges, "token_type": types, **own}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_byte_pairs_of_a_gguf_file(text):
    inner = byte_pairs()
    found = tokenizer_of_gguf(metadata_of(inner, pre="gpt-2"), "a.gguf")
    assert found.encode(text) == inner.encode(text).ids
    assert found.decode(found.encode(text)) == inner.decode(inner.encode(text).ids)


@pytest.mark.parametrize("pre, digits", [("llama-bpe", ["123", "45"]), ("qwen2", ["1", "2", "3", "4", "5"])])
def test_splits(pre, digits):
    """What is split before bytes are paired: a token of all five digits is never made."""
    inner = byte_pairs()
    own = metadata_of(inner, pre=pre, bos_token_id=np.uint32(0), eos_token_id=np.uint32(1))
    tokens = [*own["tokenizer.ggml.tokens"], "12", "123", "45", "12345"]
    own["tokenizer.ggml.tokens"] = tokens
    own["tokenizer.ggml.merges"] = ["1 2", "12 3", "4 5", "123 45"] + own["tokenizer.ggml.merges"]
    own["tokenizer.ggml.token_type"] = np.ones(len(tokens), np.int32)
    found = tokenizer_of_gguf(own, "a.gguf")
    ids = found.encode("12345")
    assert ids[:1] == [0] or pre == "qwen2"  # Llama 3 begins every text with a token
    assert [tokens[i] for i in ids if i] == digits
    assert found.special == {"bos_token": tokens[0], "eos_token": tokens[1]}


def joined(text, scores):
    """SentencePiece, as it is defined: of all neighbours whose union is a token, the one with the highest score."""
    pieces = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            return pieces
        at = -max(pairs)[1]
        pieces[at : at + 2] = ["".join(pieces[at : at + 2])]


def sentence_pieces(prefix):
    special = ["<unk>", "<s>", "</s>"]
    words = ["▁", "a", "b", "c", "bc", "ab", "abc", "▁a", "ca", "▁abc", "cab", "▁c"]
    scores = dict(zip(words, np.random.default_rng(3).permutation(len(words)) * -1.0, strict=True))
    raw = [f"<0x{i:02X}>" for i in range(256)]
    tokens = special + raw + words
    own = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0.0] * 259 + [scores[w] for w in words], np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
        "bos_token_id": np.uint32(1),
        "eos_token_id": np.uint32(2),
        "add_space_prefix": np.bool_(prefix),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in own.items()}, scores


@pytest.mark.parametrize("text", ["abcab cab", "bca bcb", "a", "ccc abc"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces_of_a_gguf_file(text, prefix):
    own, scores = sentence_pieces(prefix)
    found, tokens = tokenizer_of_gguf(own, "a.gguf"), own["tokenizer.ggml.tokens"]
    wanted = joined(("▁" if prefix else "") + text.replace(" ", "▁"), scores)
    assert [tokens[i] for i in found.encode(text)] == ["<s>", *wanted]
    assert found.decode(found.encode(text)) == text
    assert found.decode(found.encode("é")) == "é"  # in bytes


def in_directory(own, path):
    """What `tokenizer_of_gguf` makes of the metadata, as the library writes it."""
    found = tokenizer_of_gguf(own, "a.gguf")
    found.inner.save(str(path / "tokenizer.json"))
    stated = {**found.special, "add_bos_token": found.add_bos, "chat_template": found.template}
    (path / "tokenizer_config.json").write_text(json.dumps(stated))
    return found


@pytest.mark.every
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", True, False])
def test_a_tokenizer_is_written_to_gguf_and_read_again(kind, tmp_path):
    """The same metadata; of SentencePiece, scores in the same order."""
    extra = {"bos_token_id": np.uint32(0), "eos_token_id": np.uint32(1), "add_bos_token": True}
    own = metadata_of(byte_pairs(), pre=kind, **extra) if isinstance(kind, str) else sentence_pieces(kind)[0]
    own["tokenizer.chat_template"] = "{{ bos_token }}"
    wanted = in_directory(own, tmp_path)
    size = len(own["tokenizer.ggml.tokens"])
    found, notes = gguf_tokenizer(tmp_path, {"vocab_size": size + 3})  # a table of embeddings may be longer
    assert not notes
    assert found["tokenizer.ggml.tokens"] == [*own["tokenizer.ggml.tokens"], *(f"[PAD{size + i}]" for i in range(3))]
    arrays = {f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "scores")}
    assert {key: found.get(key) for key in own.keys() - arrays} == {key: own[key] for key in own.keys() - arrays}
    again = tokenizer_of_gguf(found, "b.gguf")
    assert (again.template, again.add_bos) == (wanted.template, True)
    np.testing.assert_array_equal(found["tokenizer.ggml.token_type"][:size] == 3, own["tokenizer.ggml.token_type"] == 3)
    for text in [*TEXTS, "abcab cab ccc", "<s> 12345 it's"]:
        assert again.encode(text) == wanted.encode(text)
        assert again.decode(again.encode(text)) == wanted.decode(wanted.encode(text))


@pytest.mark.every
@pytest.mark.parametrize("change", [{"pre_tokenizer": {"type": "Whitespace"}}, {"normalizer": {"type": "NFKC"}}, None])
def test_a_tokenizer_that_gguf_cannot_describe_becomes_a_note(change, tmp_path):
    in_directory(metadata_of(byte_pairs(), pre="gpt-2"), tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change)) if change else file.unlink()
    found, notes = gguf_tokenizer(tmp_path, {})
    assert not found
    assert "the file has no tokenizer" in notes["tokenizer.json"]


@pytest.mark.parametrize(
    "own, message",
    [
        ({}, "no tokenizer that can be built here; got model=None"),
        ({"model": "bert", "tokens": ["a"]}, "no tokenizer that can be built here; got model='bert'"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "tekken"}, "not known here; got pre='tekken'. Give the directory"),
    ],
)
def test_gguf_refusals(own, message):
    with pytest.raises(jq.QuantError, match=message):
        tokenizer_of_gguf({f"tokenizer.ggml.{key}": value for key, value in own.items()}, "a.gguf")

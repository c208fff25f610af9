"""The commands ``generate`` and ``eval``, as a user sees them."""

import json
import re
import shutil

import click.testing
import pytest
from models.decoders import GOLDEN
from narrowed import present

from jaxquant import cli

tokenizers = pytest.importorskip("tokenizers")

LETTERS = "abcdefghijklmnopqrstuvwxyz .,?!:ABCDE"  # 37, after three that are special


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A decoder with a tokenizer of letters, quantized by the command line."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(GOLDEN / "llama", folder / "float")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *LETTERS])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    inner.decoder = tokenizers.decoders.Fuse()
    inner.add_special_tokens(["<pad>", "<s>", "</s>"])
    inner.save(str(folder / "float" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "add_bos_token": True, "chat_template": "<s>{{ messages[0].content }}!"}
    (folder / "float" / "tokenizer_config.json").write_text(json.dumps(settings))
    done = invoke("quantize", folder / "float", folder / "int8", "--weights", "int8")
    assert "14 weights quantized" in done.output
    return folder


def invoke(*args, code=0):
    result = click.testing.CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def test_generate(checkpoint):
    """The text and nothing else on standard output; what runs, and how fast, on the other."""
    done = invoke("generate", checkpoint / "int8", "--prompt", "hello", "--tokens", 9)
    assert re.fullmatch(rf"[{LETTERS}]{{1,9}}\n", done.stdout)
    assert re.search(r"/int8: llama, 2 layers, 1\d,\d{3} parameters, compressed-tensors\n", done.stderr)
    assert re.search(r"int8, per channel, symmetric +14 tensors, 1[\d.]+ KiB\n", done.stderr)
    assert re.search(r"prompt: 6 tokens in [\d.]+ s. new: 9 tokens, [\d.]+ ms a step. compiled in", done.stderr)
    ids = invoke("generate", checkpoint / "int8", "--ids", "1,10,7,14,14,17", "--tokens", 9).stdout
    assert "".join(LETTERS[int(i) - 3] for i in ids.split()) == done.stdout.strip("\n")


def test_several_prompts(checkpoint):
    options = ("--tokens", 8, "--cache", "int8", "--temperature", 1, "--seed", 3)
    done = invoke("generate", checkpoint / "int8", "--prompt", "hello", "--prompt", "a", "--chat", *options)
    assert re.fullmatch(rf"hello\n  -> [{LETTERS}]*\na\n  -> [{LETTERS}]*\n", done.stdout)
    assert "for each of 2 prompts" in done.stderr


def test_eval(checkpoint, tmp_path):
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 4)
    common = ("--text", tmp_path / "text", "--tokens", 100)
    done = invoke("eval", checkpoint / "int8", *common, "--reference", checkpoint / "float")
    assert re.search(r"^perplexity  [\d.]+  \([\d.]+ nats a token\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^divergence  0\.0\d+ nats a token; the same first choice at [\d.]+%$", done.stdout, re.MULTILINE)
    assert "98 predicted, in 2 windows of 64" in done.stdout
    assert "reference" in done.stderr
    found = json.loads(invoke("eval", checkpoint / "int8", *common, "--json").stdout)
    printed = present(re.search(r"^perplexity  ([\d.]+)", done.stdout, re.MULTILINE))
    assert float(printed[1]) == pytest.approx(found["perplexity"], rel=1e-4)  # by two programs
    assert (found["tokens"], found["kl"], found["architecture"]) == (98, None, "llama")
    assert {"kind": "int8, per channel, symmetric", "tensors": 14}.items() <= found["weights"][0].items()


@pytest.mark.every
@pytest.mark.parametrize(
    "args, message, code",
    [
        (["generate", "org/name", "--prompt", "x"], "names of the hub are not fetched. Fetch it first", 1),
        (["generate", "{base}", "--prompt", "x"], "there is no tokenizer.json. Copy tokenizer.json there", 1),
        (["generate", "{base}"], "give --prompt TEXT, or --ids N,N,..", 2),
        (["generate", "{base}", "--ids", "1,x"], "--ids takes numbers with commas between them, not '1,x'", 2),
        (["generate", "{base}", "--ids", "1", "--chat"], "--chat needs --prompt", 2),
        (["generate", "{base}", "--ids", "99"], "an id is not in the vocabulary; got vocab_size=64, largest=99", 1),
        (["generate", "{gpt2}", "--ids", "1"], "not supported; got model_type='gpt2'. Supported are llama", 1),
        (["generate", "{base}/model.safetensors", "--ids", "1"], "the file is not a GGUF file", 1),
        (["generate", "{golden}", "--ids", "1"], "there is neither config.json nor a .gguf file", 1),
        (["generate", "{base}", "--ids", "1", "--temperature", "-1"], "temperature is out of range", 1),
        (["eval", "{base}", "--text", "{base}/config.json"], "there is no tokenizer.json", 1),
        (["eval", "{base}"], "Missing option '--text'", 2),
    ],
)
def test_refusals(args, message, code):
    names = {"base": GOLDEN.parent / "base", "gpt2": GOLDEN.parent / "transformers" / "gpt2", "golden": GOLDEN}
    done = invoke(*(arg.format(**names) for arg in args), code=code)
    assert message in done.output
    assert "Traceback" not in done.output


def test_a_text_that_is_not_utf8(checkpoint, tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in invoke("eval", checkpoint / "float", "--text", tmp_path / "text", code=1).output


def test_a_terminal_acts_on_nothing(checkpoint, tmp_path):
    """A vocabulary may hold characters that a terminal takes for commands."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint / "float", folder)
    text = (folder / "tokenizer.json").read_text()
    for letter in "abcdefghijklmnopqrstuvwxyz":
        text = text.replace(f'"{letter}":', f'"\\u001b[3{letter}":')
    (folder / "tokenizer.json").write_text(text)
    printed = invoke("generate", folder, "--prompt", ". . .", "--tokens", 9).stdout
    assert "\x1b" not in printed
    assert r"\x1b[3" in printed

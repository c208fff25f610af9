"""The README: every Python block runs on its own, and the commands it gives exist."""

import re

import jax
import pytest
import snippets
from jax_settings import optax_promotes

pytestmark = pytest.mark.every

README = snippets.ROOT / "README.md"
PYTHON = [block for block in snippets.blocks(README, "python") if not block.skipped]


@optax_promotes
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line {block.line}")
def test_each_snippet_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # the reader's JAX allows it
        snippets.run(README, block, {"__name__": "readme"})


def test_there_is_a_snippet_for_each_use():
    code = "\n".join(block.code for block in PYTHON)
    for name in ("jq.linen.QuantDense", "jq.make_plan", "jq.quantized", "optax", "jq.io.load", "jq.io.save"):
        assert name in code


def test_the_test_command_follows_its_marker():
    """The continuous integration reads it from there."""
    text = README.read_text(encoding="utf-8")
    assert re.search(r"^<!-- test-command -->\n```sh\n[^\n]*pytest[^\n]*\n```$", text, re.MULTILINE)


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (snippets.ROOT / link).exists()] == []

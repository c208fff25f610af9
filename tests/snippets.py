"""Fenced code blocks of Markdown files, for the tests that run what the documentation says."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIP = "<!-- not run -->"
_BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
      language: the word after the fence.
      code: the text between the fences.
      line: the line of the file on which the code begins.
      skipped: whether a line `<!-- not run -->` stands right before it.
      printed: the text block that follows at once, which says what the code prints; None if there is none.
    """

    language: str
    code: str
    line: int
    skipped: bool
    printed: str | None = None


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip()
        line = text.count("\n", 0, match.start(2)) + 1
        after = _BLOCK.match(text[match.end() :].lstrip())
        printed = after[2] if after and after[1] == "text" else None
        found.append(Block(match[1], match[2], line, before.endswith(SKIP), printed))
    return [block for block in found if block.language == language]


def run(page: Path, block: Block, namespace: dict) -> None:
    """Runs a block, and compares what it prints with what the page says; a traceback names the line of the page."""
    code, out = "\n" * (block.line - 1) + block.code, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(page), "exec"), namespace)
    if block.printed is not None:
        assert out.getvalue().strip() == block.printed.strip()

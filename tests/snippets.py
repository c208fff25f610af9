"""Fenced code blocks of Markdown files, for the tests that run what the documentation says."""

import dataclasses
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
    """

    language: str
    code: str
    line: int
    skipped: bool


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in one language, in order."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip()
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, before.endswith(SKIP)))
    return [block for block in found if block.language == language]


def run(page: Path, block: Block, namespace: dict) -> None:
    """Runs a block; a traceback names the line of the page."""
    code = "\n" * (block.line - 1) + block.code
    exec(compile(code, str(page), "exec"), namespace)

"""The prose is plain English: no page, docstring, comment or message holds a construction that readers stumble over.

`STYLE` is the whole style. A pattern is here because a reader had to read such sentences twice; each names the remedy.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
import snippets

STYLE = {
    r"(?:^|(?<=[.:;!?] ))What (?![^.!]*\?)": "begin with a noun: 'Options that are missing', not 'What is missing'",
    r"\b(?:of|for|to|by|from|in|on|with|at|than|as|like|beside|over) what\b": (
        "name the thing: 'of the values that', not 'of what'"
    ),
    r"\b[Tt]hose (?:that|which|who)\b": "repeat the noun: 'keys that', not 'those that'",
    r"\binside of\b": "write 'inside'",
    r"\ball the same\b": "write 'still' or 'anyway'",
    r"\bfor certain\b": "write 'certainly', or leave it out",
    r"\banew\b": "write 'again'",
    r"\bas (?:it|they) stands?\b": "write 'unchanged'",
    r"\bone for all\b": "say what shares it: 'one scale for all rows'",
    r"\b(?:no such|such a) (?:thing|case)\b": "name the thing",
    r"\b(?:thereof|whereof|thereby|therein|lest)\b": "use a word of everyday English",
    (
        r", (?:and )?(?:so|as) (?:is|are|does|do|did|has|have|was|were|can|will) "
        r"(?!if\b|follows\b|described\b)\w"
    ): "subject first: 'as qwix does', not 'as does qwix'",
    r"\b[Nn]othing of the\b": "name the thing",
}
LONGEST = 45  # words of a sentence on a page

PACKAGE = sorted((snippets.ROOT / "jaxquant").rglob("*.py"))
PAGES = [
    *sorted((snippets.ROOT / "docs").rglob("*.md")),
    snippets.ROOT / "README.md",
    snippets.ROOT / "CONTRIBUTING.md",
]


def _of_source(text: str):
    """(line, paragraph) of the docstrings, comments and long strings of a module; code in backticks is left out."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from _paragraphs(re.sub(r"(?m)^ *>>>.*$", "", node.value), node.lineno)
    comment, line = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if comment and token.start[0] != line + len(comment):
                yield line, " ".join(comment)
                comment = []
            line = token.start[0] if not comment else line
            comment.append(token.string.lstrip("# "))
    yield line, " ".join(comment)


def _of_page(text: str):
    """(line, paragraph) of a page, blocks of code left out."""
    lines = re.compile(r"(?ms)^ *```.*?^ *```|<!--.*?-->")
    yield from _paragraphs(lines.sub(lambda match: "\n" * match[0].count("\n"), text), 1)


def _paragraphs(text: str, line: int):
    for match in re.finditer(r"(?:.+\n?)+?(?=\n|\Z|^ *[-*|] )", text, re.MULTILINE):
        yield line + text[: match.start()].count("\n"), match[0]


def _plain(paragraph: str) -> str:
    return " ".join(re.sub(r"``.*?``|`[^`]*`", "code", paragraph).split()).lstrip("-*|#> ")


def _faults(paragraphs):
    for line, paragraph in paragraphs:
        words = _plain(paragraph)
        for pattern, remedy in STYLE.items():
            for match in re.finditer(pattern, words):
                yield f"line {line}: ...{words[max(0, match.start() - 30) : match.end() + 30]}...: {remedy}"


def _long(paragraphs):
    for line, paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.:;?!]) |\|", _plain(paragraph)):
            if len(sentence.split()) > LONGEST:
                yield f"line {line}: {len(sentence.split())} words: {sentence[:60]}..."


def _report(files, faults):
    found = [
        f"{file.relative_to(snippets.ROOT)}, {fault}"
        for file in files
        for fault in faults(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join([f"{len(found)} places:", *found])


def test_pages():
    _report(PAGES, lambda text: [*_faults(_of_page(text)), *_long(_of_page(text))])


def test_docstrings_comments_and_messages():
    _report(PACKAGE, lambda text: _faults(_of_source(text)))


@pytest.mark.parametrize(
    "sentence",
    [
        "What is not said is what the format needs.",
        "It raises. What is left stays in float.",
        "The sum of what is quantized.",
        "Keys are those that a plan names.",
        "It does, as does qwix.",
        "Quantized all the same.",
    ],
)
@pytest.mark.every
def test_finds(sentence):
    assert list(_faults(_of_page(sentence)))
    assert list(_faults(_of_source(f'def f():\n    """{sentence}"""\n')))
    assert list(_faults(_of_source(f"# Some words, and then on the next line.\n# {sentence}\n")))


@pytest.mark.parametrize(
    "sentence", ["What is a scale?", "The message says what is missing.", "`of what`", "It runs as qwix does."]
)
@pytest.mark.every
def test_lets_pass(sentence):
    assert not list(_faults(_of_page(sentence)))


def test_long_sentences(tmp_path: Path):
    assert not list(_long(_of_page("word " * (LONGEST - 1) + "word.")))
    assert list(_long(_of_page("word " * LONGEST + "word.")))

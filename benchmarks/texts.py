"""Real sentences that every Python has on board: docstrings of its standard library and of installed packages, and the
pages of the language's own manual (`pydoc_data.topics`).

Files and pages are dealt out by a hash of their name, half to calibrate on and half to evaluate on, so the two never
share a source; a sentence that occurs in both halves is left out of the calibration text.
"""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import re
import sysconfig
import zlib
from collections.abc import Iterator

PACKAGES = ("jax", "numpy", "flax", "optax")
_LEFT_OUT = ("test", "site-packages", "idlelib", "topics")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def _docstrings() -> Iterator[tuple[str, str, str]]:
    """(source, dotted name, docstring) of every documented module, class and function, in the order of their names."""
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    folders = [(library, "")]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.origin is not None:
            folders.append((pathlib.Path(found.origin).parent, f"{package}/"))
    for folder, prefix in folders:
        for file in sorted(folder.rglob("*.py")):
            name = file.relative_to(folder).as_posix()
            if any(part in name for part in _LEFT_OUT):
                continue
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            module = (prefix + name).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text:
                        yield prefix + name, f"{module}.{getattr(node, 'name', '')}".rstrip("."), text


def _pages() -> Iterator[tuple[str, str, str]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic {name}", name, text


def _sentences(text: str) -> list[str]:
    out = []
    for paragraph in re.split(r"\n\s*\n", text):
        if re.match(r"\s*(>>>|\.\.|\*\*\*|[-=*~]{3})", paragraph):
            continue
        for sentence in _SENTENCE.split(" ".join(paragraph.split())):
            if 30 <= len(sentence) <= 400 and sentence[0].isupper() and sentence[-1] == "." and ">>>" not in sentence:
                out.append(sentence)
    return out


def _half(source: str) -> int:
    return zlib.crc32(source.encode()) & 1


def sources() -> tuple[bytes, bytes]:
    """The standard library's own files, code and docstrings: an eighth of them to evaluate on, the others to train on.

    Files are dealt out by a hash of their name, and stand in the order of it.
    """
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = {file.relative_to(library).as_posix(): file for file in library.rglob("*.py")}
    names = sorted((n for n in found if not any(part in n for part in _LEFT_OUT)), key=_order)
    held_out = [n for n in names if zlib.crc32(n.encode()) % 8 == 0]
    train = [n for n in names if zlib.crc32(n.encode()) % 8]
    evaluate, rest = (b"\n".join(found[n].read_bytes() for n in part) for part in (held_out, train))
    return evaluate, rest


def _order(text: str) -> tuple[int, str]:
    return zlib.crc32(text.encode()), text


def sentences(number: int = 600) -> tuple[list[str], list[str]]:
    """Sentences to evaluate on (``number``, half of them from the manual) and all those to calibrate on, shuffled."""
    halves: dict[tuple[int, str], set[str]] = {(h, k): set() for h in (0, 1) for k in ("doc", "page")}
    for kind, found in (("doc", _docstrings()), ("page", _pages())):
        for source, _, text in found:
            halves[_half(source), kind].update(_sentences(text))
    ours = {key: sorted(texts, key=_order) for key, texts in halves.items()}
    evaluate = ours[0, "doc"][: number - number // 2] + ours[0, "page"][: number // 2]
    calibrate = (halves[1, "doc"] | halves[1, "page"]) - halves[0, "doc"] - halves[0, "page"]
    return evaluate, sorted(calibrate, key=_order)


def questions(number: int = 600) -> tuple[list[str], list[str]]:
    """Questions and the answers that belong to them: "What does textwrap dedent do?" and its docstring's summary."""
    pairs: dict[str, str] = {}
    for source, name, text in _docstrings():
        summary = _sentences(text)
        words = " ".join(name.split(".")[-2:]).replace("_", " ")
        public = not any(part.startswith("_") for part in name.split("."))
        if _half(source) == 0 and public and summary and "." in name and len(words) > 8:
            pairs.setdefault(summary[0], f"What does {words} do?")
    chosen = sorted(pairs, key=_order)[:number]
    return [pairs[answer] for answer in chosen], chosen

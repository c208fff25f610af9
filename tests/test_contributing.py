"""CONTRIBUTING says where things go: each path that it gives exists; each name is one of the package or a fixture."""

import ast
import builtins
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.every

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))))
PATHS = [code for code in CODE if re.fullmatch(r"[\w.]+(/[\w.]*)+|\w+\.(py|md|yml)", code)]
NAMES = [code for code in CODE if re.fullmatch(r"[A-Z][A-Za-z]+|[A-Z_]+|[a-z]+_[a-z_]+", code)]
FOLDERS = ("", "jaxquant", "jaxquant/ops/kernels", "jaxquant/transform", "tests/fuzz")


def defined() -> set[str]:
    """Names of classes, functions and constants in the package, of shared fixtures, and those that Python has."""
    names = set(dir(builtins))
    for file in (*(ROOT / "jaxquant").rglob("*.py"), ROOT / "tests/conftest.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("path", PATHS)
def test_paths_exist(path):
    assert any((ROOT / folder / path).exists() for folder in FOLDERS)


def test_names_are_defined():
    assert {"OpRule", "QTYPES", "Kernel", "Problem", "quant_error"} <= set(NAMES)
    assert set(NAMES) <= defined()


def test_both_questions_are_answered():
    """With the files to open: each answer gives at least two."""
    answers = re.split(r"\n\n", TEXT[TEXT.index("## Two questions") : TEXT.index("## Commits")])[1:3]
    for question, answer in zip(("int8 attention on TPU", "stay in float"), answers, strict=True):
        assert question in answer
        assert sum(f"`{path}`" in answer for path in PATHS) >= 2

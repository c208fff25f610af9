"""Every script in examples/ runs, with a few training steps, and prints what it promises."""

import ast
import re
import runpy
import sys

import jax
import pytest
import snippets
from jax_settings import needs_jit, optax_promotes
from narrowed import present

pytestmark = pytest.mark.every

EXAMPLES = snippets.ROOT / "examples"
MODELS = {"plain_transformer", "minilm"}  # imported by an example or a benchmark, no programs
ELSEWHERE = {"llama"}  # tested in models/test_checkpoints.py
STEPS = {"wrap_linen": 20, "wrap_nnx": 20, "qat": 4, "ptq": 20, "quantize_transformer": 2}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example as a program, in a temporary directory, and gives what it prints."""

    def run(name, *arguments):
        file = EXAMPLES / f"{name}.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(file), f"--steps={STEPS[name]}", *arguments])
        with jax.numpy_rank_promotion("allow"):  # the reader's JAX allows it
            runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out

    return run


def percents(text):
    return [float(number) for number in re.findall(r"([\d.]+)%", text)]


def test_every_example_is_run():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == STEPS.keys() | MODELS | ELSEWHERE


@pytest.mark.parametrize("name", sorted(STEPS.keys() | MODELS))
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 80


@needs_jit
@optax_promotes
@pytest.mark.slow
def test_wrap_linen(run):
    printed = run("wrap_linen")
    assert "QTensor(int2[64, 128] -> float32" in printed
    *_, trained, frozen = percents(printed)
    assert trained == frozen > 20  # ten digits; a little training is already better than chance


@needs_jit
@optax_promotes
def test_wrap_nnx(run):
    printed = run("wrap_nnx")
    assert "2 quantized" in printed
    assert min(percents(printed)) > 20
    assert printed.count("13,352 bytes") == 2


@needs_jit
@optax_promotes
def test_qat(run):
    printed = run("qat")
    assert "3 quantized" in printed
    assert len(percents(printed)) == 3
    assert "nan" not in printed


@optax_promotes
@pytest.mark.slow
def test_ptq(run, tmp_path):
    printed = run("ptq", f"--output={tmp_path}")
    rows = {line.split()[0]: line.split() for line in printed.splitlines()[1:]}
    assert rows.keys() == {"float", "w8a8", "w4a16", "nf4", "mxfp4", "w3a16", "w2a16"}
    assert percents(rows["w8a8"][3])[0] > 95  # the same class as the float model, almost always
    sizes = {name: int(row[1].replace(",", "")) for name, row in rows.items()}
    assert sizes["float"] > 3 * sizes["w8a8"] > 6 * sizes["w2a16"]
    assert {file.stem for file in tmp_path.glob("*.safetensors")} == rows.keys() - {"float"} | {"model"}


@optax_promotes
@pytest.mark.slow
def test_transformer(run):
    printed = run("quantize_transformer", "--characters=2")
    assert re.search(r"params/blocks/qkv .*\n +dot_general +\[2, 64, 192\] over -2: w int8, a int8", printed)
    assert re.search(r"params/embed/embedding .*\n +take, dot_general ", printed)
    assert "5 quantized" in printed
    losses = dict(re.findall(r"^(\S.*?) +[\d,]+ +([\d.]+)$", printed.split("scheme", 1)[1], re.MULTILINE))
    assert len(losses) == 5
    assert abs(float(losses["w8a8"]) - float(losses["float"])) < 0.01


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_never_import_jaxquant(name):
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"flax", "jax"} <= {present(name).split(".")[0] for name in names}
    assert "jaxquant" not in str(names)

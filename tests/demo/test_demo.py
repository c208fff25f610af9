"""`jaxquant demo`: table, files and progress, on all of its schemes and two more, in few epochs."""

import io
import json
from pathlib import Path

import click.testing
import jax
import numpy as np
import pytest
import rich.console
from jax_settings import optax_promotes
from narrowed import present

import jaxquant as jq
from jaxquant import cli, demo, recipes
from jaxquant.demo import digits, show
from jaxquant.demo.result import Row
from jaxquant.demo.schemes import SCHEMES, Scheme

ALL = (
    *SCHEMES,
    Scheme("int4-g32", recipes.w4a16(group_size=32)),
    Scheme("w4a8-qat", recipes.w4a8(group_size=None), qat=True),
)


def run(output, *args):
    args = ("demo", "--output", str(output), "--epochs", "4", "--qat-epochs", "1", *args)
    result = click.testing.CliRunner().invoke(cli.main, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def check(document):
    rows = {row["scheme"]: row for row in document["rows"]}
    assert list(rows) == [scheme.name for scheme in ALL]
    assert rows["float32"]["agreement"] == 1
    for name, row in rows.items():
        assert 0.5 < row["accuracy"] <= 1
        assert 0.5 < row["agreement"] <= 1
        assert row["param_bytes"] < row["file_bytes"] == Path(row["checkpoint"]).stat().st_size
        assert row["forward_ms"] > 0
        assert (row["step_ms"] is not None) == (row["qat"] or name == "float32")
    for name in ("int8", "w8a8"):
        assert rows[name]["agreement"] > 0.97
        assert rows[name]["param_bytes"] == rows["int8"]["param_bytes"]
    sizes = [rows[name]["param_bytes"] for name in ("float32", "int8", "int4", "int3", "int2") if name in rows]
    assert sizes == sorted(set(sizes), reverse=True)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Where it was written, and what was printed."""
    output = tmp_path_factory.mktemp("demo") / "new" / "directory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SCHEMES", ALL)
        return output, run(output, "--json")


@optax_promotes
def test_the_json_has_the_table(shown):
    output, result = shown
    document = json.loads(result.stdout)
    check(document)
    assert (document["seed"], document["epochs"], document["qat_epochs"]) == (0, 4, 1)
    assert json.loads((output / "results.json").read_text()) == document
    assert Path(document["plot"]).read_bytes().startswith(b"\x89PNG")


@optax_promotes
def test_progress_goes_where_it_does_not_disturb_a_reader(shown):
    _, result = shown
    for text in ("Train float32", "Quantize what was saved", "Train w4a8-qat", "Reload and measure"):
        assert text in result.stderr
        assert text not in result.stdout


@optax_promotes
def test_every_checkpoint_reloads_and_predicts_what_the_table_says(shown):
    output, result = shown
    data = digits.load()
    model = digits.MLP()
    like = jax.eval_shape(lambda: digits.init(model, data, 0))
    rows = {row["scheme"]: row for row in json.loads(result.stdout)["rows"]}
    for scheme in ALL:
        params = jq.io.load(output / f"{scheme.name}.safetensors", like=like)
        kernels = [params[f"Dense_{i}"]["kernel"] for i in range(3)]
        expected = scheme.spec and present(scheme.spec.weight).qtype
        assert [getattr(kernel, "qtype", None) for kernel in kernels] == 3 * [expected]
        if scheme.activations == "float32":  # the stored values say it all
            logits = digits.logits(model)(jq.dequantize_params(params), data.test_images)
            assert data.accuracy(logits) == pytest.approx(rows[scheme.name]["accuracy"], abs=0.005)


@optax_promotes
def test_the_table_and_the_paths_are_printed(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SCHEMES", ALL[:2])
    lines = run(tmp_path).stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert any(line.split()[:3] == ["int8", "int8", "float32"] for line in lines)
    for name in ("float32.safetensors", "int8.safetensors", "accuracy-bytes.png", "results.json"):
        assert any(line.endswith(str(tmp_path / name)) for line in lines)


def row(scheme, accuracy, param_bytes=1024, *, qat=False):
    return Row(scheme, "int8", "float32", qat, param_bytes, 2048, accuracy, 1.0, 0.5, 1.25 if qat else None, "file")


def test_one_line_per_scheme():
    printed = io.StringIO()
    console = rich.console.Console(file=printed, width=80)
    console.print(show.table([row("a", 0.5), row("b", 1.0, qat=True)], test_images=7, batch=3))
    text = printed.getvalue()
    assert "7 images in one batch" in text
    assert "training on 3" in text
    (a,), (b,) = ([line.split() for line in text.splitlines() if line.split()[:1] == [name]] for name in "ab")
    assert a == ["a", "int8", "float32", "1,024", "2,048", "50.0%", "100.0%", "0.50"]
    assert b == ["b", "int8", "float32", "1,024", "2,048", "100.0%", "100.0%", "0.50", "1.25"]


@pytest.mark.parametrize("accuracies", [(0.9, 0.9, 0.9), (1.0, 0.2, 0.21)])
def test_the_plot_takes_any_accuracies(tmp_path, accuracies):
    show.plot(
        [row(name, a) for name, a in zip(("float32", "int8", "w8a8"), accuracies, strict=True)], tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_the_split_is_always_the_same_and_every_class_is_in_it():
    data, again = digits.load(), digits.load()
    assert jax.tree.all(jax.tree.map(np.array_equal, data, again))
    assert (data.train_images.shape, data.test_images.shape) == ((1347, 64), (450, 64))
    assert data.train_images.min() == 0
    assert data.train_images.max() == 1
    assert set(data.test_labels.tolist()) == set(range(10))

"""The command line: help, version, and what it says when something is missing or wrong."""

import importlib.util
import subprocess
import sys

import click.testing
import pytest

import jaxquant
from jaxquant import cli

pytestmark = pytest.mark.every


def invoke(*args):
    return click.testing.CliRunner().invoke(cli.main, args)


def test_help_names_the_commands():
    for flag in ("-h", "--help"):
        result = invoke(flag)
        assert result.exit_code == 0
        assert "demo" in result.output


def test_help_of_demo_names_its_options_and_defaults():
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for text in ("--output", "jaxquant-demo", "--seed", "--epochs", "--qat-epochs", "--json"):
        assert text in result.output


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "jaxquant", "--version"], capture_output=True, text=True)
    assert done.stdout == f"jaxquant {jaxquant.__version__}\n", done.stderr


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"jaxquant {jaxquant.__version__}\n")


@pytest.mark.parametrize(
    "args", [("nothing",), ("demo", "--epochs", "0"), ("demo", "--seed", "-1"), ("demo", "--bits", "3"), ("demo", "x")]
)
def test_wrong_usage_is_refused(args):
    result = invoke(*args)
    assert result.exit_code == 2
    assert "Error: " in result.output


def test_the_parts_of_the_demo_that_are_missing_are_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("flax", "sklearn") else find(name))
    result = invoke("demo")
    assert result.exit_code == 1
    assert result.output == "Error: not installed: flax, sklearn. Run: pip install 'jaxquant[demo]'\n"


def run(program):
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["click", "rich"])
def test_without_its_own_extra_it_says_how_to_get_it(name):
    done = run(f"import sys; sys.modules[{name!r}] = None; import jaxquant.cli")
    assert done.returncode == 1
    *others, said = done.stderr.splitlines()  # compilers for GPUs, if they are installed, warn of missing drivers
    assert said == "jaxquant: the command line needs click and rich. Run: pip install 'jaxquant[cli]'"
    assert not any("Traceback" in line for line in others)


def test_help_loads_neither_flax_nor_matplotlib():
    done = run(
        "import sys; from jaxquant.cli import main; main(['demo', '--help'], standalone_mode=False);"
        "print(sorted({'flax', 'optax', 'sklearn', 'matplotlib'} & sys.modules.keys()))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_place_that_cannot_be_written_is_an_error_not_a_traceback(tmp_path):
    (tmp_path / "file").touch()
    result = invoke("demo", "--output", str(tmp_path / "file" / "directory"))
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert "directory" in result.output

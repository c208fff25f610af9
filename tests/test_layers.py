"""The layers of the package: imports point down only, and `import jaxquant` loads nothing optional.

The table is the one of the design. It is checked from the source of every file, imports inside functions and under
`TYPE_CHECKING` included: a delayed import is still a dependency.
"""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.every

ROOT = Path(__file__).parents[1]
PACKAGE = "jaxquant"

# An import may go from a higher number to a lower one, or stay inside its own package.
LEVELS = {
    "core": 1,
    "programs": 2,
    "ops": 2,
    "recipes": 2,
    "rules": 3,
    "layers": 3,
    "qat": 5,
    "optim": 3,
    "ptq": 3,
    "transform": 4,
    "calibration": 5,
    "invariances": 5,
    "mixed": 5,
    "linen": 5,
    "nnx": 5,
    "io": 5,
    "report": 6,
    "models": 6,
    "demo": 6,
    "cli": 6,
    "files": 6,
    "quantize_files": 6,
    "__main__": 6,
}
# The programs at the top are the one place where siblings meet, in this order.
SIBLINGS = {
    ("demo", "report"),
    ("cli", "report"),
    ("cli", "demo"),
    ("cli", "files"),
    ("cli", "models"),
    ("cli", "quantize_files"),
    ("files", "models"),
    ("quantize_files", "files"),
    ("quantize_files", "models"),
    ("__main__", "cli"),
}
# `import jaxquant` stands on levels 1 to 5, and loads on use what needs more than JAX; only programs may import it.
TOP = max(LEVELS.values())

REQUIRED = {"jax", "numpy", "ml_dtypes"}
OPTIONAL = {
    "io": {"orbax"},
    "optim": {"optax"},
    "linen": {"flax"},
    "nnx": {"flax"},
    "report": {"jinja2", "matplotlib"},
    "demo": {"flax", "optax", "sklearn", "matplotlib", "rich"},
    "models": {"click", "jinja2", "tokenizers"},
    "cli": {"click", "rich"},
}

FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


def imports(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Dotted names that `source` imports, relative ones resolved; `from a import b` gives a.b, be b a module or not."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def breaches(module: str, imported: set[str]) -> list[str]:
    """What in `imported` is not allowed in `module`, one sentence each."""
    _, _, inside = module.partition(".")
    own = inside.split(".")[0]
    found = []
    for name in sorted(imported):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top != PACKAGE:
            allowed = REQUIRED | OPTIONAL.get(own, set()) | sys.stdlib_module_names
            if top not in allowed:
                found.append(f"{module} imports {top}: not a dependency of {own or PACKAGE}")
        elif not own or target == own:  # the package's own __init__ may import everything; a module, its own submodules
            continue
        elif target not in LEVELS:  # jaxquant itself, or one of the names it exports
            if LEVELS[own] < TOP:
                found.append(f"{module} imports {name}: import it from the module that defines it")
        elif LEVELS[target] >= LEVELS[own] and (own, target) not in SIBLINGS:
            found.append(f"{module} (level {LEVELS[own]}) imports {name} (level {LEVELS[target]})")
    return found


def imports_of(module: str) -> set[str]:
    file = MODULES[module]
    return imports(file.read_text(encoding="utf-8"), module, is_package=file.name == "__init__.py")


def test_every_module_has_a_level():
    tops = {module.split(".")[1] for module in MODULES if "." in module}
    assert tops <= LEVELS.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert not breaches(module, imports_of(module))


def test_no_import_cycles():
    graph = {}
    for module in MODULES:
        # `from a import b` names the module a.b if there is one, and otherwise something that a defines.
        named = {name if name in MODULES else name.rpartition(".")[0] for name in imports_of(module)}
        graph[module] = named & MODULES.keys() - {module}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize(
    "module, source, count",
    [
        (
            "jaxquant.core.specs",
            "import jax.numpy as jnp\nfrom jaxquant.core.errors import QuantError",
            0,
        ),
        (
            "jaxquant.core.specs",
            "from . import errors\nfrom .errors import QuantError",
            0,
        ),
        ("jaxquant.core.specs", "from ..ops import dot", 1),
        ("jaxquant.core.specs", "from .. import ops", 1),
        ("jaxquant.core.specs", "import flax", 1),
        ("jaxquant.core.specs", "import scipy.stats", 1),
        ("jaxquant.core.specs", "import jaxquant", 1),
        ("jaxquant.core.specs", "from jaxquant import QTensor", 1),
        ("jaxquant.core.specs", "def f():\n    from jaxquant.ptq import gptq", 1),
        (
            "jaxquant.ops.dot",
            "from jaxquant.core import QTensor\nfrom jaxquant.ops import select",
            0,
        ),
        ("jaxquant.recipes", "from jaxquant import qat, ptq", 2),
        ("jaxquant.optim", "import optax", 0),
        ("jaxquant.ptq.gptq", "import optax", 1),
        (
            "jaxquant.linen",
            "import flax.linen as nn\nfrom jaxquant.transform import quantized",
            0,
        ),
        ("jaxquant.linen", "from jaxquant import nnx", 1),
        ("jaxquant.io.gguf", "import safetensors", 1),
        ("jaxquant.demo", "import jaxquant as jq\nfrom jaxquant import report", 0),
        ("jaxquant.report.page", "from jaxquant import demo", 1),
        ("jaxquant.cli", "from jaxquant import demo, report, QTensor\nimport click", 0),
        ("jaxquant", "from jaxquant.core import QTensor\nfrom . import recipes", 0),
    ],
)
def test_the_check_itself(module, source, count):
    assert len(breaches(module, imports(source, module, is_package=module == PACKAGE))) == count


def test_import_loads_nothing_optional():
    optional = {
        "flax",
        "optax",
        "orbax",
        "matplotlib",
        "safetensors",
        "sklearn",
        "click",
        "rich",
    }
    program = f"import sys, {PACKAGE}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert PACKAGE in loaded
    assert not loaded & optional


def test_the_lowest_level_knows_no_platform():
    """What is computed in another way for one of them is replaced from above."""
    for file in (ROOT / PACKAGE / "core").rglob("*.py"):
        text = file.read_text()
        for name in ("platform_dependent", "default_backend", "default_device"):
            assert name not in text or file.name == "replaceable.py", (file, name)

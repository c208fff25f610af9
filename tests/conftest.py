"""How the tests run.

Eight CPU devices, so that sharding is tested everywhere; no implicit rank promotion; warnings are errors (the last is
set in pyproject.toml).

Hypothesis runs the profile `ci`: the same examples every time. `--hypothesis-profile=dev` looks for new ones.

Slow tests (`@pytest.mark.slow`: more than a few seconds) are skipped. So are all parameter sets of a test but one, by a
hash of their names, unless it is cheap (`@pytest.mark.every`). Except

    pytest --slow              runs all of them
    pytest --slow-sample N     runs one in N of them, rounded up, and one set of each function that has only slow ones
    pytest --salt TEXT         chooses another sample

and `pytest --fast-sample N` runs one in N of the others, where even those are too many.

A sample depends on nothing but the tests' names and the salt, which is empty by default: it is the same on every
machine and in every order of collection. .ci/run gives the commit as the salt and prints it, so that each commit runs
another sample, and a failure can be run again.

Programs are compiled without most of LLVM's optimizations, and by XLA's older and quicker generator of code: almost all
of them run once, and compiling takes a third of the time so. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles them as
users do; .ci/run takes samples of that. A program is compiled in one piece: the threads for its parts cost more than
they save where two processes share two cores.

No test measures time and none uses the network; a connection attempted from Python raises.
"""

import gc
import itertools
import math
import os
import socket
import zlib

os.environ["XLA_FLAGS"] = " ".join(
    [
        # Before those of the caller, which count more.
        f"--xla_cpu_use_fusion_emitters={os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') == '0'}".lower(),
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50, print_blob=True)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=200, print_blob=True)
hypothesis.settings.load_profile("ci")


def pytest_addoption(parser):
    group = parser.getgroup("slow tests")
    group.addoption("--slow", action="store_true", help="run the slow tests too")
    group.addoption("--slow-sample", type=int, default=0, metavar="N", help="run one slow test in N, by --salt")
    group.addoption("--salt", default="", metavar="TEXT", help="what the samples depend on")
    group.addoption("--fast-sample", type=int, default=0, metavar="N", help="run one fast test in N, by --salt")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Of two processes each starts with half of the tests, in order: what a file compiles once is compiled in one."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


collect_ignore = ["fuzz", "golden"]  # programs: they need a fuzzer, and the libraries that write the references


def pytest_collection_finish():
    """What is imported stays: the collector need not look at it again, nor as often as by default at what is new."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_report_header(config):
    samples = [name for name in ("--slow-sample", "--fast-sample") if config.getoption(name)]
    given = [f"{name} {config.getoption(name)}" for name in samples]
    return f"sample: {' '.join(given)} --salt '{config.getoption('--salt')}'" if samples else None


def pytest_collection_modifyitems(config, items):
    functions = {}
    for item in items:
        functions.setdefault(
            (item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)), []
        ).append(item)
    for sets in functions.values():
        optional = [item for item in sets if hasattr(item, "callspec") and not {"slow", "every"} & set(item.keywords)]
        for item in _in_order(optional)[1:]:
            item.add_marker(pytest.mark.slow)
    if not config.getoption("--slow"):
        sampled = _slow_sample(functions.values(), config.getoption("--slow-sample"), config.getoption("--salt"))
        for item in items:
            if "slow" in item.keywords and item not in sampled:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    if config.getoption("--fast-sample"):  # not skipped: pytest cannot skip a doctest whose line it does not know
        fast = [item for item in items if "slow" not in item.keywords]
        out = set(fast) - _fast_sample(fast, config.getoption("--fast-sample"), config.getoption("--salt"))
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


def _slow_sample(functions, n, salt):
    """One slow test in n, and one of each function that has only slow ones; with n = 0 none."""
    if n == 0:
        return set()
    slow = [[item for item in sets if "slow" in item.keywords] for sets in functions]
    alone = [sets for sets, every in zip(slow, functions, strict=True) if sets and len(sets) == len(every)]
    whole = _in_order(itertools.chain.from_iterable(slow), salt)
    return {*whole[: math.ceil(len(whole) / n)], *(_in_order(sets, salt)[0] for sets in alone)}


def _fast_sample(fast, n, salt):
    """One fast test in n."""
    return set(_in_order(fast, salt)[: math.ceil(len(fast) / n)])


def _in_order(items, salt=""):
    return sorted(items, key=lambda item: (zlib.crc32(f"{salt}{item.nodeid}".encode()), item.nodeid))


@pytest.fixture
def quick_collections():
    """A `gc.collect()` looks at what the test itself makes: at all that others have left it takes seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def no_network():
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX:  # processes of this machine may talk
            raise RuntimeError(f"a test tried to connect to {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield

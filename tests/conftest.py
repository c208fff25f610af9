"""How the tests run.

Eight CPU devices, so that sharding is tested everywhere; no implicit rank promotion; warnings are errors (the last is
set in pyproject.toml).

Hypothesis runs the profile `ci`: the same examples every time. `--hypothesis-profile=dev` looks for new ones.

Slow tests (`@pytest.mark.slow`: more than a few seconds) are skipped. So are all parameter sets of a test but one, by a
hash of their names, unless it is cheap (`@pytest.mark.every`). Except

    pytest --slow              runs all of them
    pytest --slow-sample N     runs one in N of them, rounded up

and `pytest --fast-sample N` runs one in N of the others, where even those are too many.

A sample depends on nothing but the tests' names: it is the same on every machine and in every order of collection.

Programs are compiled without most of LLVM's optimizations, and by XLA's older and quicker generator of code: almost all
of them run once, and compiling takes a third of the time so. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest` compiles them as
users do; .ci/run takes samples of that.

No test measures time and none uses the network; a connection attempted from Python raises.
"""

import gc
import math
import os
import socket
import zlib

os.environ["XLA_FLAGS"] = " ".join(
    [
        # Before those of the caller, which count more.
        f"--xla_cpu_use_fusion_emitters={os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1') == '0'}".lower(),
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
    group.addoption("--slow-sample", type=int, default=0, metavar="N", help="run one slow test in N, always the same")
    group.addoption("--fast-sample", type=int, default=0, metavar="N", help="run one fast test in N, always the same")


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


def pytest_collection_modifyitems(config, items):
    functions = {}
    for item in items:
        if hasattr(item, "callspec") and not {"slow", "every"} & set(item.keywords):
            functions.setdefault((item.path, item.cls, item.originalname), []).append(item)
    for sets in functions.values():
        for item in sorted(sets, key=_by_hash)[1:]:
            item.add_marker(pytest.mark.slow)
    slow = [item for item in items if "slow" in item.keywords]
    if not config.getoption("--slow"):
        for item in _left_out(slow, config.getoption("--slow-sample")):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
    n = config.getoption("--fast-sample")
    if n > 0:  # not skipped: pytest cannot skip a doctest whose line it does not know
        out = set(_left_out([item for item in items if "slow" not in item.keywords], n))
        config.hook.pytest_deselected(items=list(out))
        items[:] = [item for item in items if item not in out]


def _left_out(items, n):
    """All but one in n; with n = 0 all of them."""
    items = sorted(items, key=_by_hash)
    return items[math.ceil(len(items) / n) if n > 0 else 0 :]


def _by_hash(item):
    return zlib.crc32(item.nodeid.encode()), item.nodeid


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

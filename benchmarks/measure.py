"""How the benchmarks of speed measure: one core, processor time, contestants in turn; what they print and keep.

A shared machine is slower at some times than at others, so that only figures from the same minute compare: every round
runs every contestant once, and what is reported are ratios within one run. `pin` must be called before JAX is imported.
On more cores than one (``--cores``) the time is that of the wall, and a round less sure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

CORES = argparse.ArgumentParser(add_help=False)
"""A parent of the command lines that have ``--cores``."""
CORES.add_argument("--cores", type=int, default=1, metavar="N", help="cores to use (default: 1)")


@functools.cache
def cores() -> int:
    """How many this command line asks for."""
    return CORES.parse_known_args()[0].cores


def pin() -> None:
    """Keeps this process, and the threads it starts later, on one core, or as many as are asked for."""
    if cores() == 1:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(cores())
    if hasattr(os, "sched_setaffinity"):
        there = sorted(os.sched_getaffinity(0))
        if not 1 <= cores() <= len(there):
            CORES.error(f"--cores: from 1 to {len(there)}")
        os.sched_setaffinity(0, there[-cores() :])


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine(packages: Sequence[str] = ()) -> dict[str, str]:
    """What the figures depend on, without names of hosts or places."""
    cpu, flags = platform.processor() or platform.machine(), ""
    if (info := Path("/proc/cpuinfo")).exists():
        lines = [line.partition(":") for line in info.read_text(encoding="utf-8").splitlines()]
        found = {key.strip(): value.strip() for key, _, value in lines}
        family = f" (family {found['cpu family']} model {found['model']})" if "cpu family" in found else ""
        cpu, flags = found.get("model name", cpu) + family, found.get("flags", "")
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    wanted_packages = ("jaxquant", "jax", "jaxlib", "numpy", *packages)
    return {
        "cpu": cpu,
        "instructions": " ".join(name for name in wanted if name in flags.split()) or "unknown",
        "cores": f"{cores()} of {os.cpu_count()}",
        "python": platform.python_version(),
        **dict.fromkeys(wanted_packages, "source"),
        **versions(wanted_packages),
    }


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, budget: float = 0.0) -> dict[str, dict[str, float]]:
    """Milliseconds of each contestant, `clock` time: median and minimum over rounds that run each in turn.

    Args:
      runs: contestants; each returns once its work is done.
      rounds: rounds after the first, which is not counted.
      budget: seconds at least; further rounds are run until then.
    """
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = clock()
    while len(next(iter(samples.values()))) < rounds or clock() - start < budget:
        for name, run in runs.items():
            if cores() == 1:  # threads that have slept are slow to start: a model's products follow one another
                settle()
            before = clock()
            run()
            samples[name].append(1e3 * (clock() - before))
    return {name: {"median": statistics.median(s), "min": min(s)} for name, s in samples.items()}


def clock() -> float:
    """Seconds: of the processor on one core, else of the wall."""
    return time.process_time() if cores() == 1 else time.perf_counter()


def settle() -> None:
    """Time for what the one before still frees, and for the core to be awake: neither is the next one's."""
    time.sleep(0.005)
    end = time.perf_counter() + 0.005
    while time.perf_counter() < end:
        pass


def temporaries(program: Any) -> int:
    """Bytes of the temporary arrays of a compiled program."""
    return program.memory_analysis().temp_size_in_bytes


def header(about: dict[str, str]) -> str:
    """The machine in one line."""
    return ", ".join(f"{name} {value}" for name, value in about.items())


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(line[i]) for line in (columns, *rows)) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (columns, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def keep(stem: str, text: str, results: dict[str, Any], directory: Path) -> None:
    """Writes a result as text and as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
    (directory / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

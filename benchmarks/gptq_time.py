"""How long GPTQ takes, and its compilation, beside what it cannot do without.

    python benchmarks/gptq_time.py

For square layers of several sizes: seconds to compile `jq.ptq.gptq` (int4, asymmetric, groups of 128 and per channel),
seconds to run it, and seconds of its two parts that grow with the cube of the size, each as one product of XLA's or
LAPACK's: the Cholesky factorization of the Gram matrix, and the updates of all that is still to come by each block of
128, of exactly the width that is left. "times" is the whole by the parts. Processor time on one core, the contestants
in turn. Prints the table, and writes it to benchmarks/results as text and JSON.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jaxquant as jq  # noqa: E402

SIZES = (512, 1024, 2048, 4096)
BLOCK = 128


def updates(lower: jax.Array, w: jax.Array) -> jax.Array:
    """What every block of rows adds to the rows below it."""
    for start in range(BLOCK, w.shape[0], BLOCK):
        w = w.at[start:].add(-(lower[start:, start - BLOCK : start] @ w[start - BLOCK : start]))
    return w


def compiled(fn: Any, *args: Any) -> tuple[Any, float]:
    """A program that waits for its results, and the seconds that tracing and compiling it took."""
    start = time.process_time()
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args)), time.process_time() - start


def row(size: int, rounds: int) -> list[dict[str, Any]]:
    """The figures of one size: a row for each granularity."""
    rng = jax.random.split(jax.random.key(0), 3)
    mix = jax.random.normal(rng[0], (size, size)) * 0.99 ** jnp.arange(size)[:, None]
    x = jax.random.normal(rng[1], (512, size)) @ mix
    h, w = x.T @ x / 512 + jnp.eye(size), jax.random.normal(rng[2], (size, size))
    stats = {"gram": {"gram": h[None], "rows": jnp.float32(512)}}
    runs, compile_seconds = {}, {}
    for name, how in (("group 128", jq.PerGroup(128)), ("channel", jq.PerChannel())):
        spec = jq.QuantSpec("int4", granularity=how, symmetric=False)
        one = functools.partial(jq.ptq.gptq, spec=spec, reduce_axes=(-2,))
        runs[name], compile_seconds[name] = compiled(lambda w, stats, one=one: one(w, stats=stats), w, stats)
    lower = jnp.linalg.cholesky(h)
    runs["Cholesky"], _ = compiled(jnp.linalg.cholesky, h)
    runs["updates"], _ = compiled(updates, lower, w)
    found = {name: ms["min"] / 1e3 for name, ms in measure.interleaved(runs, rounds).items()}
    parts = found["Cholesky"] + found["updates"]
    return [
        {"size": size, "scales": name, "compile": compile_seconds[name], "run": found[name],
         "Cholesky": found["Cholesky"], "updates": found["updates"], "times": found[name] / parts}
        for name in compile_seconds
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, metavar="DIR")
    args = parser.parse_args()
    about = measure.machine()
    rows = [r for size in SIZES for r in row(size, args.rounds)]
    columns = ("layer", "scales", "compile s", "run s", "Cholesky s", "updates s", "times")
    figures = ("compile", "run", "Cholesky", "updates", "times")
    cells = [[f"{r['size']} x {r['size']}", r["scales"], *(f"{r[name]:.2f}" for name in figures)] for r in rows]
    text = f"{measure.header(about)}\n\n{measure.table(columns, cells)}"
    print(text)
    measure.keep("gptq_time", text, {"machine": about, "rows": rows}, args.output)


if __name__ == "__main__":
    main()

"""A ragged product of eight experts on a CPU: stored experts, beside float ones.

    python benchmarks/experts.py     # some minutes of one core

Rows choose their experts at random. XLA's product multiplies every row by every expert. "One after another" is a scan
over the experts that skips those without rows, and multiplies all rows by each of the others. jaxquant goes through
tiles of rows, each of one expert. One process on one core, processor time, all contestants in turn (see measure.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import ops, recipes  # noqa: E402

EXPERTS, INPUTS, OUTPUTS = 8, 1024, 4096
ROWS = (2, 8, 64, 512)
SPECS = {
    "W8A8": recipes.w8a8(),
    "W8A16": recipes.w8a16(),
    "W4A16, groups of 128": recipes.w4a16(128),
    "nf4, groups of 64": recipes.nf4(),
}


def one_after_another(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The product as a user would write it for a CPU."""
    ends, row = jnp.cumsum(sizes), jnp.arange(len(x))[:, None]

    def add(total: jax.Array, expert: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w, start, end = expert
        mine = (start <= row) & (row < end)
        return total + lax.cond(end > start, lambda: jnp.where(mine, x, 0) @ w, lambda: jnp.zeros_like(total)), None

    return lax.scan(add, jnp.zeros((len(x), w.shape[2])), (w, ends - sizes, ends))[0]


def contestants(m: int, w: jax.Array, stored: dict[str, jq.QTensor]) -> dict[str, Callable[[], Any]]:
    """The products of so many rows."""
    x = jax.random.normal(jax.random.key(1), (m, INPUTS))
    chosen = jax.random.randint(jax.random.key(2), (m,), 0, EXPERTS)
    sizes = jnp.bincount(chosen, length=EXPERTS).astype(jnp.int32)

    def of(fn: Callable[..., jax.Array], w: Any) -> Callable[[], Any]:
        compiled = jax.jit(fn)
        return lambda: jax.block_until_ready(compiled(x, w, sizes))

    runs = {"float32, XLA": of(lax.ragged_dot, w), "float32, one after another": of(one_after_another, w)}
    for name, spec in SPECS.items():
        runs[name] = of(lambda x, w, sizes, spec=spec: ops.ragged_dot(x, w, sizes, spec=spec), stored[name])
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[measure.CORES]
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    w = jax.random.normal(jax.random.key(0), (EXPERTS, INPUTS, OUTPUTS))
    quantize = jax.jit(jq.quantize, static_argnames=("spec", "reduce_axes"))
    stored = {name: quantize(w, present(spec), reduce_axes=(-2,)) for name, spec in SPECS.items()}
    found = {m: measure.interleaved(contestants(m, w, stored), args.rounds) for m in ROWS}
    about = measure.machine()
    rows = [[name, *(f"{found[m][name]['median']:.1f}" for m in ROWS)] for name in found[ROWS[0]]]
    columns = [f"{EXPERTS} of [{INPUTS}, {OUTPUTS}], ms", *(f"{m} rows" for m in ROWS)]
    text = f"{measure.header(about)}\n\n{measure.table(columns, rows)}"
    print(text)
    measure.keep("experts", text, {"machine": about, "milliseconds": found}, measure.RESULTS)


def present(spec: jq.OpSpec) -> jq.QuantSpec:
    """The spec of the weight."""
    assert spec.weight is not None
    return spec.weight


if __name__ == "__main__":
    main()

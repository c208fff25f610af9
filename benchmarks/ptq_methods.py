"""Output error of the quantizers in `jaxquant.ptq`, on one synthetic layer, in every cell of a table.

    python benchmarks/ptq_methods.py

The layer: 256 inputs, strongly correlated (their covariance falls by 0.97 from one direction to the next) and of
unequal magnitude (log-normal, sigma 1), a few 10 times as large; 128 outputs with weights of Student's t (5 degrees of
freedom). 1024 rows to calibrate on, 1024 others to measure on: a figure is ``|X (W - Q)| / |X W|`` on the latter, in
percent. Everything is seeded, and errors depend on the machine in the last digit at most.

Prints the table and writes it to benchmarks/results/ptq_methods.json and into the pages under docs/ptq.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import observers, ptq
from jaxquant.transform import statistics

ROOT = Path(__file__).parents[1]
INPUTS, OUTPUTS, ROWS = 256, 128, 1024
CELLS = [(bits, group, symmetric) for bits in (8, 4, 3, 2) for group in (None, 64) for symmetric in (True, False)]
METHODS = {
    "rtn": (ptq.rtn, None),
    "rtn, MSE range": (ptq.rtn, observers.MSE()),
    "clipped": (ptq.clipped, None),
    "hqq": (ptq.hqq, None),
    "autoround": (ptq.autoround, None),
    "gptq, given order": (functools.partial(ptq.gptq, order="given"), None),
    "gptq": (ptq.gptq, None),
    "gptq, MSE range": (ptq.gptq, observers.MSE()),
    "descend": (ptq.descend, None),
    "descend, MSE range": (ptq.descend, observers.MSE()),
}
PAGES = {
    "rtn": ["rtn", "rtn, MSE range"],
    "clipped": ["rtn", "rtn, MSE range", "clipped"],
    "hqq": ["rtn", "hqq"],
    "autoround": ["rtn", "autoround", "gptq"],
    "gptq": ["rtn", "gptq, given order", "gptq", "gptq, MSE range"],
    "descend": ["rtn", "gptq, MSE range", "descend", "descend, MSE range"],
}


def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs to calibrate on, inputs to measure on, weight)."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(INPUTS, INPUTS)) * 0.97 ** np.arange(INPUTS)[:, None]
    size = np.exp(rng.normal(size=INPUTS))
    size[rng.choice(INPUTS, 4, replace=False)] *= 10
    x = rng.normal(size=(2 * ROWS, INPUTS)) @ mix * size
    w = rng.standard_t(5, size=(INPUTS, OUTPUTS)) * np.exp(0.5 * rng.normal(size=OUTPUTS))
    return x[:ROWS], x[ROWS:], w


def name_of(bits: int, group: int | None, symmetric: bool) -> str:
    """A cell in words."""
    return f"int{bits}, {f'group {group}' if group else 'channel'}, {'symmetric' if symmetric else 'asymmetric'}"


def measure() -> dict[str, dict[str, float]]:
    """cell -> method -> error in percent."""
    seen, unseen, w = layer()
    stats = {"gram": statistics.Gram().of(jnp.asarray(seen[None], jnp.float32))}
    table: dict[str, dict[str, float]] = {}
    for bits, group, symmetric in CELLS:
        row = table[name_of(bits, group, symmetric)] = {}
        for name, (method, calibration) in METHODS.items():
            how = jq.PerGroup(group) if group else jq.PerChannel()
            spec = jq.QuantSpec(f"int{bits}", granularity=how, symmetric=symmetric, calibration=calibration)
            q = method(jnp.asarray(w, jnp.float32), spec, reduce_axes=(-2,), stats=stats)
            lost = unseen @ (w - np.asarray(q.dequantize(), np.float64))
            row[name] = float(100 * np.linalg.norm(lost) / np.linalg.norm(unseen @ w))
        print(name_of(bits, group, symmetric), {k: f"{v:.3g}" for k, v in row.items()}, flush=True)
    return table


def markdown(table: dict[str, dict[str, float]], methods: list[str]) -> str:
    """The columns of some methods."""
    lines = ["| output error, % | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    lines += ["| " + " | ".join([cell, *(f"{row[m]:.3g}" for m in methods)]) + " |" for cell, row in table.items()]
    return "\n".join(lines)


def write(table: dict[str, dict[str, float]]) -> None:
    """The results, and the tables of the pages between their markers."""
    (ROOT / "benchmarks/results/ptq_methods.json").write_text(json.dumps(table, indent=1) + "\n")
    for page, methods in PAGES.items():
        path = ROOT / f"docs/ptq/{page}.md"
        text = path.read_text()
        before, rest = text.split("<!-- measured -->\n")
        after = rest.split("<!-- end -->")[1]
        path.write_text(f"{before}<!-- measured -->\n{markdown(table, methods)}\n<!-- end -->{after}")


if __name__ == "__main__":
    found = measure()
    print(markdown(found, list(METHODS)))
    write(found)

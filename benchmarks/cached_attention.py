"""Attention of one token over a cache, as the TPU compiler estimates it: `ops.cached_attention`, and XLA's products.

    python benchmarks/cached_attention.py                  # a v5e and a v6e, seven minutes on a core
    python benchmarks/cached_attention.py --chips "tpu v5e"

Prints microseconds: the kernel's, of XLA's program for the same function, and of reading keys, values and scales once.
XLA's program is what `cached_attention` computes where its kernel does not run. Nothing is run, and shapes are enough.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import measure

from jaxquant import QTensor, ops
from jaxquant.ops.attention import Scores, attention
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

CASES = {  # sequences, heads, heads of the cache, places, features
    "Llama 3 8B, batch 1, 2,048 places": (1, 32, 8, 2048, 128),
    "Llama 3 8B, batch 8, 4,096 places": (8, 32, 8, 4096, 128),
    "Llama 3 8B, batch 64, 2,048 places": (64, 32, 8, 2048, 128),
    "Llama 2 7B, batch 8, 2,048 places": (8, 32, 32, 2048, 128),
    "Qwen3 30B-A3B, batch 8, 4,096 places": (8, 32, 4, 4096, 128),
    "a quarter of Llama 3 8B, batch 8, 2,048 places": (8, 8, 2, 2048, 128),
}
DTYPES = "bfloat16", "int8", "float8_e4m3fn"


def operands(case: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
    """Shapes of queries, keys, values, validity and the place of the token."""
    b, h, g, s, d = case
    shape: Any = jax.ShapeDtypeStruct
    k, v = shape((b, g, s, d), dtype), shape((b, g, d, s), dtype)
    if dtype != "bfloat16":
        how: dict[str, Any] = {"qtype": dtype, "dtype": jnp.bfloat16}
        k = QTensor(k, shape((b, g, s, 1), jnp.float32), None, **how)
        v = QTensor(v, shape((b, g, 1, s), jnp.float32), None, **how)
    return shape((b, h, 1, d), jnp.bfloat16), k, v, shape((b, s), jnp.bool_), shape((), jnp.int32)


def products(q: jax.Array, k: Any, v: Any, valid: jax.Array, start: jax.Array) -> jax.Array:
    """The same by XLA."""
    (b, _, t, d), g = q.shape, k.shape[1]
    return attention(q.reshape(b, g, -1, t, d), k, v, valid, start, scores=Scores(d**-0.5)).reshape(q.shape)


def cells(chip: str, name: str, dtype: str) -> tuple[float, float, float]:
    """Seconds of the kernel, of XLA's products, and of reading."""
    args = operands(CASES[name], dtype)
    ours, theirs = (estimate(compiled_for("attention", chip, fn, args)) for fn in (ops.cached_attention, products))
    assert ours.seconds is not None, ours.missing
    assert theirs.seconds is not None, theirs.missing
    return ours.seconds, theirs.seconds, ours.arguments / CHIPS[chip].bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=["tpu v5e", "tpu v6e"], metavar="CHIP")
    args = parser.parse_args()
    lines = []
    for chip in args.chips:
        for name in CASES:
            for dtype in DTYPES:
                found = cells(chip, name, dtype)
                lines.append([chip, name, dtype, *(f"{1e6 * x:.1f}" for x in found), f"{found[0] / found[2]:.2f}"])
    print(measure.header(measure.machine(("libtpu",))))
    print()
    print(measure.table(("chip", "attention", "cache", "kernel", "XLA", "reading", "kernel / reading"), lines))


if __name__ == "__main__":
    main()

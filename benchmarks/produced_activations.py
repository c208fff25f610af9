"""An activation that is computed and quantized, as the TPU compiler estimates it: in one kernel, and in two programs.

    python benchmarks/produced_activations.py                  # a v5e and a v6e, three minutes on a core
    python benchmarks/produced_activations.py --chips "tpu v5e"

Prints microseconds for 2,048 rows in bfloat16 to int8, one scale per row: of `produced_codes`, which `jq.quantized`
calls, of the function by XLA and the kernel that quantizes its result, and of reading inputs and writing codes once.
Nothing is run, and shapes are enough.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import measure
from decoders import norm

from jaxquant import QTensor, QuantSpec, quantize
from jaxquant.ops.rowwise import produced_codes
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate
from jaxquant.transform.analysis.rows import made_by_rows

ROWS, SPEC = 2048, QuantSpec("int8")


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * weight[None] + bias[None]


def silu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def gelu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.gelu(gate) * up


CASES: dict[str, tuple[Callable[..., jax.Array], int, str]] = {  # the function, columns, and what its inputs are
    "RMS norm, 4,096": (norm, 4096, "rc"),
    "RMS norm, 8,192": (norm, 8192, "rc"),
    "layer norm, 4,096": (layer_norm, 4096, "rcc"),
    "SiLU times a gate, 14,336": (silu, 14336, "rr"),
    "GELU times a gate, 14,336": (gelu, 14336, "rr"),
}


def programs(fn: Callable[..., jax.Array], columns: int, forms: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """The function in one kernel, in two programs, and the shapes of its inputs."""
    shapes = {"r": (ROWS, columns), "c": (columns,)}
    args = tuple(jax.ShapeDtypeStruct(shapes[form], jnp.bfloat16) for form in forms)
    weight = jnp.zeros((columns, 8), jnp.bfloat16)
    traced = jax.make_jaxpr(lambda *args: fn(*args) @ weight)(*args).jaxpr
    (made,) = made_by_rows(traced).values()
    order = [traced.invars.index(v) for v in made.inputs]

    def one(*args: jax.Array) -> QTensor:
        inputs = tuple(args[i] for i in order)
        return produced_codes(fn(*args), inputs, function=made.function, spec=SPEC, axes=(-1,))

    return one, lambda *args: quantize(fn(*args), SPEC, reduce_axes=(-1,)), args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="*", default=["tpu v5e", "tpu v6e"], metavar="CHIP")
    lines = []
    for chip in parser.parse_args().chips:
        for name, case in CASES.items():
            one, two, args = programs(*case)
            found = [estimate(compiled_for("benchmark", chip, fn, args)) for fn in (one, two)]
            moved = (found[0].arguments + found[0].results) / CHIPS[chip].bandwidth
            assert found[0].seconds is not None, found[0].missing
            assert found[1].seconds is not None, found[1].missing
            lines.append([chip, name, *(f"{1e6 * x:.1f}" for x in (found[0].seconds, found[1].seconds, moved))])
    print(measure.header(measure.machine(("libtpu",))))
    print()
    print(measure.table(("chip", "activation", "one kernel", "two programs", "reading, writing"), lines))


if __name__ == "__main__":
    main()

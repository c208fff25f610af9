"""Products by weights as models have them: estimates of a chip's compiler, beside bfloat16 in the same program.

    python benchmarks/weight_layouts.py                     # some minutes on a core
    python benchmarks/weight_layouts.py --chips "tpu v6e"

accelerators.py has weights [inputs, outputs]. Here 8 rows are multiplied by

- a weight [outputs, inputs], as of Equinox and of checkpoints of Hugging Face;
- a stack of four such weights, in a scan;
- a table of 32,000 rows, after rows of it are looked up: tied embeddings;
- a stack of four layers of Flax's attention: an input projection [width, heads, size] and an output projection
  [heads, size, width];
- a stack of four layers of eight experts, in a ragged product;
- a weight [outputs, inputs] whose groups are scattered, as by GPTQ's act-order.

Widths are 4,096. Nothing is run. Needs jaxquant[aot-tpu,aot-gpu].
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxquant as jq
from jaxquant import recipes
from jaxquant.core.qtensor import flat
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import Estimate, estimate

WIDTH, HEADS, LAYERS, EXPERTS, TABLE, ROWS = 4096, 32, 4, 8, 32000, 8

SPECS = {
    "bfloat16": None,
    "W8A8": recipes.w8a8(),
    "W8A16": recipes.w8a16(),
    "W4A16, groups of 128": recipes.w4a16(128),
    "nf4, groups of 64": recipes.nf4(),
    "mxfp4": recipes.mxfp4(),
    "mxfp8": recipes.mxfp8(),
    "fp8": recipes.fp8(),
    "fp8, blocks of 128 x 128": jq.OpSpec(jq.QuantSpec("float8_e4m3fn", granularity=jq.PerGroup(128))),
}

Params = dict[str, jax.Array]


class Form(NamedTuple):
    """A program, and the shapes of its weights and of its other arguments."""

    fn: Callable[..., jax.Array]
    shapes: dict[str, tuple[int, ...]]
    arguments: tuple[jax.ShapeDtypeStruct, ...]


def transposed(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["w"].T


def stack(p: Params, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (x @ w.T, None), x, p["w"])[0]


def table(p: Params, tokens: jax.Array) -> jax.Array:
    return p["w"][tokens] @ p["w"].T


def attention(p: Params, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        return x + jnp.einsum("bhs,hsd->bd", jnp.einsum("bd,dhs->bhs", x, p["in"]), p["out"]), None

    return lax.scan(layer, x, p)[0]


def experts(p: Params, x: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.scan(lambda x, w: (lax.ragged_dot(x, w, sizes), None), x, p["w"])[0]


X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16)
SIZES = jax.ShapeDtypeStruct((EXPERTS,), jnp.int32)
FORMS = {
    "transposed": Form(transposed, {"w": (WIDTH, WIDTH)}, (X,)),
    "in a stack": Form(stack, {"w": (LAYERS, WIDTH, WIDTH)}, (X,)),
    "table": Form(table, {"w": (TABLE, WIDTH)}, (jax.ShapeDtypeStruct((ROWS,), jnp.int32),)),
    "attention": Form(
        attention,
        {"in": (LAYERS, WIDTH, HEADS, WIDTH // HEADS), "out": (LAYERS, HEADS, WIDTH // HEADS, WIDTH)},
        (X,),
    ),
    "experts": Form(experts, {"w": (LAYERS, EXPERTS, WIDTH, WIDTH)}, (X, SIZES)),
    "scattered": Form(transposed, {"w": (WIDTH, WIDTH)}, (X,)),
}


def measured(chip: str, name: str, form: Form, scattered: bool) -> Estimate | None:
    """The estimate of one program; None where the form is not for the scheme."""
    spec, target = SPECS[name], "tpu" if chip.startswith("tpu") else "gpu"
    blocks = name.startswith("fp8, blocks")
    grouped = name.startswith("W4A16")
    if (scattered and not grouped) or (blocks and form.fn is not transposed):
        return None
    shapes = {key: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for key, shape in form.shapes.items()}
    if spec is None:
        return estimate(compiled_for("benchmark", chip, form.fn, (shapes, *form.arguments)))
    plan = jq.make_plan(form.fn, shapes, *form.arguments, rules=[jq.Rule(".*", spec)])

    def stored(w: jax.Array | jq.QTensor) -> jax.Array | jq.QTensor:
        if isinstance(w, jq.QTensor) and blocks:
            return w.replace(scale=flat(w.scale)[::128])
        order = jnp.arange(WIDTH, dtype=jnp.int32)[None]
        return w.replace(permutation=order) if isinstance(w, jq.QTensor) and scattered else w

    def quantized(params: Params) -> Params:
        found = jq.quantize_params(params, plan, target="cpu")
        return jq.ops.lay_out({key: stored(w) for key, w in found.items()}, target)

    params = jax.eval_shape(quantized, shapes)
    if blocks:  # as a checkpoint has them; no spec of ours does
        plan = jq.make_plan(form.fn, params, *form.arguments, rules=[])
    return estimate(compiled_for("benchmark", chip, jq.quantized(form.fn, plan), (params, *form.arguments)))


def cell(found: Estimate | None) -> str:
    if found is None:
        return "-"
    if found.seconds is None:
        return "no estimate"
    return f"{found.seconds * 1e6:.1f} ({found.floor * 1e6:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="tpu v5e,tpu v6e,h100", help="names of targets, with commas between")
    chips = parser.parse_args().chips.split(",")
    packages = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
    print("Estimates of compilers in us (the floor); nothing was run.")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    for chip in chips:
        print(f"\n{chip:26}" + "".join(f"{name:>18}" for name in FORMS))
        for name in SPECS:
            found = (cell(measured(chip, name, form, kind == "scattered")) for kind, form in FORMS.items())
            print(f"{name:26}" + "".join(f"{text:>18}" for text in found), flush=True)


if __name__ == "__main__":
    main()

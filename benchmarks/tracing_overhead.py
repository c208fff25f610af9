"""What quantizing a function costs while it is traced: `make_plan`, and the first trace of `quantized(fn)`.

    python benchmarks/tracing_overhead.py [--layers 48] [--repeat 9]

Prints, for a transformer with unrolled and with scanned layers, the processor seconds to trace the float function, to
make a plan, and to trace the quantized function with float leaves and with QTensors. Caches are cleared before each
measurement; nothing is compiled. Once jitted, none of it is repeated.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import measure
from jax import lax

import jaxquant as jq
from jaxquant import recipes

WIDTH, HEADS, VOCAB = 64, 4, 128
SHAPES = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}


def block(x, p):
    """One layer of a transformer: causal attention and an MLP, normalized before."""
    h = jax.nn.standardize(x) * p["scale"][None, None]
    q, k, v = (a.reshape(*a.shape[:2], HEADS, -1) for a in jnp.split(h @ p["qkv"], 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
    scores = jnp.where(jnp.tri(x.shape[1], dtype=bool)[None, None], scores, -1e9)
    x = x + jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]


def unrolled(params, tokens):
    """Layers in a Python loop."""
    x = params["table"][tokens]
    for p in params["layers"]:
        x = block(x, p)
    return x @ params["table"].T


def scanned(params, tokens):
    """Layers in a scan, rematerialized."""
    x = lax.scan(jax.checkpoint(lambda x, p: (block(x, p), None)), params["table"][tokens], params["layers"])[0]
    return x @ params["table"].T


def params_of(layers: int, *, stacked: bool):
    """Shapes of the parameters."""
    lead = (layers,) if stacked else ()
    layer = {name: jax.ShapeDtypeStruct(lead + shape, jnp.float32) for name, shape in SHAPES.items()}
    layer["scale"] = jax.ShapeDtypeStruct((*lead, WIDTH), jnp.float32)
    return {
        "table": jax.ShapeDtypeStruct((VOCAB, WIDTH), jnp.float32),
        "layers": layer if stacked else [layer] * layers,
    }


def seconds(fns: list[Callable[[], object]], repeat: int) -> list[float]:
    """Median times of calls with cold caches, taken in turns. Each begins without garbage, and pays for its own."""
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(repeat):
        for fn, taken in zip(fns, times, strict=True):
            jax.clear_caches()
            gc.collect()
            start = time.process_time()  # of this process: others may run
            fn()
            taken.append(time.process_time() - start)
    return [statistics.median(taken) for taken in times]


def row(name: str, fn: Callable[..., object], params: object, repeat: int) -> None:
    """Prints one row."""
    tokens, rules = jax.ShapeDtypeStruct((2, 16), jnp.int32), [jq.Rule(".*", recipes.w8a16())]
    plan = jq.make_plan(fn, params, tokens, rules=rules)
    qparams = jax.eval_shape(lambda p: jq.quantize_params(p, plan), params)
    run = jq.quantized(fn, plan)
    plain, planned, trained, frozen = seconds(
        [
            lambda: jax.jit(fn).trace(params, tokens),
            lambda: jq.make_plan(fn, params, tokens, rules=rules),
            lambda: jax.jit(run).trace(params, tokens),
            lambda: jax.jit(run).trace(qparams, tokens),
        ],
        repeat,
    )
    print(f"{name:24}{plain:14.3f}{planned:14.3f}{trained:14.3f}{frozen:14.3f}{(planned + frozen) / plain:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    print(measure.header(measure.machine()))
    print(f"processor seconds, median of {options.repeat}; ratio = (plan + QTensors) / float")
    print(f"{'model':24}{'float trace':>14}{'make_plan':>14}{'float leaves':>14}{'QTensors':>14}{'ratio':>8}")
    for layers in (options.layers, 2):
        row(f"unrolled, {layers} layers", unrolled, params_of(layers, stacked=False), options.repeat)
        row(f"scanned, {layers} layers", scanned, params_of(layers, stacked=True), options.repeat)


if __name__ == "__main__":
    main()

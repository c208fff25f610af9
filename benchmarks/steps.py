"""Speed of whole steps: a token through a decoder, its prefill, a step of training, quantizing a weight.

    python benchmarks/steps.py            # some minutes
    python benchmarks/steps.py --short    # smaller models, under a minute

One process on one core, processor time, all contestants in turn (see measure.py); ratios are float32 time over time.

- *decode*: 4 layers, width 2048, one token at batch 1 against a cache of 512, stored as [heads, tokens, width of a
  head], in float32 or, for the row that says so, in int8 with one scale per token and head and the values "by width".
- *attention*: one token's attention to 2048 keys and values for each head and layer, and nothing else, with either of
  them stored as [heads, tokens, width of a head] or as [heads, width of a head, tokens]: "by width".
- *prefill*: the same layers on 256 tokens.
- *train*: forward, backward and SGD of four dense layers of width 1024, batch 256, with quantization-aware training;
  ``temporaries`` are the bytes that the program keeps beside parameters, input and result.
- *quantize*: a float32 weight of 4096 x 4096, jitted, in GB of float32 per second, and the temporaries; reduced over
  its last axis, and over its first (the kernel of a dense layer, whose codes are transposed).

Prints the tables and writes them to benchmarks/results as text and as JSON.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import OpSpec, QuantSpec, Rule, recipes  # noqa: E402

HEAD = 64
Layout = tuple[str, str]
LAYOUTS: dict[str, Layout] = {
    "": ("hkd", "hkd"),
    ", keys by width": ("hdk", "hkd"),
    ", values by width": ("hkd", "hdk"),
    ", both by width": ("hdk", "hdk"),
}


def run(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """The compiled function, to be timed."""
    program = jax.jit(fn).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args))


def norm(x: jax.Array) -> jax.Array:
    """To unit root mean square."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def heads(x: jax.Array) -> jax.Array:
    """[T, D] to [H, T, 64]."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, HEAD), 0, 1)


def layer(p: Any, x: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    """A decoder layer on [T, D]; ``attend`` takes queries, keys and values as heads."""
    q, k, v = jnp.split(norm(x) @ p["qkv"], 3, axis=-1)
    out = attend(heads(q), heads(k), heads(v))
    x = x + jnp.swapaxes(out, 0, 1).reshape(x.shape) @ p["out"]
    return x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def cached(x: jax.Array, axes: str, *, int8: bool) -> Any:
    """Keys or values [H, T, 64] with their axes, h, k and d, in this order; in int8 with one scale per token."""
    x = jnp.einsum(f"hkd->{axes}", x)
    return jq.quantize(x, QuantSpec("int8"), reduce_axes=(axes.index("d"),)).store(()) if int8 else x


def decode(params: Any, x: jax.Array, cache: Any, layout: Layout = ("hkd", "hkd")) -> jax.Array:
    """One token against a full cache of keys and values, arrays or QTensors, with these axes."""

    def attend(kv: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        keys, values = kv
        scores = jq.ops.einsum(f"hqd,{layout[0]}->hqk", q, keys) * HEAD**-0.5
        own = jnp.sum(q * k, axis=-1, keepdims=True) * HEAD**-0.5
        weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1))
        return jq.ops.einsum(f"hqk,{layout[1]}->hqd", weights[..., :-1], values) + weights[..., -1:] * v

    for p, kv in zip(params, cache, strict=True):
        x = layer(p, x, functools.partial(attend, kv))
    return x


def attention(width: int, layers: int, context: int, rounds: int) -> dict[str, dict[str, Any]]:
    """One token's attention to a cache, in float32 and in int8 with one scale per token, in every layout."""
    rng = np.random.default_rng(0)

    def normal(tokens: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((width // HEAD, tokens, HEAD), np.float32))

    q, cache = normal(1), [(normal(context), normal(context)) for _ in range(layers)]

    def attend(layout: Layout, q: jax.Array, cache: Any) -> jax.Array:
        for keys, values in cache:
            weights = jax.nn.softmax(jq.ops.einsum(f"hqd,{layout[0]}->hqk", q, keys) * HEAD**-0.5)
            q = q + jq.ops.einsum(f"hqk,{layout[1]}->hqd", weights, values)
        return q

    runs = {}
    for int8 in (False, True):
        for name, layout in LAYOUTS.items():
            kept = [tuple(cached(a, axes, int8=int8) for a, axes in zip(kv, layout, strict=True)) for kv in cache]
            runs[f"{'int8' if int8 else 'float32'}{name}"] = run(functools.partial(attend, layout), q, kept)
    return {"attention": measure.interleaved(runs, rounds)}


def prefill(params: Any, x: jax.Array) -> jax.Array:
    """Causal attention over all tokens."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("hqd,hkd->hqk", q, k) * HEAD**-0.5
        return jnp.einsum("hqk,hkd->hqd", jax.nn.softmax(jnp.where(jnp.tri(len(x), dtype=bool)[None], scores, -1e9)), v)

    for p in params:
        x = layer(p, x, attend)
    return x


def decoder(width: int, layers: int, tokens: int, context: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Decode and prefill in float32 and quantized."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32) * shape[-2] ** -0.5)

    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    params = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(layers)]
    one, many = normal(1, width), normal(tokens, width)
    cache = [(normal(width // HEAD, context, HEAD), normal(width // HEAD, context, HEAD)) for _ in range(layers)]
    specs = {
        "W8A8": recipes.w8a8(),
        "W8A16": recipes.w8a16(),
        "W4A16 two-level": recipes.w4a16(128, two_level=True),
        "W4A16 f32 group 128": recipes.w4a16(128),
    }
    steps = {"float32": run(decode, params, one, cache)}
    fills = {"float32": run(prefill, params, many)}
    for name, spec in specs.items():
        plan = jq.make_plan(prefill, params, many, rules=[Rule(".*", spec)])
        q = jq.quantize_params(params, plan)
        steps[name] = run(jq.quantized(decode, plan), q, one, cache)
        if name == "W8A8":
            layout = LAYOUTS[", values by width"]
            small = [tuple(cached(a, axes, int8=True) for a, axes in zip(kv, layout, strict=True)) for kv in cache]
            turned = functools.partial(decode, layout=layout)
            steps["W8A8, int8 cache"] = run(jq.quantized(turned, plan), q, one, small)
        fills[name] = run(jq.quantized(prefill, plan), q, many)
    return {"decode": measure.interleaved(steps, rounds), "prefill": measure.interleaved(fills, max(rounds // 2, 3))}


def compared(title: str, loss: Callable[..., jax.Array], params: Any, x: jax.Array, rounds: int) -> dict[str, Any]:
    """A step of SGD in float32 and of quantization-aware training."""

    def step(loss: Callable[..., jax.Array], params: Any, x: jax.Array) -> Any:
        return jax.tree.map(lambda w, g: w - 0.01 * g, params, jax.grad(loss)(params, x))

    losses = {"float32": loss}
    for name, spec in {
        "W8A8": recipes.w8a8(),
        "W8A8, int8 gradients": recipes.w8a8g8(),
        "W8A16": recipes.w8a16(),
        "W4A16 f32 group 128": recipes.w4a16(128),
        "W4A8 channel": OpSpec(QuantSpec("int4"), QuantSpec("int8")),
    }.items():
        losses[name] = jq.quantized(loss, jq.make_plan(loss, params, x, rules=[Rule(".*", spec)]))
    programs = {n: jax.jit(functools.partial(step, f)).lower(params, x).compile() for n, f in losses.items()}
    runs = {n: functools.partial(lambda p: jax.block_until_ready(p(params, x)), p) for n, p in programs.items()}
    found = measure.interleaved(runs, rounds)
    for name, program in programs.items():
        found[name]["temporaries"] = measure.temporaries(program)
    return {title: found}


def training(width: int, layers: int, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Steps of a multilayer perceptron, and of a transformer of half the width and depth."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32) * shape[0] ** -0.5)

    def perceptron(params: Any, x: jax.Array) -> jax.Array:
        for w in params:
            x = jax.nn.relu(x @ w)
        return jnp.mean(x * x)

    def transformer(params: Any, x: jax.Array) -> jax.Array:
        for p in params:
            fused = jnp.split(jax.nn.standardize(x) @ p["qkv"], 3, axis=-1)
            q, k, v = (a.reshape(*x.shape[:2], -1, HEAD) for a in fused)
            x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ p["out"]
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"]
        return jnp.mean(x * x)

    half = width // 2
    shapes = {"qkv": (half, 3 * half), "out": (half, half), "up": (half, 4 * half), "down": (4 * half, half)}
    blocks = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(layers // 2)]
    dense, x = [normal(width, width) for _ in range(layers)], normal(batch, width)
    tokens = x.reshape(8, -1, half)
    found = compared("train", perceptron, dense, x, rounds)
    return found | compared("train a transformer", transformer, blocks, tokens, rounds)


def quantizing(size: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Quantizing one weight."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((size, size)).astype(np.float32))
    specs = {
        "int8": recipes.w8a16().weight,
        "int8 group 128": recipes.w8a16(128).weight,
        "int4": QuantSpec("int4"),
        "int4 group 128": recipes.w4a16(128).weight,
        "int4 two-level": recipes.w4a16(128, two_level=True).weight,
    }
    functions: dict[str, Callable[[jax.Array], Any]] = {"copy": lambda x: x + 1}
    for name, spec in specs.items():
        for axis, label in ((-1, "last"), (-2, "first")):
            functions[f"{name}, {label} axis"] = functools.partial(jq.quantize, spec=spec, reduce_axes=(axis,))
    programs = {name: jax.jit(fn).lower(w).compile() for name, fn in functions.items()}
    runs = {name: functools.partial(lambda p: jax.block_until_ready(p(w)), p) for name, p in programs.items()}
    found = measure.interleaved(runs, rounds)
    for name, entry in found.items():
        entry["GB/s"] = 4e-6 * size * size / entry["median"]
        entry["temporaries"] = measure.temporaries(programs[name])
    return {"quantize": found}


def text(results: dict[str, Any]) -> str:
    """The tables as they are printed."""
    out = [f"whole steps: {results['sizes']}", measure.header(results["machine"])]
    for title, found in results["tables"].items():
        extra = sorted({key for entry in found.values() for key in entry} - {"median", "min"})
        first = next(iter(found.values()))["median"]
        columns = [title, "ms", "ratio", *extra]
        rows = []
        for name, entry in found.items():
            cells = [name, f"{entry['median']:.2f}", f"{first / entry['median']:.2f}"]
            rows.append(cells + [f"{entry[key]:,.4g}" if key == "GB/s" else f"{entry[key]:,}" for key in extra])
        out += ["", measure.table(columns, rows)]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="smaller models, fewer rounds")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds (default: 9)")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, metavar="DIR")
    args = parser.parse_args()
    width, layers, tokens, context = (512, 2, 64, 128) if args.short else (2048, 4, 256, 512)
    dense, depth, size, rounds = (512, 2, 1024, 5) if args.short else (1024, 4, 4096, args.rounds)
    tables = decoder(width, layers, tokens, context, rounds) | attention(width, layers, 4 * context, rounds)
    tables |= training(dense, depth, 256, rounds) | quantizing(size, rounds)
    sizes = f"decoder {layers} x {width}, cache {context}, attention {4 * context}, prefill {tokens}; "
    sizes += f"{depth} x {dense} at batch 256; weight {size}"
    results = {"sizes": sizes, "machine": measure.machine(), "tables": tables}
    report = text(results)
    print(report)
    measure.keep("steps_short" if args.short else "steps", report, results, args.output)


if __name__ == "__main__":
    main()

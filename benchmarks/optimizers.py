"""Training in low precision: optimizers with quantized states, and products whose gradients are quantized.

    python benchmarks/optimizers.py            # some ten minutes
    python benchmarks/optimizers.py --short    # one seed, few steps
    python benchmarks/optimizers.py --times    # the first two tables alone; the others as they were

One process on one core, processor time, all contestants in turn (see measure.py).

- *update*: one update of Adam on 4 million parameters, by Optax in float32, by `jaxquant.optim`, and by bitsandbytes
  where PyTorch and it are installed; the bytes of its state.
- *step*: forward, backward and update of a transformer of two layers of width 256.
- *optimizers*: a transformer that predicts bytes, trained on sentences of the standard library (see texts.py), with
  each optimizer from the same parameters and batches, for three seeds; bits per byte on sentences of other files.
- *products*: the same with Adam in float32, and products of all dense layers in int8 or fp8, gradients included.

``apart`` is the mean difference to the float run of the same seed and optimizer; ``spread`` the standard deviation of
the float runs over seeds, which is what a difference has to be held against.

Prints the tables and writes them, with all losses, to benchmarks/results as text and as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import texts  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import Rule, optim, recipes  # noqa: E402

HEADS, BATCH, LENGTH = 4, 16, 64


def init(key: jax.Array, width: int, layers: int) -> dict[str, Any]:
    """Parameters of a transformer over bytes."""
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    keys = iter(jax.random.split(key, 2 + layers * len(shapes)))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) * shape[0] ** -0.5

    stack = [{name: normal(*shape) for name, shape in shapes.items()} for _ in range(layers)]
    return {"embed": normal(256, width) * 4, "place": normal(LENGTH, width), "layers": stack}


def norm(x: jax.Array) -> jax.Array:
    """To unit root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def logits(params: Any, tokens: jax.Array) -> jax.Array:
    """Of the next byte, [batch, length, 256]."""
    x = params["embed"][tokens] + params["place"][: tokens.shape[1]]
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for p in params["layers"]:
        q, k, v = (t.reshape(*t.shape[:2], HEADS, -1).swapaxes(1, 2) for t in jnp.split(norm(x) @ p["qkv"], 3, axis=-1))
        scores = jnp.where(mask, q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, -1e9)
        x = x + (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(x.shape) @ p["out"]
        x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return norm(x) @ params["embed"].T


def bits(apply: Callable[..., jax.Array], params: Any, tokens: jax.Array) -> jax.Array:
    """Bits per byte."""
    out = apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(out, tokens[:, 1:]).mean() / np.log(2)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Rows of bytes to train on and to evaluate on."""

    def rows(sentences: list[str]) -> np.ndarray:
        stream = np.frombuffer(" ".join(sentences).encode(), np.uint8).astype(np.int32)
        return stream[: stream.size // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

    evaluate, train = texts.sentences(400)
    return rows(train), rows(evaluate)[:256]


ALL = dataclasses.replace(optim.EIGHT_BITS, exempt=())
OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
    "adam8bit": (optim.adam8bit, optax.adam, 3e-3),
    "adam8bit, embedding too": (functools.partial(optim.adam8bit, storage=ALL), optax.adam, 3e-3),
    "adam4bit": (optim.adam4bit, optax.adam, 3e-3),
    "lion8bit": (optim.lion8bit, functools.partial(optax.lion, weight_decay=0.0), 5e-4),
}
PRODUCTS = {
    "int8": recipes.w8a8g8(),
    "int8, stochastic": recipes.w8a8g8(rounding="stochastic"),
    "fp8": recipes.fp8_train(),
    "fp8, stochastic": recipes.fp8_train(rounding="stochastic"),
}


def train(
    tx: Any, spec: Any, seeds: int, steps: int, width: int, rows: tuple[np.ndarray, np.ndarray]
) -> list[dict[str, Any]]:
    """For each seed the losses, means of ten steps each, and the bits per byte in the end."""
    plan, stochastic = None, False
    if spec is not None:
        params = jax.eval_shape(functools.partial(init, width=width, layers=2), jax.random.key(0))
        example = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        plan = jq.make_plan(logits, params, example, rules=[Rule("layers", spec), Rule(".*", None)])
        stochastic = spec.grad.rounding == "stochastic"

    def apply(key: jax.Array | None) -> Callable[..., jax.Array]:
        return logits if plan is None else jq.quantized(logits, plan, key=key if stochastic else None)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, tokens: jax.Array, key: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda p: bits(apply(key), p, tokens))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    final = jax.jit(lambda p: bits(apply(None), p, jnp.asarray(rows[1])))
    found = []
    for seed in range(seeds):
        params = init(jax.random.key(seed), width, 2)
        state, order, losses = tx.init(params), np.random.default_rng(seed), []
        for key in jax.random.split(jax.random.key(seed + 1), steps):
            batch = rows[0][order.integers(0, len(rows[0]), BATCH)]
            params, state, loss = step(params, state, batch, key)
            losses.append(loss)
        means = np.mean(np.asarray(losses).reshape(-1, 10), axis=1)
        found.append({"losses": [round(float(x), 3) for x in means], "bits per byte": float(final(params))})
    return found


def compare(runs: dict[str, list[dict[str, Any]]], base: dict[str, str]) -> list[list[str]]:
    """Rows of a table: bits per byte, the difference to the float runs of the same seeds, the spread of those."""
    rows = []
    for name, found in runs.items():
        mine = [run["bits per byte"] for run in found]
        row = [name, f"{statistics.mean(mine):.4f}"]
        if name in base:
            theirs = [run["bits per byte"] for run in runs[base[name]]]
            apart = [a - b for a, b in zip(mine, theirs, strict=True)]
            spread = statistics.stdev(theirs) if len(theirs) > 1 else float("nan")
            row += [f"{statistics.mean(apart):+.4f}", f"{spread:.4f}"]
        rows.append([*row, *[""] * (4 - len(row))])
    return rows


def convergence(seeds: int, steps: int, width: int) -> dict[str, dict[str, Any]]:
    """The runs with each optimizer, and with each kind of products."""
    rows = data()
    run = functools.partial(train, seeds=seeds, steps=steps, width=width, rows=rows)
    optimizers: dict[str, Any] = {}
    base = {}
    for name, (ours, theirs, rate) in OPTIMIZERS.items():
        plain = f"float {name.partition('bit')[0][:-1]}"
        for label, make in ((plain, theirs), (name, ours)):
            if label not in optimizers:
                tx = make(optax.cosine_decay_schedule(rate, steps))
                optimizers[label] = run(tx, None)
                print(label, [f"{r['bits per byte']:.4f}" for r in optimizers[label]], flush=True)
        base[name] = plain
    products: dict[str, Any] = {"float": optimizers["float adam"]}
    for name, spec in PRODUCTS.items():
        tx = optax.adam(optax.cosine_decay_schedule(OPTIMIZERS["adam8bit"][2], steps))
        products[name] = run(tx, spec)
        print(name, [f"{r['bits per byte']:.4f}" for r in products[name]], flush=True)
    return {
        "optimizers": {"runs": optimizers, "table": compare(optimizers, base)},
        "products": {"runs": products, "table": compare(products, dict.fromkeys(PRODUCTS, "float"))},
    }


def bitsandbytes(w: np.ndarray, g: np.ndarray) -> Callable[[], Any] | None:
    """An update by its Adam8bit on the CPU; None where it is not installed."""
    try:
        import bitsandbytes.optim.adam
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.tensor(w))
    p.grad = torch.tensor(g)
    return bitsandbytes.optim.adam.Adam8bit([p], lr=1e-3).step


def update(size: int, rounds: int) -> dict[str, Any]:
    """Time and bytes of one update of Adam."""
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(size, size)).astype(np.float32) for _ in range(2))
    runs, nbytes = {}, {}
    for name, tx in {
        "optax.adam": optax.adam(1e-3),
        "adam8bit": optim.adam8bit(1e-3),
        "adam4bit": optim.adam4bit(1e-3),
    }.items():
        grads = {"w": jnp.asarray(g)}
        state = tx.init(grads)
        program = jax.jit(tx.update).lower(grads, state).compile()
        runs[name] = functools.partial(lambda f, *args: jax.block_until_ready(f(*args)), program, grads, state)
        nbytes[name] = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    other = bitsandbytes(w, g)
    if other is not None:
        runs["bitsandbytes Adam8bit"], nbytes["bitsandbytes Adam8bit"] = other, nbytes["adam8bit"]
    times = measure.interleaved(runs, rounds)
    return {
        name: {**t, "relative": t["min"] / times["optax.adam"]["min"], "bytes": nbytes[name]}
        for name, t in times.items()
    }


def whole_step(width: int, rounds: int) -> dict[str, Any]:
    """Time of a step of training."""
    params = init(jax.random.key(0), width, 2)
    tokens = jax.random.randint(jax.random.key(1), (BATCH, LENGTH + 1), 0, 256)
    runs = {}
    for name, tx in {
        "optax.adam": optax.adam(1e-3),
        "adam8bit": optim.adam8bit(1e-3),
        "adam4bit": optim.adam4bit(1e-3),
    }.items():

        def step(params: Any, state: Any, tx: Any = tx) -> Any:
            grads = jax.grad(lambda p: bits(logits, p, tokens))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        program = jax.jit(step).lower(params, state).compile()
        runs[name] = functools.partial(lambda f, *args: jax.block_until_ready(f(*args)), program, params, state)
    times = measure.interleaved(runs, rounds)
    return {name: {**t, "relative": t["min"] / times["optax.adam"]["min"]} for name, t in times.items()}


def text(results: dict[str, Any]) -> str:
    """The tables."""
    whole = results["update"]["optax.adam"]["bytes"]
    parts = [measure.header(results["machine"])]
    rows = [
        [name, f"{t['min']:.1f}", f"{t['relative']:.2f}", f"{t['bytes'] / 2**20:.2f}", f"{t['bytes'] / whole:.4f}"]
        for name, t in results["update"].items()
    ]
    parts.append(measure.table(("update of 4 million", "ms", "relative", "MiB of state", "of float's"), rows))
    rows = [[name, f"{t['min']:.1f}", f"{t['relative']:.2f}"] for name, t in results["step"].items()]
    parts.append(measure.table(("step of a transformer", "ms", "relative"), rows))
    for title in ("optimizers", "products"):
        parts.append(measure.table((title, "bits per byte", "apart", "spread"), results[title]["table"]))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one seed and few steps")
    parser.add_argument("--times", action="store_true", help="only the tables of speed")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="where results are written")
    args = parser.parse_args()
    seeds, steps, width, rounds = (1, 20, 64, 3) if args.short else (3, 200, 64, 7)
    kept = json.loads((args.output / "optimizers.json").read_text(encoding="utf-8")) if args.times else {}
    results: dict[str, Any] = {
        **kept,
        "machine": measure.machine(("optax", "bitsandbytes", "torch")),
        "update": update(2048, rounds),
        "step": whole_step(256, rounds),
    }
    if not args.times:
        results["settings"] = {"seeds": seeds, "steps": steps, "width": width, "batch": BATCH, "length": LENGTH}
        results |= convergence(seeds, steps, width)
    print(text(results))
    measure.keep("optimizers", text(results), results, args.output)


if __name__ == "__main__":
    main()

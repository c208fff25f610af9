"""Mixed precision against one width for all, at equal bytes, on two real models.

    python benchmarks/allocation.py

`jq.mixed.sensitivity` measures on calibration inputs what each weight costs at each width, `jq.mixed.allocate` spends
the bytes that the uniform choice would take, `jq.mixed.refine` measures choices as a whole from there on. All are
compared on inputs that none has seen: a sentence encoder (36 weights, groups of 64, by the cosine of its embeddings)
and digits classifiers (by the relative error of their logits, and their accuracy). Rounding is to nearest. Prints the
table, and writes it to benchmarks/results as text and JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits_accuracy
import jax
import numpy as np
import texts

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec
from jaxquant.demo import digits
from jaxquant.transform.distill import relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm


def candidates(widths: tuple[int, ...], *group_sizes: int | None) -> dict[str, OpSpec]:
    """Every width with every group size (None: per channel), by name."""
    made = {}
    for size in group_sizes:
        for b in widths:
            name = f"int{b}" if size is None else f"int{b} g{size}"
            granularity = jq.PerChannel() if size is None else jq.PerGroup(size)
            made[name] = OpSpec(QuantSpec(f"int{b}", granularity=granularity))
    return made


def choices(
    table: Any, uniform: str, measure: Callable[[Any], dict[str, float]], fn: Any, params: Any, batch: tuple[Any, ...]
) -> list[dict[str, Any]]:
    """The uniform choice and the mixed ones of at most its bytes, measured."""
    plain = table.uniform(uniform)
    budget = sum(item.nbytes[1] for item in plain.items)
    mixed = jq.mixed.allocate(table, budget=budget)
    refined = jq.mixed.refine(fn, table, mixed, params, [batch], budget=budget)
    rows = []
    for name, plan in ((f"all {uniform}", plain), ("allocated", mixed), ("refined", refined)):
        names = [next(n for n, spec in table.candidates.items() if spec == item.spec) for item in plan.items]
        used = {n: names.count(n) for n in sorted(set(names))}
        found = measure(jq.dequantize_params(jq.quantize_params(params, plan)))
        size = sum(item.nbytes[1] for item in plan.items)
        rows.append({"choice": name, "bytes": size, "predicted": table.predicted(plan), **found, "weights": used})
    return rows


def encoder(sentences: int) -> dict[str, list[dict[str, Any]]]:
    apply, params = jax.jit(minilm.MiniLM().apply), minilm.load()
    evaluate, calibrate = texts.sentences(sentences)
    tokens, mask = minilm.tokenize(calibrate[:4000])
    rows = np.flatnonzero(mask.sum(1) == 20)[:24]
    batch = (tokens[rows, :20], mask[rows, :20])
    unseen = minilm.tokenize(evaluate, 32)
    reference = np.asarray(apply(params, *unseen))
    widths = candidates((3, 4, 5, 6), 64)
    plan = jq.make_plan(apply, params, *batch, rules=[jq.Rule(r"layer_\d/\w+/kernel", widths["int4 g64"])])
    table = jq.mixed.sensitivity(apply, plan, params, [batch], widths, progress=progress)

    def measure(params: Any) -> dict[str, float]:
        cosine = np.sum(np.asarray(apply(params, *unseen)) * reference, axis=1)
        return {"cosine": round(float(cosine.mean()), 5), "error": round(float(2 * (1 - cosine.mean())), 5)}

    return {
        f"all-MiniLM-L6-v2 near {name}": choices(table, name, measure, apply, params, batch) for name in ("int4 g64",)
    }


def classifier(name: str, model: Any, *group_sizes: int | None) -> dict[str, list[dict[str, Any]]]:
    data = digits.load()
    params = digits.train(model, digits.init(model, data, 0), data, digits.FLOAT, seed=0).params
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    seen, unseen = data.train_images[:512], data.test_images
    widths = candidates((2, 3, 4, 5, 6, 7, 8), *group_sizes)
    plan = jq.make_plan(fn, params, seen, rules=[jq.Rule("kernel", widths["int4"])])
    table = jq.mixed.sensitivity(fn, plan, params, [seen], widths)
    reference = fn(params, unseen)

    def measure(params: Any) -> dict[str, float]:
        logits = fn(params, unseen)
        error = float(relative_error(logits, reference))
        return {"error": round(error, 5), "accuracy": round(data.accuracy(logits), 4)}

    return {
        f"{name} near {near}": choices(table, near, measure, fn, params, (seen,)) for near in ("int3", "int4", "int5")
    }


def progress(done: int, total: int) -> None:
    if done % 12 == 0:
        print(f"  sensitivity: {done} of {total}", flush=True)


def text(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for model, rows in results.items():
        lines += [model, f"  {'':<10}  {'bytes':>9}  {'error':>8}  {'predicted':>9}"]
        for row in rows:
            extra = ", ".join(f"{name} {row[name]}" for name in ("cosine", "accuracy") if name in row)
            used = ", ".join(f"{n} x {name}" for name, n in row["weights"].items())
            figures = f"{row['bytes']:>9,}  {row['error']:8.5f}  {row['predicted']:9.5f}"
            lines.append(f"  {row['choice']:<10}  {figures}  {extra}; {used}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=300, metavar="N", help="to evaluate on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    results = {
        **classifier("digits MLP", digits.MLP(), None, 32, 16),
        **classifier("digits CNN", digits_accuracy.CNN(), None),
        **encoder(args.sentences),
    }
    print(text(results))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "allocation.txt").write_text(text(results) + "\n", encoding="utf-8")
    (args.output / "allocation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

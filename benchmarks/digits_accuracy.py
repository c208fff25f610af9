"""Accuracy of a perceptron and a convolutional network on scikit-learn's digits, quantized after and during training.

    python benchmarks/digits_accuracy.py            # five seeds, a few minutes on two cores
    python benchmarks/digits_accuracy.py --peer     # the same float parameters in qwix too, if it is installed

All weights are quantized, those of the first and the last layer included; biases stay float32. The split is fixed
(1347 training and 450 test images); a seed chooses initial values and the order of the batches. One recipe serves all
seeds and rows: it is `FLOAT` in jaxquant.demo.digits, then `QAT`, which starts from the float parameters.

Prints the table, and writes it to benchmarks/results as text and as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, recipes
from jaxquant.demo import digits

MSE = jq.observers.MSE


class CNN(nn.Module):
    """Two 3x3 convolutions, 16 and 32 features, each with ReLU and 2x2 max pooling; one dense layer on top."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(-1, 8, 8, 1)
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def weight(qtype: str, group_size: int | None = None, **kwargs: Any) -> OpSpec:
    """Weight-only, with the range of least squared error: per output channel, or per group."""
    granularity = jq.PerChannel() if group_size is None else jq.PerGroup(group_size)
    return OpSpec(QuantSpec(qtype, granularity=granularity, calibration=MSE(), **kwargs))


def with_activations(spec: QuantSpec) -> OpSpec:
    """int2 weights as above, and activations with one dynamic scale per token."""
    return dataclasses.replace(weight("int2"), act=spec)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    spec: OpSpec | None
    qat: bool = False


WEIGHT_ONLY = (
    Row("float32", None),
    Row("int8, channel, absmax", recipes.w8a16()),
    Row("int4, channel, MSE", weight("int4")),
    Row("int3, channel, MSE", weight("int3")),
    Row("int2, channel, MSE", weight("int2")),
)
MODELS = {
    "MLP 64-128-128-10": (
        digits.MLP(),
        (
            *WEIGHT_ONLY,
            Row("int2, group 32, MSE", weight("int2", 32)),
            Row("int2, group 16, MSE", weight("int2", 16)),
            Row("W2A2: int2, channel, MSE; uint2 activations", with_activations(QuantSpec("uint2"))),
            Row("QAT int2, channel, MSE", weight("int2"), qat=True),
            Row("QAT W2A2: int2, channel, MSE; uint2 activations", with_activations(QuantSpec("uint2")), qat=True),
            Row(
                "QAT W2A2: int2, channel, MSE; int2 activations, MSE",
                with_activations(QuantSpec("int2", calibration=MSE())),
                qat=True,
            ),
        ),
    ),
    "CNN 16-32": (CNN(), WEIGHT_ONLY),
}


def nbytes(params: Any) -> int:
    """True bytes of all parameters: codes, scales, zero points, biases."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, jq.QTensor)))


def measure(model: nn.Module, row: Row, params: Any, data: digits.Digits, seed: int) -> tuple[float, int]:
    """Test accuracy and bytes of a row, from trained float parameters."""
    quantized = digits.quantized(model, row.spec)
    if row.qat:
        params = digits.train(quantized, params, data, digits.QAT, seed=seed).params
    if row.spec is not None:
        params = jq.quantize_params(params, [Rule("kernel", row.spec)])
    return data.accuracy(digits.logits(quantized)(params, data.test_images)), nbytes(params)


def machine() -> dict[str, str]:
    """What the figures depend on, without names of hosts or places."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = ("jaxquant", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"cpu": cpu, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}


def summary(model: str, name: str, accuracies: list[float], size: int | None) -> dict[str, Any]:
    """A line of the result; accuracies in percent."""
    percent = [100 * a for a in accuracies]
    spread = statistics.stdev(percent) if len(percent) > 1 else 0.0
    each = [round(a, 2) for a in percent]
    return {
        "model": model,
        "row": name,
        "bytes": size,
        "mean": round(statistics.fmean(percent), 2),
        "std": round(spread, 2),
        "each": each,
    }


def text(results: dict[str, Any]) -> str:
    """The table as it is printed."""
    out = [
        f"digits: test accuracy in percent, mean and standard deviation over {results['seeds']} seeds",
        "bytes: all parameters, with scales, zero points and biases",
        ", ".join(f"{name} {value}" for name, value in results["machine"].items()),
    ]
    model = None
    width = max(len(line["row"]) for line in results["rows"])
    for line in results["rows"]:
        if line["model"] != model:
            model = line["model"]
            out += ["", f"{model:<{width}}  {'bytes':>8}  {'accuracy':>14}"]
        size = "" if line["bytes"] is None else f"{line['bytes']:,}"
        out.append(f"{line['row']:<{width}}  {size:>8}  {line['mean']:6.2f} +- {line['std']:4.2f}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds (default: 5)")
    parser.add_argument("--peer", action="store_true", help="run qwix on the same float parameters")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    data = digits.load()
    lines, results = [], {"seeds": args.seeds, "machine": machine()}
    for name, (model, rows) in MODELS.items():
        floats = [
            digits.train(model, digits.init(model, data, seed), data, digits.FLOAT, seed=seed).params
            for seed in range(args.seeds)
        ]
        for row in rows:
            found = [measure(model, row, params, data, seed) for seed, params in enumerate(floats)]
            lines.append(summary(name, row.name, [accuracy for accuracy, _ in found], found[0][1]))
            print(f"{name}: {row.name}: {lines[-1]['mean']}", flush=True)
        if args.peer:
            import qwix_peer

            results["machine"]["qwix"] = importlib.metadata.version("qwix")
            for label, accuracies in qwix_peer.rows(model, floats, data, qat=any(row.qat for row in rows)):
                lines.append(summary(name, label, accuracies, None))
                print(f"{name}: {label}: {lines[-1]['mean']}", flush=True)
    results["rows"] = lines
    table = text(results)
    print(f"\n{table}")
    args.output.mkdir(parents=True, exist_ok=True)
    stem = "digits_accuracy_peer" if args.peer else "digits_accuracy"
    (args.output / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
    (args.output / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quantization-aware training on scikit-learn's digits, with ranges taken from the arrays and with learned steps.

    python benchmarks/qat_digits.py                 # five seeds; 20 minutes of one core
    python benchmarks/qat_digits.py --seeds 3

The models, the data and the recipe are those of benchmarks/digits_accuracy.py: 15 epochs from trained float parameters.
All weights are quantized, per output channel, those of the first and the last layer included; activations where the
scheme says so, by unsigned codes, since inputs are images and what a ReLU gives. Each scheme is trained

- with the ranges that its spec chooses from each array: of least squared error for weights, of each token for
  activations;
- with learned steps: LSQ, which starts where it is published, and from the least squared error instead; LSQ towards the
  float model's predictions in place of labels (KL); LSQ for weights beside activations with a range for each token;
  PACT, and LSQ+ (activations with an offset).

Learned steps have the learning rate of the weights and no weight decay. Prints the table, and writes it to
benchmarks/results as text and as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from digits_accuracy import CNN, machine, summary, text

import jaxquant as jq
from jaxquant import OpSpec, QuantSpec, Rule, qat
from jaxquant.demo import digits

MSE = jq.observers.MSE
TEMPERATURE = 4.0


@dataclasses.dataclass(frozen=True)
class Way:
    """How a scheme is trained.

    Args:
      method: of `qat.learned_steps`; None has a range for each array.
      least_error: steps start from the least squared error, in place of the method's own start.
      by_token: activations have a range for each token; only the steps of weights are learned.
      teacher: the loss compares with the float model's predictions, not with labels.
    """

    method: Literal["lsq", "lsq+", "pact"] | None = None
    least_error: bool = False
    by_token: bool = False
    teacher: bool = False


WAYS = {
    "ranges": Way(),
    "lsq": Way("lsq"),
    "lsq, least error": Way("lsq", least_error=True),
    "lsq, KL": Way("lsq", teacher=True),
    "lsq, by token": Way("lsq", by_token=True),
    "lsq+": Way("lsq+"),
    "pact": Way("pact"),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What is quantized, and to which types."""

    weight: str
    act: Any = None

    def spec(self, way: Way) -> OpSpec:
        """Weights per channel; activations per token, or with one learned step."""
        start: dict[str, Any] = {"calibration": MSE()} if way.least_error or way.method is None else {}
        weight = QuantSpec(self.weight, **start)
        if self.act is None:
            return OpSpec(weight)
        if way.method is None or way.by_token:
            return OpSpec(weight, QuantSpec(self.act))
        act = QuantSpec(self.act, granularity=jq.PerTensor(), static=True, symmetric=way.method != "lsq+", **start)
        return OpSpec(weight, act)

    def takes(self, way: Way) -> bool:
        """Ways that concern activations alone are for schemes that quantize them."""
        return self.act is not None or not (way.by_token or way.method == "lsq+")


SCHEMES = {"w2": Scheme("int2"), "w3a3": Scheme("int3", "uint3"), "w2a2": Scheme("int2", "uint2")}
MODELS: dict[str, nn.Module] = {"MLP 64-128-128-10": digits.MLP(), "CNN 16-32": CNN()}


class Training:
    """The recipe of `jaxquant.demo.digits.train`, of parameters and steps; compiled once for all seeds.

    Args:
      model: a Flax module.
      scheme: how it is quantized.
      way: one of `WAYS`.
      params: of one seed.
      data: what to train on.
      rate: learning rate of the steps.
    """

    def __init__(self, model: nn.Module, scheme: Scheme, way: Way, params: Any, data: digits.Digits, rate: float):
        self.way, self.data, self.recipe = way, data, digits.QAT
        self.apply = lambda params, images: model.apply({"params": params}, images)
        rules = [Rule("kernel", scheme.spec(way))]
        self.plan = jq.make_plan(self.apply, params, data.train_images[:1], rules=rules)
        self.batches = len(data.train_images) // self.recipe.batch
        fall = lambda peak: optax.cosine_decay_schedule(peak, self.recipe.epochs * self.batches)  # noqa: E731
        rates: Any = {
            "weights": optax.adamw(fall(self.recipe.learning_rate), weight_decay=self.recipe.weight_decay),
            "steps": optax.adam(fall(rate)),
            "frozen": optax.set_to_zero(),
        }
        self.tx = optax.multi_transform(rates, lambda both: qat.labels(*both))
        self.epoch = jax.jit(self._epoch)
        self.run = jax.jit(lambda params, state, images: jq.quantized(self.apply, self.plan, state)(params, images))

    def start(self, params: Any) -> Any:
        """The state that training starts with."""
        if self.way.method is None:
            return {}
        batch = self.data.train_images[:512]
        state = qat.learned_steps(self.apply, self.plan, params, [batch], self.way.method)
        if self.way.by_token:
            return {path: {"weight": entry["weight"]} for path, entry in state.items()}
        return state

    def _loss(self, both: Any, images: Any, goal: Any) -> jax.Array:
        logits = jq.quantized(self.apply, self.plan, both[1])(both[0], images)
        if self.way.teacher:
            return qat.distillation_loss(logits, goal, temperature=TEMPERATURE)
        targets = optax.smooth_labels(jax.nn.one_hot(goal, 10), self.recipe.smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def _epoch(self, both: Any, opt_state: Any, images: Any, goals: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            both, opt_state = carry
            updates, opt_state = self.tx.update(jax.grad(self._loss)(both, *batch), opt_state, both)
            moved: Any = optax.apply_updates(both, updates)
            return ((moved[0], qat.clamp_steps(moved[1])), opt_state), None

        return jax.lax.scan(step, (both, opt_state), (images, goals))[0]

    def measure(self, params: Any, seed: int) -> tuple[float, float]:
        """Test accuracy of the frozen model, and the largest difference of its logits from those in training."""
        both, rng, size = (params, self.start(params)), np.random.default_rng(seed), self.recipe.batch
        opt_state, goals = self.tx.init(both), self.data.train_labels
        if self.way.teacher:
            goals = np.asarray(self.apply(params, self.data.train_images))
        for _ in range(self.recipe.epochs):
            order = rng.permutation(len(self.data.train_images))[: self.batches * size].reshape(self.batches, size)
            both, opt_state = self.epoch(both, opt_state, self.data.train_images[order], goals[order])
        params, state = both
        frozen = self.run(jq.quantize_params(params, self.plan, state=state), state, self.data.test_images)
        return self.data.accuracy(frozen), float(
            jnp.max(jnp.abs(frozen - self.run(params, state, self.data.test_images)))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds (default: 5)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the steps (default: 3e-3)")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="which rows")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    data = digits.load()
    lines: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for name in args.models:
        model = MODELS[name]
        floats = [
            digits.train(model, digits.init(model, data, seed), data, digits.FLOAT, seed=seed).params
            for seed in range(args.seeds)
        ]
        run = jax.jit(lambda params, images, model=model: model.apply({"params": params}, images))
        lines.append(summary(name, "float32", [data.accuracy(run(p, data.test_images)) for p in floats], None))
        for kind in args.schemes:
            scheme = SCHEMES[kind]
            for way in args.ways:
                if not scheme.takes(WAYS[way]):
                    continue
                training = Training(model, scheme, WAYS[way], floats[0], data, args.rate)
                found = [training.measure(params, seed) for seed, params in enumerate(floats)]
                line = summary(name, f"{kind}, {way}", [accuracy for accuracy, _ in found], None)
                lines.append({**line, "trained to frozen": max(difference for _, difference in found)})
                print(
                    f"{name}: {line['row']}: {line['mean']} {line['each']} {lines[-1]['trained to frozen']:.1e}",
                    flush=True,
                )
                results = {"seeds": args.seeds, "rate of steps": args.rate, "machine": machine(), "rows": lines}
                measure.keep("qat_digits", text(results), results, args.output)
    print(f"\n{text(results)}")


if __name__ == "__main__":
    main()

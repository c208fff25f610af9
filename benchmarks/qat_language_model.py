"""A small language model on real text, quantized after training and in training: what to combine.

    python benchmarks/qat_language_model.py                        # three hours on a core
    python benchmarks/qat_language_model.py --float m.safetensors  # keeps the float model, or takes it from there
    python benchmarks/qat_language_model.py --float m.safetensors --schemes "W4A8, groups of 64"
    python benchmarks/qat_language_model.py --float m.safetensors --tune --rates 2e-3 1e-3 --output tuned

The model is the transformer over bytes of benchmarks/optimizers.py with two layers of width 128 (.4 million
parameters), which starts as GPT-2 does and is trained by AdamW; the text is the sources and docstrings of the standard
library, an eighth of the files held out (see texts.py). Then all products of its layers are quantized; embeddings,
which are the last layer's weights too, stay in float. All rows start from one float model. There are

- methods after training, which see 16 batches of the training text;
- learned steps that start from the float weights, trained towards the float model's predictions (KL); activations have
  a range for each token, or a learned step too, which is one for all tokens;
- learned steps that start from the best of these methods: weights and steps;
- the same for more steps, and in part on labels;
- the float model, trained further by the same loss: the control of a row with labels, since a model that learns from
  labels may gain what quantization has no part in. Towards its own predictions alone it stays as it is, so that the
  other rows' control is the float model.

W4A16 and W8A8 say what weights and activations cost. "With zero points" means those of activations, whose range then
need not be symmetric: half of the codes would stand for values below 0 that GELU hardly has.

Rates of weights and of steps rise for a twentieth of the steps and fall along a cosine. They were chosen by the scores
on 1,024 rows of the training text that were left out of the training in low precision (``--tune``), with one seed.

Prints bits per byte of held-out text, relative to the float model's and to the control's, and the divergence from the
float model's predictions; means and standard deviations over seeds, which choose the batches. Writes them as text and
as JSON. Rows that the file has with the same settings are kept, so that an interrupted run goes on, and processes can
share the schemes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import optimizers  # noqa: E402
import texts  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import OpSpec, QuantSpec, Rule, qat, recipes  # noqa: E402

STEM = "qat_language_model"
WIDTH, LAYERS, BATCH, TRAINED, LENGTH = 128, 2, 32, 16, optimizers.LENGTH


def grouped(qtype: str, group_size: int, **kwargs: Any) -> QuantSpec:
    """Weights of which so many inputs of one output share a scale."""
    return QuantSpec(qtype, granularity=jq.PerGroup(group_size), **kwargs)


SCHEMES = {
    "float": OpSpec(),
    "W4A8, groups of 64": OpSpec(grouped("int4", 64), QuantSpec("int8")),
    "W4A8 with zero points, groups of 64": OpSpec(grouped("int4", 64), QuantSpec("int8", symmetric=False)),
    "W4A16, groups of 64": OpSpec(grouped("int4", 64)),
    "W8A8": OpSpec(QuantSpec("int8"), QuantSpec("int8")),
    "W2, groups of 64": OpSpec(grouped("int2", 64)),
    "W2 without 0, groups of 64": recipes.w2a16(64),
}
RATES = {4: (5e-4, 5e-5), 2: (1.5e-3, 2e-4)}
"""Bits of a weight, 4 for 4 and more: learning rates of weights and of steps, at their peak."""


def init(key: jax.Array) -> Any:
    """Fresh parameters: GPT-2's standard deviation of .02, less where layers add to the stream of their inputs."""
    params = optimizers.init(key, WIDTH, LAYERS)

    def start(name: str, w: jax.Array) -> jax.Array:
        return w * (0.02 * w.shape[0] ** 0.5 * ((2 * LAYERS) ** -0.5 if name in ("out", "down") else 1.0))

    layers = [{name: start(name, w) for name, w in layer.items()} for layer in params["layers"]]
    return {**params, "layers": layers, "place": 0.5 * params["place"]}


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows of bytes."""

    train: np.ndarray
    held_out: np.ndarray

    def batches(self, number: int, seed: int, size: int = BATCH) -> Iterator[np.ndarray]:
        """Random rows of the training text, as many batches."""
        rng = np.random.default_rng(seed)
        for _ in range(number):
            yield self.train[rng.integers(0, len(self.train), size)]


def text(tune: bool) -> Text:
    """The standard library; 2,048 rows of it held out. To tune: without these, 1,024 rows to train on held out."""

    def rows(stream: bytes) -> np.ndarray:
        array = np.frombuffer(stream, np.uint8).astype(np.int32)
        return array[: array.size // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

    held_out, train = texts.sources()
    if tune:
        return Text(np.delete(rows(train), np.s_[::68], axis=0), rows(train)[::68][:1024])
    held = rows(held_out)
    return Text(rows(train), held[:: len(held) // 2048][:2048])


def risen(step: int, steps: int) -> float:
    """The part of its peak that a rate has at a step."""
    warm = steps // 20
    return min((step + 1) / warm, 0.5 * (1 + np.cos(np.pi * max(step - warm, 0) / (steps - warm))))


def train_float(params: Any, data: Text, steps: int, rate: float, seed: int, size: int = BATCH) -> Any:
    """AdamW on labels."""
    tx = optax.adamw(optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps), b2=0.98, weight_decay=0.05)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: jax.Array) -> Any:
        updates, state = tx.update(
            jax.grad(lambda p: optimizers.bits(optimizers.logits, p, rows))(params), state, params
        )
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)
    state = tx.init(params)
    for rows in data.batches(steps, seed, size):
        params, state = step(params, state, rows)
    return params


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train the quantized model.

    Attributes:
      labels: their part in the loss; the rest is the divergence from the float model's predictions.
      gptq: whether it starts from GPTQ's weights and steps, descended; else from the float weights.
      acts: whether activations have a learned step, one for all tokens; else a range for each token.
      longer: how many times as many steps there are.
    """

    labels: float = 0.0
    gptq: bool = False
    acts: bool = False
    longer: int = 1


class Training:
    """Training of the quantized model, compiled once for all seeds.

    Args:
      spec: of all products of layers.
      way: how it is trained.
      params: the float model, where training starts.
      data: the text.
      steps: of training.
    """

    def __init__(self, spec: OpSpec, way: Way, params: Any, data: Text, steps: int):
        logits = optimizers.logits
        example = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
        plan = jq.make_plan(logits, params, example, rules=[Rule("layers", spec), Rule(".*", None)])
        start: Any = after_training(spec, METHODS[GPTQ], params, data)[0] if way.gptq else params
        found = qat.learned_steps(logits, plan, start, [rows[:, :-1] for rows in data.batches(2, 99)])
        state: Any = {
            path: {k: v for k, v in entry.items() if way.acts or k == "weight"} for path, entry in found.items()
        }
        start = jq.dequantize_params(start)
        self.plan, self.data, self.start = plan, data, (start, state)
        self.steps = way.longer * steps
        self.tx, labels = optax.scale_by_adam(b2=0.99), qat.labels(start, state)

        def loss(both: Any, rows: jax.Array) -> jax.Array:
            run = jq.quantized(logits, plan, both[1] or None)
            out = run(both[0], rows[:, :-1])
            apart = qat.distillation_loss(out, logits(params, rows[:, :-1])) if way.labels < 1 else 0.0
            nats = optax.softmax_cross_entropy_with_integer_labels(out, rows[:, 1:]).mean()
            return (1 - way.labels) * apart + way.labels * nats

        @jax.jit
        def step(both: Any, opt_state: Any, rows: jax.Array, rates: Any) -> Any:
            updates, opt_state = self.tx.update(jax.grad(loss)(both, rows), opt_state, both)
            updates = jax.tree.map(lambda label, u: -rates[label] * u, labels, updates)
            moved: Any = optax.apply_updates(both, updates)
            return (moved[0], qat.clamp_steps(moved[1])), opt_state

        self.step = step

    def __call__(self, rates: tuple[float, float], seed: int) -> tuple[Any, Any, jq.Plan]:
        """The frozen model: quantized parameters, state, plan."""
        both, opt_state = self.start, self.tx.init(self.start)
        for i, rows in enumerate(self.data.batches(self.steps, seed, TRAINED)):
            weights, steps = (np.float32(rate * risen(i, self.steps)) for rate in rates)
            both, opt_state = self.step(both, opt_state, rows, {"weights": weights, "steps": steps, "frozen": 0.0})
        params, state = both
        return jq.quantize_params(params, self.plan, state=state or None), state or None, self.plan


@dataclasses.dataclass(frozen=True)
class Score:
    """On the held-out text: bits per byte, and nats per byte between the predictions and the float model's."""

    bits: float
    kl: float


def score(run: Callable[..., jax.Array], params: Any, teacher: Any, data: Text) -> Score:
    """The means over the held-out rows."""

    @jax.jit
    def of(params: Any, teacher: Any, rows: jax.Array) -> Any:
        out = run(params, rows[:, :-1])
        bits = optax.softmax_cross_entropy_with_integer_labels(out, rows[:, 1:]).mean() / np.log(2)
        return bits, qat.distillation_loss(out, optimizers.logits(teacher, rows[:, :-1]))

    found = np.mean([jax.device_get(of(params, teacher, rows)) for rows in np.split(data.held_out, 8)], axis=0)
    return Score(float(found[0]), float(found[1]))


def after_training(spec: OpSpec, method: Any, params: Any, data: Text) -> tuple[Any, Any, jq.Plan]:
    """The model by a method that looks at the training text, or by ``"rtn"``, which does not."""
    batches = [rows[:, :-1] for rows in data.batches(16, 99)]
    model = jq.quantize_model(
        optimizers.logits,
        params,
        batches[0],
        recipe=[Rule("layers", spec), Rule(".*", None)],
        method=method,
        batches=None if method == "rtn" else batches,
    )
    return model.params, model.state, model.plan


GPTQ = "GPTQ, descended"
METHODS = {"to nearest": "rtn", GPTQ: functools.partial(jq.ptq.descend, start=jq.ptq.gptq)}
TRAININGS = {
    "learned steps, KL": Way(),
    "learned steps, of activations too, KL": Way(acts=True),
    "learned steps from GPTQ, KL": Way(gptq=True),
    "learned steps from GPTQ, KL, 4 x the steps": Way(gptq=True, longer=4),
    "learned steps from GPTQ, KL, 8 x the steps": Way(gptq=True, longer=8),
    "learned steps from GPTQ, KL and a twentieth on labels": Way(gptq=True, labels=0.05),
    "learned steps from GPTQ, KL and labels": Way(gptq=True, labels=0.5),
}
CONTROLS = {
    "KL and a twentieth on labels": Way(labels=0.05),
    "KL and labels": Way(labels=0.5),
    "labels": Way(labels=1),
}
"""Ways to train the float model further."""
WAYS = [*METHODS, *TRAININGS, *CONTROLS]


def control(way: str) -> str:
    """The float model's row that has the loss and the steps of a way to train."""
    float_way = dataclasses.replace(TRAININGS[way], gptq=False, acts=False)
    return f"float: {next(name for name, other in CONTROLS.items() if other == float_way)}"


class Rows:
    """The rows of the file, by scheme and way; scores of the same settings are kept."""

    def __init__(self, settings: dict[str, Any], directory: Path):
        self.settings, self.directory = settings, directory

    def all(self) -> dict[str, Any]:
        """What the file has: ``{"scheme: way": {"bits": [..], "kl": [..]}}``, one entry for each seed."""
        file = self.directory / f"{STEM}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return found["rows"] if found.get("settings") == self.settings else {}

    def add(self, scheme: str, way: str, seed: int, score: Score) -> None:
        """Puts the score of a seed after those of the seeds before, prints and writes it."""
        rows = self.all()
        row = rows.setdefault(f"{scheme}: {way}" if way else scheme, {"bits": [], "kl": []})
        row["bits"][seed:], row["kl"][seed:] = [score.bits], [score.kl]
        results = {"machine": measure.machine(("optax",)), "settings": self.settings, "rows": rows}
        print(f"{scheme}: {way}: {score.bits:.4f}, KL {score.kl:.5f}", flush=True)
        measure.keep(STEM, table(results), results, self.directory)

    def seeds(self, scheme: str, way: str, number: int) -> range:
        """The seeds that are missing."""
        return range(len(self.all().get(f"{scheme}: {way}" if way else scheme, {"bits": []})["bits"]), number)


def table(results: dict[str, Any]) -> str:
    """As it is printed, in the order of schemes and ways."""
    found, lines = results["rows"], []
    for scheme in SCHEMES:
        for way in ("", *WAYS):
            name = f"{scheme}: {way}" if way else scheme
            if name in found:
                bits = found[name]["bits"]
                relative = [100 * (one / found["float"]["bits"][0] - 1) for one in bits]
                spread = f"{statistics.stdev(relative):.3f}" if len(bits) > 1 else ""
                beside = found.get(control(way)) if way in TRAININGS and TRAININGS[way].labels else None
                cells = [
                    f"{statistics.fmean(bits):.4f}",
                    f"{statistics.fmean(relative):+.3f} %",
                    spread,
                    f"{100 * (statistics.fmean(bits) / statistics.fmean(beside['bits']) - 1):+.3f} %" if beside else "",
                    f"{statistics.fmean(found[name]['kl']):.5f}",
                ]
                lines.append([name, str(len(bits)), *cells])
    columns = ("scheme: way", "seeds", "bits per byte", "of float's", "spread", "of its control's", "KL")
    return "\n\n".join(
        [
            measure.header(results["machine"]),
            measure.header({name: str(value) for name, value in results["settings"].items()}),
            measure.table(columns, lines),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[measure.CORES]
    )
    parser.add_argument("--float", type=Path, metavar="FILE", help="where the float model is kept")
    parser.add_argument("--float-steps", type=int, default=1400, metavar="N", help="steps in float (default: 1400)")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="steps of each training (default: 300)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds of each training (default: 3)")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS, metavar="WAY")
    parser.add_argument("--tune", action="store_true", help="score on training text that is left out")
    parser.add_argument("--rates", nargs=2, type=float, metavar="RATE", help="of weights and steps, instead of ours")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="where results are written")
    args = parser.parse_args()
    if (args.tune or args.rates) and args.output == measure.RESULTS:
        parser.error("--tune and --rates are not for the committed results: name another --output")
    given: tuple[float, float] | None = args.rates and tuple(args.rates)
    chosen = {bits: given or rates for bits, rates in RATES.items()}
    data = text(args.tune)
    if args.float is not None and args.float.exists():
        params = jq.io.load(args.float)
    else:
        params = train_float(init(jax.random.key(0)), data, args.float_steps, 5e-3, 0)
        if args.float is not None:
            jq.io.save(args.float, params)
    settings = {
        "float steps": args.float_steps,
        "steps": args.steps,
        "batch": f"{BATCH}, then {TRAINED}",
        "length": LENGTH,
        "width": WIDTH,
        "layers": LAYERS,
        "rates": {f"{bits} bits": list(rates) for bits, rates in chosen.items()},
        "held out": "training text" if args.tune else "files",
    }
    rows = Rows(settings, args.output)
    for seed in rows.seeds("float", "", 1):
        rows.add("float", "", seed, score(optimizers.logits, params, params, data))
    for scheme in args.schemes:
        spec = SCHEMES[scheme]
        bits = 4 if spec.weight is None else min(spec.weight.type.bits, 4)
        for way in [way for way in args.ways if (way in CONTROLS) == (spec.weight is None)]:
            if way in METHODS:
                for seed in rows.seeds(scheme, way, 1):
                    qparams, state, plan = after_training(spec, METHODS[way], params, data)
                    rows.add(
                        scheme, way, seed, score(jq.quantized(optimizers.logits, plan, state), qparams, params, data)
                    )
            elif missing := rows.seeds(scheme, way, args.seeds):
                training = Training(spec, {**TRAININGS, **CONTROLS}[way], params, data, args.steps)
                for seed in missing:
                    qparams, state, plan = training(chosen[bits], seed + 1)
                    rows.add(
                        scheme, way, seed, score(jq.quantized(optimizers.logits, plan, state), qparams, params, data)
                    )


if __name__ == "__main__":
    main()

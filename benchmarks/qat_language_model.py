"""A small language model on real text, quantized after training and in training: what to combine.

    python benchmarks/qat_language_model.py                        # some 15 minutes on a core
    python benchmarks/qat_language_model.py --float m.safetensors  # keeps the float model, or takes it from there

The model is the transformer over bytes of benchmarks/optimizers.py with two layers of width 128 (.4 million
parameters); the text are the sources and docstrings of the standard library, an eighth of the files held out (see
texts.py). It is trained in float first. Then all products of its layers are quantized, each output in groups of inputs;
embeddings, which are the last layer's weights too, stay in float. From the float parameters there are

- methods after training, which see 64 batches of the training text; the best is distilled on them, too;
- training with the ranges of the arrays, on labels and towards the float model's predictions (KL);
- training with learned steps, in the same two ways;
- what the float model itself gains by as many further steps on labels: a model that learns from labels is to be held
  against that one.

Prints bits per byte of held-out text, relative to the float model's, and the divergence from its predictions; writes
them as text and as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from jaxquant import OpSpec, QuantSpec, Rule, qat  # noqa: E402

WIDTH, LAYERS, BATCH, TRAINED, LENGTH = 128, 2, 32, 16, optimizers.LENGTH
STEP_RATE = 1e-3


def grouped(qtype: str, group_size: int, **kwargs: Any) -> QuantSpec:
    """Weights of which so many inputs of one output share a scale."""
    return QuantSpec(qtype, granularity=jq.PerGroup(group_size), **kwargs)


SCHEMES = {
    "W4A8, groups of 64": OpSpec(grouped("int4", 64), QuantSpec("int8")),
    "W2, groups of 32": OpSpec(grouped("int2", 32)),
}


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


def text() -> Text:
    """The standard library; 2,048 rows of it held out."""

    def rows(stream: bytes) -> np.ndarray:
        array = np.frombuffer(stream, np.uint8).astype(np.int32)
        return array[: array.size // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

    held_out, train = texts.sources()
    held = rows(held_out)
    return Text(rows(train), held[:: len(held) // 2048][:2048])


def train_float(params: Any, data: Text, steps: int, rate: float, seed: int, size: int = BATCH) -> Any:
    """Adam on labels."""
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0, rate, steps // 20, steps))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rows: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(lambda p: optimizers.bits(optimizers.logits, p, rows))(params), state)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, params)
    state = tx.init(params)
    for rows in data.batches(steps, seed, size):
        params, state = step(params, state, rows)
    return params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a quantized model is trained.

    Attributes:
      steps: of training.
      rate: of the weights, at its peak.
      step_rate: of learned steps; None: they are not learned, and ranges are those of the arrays.
      kl: whether towards the float model's predictions; else on labels.
    """

    steps: int
    rate: float = 1e-3
    step_rate: float | None = None
    kl: bool = True


def train_quantized(spec: OpSpec, recipe: Recipe, params: Any, data: Text, seed: int = 1) -> tuple[Any, Any, jq.Plan]:
    """The frozen model: quantized parameters, state, plan."""
    logits = optimizers.logits
    example = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    plan = jq.make_plan(logits, params, example, rules=[Rule("layers", spec), Rule(".*", None)])
    teacher = params
    state: Any = {}
    if recipe.step_rate is not None:
        state = qat.learned_steps(logits, plan, params, [rows[:, :-1] for rows in data.batches(4, 99)])
    fall = lambda peak: optax.warmup_cosine_decay_schedule(0, peak, recipe.steps // 20, recipe.steps)  # noqa: E731
    rates: Any = {
        "weights": optax.adam(fall(recipe.rate)),
        "steps": optax.adam(fall(recipe.step_rate or 0.0)),
        "frozen": optax.set_to_zero(),
    }
    both = (params, state)
    tx = optax.multi_transform(rates, qat.labels(*both))

    def loss(both: Any, teacher: Any, rows: jax.Array) -> jax.Array:
        run = jq.quantized(logits, plan, both[1] or None)
        if not recipe.kl:
            return optimizers.bits(run, both[0], rows)
        return qat.distillation_loss(run(both[0], rows[:, :-1]), logits(teacher, rows[:, :-1]))

    @jax.jit
    def step(both: Any, opt_state: Any, teacher: Any, rows: jax.Array) -> Any:
        updates, opt_state = tx.update(jax.grad(loss)(both, teacher, rows), opt_state, both)
        moved: Any = optax.apply_updates(both, updates)
        return (moved[0], qat.clamp_steps(moved[1])), opt_state

    opt_state = tx.init(both)
    for rows in data.batches(recipe.steps, seed, TRAINED):
        both, opt_state = step(both, opt_state, teacher, rows)
    params, state = both
    return jq.quantize_params(params, plan, state=state or None), state or None, plan


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


def after_training(spec: OpSpec, method: Any, params: Any, data: Text, epochs: int = 0) -> tuple[Any, Any, jq.Plan]:
    """The model by a method, and distilled for some epochs."""
    batches = [rows[:, :-1] for rows in data.batches(64, 99)]
    steps = len(batches) * epochs
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, max(steps, 1)))
    looks = epochs > 0 or method != "rtn"
    model = jq.quantize_model(
        optimizers.logits,
        params,
        batches[0],
        recipe=[Rule("layers", spec), Rule(".*", None)],
        method=method,
        batches=batches if looks else None,
        distillation=jq.calibration.Distillation(tx, epochs, qat.distillation_loss) if epochs else None,
    )
    return model.params, model.state, model.plan


DESCENDED = functools.partial(jq.ptq.descend, start=jq.ptq.gptq)


def ways(steps: int) -> dict[str, Callable[..., tuple[Any, Any, jq.Plan]]]:
    """What is compared: ``(spec, params, data) -> frozen model``."""

    def trained(**how: Any) -> Callable[..., tuple[Any, Any, jq.Plan]]:
        return lambda spec, params, data: train_quantized(spec, Recipe(steps, **how), params, data)

    def method(name: Any, epochs: int = 0) -> Callable[..., tuple[Any, Any, jq.Plan]]:
        return lambda spec, params, data: after_training(spec, name, params, data, epochs)

    return {
        "to nearest": method("rtn"),
        "GPTQ, descended": method(DESCENDED),
        "learned steps, KL": trained(step_rate=STEP_RATE),
        "trained, KL": trained(),
        "learned steps, labels": trained(kl=False, step_rate=STEP_RATE),
        "trained, labels": trained(kl=False),
        "GPTQ, descended, distilled": method(DESCENDED, 2),
    }


def table(results: dict[str, Any]) -> str:
    """As it is printed."""
    rows = [
        [line["scheme"], line["way"], f"{line['bits']:.4f}", f"{line['relative']:+.2f} %", f"{line['kl']:.5f}"]
        for line in results["rows"]
    ]
    return "\n\n".join(
        [
            measure.header(results["machine"]),
            measure.header({name: str(value) for name, value in results["settings"].items()}),
            measure.table(("scheme", "way", "bits per byte", "of float's", "KL"), rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[measure.CORES]
    )
    parser.add_argument("--float", type=Path, metavar="FILE", help="where the float model is kept")
    parser.add_argument("--float-steps", type=int, default=1000, metavar="N", help="steps in float (default: 1000)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="steps of each training (default: 200)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="where results are written")
    args = parser.parse_args()
    data = text()
    if args.float is not None and args.float.exists():
        params = jq.io.load(args.float)
    else:
        params = train_float(optimizers.init(jax.random.key(0), WIDTH, LAYERS), data, args.float_steps, 3e-3, 0)
        if args.float is not None:
            jq.io.save(args.float, params)
    base = score(optimizers.logits, params, params, data)
    settings = {
        "float steps": args.float_steps,
        "steps": args.steps,
        "batch": f"{BATCH}, then {TRAINED}",
        "length": LENGTH,
        "width": WIDTH,
    }
    results: dict[str, Any] = {
        "machine": measure.machine(("optax",)),
        "settings": {**settings, "layers": LAYERS, "rate of weights": Recipe.rate, "rate of steps": STEP_RATE},
        "rows": [],
    }

    def add(scheme: str, way: str, found: Score) -> None:
        relative = 100 * (found.bits / base.bits - 1)
        results["rows"].append({"scheme": scheme, "way": way, "relative": relative, **dataclasses.asdict(found)})
        print(f"{scheme}: {way}: {found.bits:.4f}, {relative:+.2f} %, KL {found.kl:.5f}", flush=True)
        measure.keep("qat_language_model", table(results), results, args.output)

    add("float", "", base)
    for name in args.schemes:
        spec = SCHEMES[name]
        for way, make in ways(args.steps).items():
            qparams, state, plan = make(spec, params, data)
            add(name, way, score(jq.quantized(optimizers.logits, plan, state), qparams, params, data))
    further = train_float(params, data, args.steps, Recipe.rate, 1, TRAINED)
    add("float", "trained further, labels", score(optimizers.logits, further, params, data))
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()

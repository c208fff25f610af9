"""`jaxquant demo`: train a model, save it, quantize what was saved, train it at 2 bits, reload it all and compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jaxquant import QTensor, Rule, io, quantize_params
from jaxquant.core.paths import Params
from jaxquant.demo import digits
from jaxquant.demo.result import Result, Row
from jaxquant.demo.schemes import SCHEMES, Scheme
from jaxquant.demo.show import plot

__all__ = ["Result", "Row", "run"]


def run(output: Path, *, seed: int, epochs: int, qat_epochs: int, console: Any) -> Result:
    """Runs the demonstration.

    Args:
      output: the directory for the checkpoints and the plot, created if need be.
      seed: of the initial parameters and of the order of the images.
      epochs: of training in float.
      qat_epochs: of each quantization-aware training, which starts from the float parameters.
      console: the rich console that shows the progress.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = {scheme: output / f"{scheme.name}.safetensors" for scheme in SCHEMES}
    steps: dict[Scheme, float] = {}
    data = digits.load()
    like = jax.eval_shape(lambda: digits.init(digits.MLP(), data, seed))

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def bar(description: str, total: int) -> Callable[[], None]:
            task = progress.add_task(description, total=total)
            return lambda: progress.advance(task)

        def train(scheme: Scheme, params: Params, recipe: digits.Recipe) -> Any:
            done = bar(f"Train {scheme.name}", recipe.epochs)
            trained = digits.train(
                digits.quantized(digits.MLP(), scheme.spec), params, data, recipe, seed=seed, on_epoch=done
            )
            steps[scheme] = trained.step_seconds
            return trained.params

        def save(scheme: Scheme, params: Params) -> None:
            if scheme.spec is not None:
                params = quantize_params(params, [Rule("kernel", scheme.spec)])
            io.save(files[scheme], params)

        original, *others = SCHEMES
        recipe = dataclasses.replace(digits.FLOAT, epochs=epochs)
        save(original, train(original, digits.init(digits.MLP(), data, seed), recipe))
        params = io.load(files[original], like=like)

        ptq = [scheme for scheme in others if not scheme.qat]
        done = bar("Quantize what was saved", len(ptq))
        for scheme in ptq:
            save(scheme, params)
            done()

        recipe = dataclasses.replace(digits.QAT, epochs=qat_epochs)
        for scheme in others:
            if scheme.qat:
                save(scheme, train(scheme, params, recipe))

        done = bar("Reload and measure", len(SCHEMES))
        truth = np.argmax(digits.logits(digits.MLP())(params, data.test_images), axis=-1)
        rows = []
        for scheme, file in files.items():
            rows.append(_measure(scheme, file, like, data, truth, steps.get(scheme)))
            done()

    settings = {
        "seed": seed,
        "epochs": epochs,
        "qat_epochs": qat_epochs,
        "batch": recipe.batch,
        "test_images": len(data.test_images),
    }
    return _written(rows, settings, output)


def _written(rows: list[Row], settings: dict[str, Any], output: Path) -> Result:
    """The result, with its plot and its JSON file in the directory."""
    picture, file = output / "accuracy-bytes.png", output / "results.json"
    plot(rows, picture)
    result = Result(rows, settings, str(picture), str(file))
    file.write_text(result.to_json() + "\n", encoding="utf-8")
    return result


def _measure(scheme: Scheme, file: Path, like: Any, data: digits.Digits, truth: np.ndarray, step: float | None) -> Row:
    params = io.load(file, like=like)
    apply = digits.logits(digits.quantized(digits.MLP(), scheme.spec))
    logits = apply(params, data.test_images)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return Row(
        scheme=scheme.name,
        weights=scheme.weights,
        activations=scheme.activations,
        qat=scheme.qat,
        param_bytes=sum(leaf.nbytes for leaf in leaves),
        file_bytes=file.stat().st_size,
        accuracy=data.accuracy(logits),
        agreement=float(np.mean(np.argmax(logits, axis=-1) == truth)),
        forward_ms=1e3 * digits.seconds(apply, params, data.test_images),
        step_ms=None if step is None else 1e3 * step,
        checkpoint=str(file),
    )

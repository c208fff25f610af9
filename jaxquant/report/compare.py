"""`compare`: a function with float and with quantized parameters, layer by layer and output by output."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.granularity import PerTensor
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree, State
from jaxquant.io.atomic import replacing
from jaxquant.rules import Rule
from jaxquant.transform.batches import arguments
from jaxquant.transform.calibrate import calibrate
from jaxquant.transform.explain import Explanation
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import quantized
from jaxquant.transform.sequential import in_order_of_use
from jaxquant.transform.stated import described
from jaxquant.transform.statistics import Statistic

__all__ = ["Comparison", "Input", "Layer", "compare"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One quantized weight, or one layer of a stack of them.

    Attributes:
      path: the parameter; a layer of a stack has its number behind it.
      op: where it goes.
      kind: how it is stored, as its `QTensor` prints.
      shape: of this layer.
      bytes_before: of the float weight.
      bytes_after: true bytes, with scales and zero points.
      weight_sqnr: ``10 log10(sum w^2 / sum (w - w_q)^2)`` in dB.
      weight_cosine: of the float and the quantized weight.
      input_sqnr: the same for the input of the layer: the errors of all layers before. None for lookups.
      input_cosine: likewise.
      act_sqnr: of quantizing this input, if it is quantized; None if not, or if its range is static.
    """

    path: str
    op: str
    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    weight_sqnr: float
    weight_cosine: float
    input_sqnr: float | None
    input_cosine: float | None
    act_sqnr: float | None = None


@dataclasses.dataclass(frozen=True)
class Input:
    """One input, and the errors of its outputs.

    Attributes:
      number: its place among all inputs.
      label: what the caller called it.
      error: relative squared error of its outputs.
      cosine: of float and quantized outputs.
      kl: ``KL(softmax(float) || softmax(quantized))`` over the last axis, mean, in nats: for logits.
    """

    number: int
    label: str
    error: float
    cosine: float
    kl: float


#: Outputs that are off by so much of their size, at most -> what that is called; a hundredth is 40 dB.
_DEGREES = (
    (0.01, "hardly differ"),
    (0.1, "differ a little"),
    (0.32, "differ clearly"),
    (math.inf, "are not those of the float model any more"),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`. Prints as a table; `save` writes one HTML page, `plot` a picture.

    Attributes:
      layers: in the order in which they run.
      inputs: every input that was compared, in the order of the batches.
      bytes_before: of all float parameters.
      bytes_after: of all quantized ones: true bytes.
      sqnr: of all outputs together, in dB.
    """

    layers: tuple[Layer, ...]
    inputs: tuple[Input, ...]
    bytes_before: int
    bytes_after: int
    sqnr: float

    @property
    def cosine(self) -> float:
        """Mean over inputs."""
        return float(np.mean([x.cosine for x in self.inputs]))

    @property
    def kl(self) -> float:
        """Mean over inputs, in nats."""
        return float(np.mean([x.kl for x in self.inputs]))

    @property
    def verdict(self) -> str:
        """The result in words: how much smaller, how far the outputs are, and which weight to look at."""
        smaller = f"{self.bytes_before / max(self.bytes_after, 1):.2f} times smaller"
        if math.isinf(self.sqnr):
            return f"{smaller}, and the outputs are unchanged."
        off = 10 ** (-self.sqnr / 20)
        degree = next(word for most, word in _DEGREES if off <= most)
        weights = [x for x in self.layers if x.weight_sqnr is not None and math.isfinite(x.weight_sqnr)]
        text = f"{smaller}; the outputs {degree}: by {off:.2%} of their size."
        if not weights:
            return text
        worst = min(weights, key=lambda x: x.weight_sqnr)
        return f"{text} The weight that lost most is {worst.path} ({worst.weight_sqnr:.1f} dB)."

    def worst(self, number: int = 8) -> tuple[Input, ...]:
        """The inputs whose outputs changed most."""
        return tuple(sorted(self.inputs, key=lambda x: (-x.error, x.number))[:number])

    def __str__(self) -> str:
        rows = [("path", "weight dB", "cosine", "input dB", "cosine", "bytes before", "after")]
        rows += [
            (
                x.path,
                _number(x.weight_sqnr, 1),
                _number(x.weight_cosine, 5),
                _number(x.input_sqnr, 1),
                _number(x.input_cosine, 5),
                f"{x.bytes_before:,}",
                f"{x.bytes_after:,}",
            )
            for x in self.layers
        ]
        rows.append(("all parameters", "", "", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(7)]
        lines = [
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        rule = "-" * len(lines[0])
        outputs = (
            f"outputs of {len(self.inputs)} inputs: {self.sqnr:.1f} dB, cosine {self.cosine:.5f}, KL {self.kl:.2e}"
        )
        worst = [
            f"  input {x.number}{f' ({x.label})' if x.label else ''}: cosine {x.cosine:.4f}" for x in self.worst(3)
        ]
        return "\n".join(map(printable, [lines[0], rule, *lines[1:-1], rule, lines[-1], outputs, "worst:", *worst]))

    def to_json(self) -> str:
        """This comparison as JSON; infinite ratios (nothing changed) as null."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(v) for key, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps(plain({**dataclasses.asdict(self), "cosine": self.cosine, "kl": self.kl}), indent=1)

    def save(
        self,
        file: str | Path,
        *,
        title: str = "Quantized and float, side by side",
        explanation: Explanation | None = None,
    ) -> None:
        """Writes one HTML page that needs nothing else: no network, no other file. Needs Jinja2.

        With what `jaxquant.explain` found for a target, it shows what the program costs there, too.

        Raises:
          QuantError: if the path cannot be a file, another writer has it, or the disk is full.
        """
        from jaxquant.report.page import render

        page = render(self, title, explanation).encode()
        with replacing(file, nbytes=len(page), function="Comparison.save") as opened:
            opened.write(page)

    def plot(self, file: str | Path) -> None:
        """Writes a picture of the layers and the outputs; the suffix says which kind. Needs Matplotlib."""
        from jaxquant.report.plots import plot

        plot(self, Path(file))


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class _Rows(Statistic):
    """All of the inputs."""

    def of(self, x: jax.Array, counted: jax.Array | None = None) -> jax.Array:
        assert counted is None  # compare has no mask
        return x.astype(jnp.float32)

    def merge(self, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.concatenate([a, b], axis=-2)


Sums = dict[str, jax.Array]
"""Name of a sum -> its values."""


def compare(
    fn: Callable[..., PyTree],
    params: Params,
    qparams: Params,
    batches: Iterable[PyTree],
    *,
    plan: Plan | None = None,
    state: State | None = None,
    labels: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Runs a function with float and with quantized parameters on the same inputs, and measures where they differ.

    Three comparisons: each weight with its quantized form; the input of each layer with its input when all weights
    before it are quantized; and the outputs for each input (each index of the first axis).

    Args:
      fn: a function of params.
      params: its float parameters.
      qparams: the same with QTensors. A float leaf of the plan is rounded as it is in training.
      batches: for each the tuple of fn's further arguments (a single array stands for a tuple of one).
      plan: the plan that qparams were made by; needed where activations are quantized. None: weight-only.
      state: static activation ranges, as `quantized` takes them.
      labels: what to call the inputs in the report: a text for each, in the order of the batches.
      progress: called with how many batches are done.

    Returns:
      A `Comparison`.

    Raises:
      QuantError: if there are no batches, no QTensors, or parameters that do not fit the function.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {"a": jax.random.normal(keys[0], (16, 16)), "b": jax.random.normal(keys[1], (16, 4))}
      >>> x = jax.random.normal(keys[2], (8, 16))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("a|b", jq.OpSpec(jq.QuantSpec("int4")))])
      >>> found = jq.compare(fn, params, jq.quantize_params(params, plan), [x])
      >>> [layer.path for layer in found.layers], found.bytes_before, found.bytes_after
      (['a', 'b'], 1280, 240)
      >>> 10 < found.layers[1].input_sqnr < 30 and found.layers[0].input_cosine == 1.0
      True
    """
    kept = list(arguments("compare", batches, fn))
    if not kept:
        raise quant_error(
            "compare", "there are no batches", todo="Pass at least one; a generator is used up by one pass"
        )
    leaves, changed = leaves_with_paths(params)[0], leaves_with_paths(qparams)[0]
    if plan is None:
        plan = _plan_of(fn, params, changed, kept[0])
    run = quantized(fn, plan, state)
    used = plan

    @jax.jit
    def measure(params: Params, qparams: Params, args: tuple[PyTree, ...]) -> tuple[dict[str, Sums], Sums]:
        inputs = [calibrate(fn, used, p, [args], collect={"x": _Rows()}) for p in (params, qparams)]
        sums = {path: _input_sums(used, path, inputs[0][path]["x"], inputs[1][path]["x"]) for path in inputs[0]}
        return sums, _output_sums(fn(params, *args), run(qparams, *args))

    totals: dict[str, dict[str, np.ndarray]] = {}
    rows: list[dict[str, np.ndarray]] = []
    for number, args in enumerate(kept, 1):
        sums, outputs = jax.device_get(measure(params, qparams, args))
        totals = {
            path: jax.tree.map(np.add, totals[path], sums[path]) if path in totals else sums[path] for path in sums
        }
        rows.append(outputs)
        if progress is not None:
            progress(number)
    layers = [
        layer
        for path in in_order_of_use(fn, plan, params, kept[0])
        for layer in _layers(plan, path, leaves[path], changed[path], totals.get(path))
    ]
    joined = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
    inputs = [
        Input(
            i,
            str(labels[i]) if i < len(labels) else "",
            float(noise / signal) if signal > 0 else 0.0,
            _cosine(dot, signal, other),
            float(kl),
        )
        for i, (noise, signal, other, dot, kl) in enumerate(
            zip(*(joined[k] for k in ("noise", "signal", "other", "dot", "kl")), strict=True)
        )
    ]
    before, after = _all_bytes(leaves), _all_bytes(changed)
    total = _sqnr(float(joined["signal"].sum()), float(joined["noise"].sum()))
    return Comparison(tuple(layers), tuple(inputs), before, after, total)


def _all_bytes(leaves: dict[str, QTensor | jax.Array]) -> int:
    return sum(int(leaf.nbytes) for leaf in leaves.values() if hasattr(leaf, "nbytes"))


def _plan_of(
    fn: Callable[..., PyTree], params: Params, changed: dict[str, QTensor | jax.Array], args: tuple[PyTree, ...]
) -> Plan:
    """The weight-only plan that the QTensors stand for."""
    found = {path: leaf for path, leaf in changed.items() if isinstance(leaf, QTensor)}
    if not found:
        todo = "Pass what quantize_params returned, or the plan too if its leaves are float"
        raise quant_error("compare", "there are no QTensors among qparams", todo=todo, leaves=len(changed))
    rules = [Rule(f"^{re.escape(path)}$", OpSpec(), dequantize=True) for path in found]
    plan = make_plan(fn, params, *args, rules=rules)
    return dataclasses.replace(plan, items=tuple(described(item, found[item.path]) for item in plan.items))


def _input_sums(plan: Plan, path: str, x: jax.Array, y: jax.Array) -> Sums:
    """Sums over all but the stacked axes."""
    item = plan[path]
    axes = tuple(range(item.stacked, x.ndim))
    total = lambda v: jnp.sum(v, axis=axes)  # noqa: E731
    out = {"noise": total((x - y) ** 2), "signal": total(x**2), "other": total(y**2), "dot": total(x * y)}
    act = item.spec.act
    by_token = act is not None and not act.static and not isinstance(act.granularity, PerTensor)
    if act is not None and by_token and item.spec.outliers is None:
        out["act_noise"] = total((y - fake_quant(y, act, reduce_axes=(-1,))) ** 2)
    return out


def _output_sums(y: PyTree, z: PyTree) -> Sums:
    """Per input: sums over all float outputs; KL of the first of them."""
    pairs = [
        (jnp.atleast_1d(a).astype(jnp.float32), jnp.atleast_1d(b).astype(jnp.float32))
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(z), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    if not pairs:
        raise quant_error("compare", "the function has no float outputs", todo="Return what argmax is taken of")
    count = pairs[0][0].shape[0]
    pairs = [(a, b) for a, b in pairs if a.shape[0] == count]

    def each(f: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        return sum((jnp.sum(f(a, b).reshape(count, -1), axis=1) for a, b in pairs), start=jnp.zeros(count))

    p, q = (jax.nn.log_softmax(v, axis=-1).reshape(count, -1, v.shape[-1]) for v in pairs[0])
    return {
        "noise": each(lambda a, b: (a - b) ** 2),
        "signal": each(lambda a, b: a**2),
        "other": each(lambda a, b: b**2),
        "dot": each(lambda a, b: a * b),
        "kl": jnp.maximum(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1), axis=-1), 0.0),
    }


def _sqnr(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _cosine(dot: float, a: float, b: float) -> float:
    size = math.sqrt(float(a) * float(b))
    return min(float(dot) / size, 1.0) if size > 0 else 1.0 if a == b else 0.0


def _layers(
    plan: Plan,
    path: str,
    leaf: QTensor | jax.Array,
    changed: QTensor | jax.Array,
    sums: dict[str, np.ndarray] | None,
) -> list[Layer]:
    """One `Layer`, or one for each of a stack."""
    item = plan[path]
    w = np.asarray(leaf, np.float32)
    q = np.asarray(changed.dequantize(jnp.float32) if isinstance(changed, QTensor) else changed, np.float32)
    kind = repr(changed).partition("] -> ")[2] if isinstance(changed, QTensor) else str(w.dtype)
    kind = f"{changed.qtype}, {kind.split(', ', 1)[1].rpartition(', ')[0]}" if isinstance(changed, QTensor) else kind
    stack = w.shape[: item.stacked]
    count = math.prod(stack)
    out = []
    for i in range(count):
        at = np.unravel_index(i, stack) if stack else ()
        a, b = w[at].astype(np.float64).ravel(), q[at].astype(np.float64).ravel()
        one = None if sums is None else {k: float(v[at]) for k, v in sums.items()}
        act = None if one is None or "act_noise" not in one else _sqnr(one["other"], one["act_noise"])
        out.append(
            Layer(
                f"{path}[{', '.join(map(str, at))}]" if stack else path,
                item.op,
                kind,
                w.shape[item.stacked :],
                int(leaf.nbytes) // count,
                int(changed.nbytes) // count,
                _sqnr(float(a @ a), float((a - b) @ (a - b))),
                _cosine(float(a @ b), float(a @ a), float(b @ b)),
                None if one is None else _sqnr(one["signal"], one["noise"]),
                None if one is None else _cosine(one["dot"], one["signal"], one["other"]),
                act,
            )
        )
    return out

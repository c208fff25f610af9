"""`sensitivity`: what quantizing each weight costs, by candidate; `allocate`: the best choice for a budget of bytes;
`refine`: a better one, by what choices cost as a whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import leaves_with_paths
from jaxquant.core.specs import OpSpec
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.distill import relative_error
from jaxquant.transform.masks import Mask, masked, with_masks
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import check_plan, quantized

__all__ = ["Cell", "Sensitivity", "allocate", "refine", "sensitivity"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One weight under one candidate, all others in float.

    Attributes:
      path: the weight.
      candidate: name of the spec.
      nbytes: true bytes of the quantized weight.
      sqnr: of the weight, ``10 log10(sum w^2 / sum (w - w_q)^2)``, in dB.
      error: of the function's outputs, mean over batches of the loss.
      estimate: of the same from gradients of the float function; None if it was not asked for.
    """

    path: str
    candidate: str
    nbytes: int
    sqnr: float
    error: float
    estimate: float | None = None


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` returns: a `Cell` for each weight and candidate. Prints as a table.

    Attributes:
      plan: the plan that was measured.
      candidates: name -> spec.
      cells: in the order of the plan, then of the candidates.
    """

    plan: Plan
    candidates: dict[str, OpSpec]
    cells: tuple[Cell, ...]

    def __getitem__(self, key: tuple[str, str]) -> Cell:
        return self._index[key]

    @property
    def _index(self) -> dict[tuple[str, str], Cell]:
        return {(cell.path, cell.candidate): cell for cell in self.cells}

    def uniform(self, candidate: str) -> Plan:
        """The plan that gives every weight the same candidate."""
        return self.choose(dict.fromkeys(self.plan, candidate))

    def choose(self, choice: Mapping[str, str]) -> Plan:
        """The plan for a choice: path -> candidate."""
        items = tuple(dataclasses.replace(i, spec=self.candidates[choice[i.path]]) for i in self.plan.items)
        return dataclasses.replace(self.plan, items=items)

    def predicted(self, plan: Plan) -> float:
        """The error that this table predicts for a plan of its candidates: the sum of the weights' own."""
        names = {spec: name for name, spec in self.candidates.items()}
        return sum(self[item.path, names[item.spec]].error for item in plan.items)

    def __str__(self) -> str:
        names = list(self.candidates)
        width = max(len(path) for path in self.plan)
        head = f"{'error of the outputs':<{width}}" + "".join(f"  {name:>12}" for name in names)
        lines = [head, "-" * len(head)]
        index = self._index
        for path in self.plan:
            lines.append(f"{path:<{width}}" + "".join(f"  {index[path, name].error:12.3e}" for name in names))
        return "\n".join(map(printable, lines))

    def to_json(self) -> str:
        """This table as JSON."""
        return json.dumps(
            {
                "plan": self.plan.to_json(),
                "candidates": {name: spec.to_dict() for name, spec in self.candidates.items()},
                "cells": [dataclasses.asdict(cell) for cell in self.cells],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """Inverse of `to_json`."""
        try:
            data = json.loads(text)
            candidates = {name: OpSpec.from_dict(spec) for name, spec in data["candidates"].items()}
            return cls(Plan.from_json(data["plan"]), candidates, tuple(Cell(**cell) for cell in data["cells"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            todo = "Pass what to_json returned"
            raise quant_error("Sensitivity", f"not a sensitivity table ({error!r})", todo=todo) from None


def sensitivity(
    fn: Callable[..., Any],
    plan: Plan,
    params: Any,
    batches: Iterable[Any],
    candidates: Mapping[str, OpSpec],
    *,
    method: Callable[..., Any] = rtn,
    stats: Mapping[str, Any] | None = None,
    loss: Callable[[Any, Any], jax.Array] = relative_error,
    probes: int = 0,
    mask: Mask = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Quantizes one weight at a time, with each candidate, and measures what that does to the function.

    Args:
      fn: the function that was planned.
      plan: its plan; its specs do not matter, the candidates take their place.
      params: its float parameters.
      batches: for each the tuple of fn's further arguments (a single array stands for a tuple of one). All are kept.
      candidates: name -> `OpSpec`. Weights are compared by their weight spec alone unless an activation spec is there.
      method: the quantizer.
      stats: what it wants to know, from `calibrate`.
      loss: ``(outputs, float outputs) -> scalar``; by default the relative squared error.
      probes: how many backward passes the gradient estimate takes; 0 leaves it out. With y the outputs and v random
        signs, ``E (<v, dy/dw> (w_q - w))^2`` is the squared change of the outputs, to first order.
      mask: which rows of the outputs count, as for `calibrate`: outputs and targets are 0 in all others before the loss
        sees them. Every float output begins with the mask's axes.
      progress: called with how many cells are done, and of how many.

    Returns:
      A `Sensitivity`.

    Raises:
      QuantError: if there are no batches or candidates, params do not fit the plan, or a candidate does not fit.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> fn, params = lambda p, x: x @ p["a"] + x @ p["b"], {"a": jnp.eye(4) + 0.3, "b": 0.01 * jnp.eye(4) + 0.003}
      >>> x = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
      >>> int2, int8 = jq.OpSpec(jq.QuantSpec("int2")), jq.OpSpec(jq.QuantSpec("int8"))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("a|b", int8)])
      >>> table = jq.sensitivity(fn, plan, params, [x], {"int2": int2, "int8": int8})
      >>> table["a", "int2"].error > 100 * table["b", "int2"].error
      True
      >>> {item.path: item.spec.weight.qtype for item in jq.allocate(table, budget=56).items}
      {'a': 'int8', 'b': 'int2'}

    Source: Dong et al. 2019 (HAWQ, arXiv:1905.03696) for second-order estimates of a layer's share of the error; here
      its Gauss-Newton form by random probes, beside the measured one.
    """
    kept, counted = _kept("sensitivity", batches, mask, fn)
    if not kept or not candidates:
        raise quant_error("sensitivity", "nothing to measure with", todo="Pass at least one batch and one candidate",
                          batches=len(kept), candidates=len(candidates))  # fmt: skip
    leaves = leaves_with_paths(params)[0]
    check_plan("sensitivity", plan, leaves)
    given = list(zip(kept, _targets("sensitivity", fn, params, kept, counted), counted, strict=True))
    targets = [target for _, target, _ in given]
    compared = lambda y, target, only: loss(*masked("sensitivity", only, y, target))  # noqa: E731
    run = jax.jit(lambda params, args, target, only: compared(fn(params, *args), target, only))
    grads = _probe(fn, plan, params, kept, counted, probes) if probes else None
    power = _power(targets)
    cells: list[Cell] = []
    total = len(plan) * len(candidates)
    for item in plan.items:
        for name, spec in candidates.items():
            one = Plan((dataclasses.replace(item, spec=spec),))
            new = quantize_params(params, one, method=method, stats=stats)
            q = leaves_with_paths(new)[0][item.path]
            changed = dequantize_params(new)
            delta = leaves_with_paths(changed)[0][item.path] - jnp.asarray(leaves[item.path])
            noise, signal = float(jnp.sum(delta**2)), float(jnp.sum(jnp.asarray(leaves[item.path]) ** 2))
            if spec.act is None:
                losses = [run(changed, *batch) for batch in given]
            else:
                low = quantized(fn, one)
                losses = [compared(low(new, *args), target, only) for args, target, only in given]
            estimate = None
            if grads is not None:
                squares = [float(jnp.sum(g[item.path] * delta)) ** 2 for g in grads]
                estimate = sum(squares) / len(squares) / power
            sqnr = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
            cells.append(Cell(item.path, name, _nbytes(q), sqnr, float(np.mean([float(x) for x in losses])), estimate))
            if progress is not None:
                progress(len(cells), total)
    return Sensitivity(plan, dict(candidates), tuple(cells))


def _kept(
    function: str, batches: Iterable[Any], mask: Mask, fn: Callable[..., Any]
) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """The arguments of all batches, and their masks."""
    found = list(with_masks(function, batches, mask, fn))
    return [args for args, _ in found], [counted for _, counted in found]


def _targets(
    function: str, fn: Callable[..., Any], params: Any, kept: list[tuple[Any, ...]], counted: list[Any]
) -> list[Any]:
    """The outputs of the float function, with 0 in what does not count."""
    run = jax.jit(lambda params, args, only: masked(function, only, fn(params, *args))[0])
    return [run(params, args, only) for args, only in zip(kept, counted, strict=True)]


def _nbytes(leaf: Any) -> int:
    return int(leaf.nbytes)


def _power(targets: list[Any]) -> float:
    """Mean over batches of the sum of squares of the outputs."""
    return float(np.mean([sum(float(jnp.sum(y.astype(jnp.float32) ** 2)) for y in _floats(t)) for t in targets]))


def _floats(tree: Any) -> list[Any]:
    return [y for y in jax.tree.leaves(tree) if jnp.issubdtype(y.dtype, jnp.floating)]


def _probe(
    fn: Callable[..., Any], plan: Plan, params: Any, kept: list[tuple[Any, ...]], counted: list[Any], probes: int
) -> list[dict[str, jax.Array]]:
    """Gradients of random projections of the outputs: path -> array, for each probe."""
    leaves, treedef = leaves_with_paths(params)
    planned = {item.path: jnp.asarray(leaves[item.path]) for item in plan.items}

    @jax.jit
    def one(key: jax.Array, args: tuple[Any, ...], only: Any) -> dict[str, jax.Array]:
        def projected(planned: dict[str, jax.Array]) -> jax.Array:
            found = fn(jax.tree.unflatten(treedef, {**leaves, **planned}.values()), *args)
            outs = _floats(masked("sensitivity", only, found)[0])
            keys = jax.random.split(key, len(outs))
            return sum(
                (jnp.sum(y * jax.random.rademacher(k, y.shape, y.dtype)) for y, k in zip(outs, keys, strict=True)),
                start=jnp.zeros(()),
            )

        return jax.grad(projected)(planned)

    return [one(jax.random.key(i), kept[i % len(kept)], counted[i % len(kept)]) for i in range(probes)]


# -- allocation --------------------------------------------------------------------------------------------------------


def allocate(
    sensitivity: Sensitivity,
    *,
    budget: int | None = None,
    mean_bits: float | None = None,
    limit: int = 200_000,
) -> Plan:
    """The candidate for each weight that costs the least error in total, within a budget of bytes.

    Minimises ``sum_i error_i(c_i)`` subject to ``sum_i bytes_i(c_i) <= budget``: a knapsack with one choice for each
    weight, solved by dynamic programming over the choices that no other beats in both. Exact, unless more than
    ``limit`` partial choices are left after a weight; then some that differ little in bytes are dropped. Between equal
    choices the candidates' order decides: the result depends on the table alone.

    Args:
      sensitivity: from `sensitivity`.
      budget: true bytes of all planned weights together.
      mean_bits: the same as mean bits per weight; scales count.
      limit: partial choices to keep.

    Returns:
      A `Plan`: quantize with it.

    Raises:
      QuantError: unless exactly one of budget and mean_bits is given, or if nothing fits; the message says how much the
        smallest choice takes.

    Source: the knapsack form of mixed precision is Chen et al. 2021 (arXiv:2110.06554).
    """
    if (budget is None) == (mean_bits is None):
        todo = "Pass budget=bytes or mean_bits=bits"
        got = {"budget": budget, "mean_bits": mean_bits}
        raise quant_error("allocate", "one of budget and mean_bits is needed", todo=todo, **got)
    items = sensitivity.plan.items
    if budget is None:
        assert mean_bits is not None
        budget = math.floor(mean_bits * sum(math.prod(i.shape) for i in items) / 8)
    rows = [[sensitivity[item.path, name] for name in sensitivity.candidates] for item in items]
    least = sum(min(cell.nbytes for cell in row) for row in rows)
    if least > budget:
        todo = f"Allow {least} bytes, or add a smaller candidate"
        raise quant_error("allocate", "no choice fits the budget", todo=todo, budget=budget)
    choice = _knapsack([[(c.nbytes, c.error) for c in row] for row in rows], budget, limit)
    names = list(sensitivity.candidates)
    return sensitivity.choose({item.path: names[k] for item, k in zip(items, choice, strict=True)})


def _knapsack(rows: list[list[tuple[int, float]]], budget: int, limit: int) -> list[int]:
    """One index per row, of least total error within the budget."""
    rest = np.cumsum([min(n for n, _ in row) for row in rows][::-1])[::-1]  # what later rows take at least
    sizes, errors = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for i, row in enumerate(rows):
        later = int(rest[i + 1]) if i + 1 < len(rows) else 0
        new_sizes = np.concatenate([sizes + n for n, _ in row])
        new_errors = np.concatenate([errors + e for _, e in row])
        before = np.tile(np.arange(len(sizes)), len(row))
        pick = np.repeat(np.arange(len(row)), len(sizes))
        order = np.lexsort((pick, new_errors, new_sizes))
        order = order[new_sizes[order] + later <= budget]
        best = np.minimum.accumulate(new_errors[order])
        first = np.concatenate([[True], best[1:] < best[:-1]])  # what is smaller and no worse beats the rest
        order = order[first]
        if len(order) > limit:
            order = order[np.unique(np.linspace(0, len(order) - 1, limit).round().astype(int))]
        sizes, errors = new_sizes[order], new_errors[order]
        steps.append((before[order], pick[order]))
    at, choice = len(sizes) - 1, []
    for before, pick in reversed(steps):
        choice.append(int(pick[at]))
        at = int(before[at])
    return choice[::-1]


# -- choices as a whole ------------------------------------------------------------------------------------------------


def refine(
    fn: Callable[..., Any],
    sensitivity: Sensitivity,
    plan: Plan,
    params: Any,
    batches: Iterable[Any],
    *,
    budget: int | None = None,
    method: Callable[..., Any] = rtn,
    stats: Mapping[str, Any] | None = None,
    loss: Callable[[Any, Any], jax.Array] = relative_error,
    evaluations: int = 64,
    mask: Mask = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """A choice within a budget of bytes, of less error as a whole than another.

    The errors of single weights do not add up exactly: some cancel. This measures whole choices: the given one, each
    uniform one that is not larger, and, from the best of them, those that differ in one or two weights, in the order of
    the error that the table predicts; whenever one is better, on from there. Never worse on the batches than where it
    starts.

    Args:
      fn: the function that was planned.
      sensitivity: what `sensitivity` returned.
      plan: where to start, a choice of its candidates; from `allocate`.
      params: the float parameters.
      batches: as for `sensitivity`; all are kept.
      budget: true bytes of all planned weights together; None: those of ``plan``.
      method: the quantizer.
      stats: what it wants to know, from `calibrate`.
      loss: ``(outputs, float outputs) -> scalar``.
      evaluations: how many choices are measured at most.
      mask: which rows of the outputs count, as it was for `sensitivity`.
      progress: called with how many choices have been measured, and of how many at most.

    Returns:
      A `Plan`: quantize with it.

    Raises:
      QuantError: if there are no batches, or a candidate quantizes activations, whose products are not measured here.
    """
    kept, counted = _kept("refine", batches, mask, fn)
    if not kept:
        raise quant_error("refine", "there are no batches", todo="Pass at least one", batches=0)
    if any(spec.act is not None for spec in sensitivity.candidates.values()):
        todo = "Use candidates with a weight spec alone"
        raise quant_error("refine", "a candidate quantizes activations", todo=todo)
    leaves, treedef = leaves_with_paths(params)
    given = list(zip(kept, _targets("refine", fn, params, kept, counted), counted, strict=True))
    run = jax.jit(lambda params, args, target, only: loss(*masked("refine", only, fn(params, *args), target)))
    names, items = list(sensitivity.candidates), sensitivity.plan.items

    @functools.cache
    def value(i: int, k: int) -> jax.Array:
        one = Plan((dataclasses.replace(items[i], spec=sensitivity.candidates[names[k]]),))
        new = dequantize_params(quantize_params(params, one, method=method, stats=stats))
        return leaves_with_paths(new)[0][items[i].path]

    measured: dict[tuple[int, ...], float] = {}

    def error(choice: tuple[int, ...]) -> float:
        if choice not in measured:
            new = {item.path: value(i, k) for i, (item, k) in enumerate(zip(items, choice, strict=True))}
            tree = jax.tree.unflatten(treedef, {**leaves, **new}.values())
            losses = [run(tree, *batch) for batch in given]
            measured[choice] = float(np.mean([float(x) for x in losses]))
            if progress is not None:
                progress(len(measured), evaluations)
        return measured[choice]

    rows = [[sensitivity[item.path, name] for name in names] for item in items]
    size, own = (np.array([[getattr(c, field) for c in row] for row in rows]) for field in ("nbytes", "error"))
    at = np.arange(len(items))
    specs = [sensitivity.candidates[name] for name in names]
    start = tuple(specs.index(plan[item.path].spec) for item in items)
    budget = int(size[at, list(start)].sum()) if budget is None else budget
    uniform = [(k,) * len(items) for k in range(len(names)) if size[:, k].sum() <= budget]
    best = min([start, *uniform[: evaluations - 1]], key=error)
    while len(measured) < evaluations:
        for choice in _neighbours(np.array(best), size, own, budget):
            if len(measured) >= evaluations:
                break
            if choice not in measured and error(choice) < measured[best]:
                best = choice
                break
        else:
            break
    return sensitivity.choose({item.path: names[k] for item, k in zip(items, best, strict=True)})


def _neighbours(choice: np.ndarray, size: np.ndarray, own: np.ndarray, budget: int) -> list[tuple[int, ...]]:
    """Choices that differ in one or two weights and fit, by predicted error."""
    at, count = np.arange(len(choice)), size.shape[1]
    more = (size - size[at, choice][:, None]).reshape(-1)  # of each single change
    worse = (own - own[at, choice][:, None]).reshape(-1)
    left = budget - int(size[at, choice].sum())
    changes = [(k,) for k in np.flatnonzero(more <= left)]
    one, two = np.triu_indices(len(more), 1)
    fits = (one // count != two // count) & (more[one] + more[two] <= left)
    changes += list(zip(one[fits], two[fits], strict=True))
    order = sorted(changes, key=lambda change: (sum(worse[k] for k in change), change))
    out = []
    for change in order[:1024]:
        new = choice.copy()
        for k in change:
            new[k // count] = k % count
        if np.any(new != choice):
            out.append(tuple(int(k) for k in new))
    return out

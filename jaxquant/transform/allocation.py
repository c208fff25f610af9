"""`allocate`: the best choice of candidates within a budget of bytes; `refine`: a better one, by the measured error of
whole choices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.distill import relative_error
from jaxquant.transform.masks import Mask, masked
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.sensitivity import Sensitivity, all_batches, targets_of

__all__ = ["allocate", "refine"]


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


def refine(
    fn: Callable[..., PyTree],
    sensitivity: Sensitivity,
    plan: Plan,
    params: Params,
    batches: Iterable[PyTree],
    *,
    budget: int | None = None,
    method: str | Callable[..., QTensor] = rtn,
    stats: Mapping[str, PyTree] | None = None,
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_error,
    evaluations: int = 64,
    mask: Mask = None,
    progress: Callable[[int, int], object] | None = None,
) -> Plan:
    """A choice within a budget of bytes, of less error as a whole than another.

    The errors of single weights do not add up exactly: some cancel. So this measures whole choices: the given one and
    each uniform one that is not larger. From the best of them it tries choices that differ in one or two weights, in
    the order of the error that the table predicts, and continues from each improvement. The result is never worse on
    the batches.

    Args:
      fn: the function that was planned.
      sensitivity: what `sensitivity` returned.
      plan: where to start, a choice of its candidates; from `allocate`.
      params: the float parameters.
      batches: as for `sensitivity`; all are kept.
      budget: true bytes of all planned weights together; None: those of ``plan``.
      method: the quantizer, or its name.
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
    kept, counted = all_batches("refine", batches, mask, fn)
    if not kept:
        raise quant_error("refine", "there are no batches", todo="Pass at least one", batches=0)
    if any(spec.act is not None for spec in sensitivity.candidates.values()):
        todo = "Use candidates with a weight spec alone"
        raise quant_error("refine", "a candidate quantizes activations", todo=todo)
    leaves, treedef = leaves_with_paths(params)
    given = list(zip(kept, targets_of("refine", fn, params, kept, counted), counted, strict=True))
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
    near = functools.partial(_neighbours, size=size, own=own, budget=budget)
    while len(measured) < evaluations and (better := _better(best, near, error, measured, evaluations)) is not None:
        best = better
    return sensitivity.choose({item.path: names[k] for item, k in zip(items, best, strict=True)})


Choice = tuple[int, ...]


def _better(
    best: Choice,
    near: Callable[..., list[Choice]],
    error: Callable[[Choice], float],
    measured: Mapping[Choice, float],
    most: int,
) -> Choice | None:
    """The first choice near the best one that has less error; None if none of them has, or enough are measured."""
    for choice in near(np.array(best)):
        if len(measured) >= most:
            return None
        if choice not in measured and error(choice) < measured[best]:
            return choice
    return None


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

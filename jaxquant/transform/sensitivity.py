"""`sensitivity`: what quantizing each weight costs, by candidate."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.distill import relative_error
from jaxquant.transform.masks import Counted, Mask, masked, with_masks
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import check_plan, quantized

__all__ = ["Cell", "Sensitivity", "all_batches", "sensitivity", "targets_of"]


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
    """The result of `sensitivity`: a `Cell` for each weight and candidate. Prints as a table.

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
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    batches: Iterable[PyTree],
    candidates: Mapping[str, OpSpec],
    *,
    method: str | Callable[..., QTensor] = rtn,
    stats: Mapping[str, PyTree] | None = None,
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_error,
    probes: int = 0,
    mask: Mask = None,
    progress: Callable[[int, int], object] | None = None,
) -> Sensitivity:
    """Quantizes one weight at a time, with each candidate, and measures what that does to the function.

    Args:
      fn: the function that was planned.
      plan: its plan; its specs do not matter, the candidates take their place.
      params: its float parameters.
      batches: for each the tuple of fn's further arguments (a single array stands for a tuple of one). All are kept.
      candidates: name -> `OpSpec`. Weights are compared by their weight spec alone unless an activation spec is there.
      method: the quantizer, or its name.
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
      >>> table = jq.mixed.sensitivity(fn, plan, params, [x], {"int2": int2, "int8": int8})
      >>> table["a", "int2"].error > 100 * table["b", "int2"].error
      True
      >>> {item.path: item.spec.weight.qtype for item in jq.mixed.allocate(table, budget=56).items}
      {'a': 'int8', 'b': 'int2'}

    Source: Dong et al. 2019 (HAWQ, arXiv:1905.03696) for second-order estimates of a layer's share of the error; here
      its Gauss-Newton form by random probes, beside the measured one.
    """
    kept, counted = all_batches("sensitivity", batches, mask, fn)
    if not kept or not candidates:
        raise quant_error("sensitivity", "nothing to measure with", todo="Pass at least one batch and one candidate",
                          batches=len(kept), candidates=len(candidates))  # fmt: skip
    leaves = leaves_with_paths(params)[0]
    check_plan("sensitivity", plan, leaves)
    given = list(zip(kept, targets_of("sensitivity", fn, params, kept, counted), counted, strict=True))
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
            cells.append(
                Cell(item.path, name, int(q.nbytes), sqnr, float(np.mean([float(x) for x in losses])), estimate)
            )
            if progress is not None:
                progress(len(cells), total)
    return Sensitivity(plan, dict(candidates), tuple(cells))


def all_batches(
    function: str, batches: Iterable[PyTree], mask: Mask, fn: Callable[..., PyTree]
) -> tuple[list[tuple[PyTree, ...]], list[Counted]]:
    """The arguments of all batches, and their masks."""
    found = list(with_masks(function, batches, mask, fn))
    return [args for args, _ in found], [counted for _, counted in found]


def targets_of(
    function: str, fn: Callable[..., PyTree], params: Params, kept: list[tuple[PyTree, ...]], counted: list[Counted]
) -> list[PyTree]:
    """The outputs of the float function, with 0 in masked rows."""
    run = jax.jit(lambda params, args, only: masked(function, only, fn(params, *args))[0])
    return [run(params, args, only) for args, only in zip(kept, counted, strict=True)]


def _power(targets: list[PyTree]) -> float:
    """Mean over batches of the sum of squares of the outputs."""
    return float(np.mean([sum(float(jnp.sum(y.astype(jnp.float32) ** 2)) for y in _floats(t)) for t in targets]))


def _floats(tree: PyTree) -> list[jax.Array]:
    return [y for y in jax.tree.leaves(tree) if jnp.issubdtype(y.dtype, jnp.floating)]


def _probe(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    kept: list[tuple[PyTree, ...]],
    counted: list[Counted],
    probes: int,
) -> list[dict[str, jax.Array]]:
    """Gradients of random projections of the outputs: path -> array, for each probe."""
    leaves, treedef = leaves_with_paths(params)
    planned = {item.path: jnp.asarray(leaves[item.path]) for item in plan.items}

    @jax.jit
    def one(key: jax.Array, args: tuple[PyTree, ...], only: Counted) -> dict[str, jax.Array]:
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

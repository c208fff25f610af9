"""`quantize_sequentially`: calibrates each weight on the outputs of the quantized weights before it."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.ptq.gptq import gptq
from jaxquant.transform.batches import arguments
from jaxquant.transform.calibrate import Calibration
from jaxquant.transform.interpreter import Interpreter
from jaxquant.transform.masks import Mask
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.quantized import check_plan
from jaxquant.transform.statistics import Gram, Statistic
from jaxquant.transform.trace import trace
from jaxquant.transform.weights import ABSENT, Weight, dims_of

__all__ = ["in_order_of_use", "quantize_sequentially"]


def in_order_of_use(fn: Callable[..., PyTree], plan: Plan, params: Params, args: tuple[PyTree, ...]) -> list[str]:
    """The planned paths in the order in which the function meets them."""
    traced = trace("quantize_sequentially", fn, params, args, {})
    interpreter = Interpreter(planning=True)
    weights = [
        Weight(path, None, None, dims_of(tuple(leaf.shape)), leaf.dtype) if is_float(leaf) and leaf.size else ABSENT
        for path, leaf in traced.params.items()
    ]
    interpreter.run(traced.jaxpr, [*weights, *[ABSENT] * len(traced.arrays)])
    met = dict.fromkeys(use.path for use in interpreter.uses if use.path in plan)
    return [*met, *(path for path in plan if path not in met)]


def _staged(paths: Sequence[str], stages: Sequence[str] | None) -> list[list[str]]:
    """The paths of each stage: by the first pattern that matches, or each on its own."""
    if stages is None:
        return [[path] for path in paths]
    found: list[list[str]] = [[] for _ in stages]
    for path in paths:
        for pattern, members in zip(stages, found, strict=True):
            if re.search(pattern, path):
                members.append(path)
                break
        else:
            todo = "Add a pattern that matches it"
            raise quant_error("quantize_sequentially", "a planned weight is in no stage", todo=todo, path=path)
    empty = [pattern for pattern, members in zip(stages, found, strict=True) if not members]
    if empty:
        todo = "Leave it out, or correct it"
        raise quant_error("quantize_sequentially", "a stage has no planned weight", todo=todo, stage=empty[0])
    return found


def _later(progress: Callable[[int, int], object], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def quantize_sequentially(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    batches: Iterable[PyTree],
    *,
    method: str | Callable[..., QTensor] = gptq,
    stages: Sequence[str] | None = None,
    collect: Mapping[str, Statistic] | None = None,
    mask: Mask = None,
    on_stage: Callable[[Params, tuple[str, ...]], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Params:
    """`calibrate` and `quantize_params` in turns, so that each weight makes up for the errors of those before it.

    The weights of a stage are calibrated on the function with all earlier stages quantized (to real values: activations
    stay in float), then quantized. Each stage runs the batches once. The function is compiled once for all stages.

    Args:
      fn: the function that was planned.
      plan: from `make_plan`.
      params: its parameters. Weights that are QTensors already are kept and count as done, so that interrupted
        work continues from the params that ``on_stage`` has saved.
      batches: as for `calibrate`; kept in a list.
      method: the quantizer or its name, `jaxquant.ptq.gptq` by default.
      stages: patterns, searched in the paths: all weights for which a pattern is the first to match are one stage, in
        the order of the patterns. None: each weight is its own stage, in the order in which the function uses them.
        The layers of a stacked weight are always one stage.
      collect: the statistics the method needs; the Gram matrix by default.
      mask: which rows count, as for `calibrate`.
      on_stage: called after each stage with the params so far and the paths of the stage: to save them.
      progress: called after each weight with the numbers of finished weights (earlier runs included) and of all.

    Returns:
      The params, with `QTensor`s in place of the planned weights.

    Raises:
      QuantError: as `calibrate` and `quantize_params`; if stages leave a weight out or have none.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> fn = lambda p, x: jnp.tanh(x @ p["first"]) @ p["second"]
      >>> params = {"second": jnp.eye(8), "first": jnp.eye(8)}
      >>> x = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule(".*", recipes.w4a16(None))])
      >>> told = lambda params, paths: print(*paths)
      >>> qparams = jq.calibration.quantize_sequentially(fn, plan, params, [x], on_stage=told)
      first
      second

    Source: Frantar et al. 2023 (arXiv:2210.17323), section 4, where the stages are the blocks of a transformer.
    """
    batches = list(arguments("quantize_sequentially", batches, fn))
    mask = mask if mask is None or callable(mask) or hasattr(mask, "shape") else list(mask)
    if not batches:
        raise quant_error("quantize_sequentially", "there are no batches", todo="Pass at least one")
    leaves = leaves_with_paths(params)[0]
    check_plan("quantize_sequentially", plan, leaves)
    order = in_order_of_use(fn, plan, dequantize_params(params), batches[0])
    todo = [[p for p in stage if not isinstance(leaves[p], QTensor)] for stage in _staged(order, stages)]
    wanted = {"gram": Gram()} if collect is None else collect
    done = len(order) - sum(map(len, todo))
    todo = [paths for paths in todo if paths]
    items = {item.path: item for item in plan.items}
    rest = dataclasses.replace(plan, items=tuple(items[path] for paths in todo for path in paths), products=())
    calibration = Calibration("calibrate", fn, rest, wanted, todo)
    for paths in todo:
        part = dataclasses.replace(rest, items=tuple(items[path] for path in paths))
        stats = calibration(dequantize_params(params), batches, mask, paths)
        now, treedef = leaves_with_paths(params)
        told = None if progress is None else functools.partial(_later, progress, done, len(order))
        made = quantize_params(dequantize_params(params), part, method=method, stats=stats, progress=told)
        new, _ = leaves_with_paths(made)
        params = jax.tree.unflatten(treedef, [new[p] if p in paths else leaf for p, leaf in now.items()])
        done += len(paths)
        if on_stage is not None:
            on_stage(params, tuple(paths))
    return params

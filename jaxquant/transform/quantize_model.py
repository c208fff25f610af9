"""`quantize_model`: a function and its float params to a quantized model, in one call."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import Params, folded, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree, State
from jaxquant.core.units import in_bytes
from jaxquant.ops.targets import Platform, check_target
from jaxquant.ptq.named import QUANTIZERS
from jaxquant.recipes import recipe as named
from jaxquant.rules import OpRule, Rule
from jaxquant.transform.analysis.scales import scale_pairs
from jaxquant.transform.batches import arguments
from jaxquant.transform.calibrate import act_state, calibrate
from jaxquant.transform.distill import Distillation, distill, resumed
from jaxquant.transform.make_plan import check_all_rules, make_plan
from jaxquant.transform.methods import STEPS, Method, method_of
from jaxquant.transform.params import quantize_params
from jaxquant.transform.plan import Float, Plan
from jaxquant.transform.quantized import quantized
from jaxquant.transform.statistics import Gram, Statistic

__all__ = ["QuantizedModel", "Report", "quantize_model"]

_F = "quantize_model"


@dataclasses.dataclass(frozen=True)
class Report:
    """The quantized parameters and those in float; prints as a few lines.

    Attributes:
      quantized: how many weights are quantized.
      nbytes: true bytes of all parameters, before and after.
      floats: what stays in float, and why.
      notes: path -> what to know of a quantized weight, such as a use that runs on float values.
    """

    quantized: int
    nbytes: tuple[int, int]
    floats: tuple[Float, ...]
    notes: dict[str, str]

    def __str__(self) -> str:
        before, after = self.nbytes
        smaller = f", {before / after:.2f}x smaller" if after else ""
        weights = "1 weight" if self.quantized == 1 else f"{self.quantized} weights"
        lines = [f"{weights} quantized: {in_bytes(before)} -> {in_bytes(after)}{smaller}"]
        lines += [f"  {label}: {self.notes[paths[0]]}" for label, paths in folded(self.notes).items()]
        vectors = collections.Counter(f.reason for f in self.floats if len(f.shape) < 2)
        large = {f.path: (f.shape, f.reason) for f in self.floats if len(f.shape) >= 2}
        for label, paths in folded(large).items():
            shape, reason = large[paths[0]]
            lines.append(f"in float: {label} {list(shape)}: {reason}")
        lines += [f"in float: vectors and scalars ({n}): {reason}" for reason, n in vectors.items()]
        return "\n".join(map(printable, lines))


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """A quantized model: ``model.fn(model.params, ...)``; made by `quantize_model`.

    ``jq.io.save(path, model.params, plan=model.plan, state=model.state)`` saves all that it takes to run again.

    Attributes:
      fn: the function of params and arguments, in low precision; jit it.
      params: the tree, with `QTensor`s in place of the weights.
      plan: what is quantized how; prints as a table.
      state: static activation ranges; None if the recipe has none.
      report: what was quantized, what stayed in float and why; print it.
    """

    fn: Callable[..., PyTree]
    params: Params
    plan: Plan
    state: State | None
    report: Report


def quantize_model(
    fn: Callable[..., PyTree],
    params: Params,
    *args: PyTree,
    recipe: str | OpSpec | Sequence[Rule | OpRule],
    method: str | Callable[..., QTensor] | None = None,
    batches: Iterable[PyTree] | None = None,
    ignore: Sequence[str] = (),
    misfit: Literal["per_channel", "float"] | None = None,
    target: Platform | None = None,
    distillation: Distillation | None = None,
    **kwargs: PyTree,
) -> QuantizedModel:
    """Plans, calibrates and quantizes in one call: `make_plan`, `calibrate`, `quantize_params`, `quantized`.

    Args:
      fn: any JAX function whose argument 0 is a pytree of parameters, such as ``model.apply`` of Flax Linen or Haiku.
      params: float parameters; they are not changed.
      *args, **kwargs: further arguments of ``fn``, arrays or shapes, to trace it with. Without any, those of the first
        batch.
      recipe: the name of a recipe (see `jaxquant.recipes.recipe`), an `OpSpec`, or rules for `make_plan`. A name or an
        OpSpec is for all weights.
      method: how codes are chosen: the name of a quantizer of `jaxquant.ptq` (``"gptq"``), or a quantizer. ``"awq"``
        and ``"smoothquant"`` move scales between parameters first, then round to nearest; ``"awq+gptq"`` rounds by
        gptq. None: round to nearest.
      batches: what to calibrate on, for methods that look at inputs and for static ranges: each batch a tuple of
        ``fn``'s further arguments, or a single array. ``fn`` is given ``kwargs`` there too.
      ignore: patterns; weights in whose path one is found stay in float.
      misfit: what becomes of a weight whose size no group divides; see `Rule`. None: it is an error.
      target: the platform that the codes will be read on; see `quantize_params`.
      distillation: tunes scales and vectors on the batches after the method, until the outputs are those of the float
        function; see `jaxquant.calibration.Distillation`. It reports after each step and goes on where it was stopped.

    Returns:
      A `QuantizedModel`.

    Raises:
      QuantError: if there is no such recipe or method; if batches are missing, or given and read by nothing; and as
        `make_plan`, `calibrate` and `quantize_params`. All names are checked before the function is traced.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"] + p["bias"]
      >>> params = {"up": jnp.ones((64, 128)), "down": jnp.ones((128, 64)), "bias": jnp.zeros((1, 64))}
      >>> model = jq.quantize_model(fn, params, jnp.ones((1, 64)), recipe="w4a16:g64")
      >>> print(model.report)
      2 weights quantized: 64.2 KiB -> 9.2 KiB, 6.95x smaller
      in float: bias [1, 64]: added, not contracted
      >>> y = jax.jit(model.fn)(model.params, jnp.ones((1, 64)))
    """
    rules = _rules(recipe, ignore, misfit)
    chosen = method_of(_F, method)
    check_target(_F, target)
    _check_function(fn)
    if distillation is not None and not isinstance(distillation, Distillation):
        todo = "Use jq.calibration.Distillation(optax.adam(1e-3))"
        raise quant_error(_F, "distillation must be a Distillation", todo=todo, distillation=distillation)
    run = functools.partial(fn, **kwargs) if kwargs else fn
    seen = None if batches is None else list(arguments(_F, batches, run))
    if not args and seen:
        args = seen[0]
    plan = make_plan(fn, params, *args, rules=rules, **kwargs)
    static = any(item.spec.act is not None and item.spec.act.static for item in plan.items)
    steps, looks = chosen.steps, chosen.looks
    _check_batches(seen, chosen, static, distillation)
    teacher = params
    resume = None if distillation is None else distillation.resume
    begun = None if resume is None else resumed(_F, resume, params)
    if begun is not None:
        steps, looks = (steps if static else ()), False  # static ranges are those of the scaled activations
    for name in steps:
        move, collect = STEPS[name]
        pairs = scale_pairs(fn, plan, params, *args, **kwargs)
        if not pairs:
            todo = "Use another method, or scale the inputs: jq.invariances.precondition"
            raise quant_error(_F, f"{name} finds no scales that could move in this function", todo=todo, method=name)
        params = move(params, plan, pairs, calibrate(run, plan, params, seen or (), collect=collect))
    stats = None
    if seen is not None and (looks is not False or static):
        wanted: dict[str, Statistic] = {} if looks is False else {"gram": Gram()}
        stats = calibrate(run, plan, params, seen, collect=wanted)
    state = act_state(plan, stats) if static and stats is not None else None
    if begun is None:
        stats = None if looks is False else stats
        made = quantize_params(params, plan, method=chosen.quantizer, stats=stats, target=target)
    else:
        made = begun
    if distillation is not None:
        made = _distilled(distillation, run, plan, teacher, made, seen or [], state)
    return QuantizedModel(quantized(fn, plan, state), made, plan, state, _report(plan, made))


def _distilled(
    how: Distillation,
    fn: Callable[..., PyTree],
    plan: Plan,
    teacher: Params,
    made: Params,
    batches: list[PyTree],
    state: State | None,
) -> Params:
    """The quantized parameters after all steps of a distillation."""
    steps = distill(
        fn, plan, teacher, made, batches * how.epochs, how.tx,
        loss=how.loss, floats=how.floats, state=state, resume=how.resume,
    )  # fmt: skip
    for done in steps:
        made = done.params
        if how.progress is not None:
            how.progress(done)
    return made


def _rules(
    recipe: str | OpSpec | Sequence[Rule | OpRule],
    ignore: Sequence[str],
    misfit: Literal["per_channel", "float"] | None,
) -> list[Rule | OpRule]:
    if isinstance(ignore, str):
        raise quant_error(_F, "ignore must be a sequence of patterns", todo=f"Pass [{ignore!r}]", ignore=ignore)
    kept: list[Rule | OpRule] = [Rule(pattern, None) for pattern in ignore]
    if isinstance(recipe, str) and recipe in (*QUANTIZERS, *STEPS):
        todo = f"Pass a recipe for the types, and the method beside it: recipe='w4a16', method={recipe!r}"
        raise quant_error(_F, "this is a method, which chooses codes of given types", todo=todo, recipe=recipe)
    if isinstance(recipe, str | OpSpec):
        return [*kept, Rule(".*", named(recipe), misfit=misfit)]
    if misfit is not None:
        todo = "Say it in the rules: Rule(pattern, spec, misfit=...)"
        raise quant_error(_F, "misfit is for a recipe, and here are rules", todo=todo, misfit=misfit)
    if not isinstance(recipe, Sequence):
        named(recipe)  # says what a recipe may be
    return [*kept, *check_all_rules(_F, recipe)]


def _check_function(fn: object) -> None:
    if not callable(fn) or (hasattr(fn, "apply") and hasattr(fn, "init")):
        todo = "Pass a function of params: model.apply of Flax Linen and Haiku. For NNX: "
        todo += "graph, params = nnx.split(model); fn = lambda params, x: nnx.merge(graph, params)(x)"
        raise quant_error(_F, "fn must be a function of params", todo=todo, fn=type(fn).__name__)


def _check_batches(
    batches: list[PyTree] | None, method: Method, static: bool, distillation: Distillation | None
) -> None:
    """Raises if batches are missing, or nobody would look at them; of a method of the user's own only it can say."""
    todo = "Pass batches=[x, ...]: each the tuple of fn's further arguments, or one array"
    todo += "" if batches is None else "; a generator is used up by one pass"
    if distillation is not None:
        if not batches:
            raise quant_error(_F, "a model is distilled on batches", todo=todo, batches=batches)
        return
    last = [getattr(method.quantizer, "__name__", "the method")] if method.looks else []
    who = "+".join([*method.steps, *last])
    if not batches and (who or static):
        rule = f"{who} looks at inputs" if who else "static activation ranges come from inputs"
        raise quant_error(_F, rule, todo=todo, batches=batches)
    if batches is not None and method.looks is False and not method.steps and not static:
        todo = "Leave batches out, or use a method that looks at inputs, such as method='gptq', or a static recipe, or "
        todo += "a distillation"
        raise quant_error(_F, "nothing here looks at the batches", todo=todo, batches=len(batches))


def _report(plan: Plan, made: Params) -> Report:
    leaves, _ = leaves_with_paths(made)
    rest = sum(f.nbytes for f in plan.floats)
    before = sum(item.nbytes[0] for item in plan.items) + rest
    after = sum(leaves[item.path].nbytes for item in plan.items) + rest
    return Report(len(plan.items), (before, after), plan.floats, {i.path: i.note for i in plan.items if i.note})

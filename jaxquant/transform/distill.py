"""`distill`: quantized parameters tuned until the function's outputs are those of the float one again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Leaf, Params, is_qtensor, leaves_with_paths
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree, State, TreeDef
from jaxquant.transform.masks import Counted, Mask, masked, with_masks
from jaxquant.transform.params import dequantize_params
from jaxquant.transform.plan import Plan, is_float
from jaxquant.transform.quantized import check_plan, quantized

__all__ = ["Distillation", "Distilled", "distill", "relative_error", "resumed"]


class Optimizer(Protocol):
    """An Optax transformation of gradients."""

    def init(self, params: PyTree, /) -> PyTree:
        """The state before any step."""
        ...

    def update(self, updates: PyTree, state: PyTree, params: PyTree, /) -> tuple[PyTree, PyTree]:
        """The changes of the parameters, and the state after this step."""
        ...


class Distilled(NamedTuple):
    """The result of `distill` after each batch.

    Attributes:
      params: the quantized parameters, as tuned so far.
      loss: of this batch, before its step; an array, so that reading it is what waits for it.
      step: how many batches there have been.
      seconds: since the first of this run.
      resume: what ``distill(resume=...)`` goes on from: a tree of arrays and QTensors, ``params`` among them, which
        `jaxquant.io.save` writes and `jaxquant.io.load` reads. Saving it is what costs; making it does not.
    """

    params: Params
    loss: jax.Array
    step: int
    seconds: float
    resume: dict[str, PyTree]


def relative_error(outputs: PyTree, targets: PyTree) -> jax.Array:
    """``sum |y - t|^2 / sum |t|^2`` over all float arrays of two trees."""
    pairs = [(y, t) for y, t in zip(jax.tree.leaves(outputs), jax.tree.leaves(targets), strict=True) if is_float(t)]
    error = sum(jnp.sum((y - t).astype(jnp.float32) ** 2) for y, t in pairs)
    return error / jnp.maximum(sum(jnp.sum(t.astype(jnp.float32) ** 2) for _, t in pairs), 1e-30)


def _is_vector(path: str, leaf: jax.Array) -> bool:
    return max(leaf.shape, default=1) == leaf.size


def distill(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    qparams: Params,
    batches: Iterable[PyTree],
    tx: Optimizer,
    *,
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_error,
    floats: Callable[[str, jax.Array], bool] = _is_vector,
    mask: Mask = None,
    state: State | None = None,
    resume: Mapping[str, PyTree] | None = None,
) -> Iterator[Distilled]:
    """Trains what is real in quantized parameters: scales, and the vectors beside them (biases, gains of norms).

    ``min over scales and vectors of loss(quantized fn, float fn)``, one step of ``tx`` for each batch. Codes and zero
    points stay as they are, so the result is as large as before and runs as fast. No labels are needed, only inputs.
    A generator: take as many steps as you like, keep the last ``params``, stop at any time.

    Args:
      fn: the function that was planned.
      plan: its plan.
      params: the float parameters, whose outputs are the targets.
      qparams: what `quantize_params` made of them, by any method.
      batches: for each step the tuple of fn's further arguments (a single array stands for a tuple of one).
      tx: an Optax transformation.
      loss: ``(outputs, targets) -> scalar``.
      floats: ``(path, leaf) -> bool``: which float leaves train; by default those with one axis longer than 1.
      mask: which rows of the outputs count, as for `calibrate`: outputs and targets are 0 in all others before the loss
        sees them. Every float output begins with the mask's axes.
      state: static ranges of activations, as for `quantized`; they stay as they are.
      resume: `Distilled.resume` of a run that was stopped; ``qparams`` are then its ``resume["params"]``, and all else
        is as it was: batches that were seen are passed over.

    Yields:
      `Distilled` after each step.

    Raises:
      QuantError: if parameters do not fit the plan, nothing can be trained, or ``resume`` is of another run.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq, optax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros((1, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (32, 8))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", jq.OpSpec(jq.QuantSpec("int3")))])
      >>> qparams = jq.quantize_params(params, plan)
      >>> *_, last = jq.calibration.distill(fn, plan, params, qparams, [x] * 50, optax.adam(0.02))
      >>> error = lambda q: float(relative_error(fn(jq.dequantize_params(q), x), fn(params, x)))
      >>> error(last.params) < 0.9 * error(qparams)
      True

    Source: Chen et al. 2024 (EfficientQAT, arXiv:2407.11062), section 3.3, trains scales end to end; Esser et al. 2020
      (arXiv:1902.08153) for steps as parameters. Here the targets are the float model's outputs.
    """
    check_plan("distill", plan, leaves_with_paths(qparams)[0])
    train, rest, treedef = _parts(plan, qparams, floats)
    weight_only = not plan.products and all(item.spec.act is None for item in plan.items)
    run = quantized(fn, plan, state)
    opt_state, before = tx.init(train), 0
    if resume is not None:
        train, opt_state, before = _where_it_was(resume, train, opt_state)

    def together(train: dict[str, jax.Array], rest: dict[str, Leaf]) -> Params:
        leaves = {}
        for path, leaf in rest.items():
            leaves[path] = train.get(path, leaf)
            if isinstance(leaf, QTensor) and path in train:
                leaves[path] = _with_scale(leaf, jnp.exp(train[path]))
        return jax.tree.unflatten(treedef, leaves.values())

    def objective(
        train: dict[str, jax.Array], rest: dict[str, Leaf], args: tuple[PyTree, ...], targets: PyTree, counted: Counted
    ) -> jax.Array:
        new = together(train, rest)
        outputs = fn(dequantize_params(new), *args) if weight_only else run(new, *args)
        return loss(*masked("distill", counted, outputs, targets))

    @jax.jit
    def step(
        train: dict[str, jax.Array],
        opt_state: PyTree,
        rest: dict[str, Leaf],
        params: Params,
        args: tuple[PyTree, ...],
        counted: Counted,
    ) -> tuple[dict[str, jax.Array], PyTree, jax.Array]:
        value, grads = jax.value_and_grad(objective)(train, rest, args, fn(params, *args), counted)
        updates, opt_state = tx.update(grads, opt_state, train)
        return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), train, updates), opt_state, value

    start = time.perf_counter()
    for number, (args, counted) in enumerate(with_masks("distill", batches, mask, fn), 1):
        if number <= before:
            continue
        train, opt_state, value = step(train, opt_state, rest, params, args, counted)
        made = together(train, rest)
        kept = {"params": made, "train": train, "optimizer": jax.tree.leaves(opt_state), "step": jnp.int32(number)}
        yield Distilled(made, value, number, time.perf_counter() - start, kept)


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How `quantize_model` tunes what a method gives: the settings of `distill`.

    Attributes:
      tx: an Optax transformation.
      epochs: how often the batches are gone through, one step for each.
      loss: ``(outputs, targets) -> scalar``, such as `jaxquant.qat.distillation_loss` for a function of logits.
      floats: ``(path, leaf) -> bool``: which float leaves train beside the scales.
      progress: is called with `Distilled` after each step: to print a bar, and to save ``done.resume`` now and then.
      resume: the saved state; None: a new run. With it neither calibration for the method nor the method runs.

    Raises:
      QuantError: if there is no optimizer, or ``epochs`` is no number above 0.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq, optax
      >>> fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"])
      >>> params = {"w": jax.random.normal(jax.random.key(0), (16, 4)), "b": jnp.zeros((1, 4))}
      >>> x, losses = jax.random.normal(jax.random.key(1), (32, 16)), []
      >>> how = jq.calibration.Distillation(optax.adam(0.02), epochs=50, progress=lambda d: losses.append(d.loss))
      >>> model = jq.quantize_model(fn, params, recipe="w4a16:g16", method="gptq", batches=[x], distillation=how)
      >>> len(losses), bool(losses[-1] < losses[0])
      (50, True)
    """

    tx: Optimizer
    epochs: int = 1
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_error
    floats: Callable[[str, jax.Array], bool] = _is_vector
    progress: Callable[[Distilled], object] | None = None
    resume: Mapping[str, PyTree] | None = None

    def __post_init__(self):
        if not callable(getattr(self.tx, "init", None)) or not callable(getattr(self.tx, "update", None)):
            todo = "Pass for example optax.adam(1e-3)"
            raise quant_error("Distillation", "tx must be an Optax transformation", todo=todo, tx=self.tx)
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            todo = "Use for example 4"
            raise quant_error("Distillation", "epochs must be an integer above 0", todo=todo, epochs=self.epochs)


_KEPT = ("optimizer", "params", "step", "train")


def resumed(function: str, resume: object, params: Params) -> Params:
    """The saved quantized parameters, in the containers of ``params``."""
    if not isinstance(resume, Mapping) or tuple(sorted(resume)) != _KEPT:
        keys = tuple(sorted(map(str, resume))) if isinstance(resume, Mapping) else type(resume).__name__
        todo = "Pass Distilled.resume, or what jq.io.load read of it"
        raise quant_error(function, "there is nothing to go on from in resume", todo=todo, resume=keys)
    leaves, treedef = leaves_with_paths(params)
    found = leaves_with_paths(resume["params"])[0]
    if set(found) != set(leaves):
        todo = "Pass the params that the run began with"
        odd = tuple(sorted(set(found) ^ set(leaves)))[:4]
        raise quant_error(function, "resume is of other parameters", todo=todo, paths=odd)
    return jax.tree.unflatten(treedef, [found[path] for path in leaves])


def _where_it_was(
    resume: Mapping[str, PyTree], train: dict[str, jax.Array], opt_state: PyTree
) -> tuple[dict[str, jax.Array], PyTree, int]:
    """The trained values, the optimizer's state and the number of steps of an interrupted run."""
    todo = "Go on with the arguments that it began with, and qparams=resume['params']"
    resumed("distill", resume, resume.get("params") if isinstance(resume, Mapping) else None)
    old, kept = resume["train"], jax.tree.leaves(resume["optimizer"])
    leaves, treedef = jax.tree.flatten(opt_state)
    same = [(jnp.shape(a), jnp.result_type(a)) for a in kept] == [(jnp.shape(a), jnp.result_type(a)) for a in leaves]
    if set(old) != set(train) or not same:
        odd = tuple(sorted(set(old) ^ set(train)))[:4]
        raise quant_error("distill", "resume is of a run with another optimizer or plan", todo=todo, paths=odd)
    for path, value in old.items():
        if value.shape != train[path].shape or not bool(jnp.allclose(value, train[path], rtol=1e-2, atol=1e-2)):
            raise quant_error("distill", "qparams differ from the parameters in resume", todo=todo, path=path)
    return dict(old), jax.tree.unflatten(treedef, map(jnp.asarray, kept)), int(resume["step"])


def _parts(
    plan: Plan, qparams: Params, floats: Callable[[str, jax.Array], bool]
) -> tuple[dict[str, jax.Array], dict[str, Leaf], TreeDef]:
    """The trained values (scales by their logarithms), all leaves, and the treedef."""
    leaves, treedef = leaves_with_paths(qparams)
    train: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        if is_qtensor(leaf):
            scale = leaf.scale
            if not isinstance(scale, QTensor) and scale.dtype.itemsize >= 2 and bool(jnp.all(scale > 0)):
                train[path] = jnp.log(scale.astype(jnp.float32))
        elif is_float(leaf) and path not in plan and floats(path, leaf):
            train[path] = jnp.asarray(leaf)
    if not train:
        todo = "Pass floats=..., or quantize with scales of 16 bits or more"
        raise quant_error("distill", "there is nothing to train", todo=todo, leaves=len(leaves))
    return train, leaves, treedef


def _with_scale(q: QTensor, scale: jax.Array) -> QTensor:
    new = jax.tree.unflatten(jax.tree.structure(q), jax.tree.leaves(q))
    new.scale = scale.astype(q.scale.dtype)
    return new

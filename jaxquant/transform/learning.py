"""`learn_rotations`: orthogonal matrices that make a quantized function's outputs those of the float one."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxquant.core.blocks import BlockView, block_shape
from jaxquant.core.errors import quant_error
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.paths import Params, leaves_with_paths
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.ptq.bases import Orthogonal
from jaxquant.transform.analysis.rotations import RotationGroup
from jaxquant.transform.change_of_basis import precondition, precondition_params
from jaxquant.transform.distill import relative_error
from jaxquant.transform.folding import rotate
from jaxquant.transform.interpreter import Interpreter
from jaxquant.transform.masks import Counted, Mask, masked, with_masks
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import check_plan, weights_of
from jaxquant.transform.trace import trace
from jaxquant.transform.weights import Weight, as_array

__all__ = ["LearnedRotations", "cayley", "learn_rotations"]

Place = RotationGroup | str
Key = TypeVar("Key", bound=Place)


class LearnedRotations(NamedTuple):
    """The result of `learn_rotations` after each batch.

    Attributes:
      matrices: place -> orthogonal matrix, as learned so far.
      loss: of this batch, before its step; an array, so that reading it is what waits for it.
      step: how many batches there have been.
      seconds: since the first.
    """

    matrices: dict[Place, jax.Array]
    loss: jax.Array
    step: int
    seconds: float


def cayley(matrix: jax.Array, skew: jax.Array) -> jax.Array:
    """``(I + A / 2)^-1 (I - A / 2) R``: the orthogonal matrix R turned against the skew matrix A, orthogonal again.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant.transform.learning import cayley
      >>> r = cayley(jnp.eye(2), jnp.array([[0.0, 2.0], [-2.0, 0.0]]))
      >>> bool(jnp.allclose(r, jnp.array([[0.0, -1.0], [1.0, 0.0]]), atol=1e-6))
      True

    Source: Li et al. 2020 (arXiv:2002.01113), equation 3.
    """
    half, eye = skew / 2, jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    turned = jnp.linalg.solve(eye + half, jnp.matmul(eye - half, matrix, precision="highest"))
    # One step of Newton's iteration squares the departure from orthogonality that rounding leaves.
    gram = jnp.matmul(turned.T, turned, precision="highest")
    return jnp.matmul(turned, 1.5 * eye - gram / 2, precision="highest")


class _State(NamedTuple):
    """Running means of the skew gradient [n, n], and of its mean square."""

    mean: jax.Array
    square: jax.Array


def _with_range(x: jax.Array, spec: QuantSpec, axes: tuple[int, ...]) -> jax.Array:
    """Quantized and dequantized; its error is a fraction of the range, through which it has a gradient."""
    block = block_shape(tuple(x.shape), spec.granularity, tuple(a - x.ndim for a in axes))
    view = BlockView(tuple(x.shape), block)
    v = view.split(x)
    if spec.symmetric:
        size = jnp.max(jnp.abs(v), axis=view.axes, keepdims=True)
    else:
        size = jnp.max(v, axis=view.axes, keepdims=True) - jnp.min(v, axis=view.axes, keepdims=True)
    error = jax.lax.stop_gradient(view.split(fake_quant(x, spec, reduce_axes=axes)) - v)
    fraction = jax.lax.stop_gradient(error / jnp.where(size > 0, size, 1))
    return view.join(v + size * fraction)


def _weight(spec: QuantSpec, axes: tuple[int, ...], w: jax.Array) -> jax.Array:
    return _with_range(w, spec, tuple(a % w.ndim for a in axes))


def _rounding(fn: Callable[..., PyTree], plan: Plan) -> Callable[..., PyTree]:
    """`quantized`, with float parameters and those gradients."""

    bare = Plan(tuple(dataclasses.replace(item, spec=OpSpec()) for item in plan.items))

    def entering(weight: Weight, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        spec = plan[weight.path].spec.act
        return x if spec is None else _with_range(x, spec, tuple(a % x.ndim for a in axes))

    def run(params: Params, *args: PyTree) -> PyTree:
        leaves, treedef = leaves_with_paths(params)
        check_plan("learn_rotations", plan, leaves)
        for item in plan.items:
            spec = item.spec.weight
            if spec is not None:
                one = functools.partial(_weight, spec, item.reduce_axes)
                leaves[item.path] = item.stack(one)(leaves[item.path])
        traced = trace("learn_rotations", fn, jax.tree.unflatten(treedef, leaves.values()), args, {})
        results = Interpreter(bare, entering=entering).run(traced.jaxpr, weights_of(traced, bare, None))
        return traced.rebuild([r.real() if isinstance(r, Weight) else as_array(r) for r in results])

    return run


def learn_rotations(
    fn: Callable[..., PyTree],
    plan: Plan,
    params: Params,
    matrices: Mapping[Key, jax.Array],
    batches: Iterable[PyTree],
    *,
    rate: float = 0.02,
    loss: Callable[[PyTree, PyTree], jax.Array] = relative_error,
    mask: Mask = None,
) -> Iterator[LearnedRotations]:
    """Turns orthogonal matrices, fused or online, so that the quantized function does what the float one does.

    ``min over R of loss(quantized fn of params turned by R, fn of params)``, over inputs without labels. Rounding
    passes its gradient on to the rounded value and to its range, of which the error is a fixed fraction. So training
    mostly finds a basis in which ranges are small where errors matter.

    With G the gradient in R, ``A = G R^T - R G^T`` is how R should turn. Running means of it, in units of their root
    mean square, go into a Cayley step, after which R is orthogonal again. A generator: take as many steps as you like,
    keep the last ``matrices``, stop at any time.

    Args:
      fn: the function that was planned.
      plan: its plan; its specs are what is learned for.
      params: its float parameters.
      matrices: where each matrix goes, and where it starts: a `RotationGroup` (fused by `rotate`; from
        `rotation_groups`), or the path of a planned weight (online: an `Orthogonal` basis for `precondition`).
      batches: for each the tuple of fn's further arguments (a single array stands for a tuple of one).
      rate: by how much a matrix turns in a step: the root mean square of the angles, about.
      loss: ``(outputs, float outputs) -> scalar``; by default the relative squared error.
      mask: which rows of the outputs count, as for `calibrate`: outputs and targets are 0 in all others before the loss
        sees them. Every float output begins with the mask's axes.

    Yields:
      `LearnedRotations` after each batch.

    Raises:
      QuantError: if there are no matrices, one does not fit its place, or params do not fit the plan.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant as jq
      >>> fn = lambda p, x: x @ p["w"]
      >>> params = {"w": jax.random.t(jax.random.key(0), 2.0, (8, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (64, 8)) * jnp.arange(1.0, 9.0)[None]
      >>> spec = jq.OpSpec(jq.QuantSpec("int3"), jq.QuantSpec("int3"))
      >>> plan = jq.make_plan(fn, params, x, rules=[jq.Rule("w", spec)])
      >>> first, *_, last = jq.invariances.learn_rotations(fn, plan, params, {"w": jnp.eye(8)}, [x] * 20, rate=0.1)
      >>> float(last.loss) < 0.7 * float(first.loss)
      True

    Source: Liu et al. 2024 (SpinQuant, arXiv:2405.16406), which learns on the task's loss; the Cayley step is that of
      Li et al. 2020 (arXiv:2002.01113), the running means those of Adam, with one mean square for each matrix.
    """
    if not matrices:
        todo = "Pass {group: group.random(key)}, or {path: matrix}"
        raise quant_error("learn_rotations", "there is nothing to learn", todo=todo, matrices=dict(matrices))

    def objective(
        matrices: dict[Place, jax.Array], new: Params, args: tuple[PyTree, ...], targets: PyTree, counted: Counted
    ) -> jax.Array:
        online = {p: Orthogonal(m) for p, m in matrices.items() if isinstance(p, str)}
        for place, matrix in matrices.items():
            if isinstance(place, RotationGroup):
                new = rotate(new, place, matrix)
        run = fn
        if online:
            run, new = precondition(fn, plan, online), precondition_params(new, plan, online)
        return loss(*masked("learn_rotations", counted, _rounding(run, plan)(new, *args), targets))

    places = list(matrices)

    @jax.jit
    def step(
        number: jax.Array,
        now: list[jax.Array],
        states: list[_State],
        params: Params,
        args: tuple[PyTree, ...],
        counted: Counted,
    ) -> tuple[list[jax.Array], list[_State], jax.Array]:
        targets = fn(params, *args)
        split = lambda ms: objective(dict(zip(places, ms, strict=True)), params, args, targets, counted)  # noqa: E731
        value, gradients = jax.value_and_grad(split)(now)
        moved = [_turned(m, g, s, number, rate) for m, g, s in zip(now, gradients, states, strict=True)]
        return [m for m, _ in moved], [s for _, s in moved], value

    now = [jnp.asarray(matrices[place], jnp.float32) for place in places]
    states, start = [_State(jnp.zeros_like(m), jnp.zeros(())) for m in now], time.perf_counter()
    for number, (args, counted) in enumerate(with_masks("learn_rotations", batches, mask, fn), 1):
        now, states, value = step(jnp.float32(number), now, states, params, args, counted)
        yield LearnedRotations(dict(zip(places, now, strict=True)), value, number, time.perf_counter() - start)


def _turned(
    matrix: jax.Array, gradient: jax.Array, state: _State, number: jax.Array, rate: float
) -> tuple[jax.Array, _State]:
    skew = jnp.matmul(gradient, matrix.T, precision="highest")
    skew = skew - skew.T
    state = _State(0.9 * state.mean + 0.1 * skew, 0.99 * state.square + 0.01 * jnp.mean(skew**2))
    mean, square = state.mean / (1 - 0.9**number), state.square / (1 - 0.99**number)
    size = jnp.sqrt(square * len(matrix))  # the root mean square of the lengths of rows: of the angles of a step
    return cayley(matrix, rate * mean / jnp.where(size > 0, size, 1)), state

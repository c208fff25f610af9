"""The ``scale_by_*`` of quantized optimizers: transformations of gradients, which Optax chains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params, is_qtensor, path_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.ops.kernels.tpu.undivided import if_undivided
from jaxquant.optim.moments import EIGHT_BITS, Storage, StoredMoment, as_form, as_parameter, real, stored
from jaxquant.optim.one_pass import (
    Arithmetic,
    Arrays,
    Moment,
    Numbers,
    Step,
    Stepped,
    fits,
    hoisted,
    in_one_pass,
    of_elements,
)

__all__ = [
    "State",
    "checked",
    "scale_by_adagrad8bit",
    "scale_by_adam8bit",
    "scale_by_ademamix8bit",
    "scale_by_lion8bit",
    "scale_by_momentum8bit",
    "scale_by_rms8bit",
]


class State(NamedTuple):
    """The state of a quantized optimizer.

    Attributes:
      count: steps done.
      moments: name -> tree in the structure of the parameters, of `QTensor`s, and float32 arrays for exempt parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]  # Optax names it so, in its tuples too
    moments: dict[str, PyTree]


Rule = Callable[[jax.Array], Step]
_Result = tuple[jax.Array, Sequence[StoredMoment]]


def checked(function: str, storage: Storage | None = None, **values: Any) -> None:
    """Refuses decays outside [0, 1), and negative values of other numbers; traced arrays are not checked."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer) or (name == "learning_rate" and callable(value)):
            continue
        got: dict[str, Any] = {name: value}
        try:
            number = None if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = None
        if number is None:
            raise quant_error(function, f"{name} must be a number", todo="Use the default", **got)
        if name.startswith("b") or name == "momentum":
            if not 0 <= number < 1:
                raise quant_error(function, f"{name} must be in [0, 1)", todo="Use for example 0.9", **got)
        elif not 0 <= number < float("inf"):
            raise quant_error(function, f"{name} must be finite and not negative", todo="Use the default", **got)
    if storage is not None and not isinstance(storage, Storage):
        todo = "Use optim.Storage(...), optim.EIGHT_BITS or optim.FOUR_BITS"
        raise quant_error(function, "storage must be a Storage", todo=todo, storage=storage)


def _in_float32(*values: Any) -> list[Any]:
    """Hyperparameters that are arrays, in float32: `optax.inject_hyperparams` gives them in the parameters' dtype."""
    return [value.astype(jnp.float32) if isinstance(value, jax.Array) else value for value in values]


def _stepped(step: Step, g: jax.Array, moments: Sequence[StoredMoment]) -> _Result:
    """The update of one parameter in its dtype, and its moments in stored form."""

    def plain(step: Callable[..., Stepped], scalars: Arrays, g: jax.Array, moments: Sequence[StoredMoment]) -> _Result:
        update, becomes = step(*scalars, g.astype(jnp.float32), *(real(m, g.shape) for m in moments))
        return update.astype(g.dtype), [stored(x, m) for x, m in zip(becomes, moments, strict=True)]

    exact = functools.partial(of_elements, step)
    if not fits(moments) or g.dtype not in (jnp.float32, jnp.bfloat16):
        return plain(exact, (), g, moments)

    def on_tpu(g: jax.Array, moments: Sequence[QTensor]) -> _Result:
        form = moments[0].shape
        kernel = in_one_pass(step, jax.ShapeDtypeStruct(form, g.dtype), moments)
        element = jax.ShapeDtypeStruct(g.shape, jnp.float32)
        whole = hoisted(exact, element, *(element,) * len(moments))
        if any(x.dtype != jnp.float32 or x.shape for x in (*whole.scalars, *kernel.scalars)):
            return plain(exact, (), g, moments)
        leaves, tree = jax.tree.flatten((whole.scalars, g, moments))

        def divided(*leaves: jax.Array) -> _Result:
            return plain(whole.function, *jax.tree.unflatten(tree, leaves))

        def undivided(*leaves: jax.Array) -> _Result:
            scalars, g, moments = jax.tree.unflatten(tree, leaves)
            update, moments = kernel.function(*scalars, as_form(g, form), moments)
            return as_parameter(update, g.shape), moments

        return if_undivided(undivided, divided, *leaves)

    return jax.lax.platform_dependent(g, moments, tpu=on_tpu, default=functools.partial(plain, exact, ()))


def _scale_by(signs: dict[str, bool], rule: Rule, storage: Storage) -> optax.GradientTransformation:
    """The transformation of a rule, which makes of the number of a step t the function
    ``(g, *moments) -> (update, moments)`` of elements of one parameter in float32.

    ``signs`` maps the names of the moments, in the rule's order, to whether they have both signs.
    """

    def init(params: Params) -> State:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
        for keys, p in leaves:
            if is_qtensor(p) or not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                todo = "Wrap the optimizer in qat.freeze_quantized, or leave the parameter out"
                path = path_of(keys)
                raise quant_error("optim", "only float parameters train", todo=todo, path=path, parameter=p)
        moments = {
            name: treedef.unflatten([storage.zeros(jnp.asarray(p), path_of(keys), signed=s) for keys, p in leaves])
            for name, s in signs.items()
        }
        return State(jnp.zeros((), jnp.int32), moments)

    def update(updates: PyTree, state: PyTree, params: Params = None) -> tuple[PyTree, State]:
        del params
        count: Any = optax.safe_increment(state.count)
        leaves, treedef = jax.tree.flatten(updates)
        old = [treedef.flatten_up_to(state.moments[name]) for name in signs]
        found = [
            _stepped(rule(count.astype(jnp.float32)), g, moments) for g, *moments in zip(leaves, *old, strict=True)
        ]
        steps, new = [step for step, _ in found], [moments for _, moments in found]
        kept = {name: treedef.unflatten([each[i] for each in new]) for i, name in enumerate(signs)}
        return treedef.unflatten(steps), State(count, kept)

    return optax.GradientTransformation(init, update)


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, storage: Storage = EIGHT_BITS
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with quantized moments.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    The update uses the moments before they are rounded; the next step starts from the rounded ones.

    Args:
      b1, b2: decay of the moments.
      eps: added to the root.
      storage: how the moments are stored.

    Returns:
      An `optax.GradientTransformation`, whose state is a `State` with the moments ``m`` and ``v``.

    Raises:
      QuantError: if a decay is not in [0, 1), or eps is negative; from ``init``, naming the leaf, if a parameter is not
        a float array.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxquant import optim
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), optim.scale_by_adam8bit(), optax.scale(-1e-3))
      >>> tx.init({"w": jnp.ones((64, 128))})[1].moments["v"]["w"]
      QTensor(udynamic8[64, 128] -> float32, group 2 x 128 on axes -2, -1, symmetric, 8.1 KiB)

    Source: Dettmers et al. 2022 (arXiv:2110.02861).
    """
    checked("scale_by_adam8bit", storage, b1=b1, b2=b2, eps=eps)
    b1, b2, eps = _in_float32(b1, b2, eps)

    def rule(t: jax.Array) -> Step:
        of_m, of_v = 1 - b1**t, jnp.sqrt(1 - b2**t)

        def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
            m, v = new
            return f.over(m / (of_m / units[0]), f.root(v) / (of_v / jnp.sqrt(units[1])) + eps)

        return Step((Moment(b1, 1 - b1), Moment(b2, 1 - b2, squared=True)), update)

    return _scale_by({"m": True, "v": False}, rule, storage)


def scale_by_lion8bit(
    b1: float = 0.9, b2: float = 0.99, *, storage: Storage = EIGHT_BITS
) -> optax.GradientTransformation:
    """`optax.scale_by_lion` with a quantized moment: ``u = sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g``.

    Args, Returns, Raises: as `scale_by_adam8bit`; the moment is ``m``.

    Source: Chen et al. 2023 (arXiv:2302.06675).
    """
    checked("scale_by_lion8bit", storage, b1=b1, b2=b2)
    b1, b2 = _in_float32(b1, b2)

    def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
        x = (b1 * units[0]) * old[0] + (1 - b1) * g
        return jnp.where(x > 0, 1.0, jnp.where(x < 0, -1.0, x))  # JAX asks which chip is there before it lowers a sign

    return _scale_by({"m": True}, lambda t: Step((Moment(b2, 1 - b2),), update), storage)


def scale_by_momentum8bit(momentum: float = 0.9, *, storage: Storage = EIGHT_BITS) -> optax.GradientTransformation:
    """`optax.trace` with a quantized moment: ``u = m = momentum m + g``.

    Args, Returns, Raises: as `scale_by_adam8bit`; the moment is ``m``.

    Source: bitsandbytes' SGD8bit.
    """
    checked("scale_by_momentum8bit", storage, momentum=momentum)
    (momentum,) = _in_float32(momentum)

    def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
        return new[0]

    return _scale_by({"m": True}, lambda t: Step((Moment(momentum, 1.0),), update), storage)


def scale_by_ademamix8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """AdEMAMix with quantized moments: Adam with a second, slow first moment, added alpha-fold.

        m1 = b1 m1 + (1 - b1) g      m2 = b3 m2 + (1 - b3) g      v = b2 v + (1 - b2) g^2
        u = (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps)

    Args, Returns, Raises: as `scale_by_adam8bit`; the moments are ``m1``, ``m2`` and ``v``. alpha and b3 are constant.

    Source: Pagliardini et al. 2024 (arXiv:2409.03137).
    """
    checked("scale_by_ademamix8bit", storage, b1=b1, b2=b2, b3=b3, alpha=alpha, eps=eps)
    b1, b2, b3, alpha, eps = _in_float32(b1, b2, b3, alpha, eps)

    def rule(t: jax.Array) -> Step:
        of_m, of_v = 1 - b1**t, jnp.sqrt(1 - b2**t)

        def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
            m1, m2, v = new
            m = m1 / (of_m / units[0]) + (alpha * units[1]) * m2
            return f.over(m, f.root(v) / (of_v / jnp.sqrt(units[2])) + eps)

        return Step((Moment(b1, 1 - b1), Moment(b3, 1 - b3), Moment(b2, 1 - b2, squared=True)), update)

    return _scale_by({"m1": True, "m2": True, "v": False}, rule, storage)


def scale_by_rms8bit(
    b: float = 0.99, eps: float = 1e-8, *, storage: Storage = EIGHT_BITS
) -> optax.GradientTransformation:
    """RMSprop with a quantized moment: ``v = b v + (1 - b) g^2; u = g / (sqrt(v) + eps)``.

    Args, Returns, Raises: as `scale_by_adam8bit`; the moment is ``v``. bitsandbytes keeps it on the signed map; a state
      that is read from there stays on it.

    Source: Tieleman and Hinton 2012, lecture 6.5; bitsandbytes' RMSprop8bit.
    """
    checked("scale_by_rms8bit", storage, b=b, eps=eps)
    b, eps = _in_float32(b, eps)

    def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
        return f.over(g, f.root(new[0]) * jnp.sqrt(units[0]) + eps)

    return _scale_by({"v": False}, lambda t: Step((Moment(b, 1 - b, squared=True),), update), storage)


def scale_by_adagrad8bit(eps: float = 1e-10, *, storage: Storage = EIGHT_BITS) -> optax.GradientTransformation:
    """Adagrad with a quantized sum of squares: ``v = v + g^2; u = g / (sqrt(v) + eps)``.

    Args, Returns, Raises: as `scale_by_rms8bit`. Growth of the sum by less than half a step of its map is lost, so that
      the learning rate falls more slowly than in float32.

    Source: Duchi et al. 2011; bitsandbytes' Adagrad8bit.
    """
    checked("scale_by_adagrad8bit", storage, eps=eps)
    (eps,) = _in_float32(eps)

    def update(f: Arithmetic, units: Numbers, g: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
        return f.over(g, f.root(new[0]) + eps)

    return _scale_by({"v": False}, lambda t: Step((Moment(1.0, 1.0, squared=True),), update), storage)

"""Optimizers whose states take 8 bits a number, as Optax transformations: what bitsandbytes' 8-bit optimizers compute.

A moment is cut into blocks of 256 numbers; each block keeps its largest magnitude in float32 and one code per number:
the nearest entry of Dettmers' dynamic map, times that magnitude. A step takes the moments back to float32, updates
them, uses them, and stores them anew. Parameters below 4096 numbers keep moments in float32, as in bitsandbytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import is_qtensor, path_of
from jaxquant.core.qtypes import QTYPES

__all__ = ["Blocks", "State", "adam8bit", "adamw8bit", "ademamix8bit", "lion8bit", "sgd8bit"]

BLOCK, SMALL = 256, 4096


@functools.cache
def _table(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic map, ascending; unsigned: twice as many steps in each decade, none below 0."""
    if signed:
        return np.asarray(QTYPES["dynamic8"].table, np.float32)
    values = [np.float32(0), np.float32(1)]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i + 1) + 1, dtype=np.float32)
        values += list(np.float32(10.0 ** (i - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2)))
    return np.sort(np.asarray(values, np.float32))


def _nearest(y: jax.Array, signed: bool) -> jax.Array:
    """The code of the nearest entry, of numbers in [-1, 1]."""
    table = _table(signed)
    middles = jnp.asarray((table[:-1] + table[1:]) / np.float32(2))
    return jnp.searchsorted(middles, y, side="left", method="scan_unrolled").astype(jnp.uint8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """An array in 8 bits: codes in its shape, and the largest magnitude of each block of 256 numbers.

    Attributes:
      codes: uint8, of the array's shape.
      absmax: float32 [blocks], of the array in row-major order.
      signed: which dynamic map the codes mean.
    """

    codes: jax.Array
    absmax: jax.Array
    signed: bool = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, signed: bool) -> Blocks:
        """The nearest 8-bit form of a float array."""
        flat = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
        absmax = jnp.max(jnp.abs(flat), axis=1)
        codes = _nearest(flat / jnp.where(absmax > 0, absmax, 1)[:, None], signed)
        return cls(codes.reshape(-1)[: x.size].reshape(x.shape), absmax, signed)

    def real(self) -> jax.Array:
        """The float32 array it stands for."""
        values = jnp.asarray(_table(self.signed)).at[self.codes].get(mode="promise_in_bounds")
        each = jnp.repeat(self.absmax, BLOCK)[: self.codes.size].reshape(self.codes.shape)
        return values * each


def _kept(x: jax.Array, signed: bool) -> Any:
    return x if x.size < SMALL else Blocks.of(x, signed)


def _real(x: Any) -> jax.Array:
    return x.real() if isinstance(x, Blocks) else x


class State(NamedTuple):
    """Steps done, and for each parameter its moments (arrays, or `Blocks`)."""

    count: jax.Array
    moments: Any


def _scale_by(
    signs: tuple[bool, ...],
    rule: Callable[..., tuple[jax.Array, tuple[jax.Array, ...]]],
) -> optax.GradientTransformation:
    """The transformation of a rule ``(g, t, *moments) -> (update, moments)`` for one parameter, in float32."""

    def init(params: Any) -> State:
        leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)
        for keys, p in leaves:
            if is_qtensor(p) or not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                todo = "Wrap the optimizer in qat.freeze_quantized, or leave the parameter out"
                path = path_of(keys)
                raise quant_error("optim", "only float parameters train", todo=todo, path=path, parameter=p)

        def zeros(p: jax.Array) -> tuple[Any, ...]:
            return tuple(_kept(jnp.zeros(p.shape, jnp.float32), signed) for signed in signs)

        return State(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, State]:
        del params
        count = state.count + 1
        leaves, treedef = jax.tree.flatten(updates)
        steps, kept = [], []
        for g, moments in zip(leaves, treedef.flatten_up_to(state.moments), strict=True):
            step, new = rule(g.astype(jnp.float32), count.astype(jnp.float32), *map(_real, moments))
            steps.append(step.astype(g.dtype))
            kept.append(tuple(_kept(m, signed) for m, signed in zip(new, signs, strict=True)))
        return treedef.unflatten(steps), State(count, treedef.unflatten(kept))

    return optax.GradientTransformation(init, update)


def _checked(function: str, **decays: float) -> None:
    for name, value in decays.items():
        if not 0 <= value < 1:
            got: dict[str, Any] = {name: value}
            raise quant_error(function, f"{name} must be in [0, 1)", todo="Use for example 0.9", **got)


def adamw8bit(
    learning_rate: Any, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, both moments in 8 bits.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    Args:
      learning_rate: a number or an Optax schedule.
      b1, b2: decay of the moments.
      eps: is added to the root.
      weight_decay: of the parameters, in units of the learning rate.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      QuantError: if a decay is not in [0, 1); from ``init``, naming the leaf, if a parameter is not of floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import optim
      >>> tx, params = optim.adamw8bit(1e-3), {"w": jnp.ones((64, 128))}
      >>> state = tx.init(params)
      >>> m, v = state[0].moments["w"]
      >>> m.codes.dtype, m.absmax.shape
      (dtype('uint8'), (32,))

    Source: Dettmers et al. 2022 (arXiv:2110.02861); bitsandbytes' AdamW8bit.
    """
    _checked("adamw8bit", b1=b1, b2=b2)

    def rule(g: jax.Array, t: jax.Array, m: jax.Array, v: jax.Array) -> Any:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        return m / (1 - b1**t) / (jnp.sqrt(v) / jnp.sqrt(1 - b2**t) + eps), (m, v)

    return _with_decay(_scale_by((True, False), rule), learning_rate, weight_decay)


def adam8bit(learning_rate: Any, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """`adamw8bit` without weight decay."""
    return adamw8bit(learning_rate, b1, b2, eps, weight_decay=0.0)


def lion8bit(
    learning_rate: Any, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Lion, its moment in 8 bits: ``p <- p - lr (sign(b1 m + (1 - b1) g) + weight_decay p); m = b2 m + (1 - b2) g``.

    Args, Returns, Raises: as `adamw8bit`.

    Source: Chen et al. 2023 (arXiv:2302.06675); bitsandbytes' Lion8bit.
    """
    _checked("lion8bit", b1=b1, b2=b2)

    def rule(g: jax.Array, t: jax.Array, m: jax.Array) -> Any:
        del t
        return jnp.sign(b1 * m + (1 - b1) * g), (b2 * m + (1 - b2) * g,)

    return _with_decay(_scale_by((True,), rule), learning_rate, weight_decay)


def sgd8bit(learning_rate: Any, momentum: float = 0.9, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Gradient descent with momentum in 8 bits: ``m = momentum m + g + weight_decay p; p <- p - lr m``.

    Args, Returns, Raises: as `adamw8bit`; the decay goes through the momentum here.

    Source: bitsandbytes' SGD8bit.
    """
    _checked("sgd8bit", momentum=momentum)

    def rule(g: jax.Array, t: jax.Array, m: jax.Array) -> Any:
        del t
        m = momentum * m + g
        return m, (m,)

    steps = [_scale_by((True,), rule), optax.scale_by_learning_rate(learning_rate)]
    return optax.chain(*([optax.add_decayed_weights(weight_decay)] if weight_decay else []), *steps)


def ademamix8bit(
    learning_rate: Any,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> optax.GradientTransformation:
    """AdEMAMix, all three moments in 8 bits: Adam with a second, slow first moment, added alpha-fold.

        p <- p - lr ((m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    with ``m2 = b3 m2 + (1 - b3) g``; alpha and b3 are constant.

    Args, Returns, Raises: as `adamw8bit`.

    Source: Pagliardini et al. 2024 (arXiv:2409.03137); bitsandbytes' AdEMAMix8bit.
    """
    _checked("ademamix8bit", b1=b1, b2=b2, b3=b3)

    def rule(g: jax.Array, t: jax.Array, m1: jax.Array, m2: jax.Array, v: jax.Array) -> Any:
        m1, m2 = b1 * m1 + (1 - b1) * g, b3 * m2 + (1 - b3) * g
        v = b2 * v + (1 - b2) * g * g
        return (m1 / (1 - b1**t) + alpha * m2) / (jnp.sqrt(v) / jnp.sqrt(1 - b2**t) + eps), (m1, m2, v)

    return _with_decay(_scale_by((True, True, False), rule), learning_rate, weight_decay)


def _with_decay(
    scale: optax.GradientTransformation, learning_rate: Any, weight_decay: float
) -> optax.GradientTransformation:
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(scale, *decay, optax.scale_by_learning_rate(learning_rate))

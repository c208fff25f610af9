"""Complete optimizers: a ``scale_by_*``, weight decay, and the learning rate."""

from __future__ import annotations

from typing import TypeAlias

import optax

from jaxquant.optim import scale
from jaxquant.optim.moments import EIGHT_BITS, FOUR_BITS, Storage
from jaxquant.optim.scale import checked

__all__ = [
    "adagrad8bit",
    "adam4bit",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "ademamix8bit",
    "lion8bit",
    "rmsprop8bit",
    "sgd8bit",
]

Rate: TypeAlias = optax.ScalarOrSchedule
"""A learning rate: a number, or the function of the number of a step that gives it."""


def _decoupled(step: optax.GradientTransformation, learning_rate: Rate, decay: float) -> optax.GradientTransformation:
    return optax.chain(step, *_decay(decay), optax.scale_by_learning_rate(learning_rate))


def _coupled(step: optax.GradientTransformation, learning_rate: Rate, decay: float) -> optax.GradientTransformation:
    return optax.chain(*_decay(decay), step, optax.scale_by_learning_rate(learning_rate))


def _decay(weight_decay: float) -> list[optax.GradientTransformation]:
    none = isinstance(weight_decay, int | float) and weight_decay == 0
    return [] if none else [optax.add_decayed_weights(weight_decay)]


def _adam(
    function: str, learning_rate: Rate, b1: float, b2: float, eps: float, weight_decay: float, storage: Storage
) -> optax.GradientTransformation:
    """`adamw8bit`; errors name ``function``."""
    checked(function, storage, learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return _decoupled(scale.scale_by_adam8bit(b1, b2, eps, storage=storage), learning_rate, weight_decay)


def adamw8bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, both moments in 8 bits.

        m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    Args:
      learning_rate: a number or an Optax schedule.
      b1, b2: decay of the moments.
      eps: added to the root.
      weight_decay: of the parameters, in units of the learning rate.
      storage: how the moments are stored, and which parameters keep float32 moments.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      QuantError: if a decay is not in [0, 1), or another number is negative; from ``init``, naming the leaf, if a
        parameter is not a float array.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import optim
      >>> tx, params = optim.adamw8bit(1e-3), {"w": jnp.ones((64, 256))}
      >>> state = tx.init(params)
      >>> state[0].moments["m"]["w"]
      QTensor(dynamic8[64, 256] -> float32, per channel on axis -2, symmetric, 16.2 KiB)

    Source: Dettmers et al. 2022 (arXiv:2110.02861); bitsandbytes' AdamW8bit.
    """
    return _adam("adamw8bit", learning_rate, b1, b2, eps, weight_decay, storage)


def adam8bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """`adamw8bit` without weight decay."""
    return _adam("adam8bit", learning_rate, b1, b2, eps, 0.0, storage)


def adamw4bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    storage: Storage = FOUR_BITS,
) -> optax.GradientTransformation:
    """`adamw8bit` with moments in 4 bits and blocks of 128: a seventh of the memory of float moments.

    Args, Returns, Raises: as `adamw8bit`.

    Source: Li et al. 2023 (arXiv:2309.01507), section 4; second moments have one scale per block, as its ``B128``,
      rather than one per row and column.
    """
    return _adam("adamw4bit", learning_rate, b1, b2, eps, weight_decay, storage)


def adam4bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    storage: Storage = FOUR_BITS,
) -> optax.GradientTransformation:
    """`adamw4bit` without weight decay."""
    return _adam("adam4bit", learning_rate, b1, b2, eps, 0.0, storage)


def lion8bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """Lion, its moment in 8 bits: ``p <- p - lr (sign(b1 m + (1 - b1) g) + weight_decay p); m = b2 m + (1 - b2) g``.

    Args, Returns, Raises: as `adamw8bit`.

    Source: Chen et al. 2023 (arXiv:2302.06675); bitsandbytes' Lion8bit.
    """
    checked("lion8bit", storage, learning_rate=learning_rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return _decoupled(scale.scale_by_lion8bit(b1, b2, storage=storage), learning_rate, weight_decay)


def sgd8bit(
    learning_rate: Rate,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """Gradient descent with momentum in 8 bits: ``m = momentum m + g + weight_decay p; p <- p - lr m``.

    Args, Returns, Raises: as `adamw8bit`, except that the decay is part of the momentum.


    Source: bitsandbytes' SGD8bit.
    """
    checked("sgd8bit", storage, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    return _coupled(scale.scale_by_momentum8bit(momentum, storage=storage), learning_rate, weight_decay)


def ademamix8bit(
    learning_rate: Rate,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    alpha: float = 5.0,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """AdEMAMix, all three moments in 8 bits: Adam with a second, slow first moment, added alpha-fold.

        p <- p - lr ((m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay p)

    with ``m2 = b3 m2 + (1 - b3) g``; alpha and b3 are constant.

    Args, Returns, Raises: as `adamw8bit`.

    Source: Pagliardini et al. 2024 (arXiv:2409.03137); bitsandbytes' AdEMAMix8bit.
    """
    numbers = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "b3": b3, "alpha": alpha, "eps": eps}
    checked("ademamix8bit", storage, weight_decay=weight_decay, **numbers)
    step = scale.scale_by_ademamix8bit(b1, b2, b3, alpha, eps, storage=storage)
    return _decoupled(step, learning_rate, weight_decay)


def rmsprop8bit(
    learning_rate: Rate,
    b: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """RMSprop, its moment in 8 bits: ``v = b v + (1 - b) g^2; p <- p - lr g / (sqrt(v) + eps)``.

    Args, Returns, Raises: as `adamw8bit`; the decay is added to the gradient.

    Source: bitsandbytes' RMSprop8bit.
    """
    checked("rmsprop8bit", storage, learning_rate=learning_rate, b=b, eps=eps, weight_decay=weight_decay)
    return _coupled(scale.scale_by_rms8bit(b, eps, storage=storage), learning_rate, weight_decay)


def adagrad8bit(
    learning_rate: Rate,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    *,
    storage: Storage = EIGHT_BITS,
) -> optax.GradientTransformation:
    """Adagrad, its sum of squares in 8 bits: ``v = v + g^2; p <- p - lr g / (sqrt(v) + eps)``.

    Args, Returns, Raises: as `adamw8bit`; the decay is added to the gradient.

    Source: Duchi et al. 2011; bitsandbytes' Adagrad8bit.
    """
    checked("adagrad8bit", storage, learning_rate=learning_rate, eps=eps, weight_decay=weight_decay)
    return _coupled(scale.scale_by_adagrad8bit(eps, storage=storage), learning_rate, weight_decay)

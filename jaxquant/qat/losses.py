"""Losses that train towards the predictions of a float model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxquant.core.errors import quant_error

__all__ = ["distillation_loss"]


def distillation_loss(
    logits: ArrayLike, targets: ArrayLike, *, temperature: float = 1.0, counted: ArrayLike | None = None
) -> jax.Array:
    """The divergence of a model's predictions from the float model's, in nats.

        T^2 mean KL(softmax(targets / T) || softmax(logits / T))

    No labels are needed. The factor T^2 keeps the size of gradients independent of the temperature, so that the loss
    can be added to a loss on labels. The float model is a constant: no gradient flows to it.

    Args:
      logits: of the model that trains, [..., classes].
      targets: logits of the float model, of the same shape.
      temperature: above 0; a larger one gives more weight to the order of unlikely classes.
      counted: which predictions count, a boolean array [...]; None: all.

    Returns:
      A float32 scalar; 0 if both agree, NaN if no prediction counts.

    Raises:
      QuantError: if the shapes differ, the temperature is not above 0, or ``counted`` does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import qat
      >>> print(qat.distillation_loss(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 1.0]])))
      0.0

    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    logits, targets = jnp.asarray(logits), jax.lax.stop_gradient(jnp.asarray(targets))
    if logits.shape != targets.shape or not logits.ndim:
        todo = "Give the logits of both models for the same inputs"
        rule = "logits and targets must have one shape [..., classes]"
        raise quant_error("distillation_loss", rule, todo=todo, logits=logits.shape, targets=targets.shape)
    if not temperature > 0:
        todo = "Use for example 1.0 or 2.0"
        raise quant_error("distillation_loss", "temperature must be above 0", todo=todo, temperature=temperature)
    p, q = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (targets, logits))
    each = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    if counted is None:
        return temperature**2 * jnp.mean(each)
    counted = jnp.asarray(counted)
    if counted.shape != each.shape or counted.dtype != jnp.bool_:
        todo = "Give one boolean for each prediction"
        got = {"counted": counted, "predictions": each.shape}
        raise quant_error("distillation_loss", "counted does not fit the logits", todo=todo, **got)
    return temperature**2 * jnp.sum(jnp.where(counted, each, 0.0)) / jnp.sum(counted.astype(jnp.float32))

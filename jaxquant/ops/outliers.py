"""Splits an activation into the few features with outliers, kept in float, and the others, in int8.

Source: Dettmers et al. 2022 (arXiv:2208.07339), section 3.2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.arithmetic import divide
from jaxquant.core.codec import codes_of, round_to_grid
from jaxquant.core.qtensor import QTensor
from jaxquant.core.scale_zero_point import reach
from jaxquant.core.specs import QuantSpec
from jaxquant.ops.axes import Axes
from jaxquant.ops.trained import TrainedTensor

__all__ = ["split"]


def split(x: jax.Array, axes: Axes, spec: QuantSpec, threshold: float) -> tuple[TrainedTensor, jax.Array, jax.Array]:
    """An activation as the sum of two: the features without an outlier, quantized, and those with one.

    The range of each row is that of its magnitudes below the threshold, also in features with an outlier.

    Args:
      x: the activation.
      axes: its axes.
      spec: symmetric integers.
      threshold: the smallest magnitude of an outlier; infinity: no outliers.

    Returns:
      Codes (0 where there is an outlier), with the float array that gradients go to; the float features with an outlier
      (0 elsewhere); and whether there are any.
    """
    large = ~(jnp.abs(x) < threshold)  # NaN too, which int8 cannot hold
    outlier = jnp.any(large, axis=axes.rows, keepdims=True)
    absmax = jnp.max(jnp.where(large, 0, jnp.abs(x)), axis=axes.contract, keepdims=True).astype(jnp.float32)
    magnitude, steps = reach(-absmax, absmax, spec)
    small = jnp.where(outlier, 0, x)
    # bitsandbytes multiplies by the reciprocal; doing the same rounds ties as it does.
    inverse = divide(jnp.full_like(magnitude, steps), jnp.where(magnitude > 0, magnitude, 1))
    codes = codes_of(round_to_grid(lax.stop_gradient(small.astype(jnp.float32) * inverse), spec.type), spec.type)
    scale = lax.stop_gradient(jnp.where(magnitude > 0, magnitude / steps, 1))
    q = QTensor(codes, scale, None, qtype=spec.qtype, dtype=x.dtype)
    real = small + lax.stop_gradient(q.dequantize() - small)
    return TrainedTensor(q, real), jnp.where(outlier, x, 0), jnp.any(outlier)

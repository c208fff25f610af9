"""Round to nearest: the quantizer that needs no data."""

from __future__ import annotations

import jax
import numpy as np

from jaxquant.core.affine import quantize
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.gram import WeightStats

__all__ = ["rtn"]


def rtn(
    w: jax.Array | np.ndarray, spec: QuantSpec, *, reduce_axes: tuple[int, ...], stats: WeightStats | None = None
) -> QTensor:
    """Rounds each weight to the nearest code: ``quantize(w, spec, reduce_axes=reduce_axes)``.

    The range is the spec's: absmax by default; the clip of least squared error with ``calibration=observers.MSE()``,
    which is recommended at 3 and 2 bits.

    Args:
      w: float weight.
      spec: number type, granularity, range choice.
      reduce_axes: axes that share a scale.
      stats: ignored; other quantizers use them.

    Returns:
      `QTensor` of w's shape.

    Raises:
      QuantError: as `quantize`.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq import rtn
      >>> rtn(jnp.eye(4), jq.QuantSpec("int8"), reduce_axes=(-2,))
      QTensor(int8[4, 4] -> float32, per channel on axis -1, symmetric, 32 B)
    """
    del stats
    return quantize(w, spec, reduce_axes=reduce_axes)

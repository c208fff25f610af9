"""Double quantization: quantizes the scales of a quantized weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.arithmetic import times_reciprocal
from jaxquant.core.codec import codes_of, round_to_grid
from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor, flat, from_codes
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.specs import QuantSpec
from jaxquant.ptq.gram import WeightStats
from jaxquant.ptq.rtn import rtn

__all__ = ["double_quantized"]


def double_quantized(
    w: jax.Array,
    spec: QuantSpec,
    *,
    reduce_axes: tuple[int, ...],
    stats: WeightStats | None = None,
    method: Callable[..., QTensor] = rtn,
    group_size: int = 256,
    qtype: str = "dynamic8",
) -> QTensor:
    """Another quantizer's result with its scales in 8 bits: ``s ~ code * t + mean(s)``.

    The mean of all scales is subtracted, and the remainder is quantized in groups of 256 scales, each with one float32
    t. With one scale per 64 weights, the scales take 0.127 bits per weight instead of 0.5.

    Args:
      w, spec, reduce_axes, stats: arguments of ``method``.
      method: the quantizer; its result must have float scales.
      group_size: scales that share a t, counted along the reduced axes first, then from output to output. The last
        group may be short; if groups end within rows of scales, t is repeated for each part.
      qtype: number type of the scales' codes; by default bitsandbytes' dynamic map, which it uses with nf4 and fp4.

    Returns:
      `QTensor` of w's shape, whose ``scale`` is a QTensor. The weights keep the codes that they had with float scales,
      as in bitsandbytes.

    Raises:
      QuantError: as ``method``; if the scales are quantized already, or ``group_size`` is not positive.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ptq.double import double_quantized
      >>> w = jnp.linspace(-1.0, 1.0, 256 * 512).reshape(256, 512)
      >>> spec = jq.QuantSpec("nf4", granularity=jq.PerGroup(64))
      >>> double_quantized(w, spec, reduce_axes=(-2,))
      QTensor(nf4[256, 512] -> float32, group 64 on axis -2, symmetric, 66.1 KiB)

    Source: Dettmers et al. 2023 (QLoRA, arXiv:2305.14314), section 3, "Double Quantization".
    """
    if type(group_size) is not int or group_size < 1:
        todo = "Use for example 256"
        raise quant_error("double_quantized", "group_size must be a positive integer", todo=todo, group_size=group_size)
    q = method(w, spec, reduce_axes=reduce_axes, stats=stats)
    if isinstance(q.scale, QTensor) or q.scale.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        todo = "Leave double_quantized out"
        raise quant_error("double_quantized", "the scales are not floats", todo=todo, q=repr(q))
    return q.replace(scale=_quantized(q, group_size, qtype))


def _quantized(q: QTensor, group_size: int, qtype: str) -> QTensor:
    """The scales as codes, in groups along their stored order, the last of which may be short."""
    scale, order, info = flat(q.scale).astype(jnp.float32), q.stored_order, QTYPES[qtype]
    group_size = min(group_size, scale.size)
    groups, mean = -(-scale.size // group_size), jnp.mean(scale)
    x = jnp.transpose(scale - mean, order).reshape(-1)
    x = jnp.pad(x, (0, groups * group_size - scale.size)).reshape(groups, group_size)
    absmax = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    outer = jnp.where(absmax > 0, absmax / info.qmax, 1)
    codes = codes_of(round_to_grid(times_reciprocal(x, outer), info), info).reshape(-1)[: scale.size]
    shape = tuple(scale.shape[axis] for axis in order)
    index = (np.arange(scale.size) // group_size).reshape(shape)
    index = index[tuple(slice(None, None, n) for n in _blocks(shape, group_size))]
    back = tuple(np.argsort(order).tolist())
    codes, outer = (jnp.transpose(v, back) for v in (codes.reshape(shape), outer.reshape(-1)[index]))
    return from_codes(codes, outer, None, jnp.broadcast_to(mean, outer.shape), qtype=qtype, dtype=jnp.float32)


def _blocks(shape: tuple[int, ...], group_size: int) -> list[int]:
    """For groups over a flattened array: the largest blocks that lie within one group and divide the array evenly."""
    left, block = group_size, [1] * len(shape)
    for axis in reversed(range(len(shape))):
        block[axis] = math.gcd(left, shape[axis])
        if block[axis] < shape[axis]:
            break
        left //= block[axis]
    return block

"""Integer codes of a weight in the form that several layouts share: unsigned, [out, in], one scale per group."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.core.errors import QuantError
from jaxquant.core.packing import pack
from jaxquant.core.qtensor import QTensor, scale_values

__all__ = ["Grouped", "check_half", "check_integers", "common_group_size", "group_size", "grouped", "words"]


class Grouped(NamedTuple):
    """Codes ``u`` with ``w = (u - zero) * scale``.

    Attributes:
      codes: uint8 [out, in], in the order of the input features.
      scale: [out, groups].
      zero: uint8 [out, groups].
      group: int32 [in]: the group of each input feature.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array
    group: jax.Array


def group_size(q: QTensor) -> int:
    """Input features that share a scale."""
    return q.shape[-1] // q.scale.shape[-1]


def common_group_size(weights: Collection[QTensor]) -> int | None:
    """The group size that all weights have, -1 if each has a single group per output; None if there is none.

    A weight with one group per output fits any group size that is no smaller than its rows.
    """
    rows = {q.shape[-1] for q in weights if q.scale.shape[-1] == 1}
    sizes = {group_size(q) for q in weights if q.scale.shape[-1] > 1}
    if not sizes:
        return rows.pop() if len(rows) == 1 else -1
    size = sizes.pop()
    return size if not sizes and all(n <= size for n in rows) else None


def check_integers(q: QTensor, bits: tuple[int, ...], error: Callable[..., QuantError]) -> None:
    """Raises unless `grouped` can represent ``q``: integers of one of these widths on [out, in]."""
    info = q.type
    if info.kind != "int" or info.bits not in bits:
        todo = f"Quantize to integers of {', '.join(map(str, bits))} bits"
        raise error("this number type is not on the format's grid", todo=todo, weight=repr(q))
    if q.offset is not None or (q.zero_point is not None and not jnp.issubdtype(q.zero_point.dtype, jnp.integer)):
        todo = "Quantize anew with integer zero points, or symmetrically"
        raise error("zero points must be integers on the grid of the codes", todo=todo, weight=repr(q))
    check_matrix(q, error)


def check_matrix(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless ``q`` is [out, in] with groups along ``in``, stored so."""
    if len(q.shape) != 2 or q.stored_order != (0, 1) or q.scale.shape[0] not in (1, q.shape[0]):
        todo = "Store the weight as [out, in], quantized along its last axis"
        raise error("the weight must be [out, in], with groups along in", todo=todo, weight=repr(q))


def check_half(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless float16 holds every scale. Shapes without values pass if their dtype says so."""
    if q.scale.dtype == np.float16 and not isinstance(q.scale, QTensor):
        return
    todo = "Quantize with scale_dtype='float16'"
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(q)):
        raise error("each scale must be a float16 number", todo=todo, scale=q.scale)
    exact = np.asarray(scale_values(q.scale))
    with np.errstate(over="ignore"):
        lost = int(np.count_nonzero(exact.astype(np.float16).astype(exact.dtype) != exact))
    if lost:
        raise error("each scale must be a float16 number", todo=todo, lost=lost, of=exact.size)


def grouped(q: QTensor) -> Grouped:
    """The codes of a weight that passed `check_integers`."""
    low = int(q.type.qmin)
    out, count = q.shape
    codes = (q.logical_codes().astype(jnp.int16) - low).astype(jnp.uint8)
    blocks = (out, q.scale.shape[-1])
    zero = jnp.full(q.scale.shape, -low, jnp.int16) if q.zero_point is None else q.zero_point.astype(jnp.int16) - low
    group = jnp.arange(count, dtype=jnp.int32) // group_size(q)
    if q.permutation is not None:
        place = jnp.argsort(q.permutation.reshape(-1))
        codes, group = codes[:, place], group[place]
    scale = scale_values(q.scale) if isinstance(q.scale, QTensor) else q.scale
    return Grouped(codes, jnp.broadcast_to(scale, blocks), jnp.broadcast_to(zero.astype(jnp.uint8), blocks), group)


def words(values: jax.Array, bits: int) -> jax.Array:
    """int32 words of the little-endian bit stream of each row: [..., ceil(n * bits / 32)]."""
    packed: Any = pack(values, bits)
    packed = jnp.pad(packed, [(0, 0)] * (packed.ndim - 1) + [(0, -packed.shape[-1] % 4)])
    return lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], -1, 4), jnp.int32)

"""Integer codes of a weight in a form common to several layouts: unsigned, [out, in], one scale per group."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor, flat, scale_values
from jaxquant.io.bits import packed, patterns

__all__ = [
    "Grouped",
    "check_half",
    "check_integers",
    "check_stack",
    "common_group_size",
    "group_size",
    "grouped",
    "is_stack",
    "words",
]


class Grouped(NamedTuple):
    """Codes ``u`` with ``w = (u - zero) * scale``.

    Attributes:
      codes: uint8 [out, in], in the order of the input features.
      scale: [out, groups].
      zero: uint8 [out, groups].
      group: int32 [in]: the group of each input feature.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: np.ndarray


def group_size(q: QTensor) -> int:
    """Input features that share a scale."""
    return q.shape[-1] // q.scale.shape[-1]


def common_group_size(weights: Collection[QTensor]) -> int | None:
    """The group size of all weights, -1 if each has a single group per output; None if they have no common size.

    A weight with one group per output fits any group size that is at least the length of its rows.
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
        todo = "Quantize the float weight with integer zero points, or symmetrically"
        raise error("zero points must be integers on the grid of the codes", todo=todo, weight=repr(q))
    check_matrix(q, error)


def check_matrix(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless ``q`` is [out, in] with groups along ``in``, stored in the order of its axes."""
    if len(q.shape) != 2 or q.stored_order != (0, 1) or q.scale.shape[0] not in (1, q.shape[0]):
        todo = "Store the weight as [out, in], quantized along its last axis"
        raise error("the weight must be [out, in], with groups along in", todo=todo, weight=repr(q))


def is_stack(q: QTensor) -> bool:
    """Whether ``q`` holds several matrices, or one as [in, out], as weights of experts do in some families."""
    return len(q.shape) == 3 or (len(q.shape) == 2 and q.scale.shape[0] not in (1, q.shape[0]))


def check_stack(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless ``q`` is [.., out, in] or [.., in, out], unpermuted, with groups along one of the last two axes."""
    along = [axis for axis in (-1, -2) if q.scale.shape[axis] != q.shape[axis]]
    if q.stored_order != tuple(range(len(q.shape))) or len(along) > 1:
        todo = "Store it in the order of its axes, quantized along one of the last two"
        raise error("experts have groups along one of their last two axes", todo=todo, weight=repr(q))


def check_half(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises unless float16 holds every scale. Shapes without values pass if their dtype is float16."""
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
    """The codes of a weight of NumPy arrays that passed `check_integers`."""
    low = int(q.type.qmin)
    scale, blocks = np.asarray(flat(q.scale)), (q.shape[0], q.scale.shape[-1])
    codes, group = patterns(q), np.arange(q.shape[1], dtype=np.int32) // group_size(q)
    zero = np.full(blocks, -low, np.uint8) if q.zero_point is None else (q.zero_point - np.int16(low)).astype(np.uint8)
    if q.permutation is not None:
        place = np.argsort(q.permutation.reshape(-1))
        codes, group = codes[:, place], group[place]
    return Grouped(codes, np.broadcast_to(scale, blocks), np.broadcast_to(zero, blocks), group)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """int32 words of the little-endian bit stream of each row: [..., ceil(n * bits / 32)]."""
    stream = packed(values, bits)
    whole = np.zeros((*stream.shape[:-1], stream.shape[-1] + -stream.shape[-1] % 4), np.uint8)
    whole[..., : stream.shape[-1]] = stream
    return whole.view("<i4")

"""Stores the codes of a `QTensor` as a platform reads them fastest."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.codec import to_int4
from jaxquant.core.layout import Layout, block_rows, own_dtype, stored_order, transpose
from jaxquant.core.qtensor import QTensor, Scale, from_codes

__all__ = ["is_laid_out", "laid_out"]


def laid_out(q: QTensor, layout: Layout, minor: tuple[int, ...] | None = None) -> QTensor:
    """The same values, to the bit, with codes in another layout.

    Args:
      q: the array.
      layout: where codes lie and in which dtype; see `jaxquant.core.layout.Layout`.
      minor: the axes that are stored last; by default as the layout wants. Packed codes have the axes last that share
        scales, or keep theirs.

    Returns:
      The `QTensor`.
    """
    if is_laid_out(q, layout) and minor in (None, q.minor):
        return q
    if q.permutation is not None and minor is not None:
        return laid_out(q.unpermuted(), layout, minor)
    rest: dict[str, Any] = {"qtype": q.qtype, "dtype": q.dtype}
    if layout == "packed":
        minor = _shared_axes(q) if minor is None else tuple(minor)
        scale = _scale_beside(q, layout)
        rest |= {"permutation": q.permutation, "minor": minor}
        return from_codes(q.logical_codes(), scale, q.zero_point, q.offset, **rest)
    split, minor = _group_axis(q), _minor_in(q, layout) if minor is None else tuple(minor)
    codes = q.logical_codes()
    seal = _seal(codes, q.scale) if layout == "native" and own_dtype(q.qtype) is not None else None
    if q.type.packed and q.type.bits <= 4:
        codes = to_int4(codes, q.type)
    order = stored_order(q.ndim, minor)
    codes = transpose(codes, order)
    if split is not None:
        at, rows = order.index(q.ndim + split), block_rows(q.shape[split], q.scale.shape[split])
        codes = codes.reshape(*codes.shape[:at], -1, rows, *codes.shape[at + 1 :])
    if joined := _joined_in(q, layout):
        codes = codes.reshape(*codes.shape[:-joined], -1)
    scale, rest = _scale_beside(q, layout), rest | {"minor": minor, "split": split, "joined": joined}
    return QTensor(codes, scale, q.zero_point, q.offset, q.permutation, seal, **rest)


def is_laid_out(q: QTensor, layout: Layout) -> bool:
    """Whether codes have this layout already, or only one layout exists for them."""
    if q.permutation is not None and _group_axis(q) != q.permuted_axis - q.ndim:
        return True
    narrow = _narrow_scale(q)
    if narrow is not None and narrow.layout != _of_scales(layout):
        return False
    own = own_dtype(q.qtype) is not None
    if not q.type.packed and _group_axis(q) is None and not (own and layout == "native"):
        return q.seal is None and not (layout == "native" and _shares_last_axes(q))
    if q.layout != ("native" if own and layout == "native" else "packed" if layout == "packed" else "elements"):
        return False
    how = _minor_in(q, layout), _group_axis(q), _joined_in(q, layout)
    return layout == "packed" or (q.minor, q.split, q.joined) == how


# -- scales ------------------------------------------------------------------------------------------------------------


def _of_scales(layout: Layout) -> Layout:
    """The layout of scales of fewer than 8 bits beside codes in a layout."""
    return "elements" if layout == "native" else "packed"


def _narrow_scale(q: QTensor) -> QTensor | None:
    """The scales, if they are codes of fewer than 8 bits without groups of their own."""
    scale = q.scale
    return scale if isinstance(scale, QTensor) and scale.type.packed and _group_axis(scale) is None else None


def _scale_beside(q: QTensor, layout: Layout) -> Scale:
    """The scales as they lie beside codes in a layout."""
    scale = _narrow_scale(q)
    if scale is None or scale.layout == _of_scales(layout):
        return q.scale
    make = QTensor if _of_scales(layout) == "elements" else from_codes
    rest: dict[str, Any] = {"qtype": scale.qtype, "dtype": scale.dtype}
    return make(scale.logical_codes(), scale.scale, scale.zero_point, scale.offset, **rest)


def _seal(codes: jax.Array, scale: Scale) -> jax.Array:
    """The seal of codes: of the scale's shape, but 1 along an axis with groups."""
    return jnp.zeros([s if s == n else 1 for n, s in zip(codes.shape, scale.shape, strict=True)], bool)


# -- axes --------------------------------------------------------------------------------------------------------------


def _minor_in(q: QTensor, layout: Layout) -> tuple[int, ...]:
    """The axes that a layout of one code per element stores last."""
    own = _own_axes(q)
    if layout != "native" or own[-1:] == (-1,):
        return ()
    if _are_bytes(q):
        return own[-1:]
    groups, decoded = _group_axis(q), own_dtype(q.qtype) is not None or (q.type.packed and q.type.bits <= 4)
    last = groups == -1 or (groups is None and decoded and q.scale.shape[-1] == 1)
    return (-2,) if last and q.ndim > 1 and q.scale.shape[-2] > 1 else ()


def _joined_in(q: QTensor, layout: Layout) -> int:
    """How many of the last axes a layout stores as one."""
    own = () if layout != "native" or _are_bytes(q) else _own_axes(q)
    count = next((n for n in range(len(own)) if own[-n - 1] != -n - 1), len(own))
    return count if 1 < count < q.ndim else 0


def _are_bytes(q: QTensor) -> bool:
    """Whether codes are 8-bit integers without groups."""
    return not q.type.packed and own_dtype(q.qtype) is None and _group_axis(q) is None


def _shares_last_axes(q: QTensor) -> bool:
    """Whether several axes are stored last, of which one at least shares scales with others before."""
    return len(q.minor) > 1 and len(_own_axes(q)) > 0


def _own_axes(q: QTensor) -> tuple[int, ...]:
    """The axes along which each element has a scale of its own."""
    pairs = enumerate(zip(q.shape, q.scale.shape, strict=True))
    return tuple(i - q.ndim for i, (n, s) in pairs if s == n > 1)


def _shared_axes(q: QTensor) -> tuple[int, ...]:
    """The axes along which elements share scales; the last but one if all elements share one."""
    found = tuple(i - q.ndim for i, (n, s) in enumerate(zip(q.shape, q.scale.shape, strict=True)) if s < n)
    if len(found) == q.ndim and q.split is not None:  # blocks along all axes, of which one is summed over
        return () if q.split == -1 else (q.split,)
    return found if 0 < len(found) < q.ndim else (-2,) if q.ndim > 1 else ()


def _group_axis(q: QTensor) -> int | None:
    """The axis with groups, counted from the end: the only one, or of several the one that products sum over.

    That is the axis that is split, or else the one that is stored last.
    """
    found = [i - q.ndim for i, (n, s) in enumerate(zip(q.shape, q.scale.shape, strict=True)) if 1 < s < n]
    if len(found) < 2:
        return found[0] if found else None
    last = q.split if q.split is not None else q.stored_order[-1] - q.ndim
    return last if last in found else None

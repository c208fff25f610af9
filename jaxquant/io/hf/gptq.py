"""GPTQ and AutoRound: integers packed along the input features, with one zero point per group.

    qweight  int32 [in * bits / 32, out]   a little-endian bit stream down each column
    qzeros   int32 [groups, out * bits / 32]
    scales   float [groups, out]
    g_idx    int32 [in], optional           the group of each input feature (act-order)

    W[n, k] = scales[g_idx[k], n] * (q[k, n] - z[g_idx[k], n])

Version 1 stores z - 1 and version 2 stores z. Where a word holds whole fields (2, 4, 8 bits), version 1 was written by
subtracting 1 from every field at once in 32-bit arithmetic, so that a field of 0 borrows from its neighbour. The
inverse is to add the same word back and then unpack; adding 1 to each field gives other values. 3-bit fields are
decremented modulo 8. Symmetric checkpoints have z = 2**(bits - 1) throughout, so the stored value tells the version;
some checkpoints are labelled 1 but hold version 2. They become symmetric QTensors of signed codes with the same
patterns.

The planar layout of GPTQModel 7 ("gptq_p") stores each 32 values as bit planes, low plane first, and z itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of, packed, unpacked
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.hf.stated import overridden
from jaxquant.io.hf.to_qtensor import block_size, grouping, qtensor
from jaxquant.io.strict_json import Json

__all__ = ["GPTQ"]

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def _refuse(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    layout = _layout(config)
    if layout not in ("gptq", "gptq_v2", "gptq_p"):
        todo = "Convert it from the checkpoint that the kernel's layout was made from"
        raise error(f"the layout {layout!r} is that of one GPU kernel and cannot be read", todo=todo)


def _layout(config: dict[str, Json]) -> str:
    """``gptq`` (version 1), ``gptq_v2`` or ``gptq_p``."""
    packing = config.get("packing_format")
    if isinstance(packing, str):  # AutoRound: layouts named after a tool are that tool's; its own stores z itself
        return "gptq" if "gptq" in packing and "v2" not in packing else "gptq_v2"
    return str(config.get("checkpoint_format") or config.get("format") or "gptq")


def read(m: Module) -> QTensor:
    """The weight of one module."""
    qweight = m.array(".qweight", np.int32, ndim=2).view(np.uint32)
    qzeros = m.array(".qzeros", np.int32, ndim=2).view(np.uint32)
    scales = m.scales(".scales", ndim=2)
    g_idx = m.maybe(".g_idx", np.int32, np.int64, ndim=1)
    groups, out = scales.shape
    bits = _bits(m, qweight.shape[0], qzeros.shape[1], out, None if g_idx is None else len(g_idx))
    length = qweight.shape[0] * 32 // bits if g_idx is None else len(g_idx)
    m.check(".qweight", qweight.shape, (-(-length * bits // 32), out))
    m.check(".qzeros", qzeros.shape, (groups, -(-out * bits // 32)))
    layout = _layout(m.config)
    planar = bits in (5, 6, 7) or (layout == "gptq_p" and bits == 3)
    if planar and (qweight.shape[0] % bits or qzeros.shape[1] % bits):
        got = {"in_features": length, "out_features": out, "bits": bits}
        raise m.error("bit planes hold 32 codes at a time", ".qweight", todo="Check the configuration", **got)
    group = grouping(_groups(m, g_idx, length, groups))
    zeros = _zeros(m, qzeros, bits, out, planar=planar, layout=layout)
    stream = bytes_of(qweight.T)
    if planar:
        stream = packed(_from_planes(np.ascontiguousarray(qweight.T), bits, length), bits)
    if group.order is not None:
        m.notes.append("act-order: columns stored by group")
    common = {"bits": bits, "length": length, "dtype": scales.dtype, "permutation": group.permutation}
    stream, scale = group.stream(stream, bits, length), group.scale(np.ascontiguousarray(scales.T))
    if (zeros == 1 << (bits - 1)).all():
        return qtensor(stream, scale, signed=True, **common)
    return qtensor(stream, scale, zero_point=group.scale(np.ascontiguousarray(zeros.T)), **common)


def _bits(m: Module, rows: int, words: int, out: int, length: int | None) -> int:
    """The stated width of codes, or the only width that the shapes allow."""

    def fits(bits: int) -> bool:
        inside = rows * 32 % bits == 0 if length is None else rows == -(-length * bits // 32)
        return inside and words == -(-out * bits // 32)

    stated = m.config.get("bits")
    if type(stated) is int and stated in _PLANES and fits(stated):
        return stated
    found = [bits for bits in _PLANES if fits(bits)]
    if len(found) == 1:
        m.by_shapes(f"{found[0]} bits", stated)
        return found[0]
    got = {"qweight_rows": rows, "qzeros_columns": words, "out_features": out, "bits": stated}
    rule = f"{'several widths fit' if found else 'no width of codes fits'} the shapes"
    raise m.error(rule, ".qweight", todo="Check the configuration", **got)


def _groups(m: Module, g_idx: np.ndarray | None, length: int, groups: int) -> np.ndarray:
    """The group of each input feature."""
    if g_idx is not None:
        if g_idx.min() < 0 or g_idx.max() >= groups:
            got = {"least": int(g_idx.min()), "greatest": int(g_idx.max()), "groups": groups}
            raise m.error("g_idx names a group that has no scales", ".g_idx", todo="Fetch the checkpoint again", **got)
        if g_idx.any() or groups == 1:
            return g_idx.astype(np.int64)
        m.notes.append("g_idx is 0 throughout: groups are consecutive")
    elif m.config.get("desc_act") is True and groups > 1:
        rule = "the configuration states act-order, but g_idx, which names its groups, is missing"
        raise m.error(rule, ".g_idx", todo="Fetch all files of the checkpoint again", groups=groups)
    stated = m.config.get("group_size")
    size = length if stated == -1 else stated
    if type(size) is not int or size < 1 or -(-length // size) != groups:
        size = block_size(length, groups)
        if size is None:
            rule = "the group size is not stated, or does not fit the shapes, and they allow several"
            got = {"group_size": stated, "groups": groups, "columns": length}
            raise m.error(rule, ".scales", todo="Correct group_size in the configuration", **got)
        m.by_shapes(f"groups of {size}", stated)
    return np.arange(length) // min(size, length)


def _zeros(m: Module, words: np.ndarray, bits: int, out: int, *, planar: bool, layout: str) -> np.ndarray:
    """The zero points [groups, out], in uint8."""
    if planar:
        raw, first = _from_planes(words, bits, out), False
        if layout == "gptq":
            return (raw + 1) & ((1 << bits) - 1)
        return raw
    raw, first, half = unpacked(bytes_of(words), bits, out), layout == "gptq", 1 << (bits - 1)
    if m.config.get("sym") is True:
        held = {1: np.mean(raw == half - 1) > 0.5, 2: np.mean(raw == half) > 0.5}
        if first and held[2]:
            m.problems.append("labelled as GPTQ version 1, but its zero points are those of version 2")
            first = False
        elif not first and held[1]:
            m.problems.append("labelled as GPTQ version 2, but its zero points are those of version 1")
            first = True
    if not first:
        return raw
    if 32 % bits:
        return (raw + 1) & ((1 << bits) - 1)
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    if (raw == (1 << bits) - 1).any():
        m.notes.append("zero points that wrap around: readers differ on these")
    return unpacked(bytes_of(words + ones), bits, out)


def _from_planes(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Codes [rows, length] from bit planes: each ``bits`` words hold 32 values."""
    blocks = words.reshape(words.shape[0], -1, bits)
    codes, word, shift = np.zeros((*blocks.shape[:2], 32), np.uint8), 0, 0
    for width in _PLANES[bits]:
        plane = unpacked(bytes_of(blocks[..., word : word + width]), width, 32)
        codes |= plane << np.uint8(shift)
        word, shift = word + width, shift + width
    return codes.reshape(words.shape[0], -1)[:, :length]


GPTQ = Format(
    "GPTQ",
    methods=("gptq",),
    names=(Naming(marks=(".qweight", ".qzeros")),),
    read=read,
    layouts="versions 1 and 2, planar; 2 to 8 bits; symmetric and not; act-order; AutoRound",
    refuse=_refuse,
    stated=overridden,
)

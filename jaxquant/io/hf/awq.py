"""AWQ: 4-bit integers with zero points, in one of three kernel layouts, which their shapes distinguish.

GEMM       qweight int32 [in, out / 8]   scales [groups, out]   qzeros int32 [groups, out / 8]
           nibble i of a word holds column [0, 2, 4, 6, 1, 3, 5, 7][i] of its eight
GEMV       qweight int32 [out, in / 8]   scales [out, 8 ZW]     qzeros int32 [out, ZW]
           nibbles in order; groups padded with zeros to whole words of zero points
GEMV fast  qweight int16 [out / 4, in]   scales [8 ZW, out]     qzeros float16 [8 ZW, out]
           four rows interleaved; qzeros hold -(z * s), which is added

W[n, k] = (q - z) * s
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of, packed, unpacked
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.hf.stated import overridden
from jaxquant.io.hf.to_qtensor import block_size, qtensor, refined
from jaxquant.io.strict_json import Json

__all__ = ["AWQ"]

_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble that holds each column


def _refuse(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    _check_bits(config, error)
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version not in ("gemm", "gemv", "gemv_fast", "llm-awq"):
        todo = "Convert it from the checkpoint that the kernel's layout was made from"
        raise error(f"the layout {version!r} is that of one GPU kernel and cannot be read", todo=todo)


def _check_bits(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    bits = config.get("bits", config.get("w_bit", 4))
    if bits != 4:
        raise error("AWQ has 4-bit codes only", todo="Check the configuration", bits=bits)


def read(m: Module) -> QTensor:
    """The weight of one module."""
    _check_bits(m.config, m.error)
    if m.has(".qweight") and m.array(".qweight").dtype == np.int16:
        return _fast(m)
    qweight = m.array(".qweight", np.int32, ndim=2)
    qzeros = m.array(".qzeros", np.int32, ndim=2)
    scales = m.scales(".scales", ndim=2)
    if scales.shape[1] == 8 * qweight.shape[1]:
        length, out = qweight.shape[0], scales.shape[1]
        size = _group_size(m, length, scales.shape[0])
        m.check(".qzeros", qzeros.shape, (scales.shape[0], out // 8))
        stream = packed(np.ascontiguousarray(_columns(qweight, out).T), 4)
        zeros, scales = _columns(qzeros, out).T, scales.T
    else:
        out, length = qweight.shape[0], 8 * qweight.shape[1]
        size = _group_size(m, length, None)
        groups = -(-length // size)
        m.check(".scales", (scales.shape[0], min(scales.shape[1], groups)), (out, groups))
        m.check(".qzeros", qzeros.shape, (out, scales.shape[1] // 8))
        stream = bytes_of(qweight)
        zeros, scales = unpacked(bytes_of(qzeros), 4, 8 * qzeros.shape[1])[:, :groups], scales[:, :groups]
        m.notes.append("GEMV layout")
    zeros, scales = (refined(np.ascontiguousarray(v), length, size) for v in (zeros, scales))
    return qtensor(stream, scales, zero_point=zeros, bits=4, length=length, dtype=scales.dtype)


def _columns(words: np.ndarray, out: int) -> np.ndarray:
    """Codes [rows, out] from words in the order of the GEMM kernel."""
    nibbles = unpacked(bytes_of(words), 4, out)
    return nibbles.reshape(*nibbles.shape[:-1], -1, 8)[..., _PLACES].reshape(nibbles.shape)


def _group_size(m: Module, length: int, groups: int | None) -> int:
    size = m.config.get("group_size", m.config.get("q_group_size"))
    if size is None and groups is not None:
        size = block_size(length, groups)
    size = length if size == -1 else size
    if type(size) is not int or size < 1 or (groups is not None and -(-length // size) != groups):
        rule = "the group size is not stated, or does not fit the shapes"
        raise m.error(rule, ".scales", todo="Check the configuration", group_size=size, groups=groups, columns=length)
    return size


def _fast(m: Module) -> QTensor:
    qweight = m.array(".qweight", np.int16, ndim=2)
    scales, qzeros = m.scales(".scales", ndim=2), m.scales(".qzeros", np.float16, ndim=2)
    length, out = qweight.shape[1], 4 * qweight.shape[0]
    size = _group_size(m, length, None)
    groups = -(-length // size)
    if length % 64:
        raise m.error("GEMV fast needs multiples of 64 columns", ".qweight", todo="Check the format", columns=length)
    m.check(".scales", (min(scales.shape[0], groups), scales.shape[1]), (groups, out))
    m.check(".qzeros", qzeros.shape, scales.shape)
    codes = unpacked(bytes_of(qweight), 4, 4 * length)  # [out / 4, 4 * in]: tile, column, row
    codes = codes.reshape(out // 4, length // 64, 4, 64).transpose(0, 2, 1, 3).reshape(out, length // 8, 8)
    codes = codes.reshape(out, -1, 4, 2, 4).transpose(0, 1, 2, 4, 3)  # pairs within every eight
    codes = codes.reshape(out, -1, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(out, length)
    m.notes.append("GEMV fast layout: zero points as products with the scale, added")
    scale, offset = (refined(np.ascontiguousarray(v[:groups].T), length, size) for v in (scales, qzeros))
    return qtensor(packed(codes, 4), scale, offset=offset.astype(np.float32), bits=4, length=length, dtype=scales.dtype)


AWQ = Format(
    "AWQ",
    methods=("awq",),
    names=(Naming(marks=(".qweight", ".qzeros")),),
    read=read,
    layouts="GEMM, GEMV, GEMV fast (llm-awq 2); 4 bits",
    refuse=_refuse,
    stated=overridden,
)

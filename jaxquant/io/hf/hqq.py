"""HQQ: integers with float zero points, packed along the rows of a matrix of groups.

    W_q     the groups are the rows (axis 1) or columns (axis 0) of a matrix; blocks of its rows share a byte,
            the first block in the most significant bits (3 bits: ten blocks in an int32)
    scale, zero, and the parameters as scalars: nbits, group_size, axis, shape, packing, compute_dtype

    W = (q - zero) * scale, each step rounded to the compute dtype

Groups along axis 0 are strided over the weight. They become consecutive by a permutation of rows or of columns.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from jaxquant.core.blocks import spread
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import packed
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import Format, Module, Naming
from jaxquant.io.hf.to_qtensor import qtensor
from jaxquant.io.strict_json import Json

__all__ = ["HQQ"]

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_BLOCKS = {"8bit_u8": 1, "4bit_u8": 2, "3bit_32": 10, "2bit_u8": 4, "1bit_u8": 8}
_PACKINGS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
_NUMBERS = (np.bool_, np.uint8, np.int8, np.int16, np.int32, np.int64)
_SAID = (
    ".channel_wise", ".encoded_state_dict", ".offload_meta", ".optimize", ".quant_scale", ".quant_zero", ".round_zero",
    ".stores_quant_config", ".unpack_view_dtype",
)  # fmt: skip


def _number(m: Module, suffix: str, key: str) -> Json:
    """A parameter of the module, from its tensors or from the configuration."""
    own = m.maybe(suffix, *_NUMBERS)
    if own is not None:
        return int(own.reshape(-1)[0])
    config = m.config.get("quant_config")
    weight = config.get("weight_quant_params") if isinstance(config, dict) else None
    return weight.get(key) if isinstance(weight, dict) else None


def _stated(_: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json]:
    """The configuration of one module, by its tag: the end of its name, without the number of the layer."""
    parts = prefix.split(".")
    tags = [".".join(part for part in parts[i:] if not part.isdigit()) for i in range(len(parts))]
    for place in ("dynamic_config", "quant_config"):
        table = config.get(place)
        own = next((table[tag] for tag in tags if tag in table), None) if isinstance(table, dict) else None
        if isinstance(own, dict):
            return config | {"quant_config": own if "weight_quant_params" in own else {"weight_quant_params": own}}
    return config


def _text(m: Module, suffix: str) -> str | None:
    own = m.maybe(suffix, np.uint8, ndim=1)
    return None if own is None else own.tobytes().decode(errors="replace")


def read(m: Module) -> QTensor:
    """The weight of one module."""
    m.skip(*_SAID)
    todo = "Save it again with hqq"
    bits, axis, size = (
        _number(m, ".nbits", "nbits"),
        _number(m, ".axis", "axis"),
        _number(m, ".group_size", "group_size"),
    )
    raw = m.array(".W_q")
    if _number(m, ".view_as_float", "view_as_float"):
        raw = raw.view(np.int32 if bits == 3 else np.uint8)
    shape = tuple(int(n) for n in m.array(".shape", np.int64, np.int32, ndim=1))
    count = math.prod(shape)
    packing = _text(m, ".packing") or _PACKINGS.get(bits, "")
    dtype = _DTYPES.get((_text(m, ".compute_dtype") or "torch.float16").removeprefix("torch."))
    scale = m.scales(".scale", ndim=2)
    zero = m.scales(".zero", ndim=2)
    size = (shape[-1] if axis == 1 else shape[0]) if size in (None, 0) else size
    good = len(shape) == 2 and packing in _BLOCKS and bits in _PACKINGS and axis in (0, 1) and dtype is not None
    if not good or type(size) is not int or size < 1 or count % size or raw.ndim != 2:
        got = {"nbits": bits, "axis": axis, "group_size": size, "shape": shape, "packing": packing}
        raise m.error("the parameters of the module do not fit together", ".W_q", todo=todo, **got)
    rows, columns = (count // size, size) if axis == 1 else (size, count // size)
    wanted = np.int32 if packing == "3bit_32" else np.uint8
    blocks = _BLOCKS[packing]
    if raw.dtype != wanted:
        raise m.error("W_q has another dtype than its packing", ".W_q", todo=todo, dtype=raw.dtype, packing=packing)
    m.check(".W_q", raw.shape, (-(-rows // blocks), columns))
    for suffix, value in ((".scale", scale), (".zero", zero)):
        m.check(suffix, value.shape, (rows, 1) if axis == 1 else (1, columns))
    codes = _codes(raw, blocks, 32 // 10 if packing == "3bit_32" else 8 // blocks, rows)
    if (codes >> np.uint8(bits)).any() if bits < 8 else False:
        raise m.error("a code is wider than nbits", ".W_q", todo=todo, nbits=bits)
    bits, scale, zero = max(bits, 2), scale.astype(dtype), zero.astype(dtype)
    layout = _in_rows if axis == 1 else _across_rows
    return layout(m, codes.reshape(shape), scale, zero, size, bits=bits, dtype=np.dtype(dtype))


def _in_rows(
    m: Module, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, size: int, *, bits: int, dtype: np.dtype
) -> QTensor:
    """Groups of consecutive elements of a row, or of some rows."""
    out, length = codes.shape
    if length % size and size % length:
        index = (np.arange(0, codes.size, step := math.gcd(size, length)) // size).reshape(out, -1)
        scale, zero = (v.reshape(-1)[index].reshape(out, length // step) for v in (scale, zero))
    elif size > length:
        scale, zero = (v.reshape(-1, 1) for v in (scale, zero))
        if out % len(scale):
            scale, zero = (spread(v, (len(v) * size // length, 1)) for v in (scale, zero))
    else:
        scale, zero = (v.reshape(out, -1) for v in (scale, zero))
    return qtensor(packed(codes, bits), scale, zero_point=zero, length=length, bits=bits, dtype=dtype)


def _across_rows(
    m: Module, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, size: int, *, bits: int, dtype: np.dtype
) -> QTensor:
    """Groups along axis 0: elements of a group are as far apart as the number of groups."""
    m.notes.append("groups along axis 0")
    (out, length), period = codes.shape, codes.size // size
    if period % length == 0:  # groups repeat after whole rows: store rows of one group together, features minor
        step = period // length
        order = np.arange(out).reshape(-1, step).T.reshape(-1)
        stream = packed(np.ascontiguousarray(codes.T[:, order]), bits)
        scale, zero = (v.reshape(step, length) for v in (scale, zero))
        permutation = None if (order == np.arange(out)).all() else order[:, None].astype(np.int32)
        kind = {"length": out, "minor": (-2,), "permutation": permutation}
    elif length % period:
        got = {"shape": codes.shape, "group_size": size}
        raise m.error("groups along axis 0 that follow neither rows nor columns", ".W_q", todo="Use axis 1", **got)
    else:
        order = np.arange(length).reshape(-1, period).T.reshape(-1)
        stream = packed(codes[:, order], bits)
        kind = {"length": length, "permutation": order[None].astype(np.int32)}
    return qtensor(stream, scale, zero_point=zero, bits=bits, dtype=dtype, **kind)


def _codes(raw: np.ndarray, blocks: int, width: int, rows: int) -> np.ndarray:
    """Codes [rows, columns] from blocks of rows that share a byte or a word."""
    if blocks == 1:
        return raw[:rows]
    words = raw.view(np.uint32) if raw.dtype == np.int32 else raw
    mask = words.dtype.type((1 << width) - 1)
    parts = [(words >> words.dtype.type(width * (blocks - 1 - i))) & mask for i in range(blocks)]
    return np.concatenate(parts).astype(np.uint8)[:rows]


HQQ = Format(
    "HQQ",
    methods=("hqq",),
    names=(Naming(marks=(".W_q", ".zero")),),
    read=read,
    stated=_stated,
    layouts="1 to 8 bits, both axes, float zero points",
)

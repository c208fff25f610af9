"""bitsandbytes: nf4 and fp4 with blocks over the flattened weight, and LLM.int8().

    weight                                  bytes of any dtype: element 2k in the high nibble of byte k
    weight.absmax                           float32 [blocks], or uint8 codes of it (double quantization)
    weight.quant_map                        float32 [16], the table
    weight.nested_absmax, nested_quant_map  float32 [ceil(blocks / 256)], [256]
    weight.quant_state.bitsandbytes__nf4    JSON as bytes: quant_type, blocksize, dtype, shape, nested_offset ...

    W = quant_map[code] * absmax[i // blocksize]
    absmax[j] = nested_quant_map[code] * nested_absmax[j // 256] + nested_offset

    weight int8 [out, in], SCB float32 [out], weight_format: W = weight * SCB / 127

A parameter NAME has NAME.absmax, NAME.quant_map and so on.

Blocks straddle rows if the block size does not divide the input features; they are then split at the ends of rows. An
int8 weight is multiplied by SCB, rounded to float32, and then by 1/127: its scale has these two factors. The result is
float32 for models of every dtype.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of, packed, unpacked
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, dynamic, refused
from jaxquant.io.hf.to_qtensor import TABLES, flat_blocks
from jaxquant.io.safetensors import is_shape
from jaxquant.io.strict_json import Json, parse

__all__ = ["BITSANDBYTES"]

_STATE = ".weight.quant_state.bitsandbytes__"
_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def read(m: Module) -> QTensor:
    """The weight of one module."""
    return _int8(m) if m.has(".SCB") else _four_bits(m)


def _int8(m: Module) -> QTensor:
    weight, scale = m.array(".weight", np.int8, ndim=RANKS), m.magnitudes(".SCB", np.float32, ndim=1)
    m.check(".SCB", scale.shape, weight.shape[:1])
    scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    layout = m.maybe(".weight_format", np.uint8)
    if layout is not None and int(layout.reshape(-1)[0]) != 0:
        rule = "the weight is tiled for one kind of GPU"
        raise m.error(rule, ".weight_format", todo="Save it again with a newer bitsandbytes", code=int(layout.max()))
    if m.config.get("llm_int8_threshold"):
        m.notes.append(f"outlier threshold {m.config['llm_int8_threshold']}")
    ones = (1,) * weight.ndim
    factors = QTensor(scale, np.full(ones, 1 / 127, np.float32), None, qtype="float32", dtype=np.float32)
    return QTensor(weight, factors, None, qtype="int8", dtype=np.float32)


def _state(m: Module) -> tuple[str, dict[str, Json]]:
    for kind in ("nf4", "fp4"):
        raw = m.maybe(_STATE + kind, np.uint8, ndim=1)
        if raw is None:
            continue
        todo = "The checkpoint is damaged: fetch it again"
        try:
            state = parse(raw.tobytes())
        except ValueError as error:
            raise m.error(f"the quantization state is not JSON ({error})", _STATE + kind, todo=todo) from None
        good = isinstance(state, dict) and state.get("quant_type") == kind and state.get("dtype") in _DTYPES
        shape, block = (state.get("shape"), state.get("blocksize")) if good else (None, None)
        if not good or not is_shape(shape) or not shape or type(block) is not int or block < 1:
            raise m.error("the quantization state is not one of a 4-bit weight", _STATE + kind, todo=todo, state=state)
        return kind, state
    raise m.error("the quantization state is missing", _STATE + "nf4", todo="Fetch all files of the checkpoint again")


def _four_bits(m: Module) -> QTensor:
    kind, state = _state(m)
    shape, block = tuple(state["shape"]), state["blocksize"]
    count = math.prod(shape)
    stream = bytes_of(m.array(".weight").reshape(-1))
    m.check(".weight", stream.shape, (-(-count // 2),))
    table = m.array(".weight.quant_map", np.float32)
    if table.shape != (16,) or not np.array_equal(table, TABLES[kind]):
        todo = "Only the tables of bitsandbytes itself can be read"
        raise m.error(f"the table is not that of {kind}", ".weight.quant_map", todo=todo, table=table)
    stream = stream << np.uint8(4) | stream >> np.uint8(4)
    if shape[-1] % 2:
        codes = packed(unpacked(stream, 4, count).reshape(shape), 4)
    else:
        codes = stream.reshape(*shape[:-1], shape[-1] // 2)
    index = flat_blocks(shape, block)
    scale = _scale(m, state, index, -(-count // block))
    return QTensor(codes, scale, None, qtype=kind, dtype=_DTYPES[state["dtype"]], length=shape[-1])


def _scale(m: Module, state: dict[str, Json], index: np.ndarray, blocks: int) -> QTensor | np.ndarray:
    nested = m.has(".weight.nested_absmax")
    if not nested:
        absmax = m.magnitudes(".weight.absmax", np.float32, ndim=1)
        m.check(".weight.absmax", absmax.shape, (blocks,))
        return absmax[index]
    codes = m.array(".weight.absmax", np.uint8, ndim=1)
    m.check(".weight.absmax", codes.shape, (blocks,))
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(size) is not int or size < 1 or not isinstance(offset, int | float) or not math.isfinite(offset):
        todo = "The checkpoint is damaged: fetch it again"
        raise m.error(
            "the state of the nested scales is incomplete", _STATE + state["quant_type"], todo=todo, state=state
        )
    scales = m.magnitudes(".weight.nested_absmax", np.float32, ndim=1)
    m.check(".weight.nested_absmax", scales.shape, (-(-blocks // size),))
    size = min(size, blocks)
    table = m.scales(".weight.nested_quant_map", np.float32)
    m.check(".weight.nested_quant_map", table.shape, (256,))
    if not np.array_equal(table, TABLES["dynamic8"]):
        m.notes.append("scales of an unknown table, in float32")
        return (table[codes] * scales[np.arange(blocks) // size] + np.float32(offset))[index]
    # The nested blocks run over the blocks: cut them where the rows of scales end.
    inner = (index // size).astype(np.int64)
    step = inner.shape[-1]
    while (inner.reshape(-1, step) != inner.reshape(-1, step)[:, :1]).any():
        step = next(d for d in range(step - 1, 0, -1) if inner.shape[-1] % d == 0)
    outer = scales[inner[..., ::step]]
    added = np.full(outer.shape, offset, np.float32)
    return QTensor(codes[index], outer, None, added, qtype="dynamic8", dtype=np.float32)


def activation(m: Module) -> Activation | None:
    """Of LLM.int8(): int8 for each token, apart from features that hold an outlier; of 4 bits, none."""
    if not m.has(".SCB"):
        return None
    threshold = m.config.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or threshold < 0:
        raise refused(m, "llm_int8_threshold", threshold, "the threshold must not be negative")
    return dynamic("int8", outliers=float(threshold)) if threshold else dynamic("int8")


BITSANDBYTES = Format(
    "bitsandbytes",
    methods=("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
    names=(
        Naming(marks=(".weight.absmax", ".weight.quant_map", ".SCB")),
        Naming(
            "",
            (".absmax", ".quant_map"),
            tensors={
                ".weight": "",
                ".weight.absmax": ".absmax",
                ".weight.quant_map": ".quant_map",
                ".weight.nested_absmax": ".nested_absmax",
                ".weight.nested_quant_map": ".nested_quant_map",
                _STATE + "nf4": ".quant_state.bitsandbytes__nf4",
                _STATE + "fp4": ".quant_state.bitsandbytes__fp4",
            },
            keeps=("_bias",),
        ),
    ),
    read=read,
    layouts="nf4, fp4, nested scales, any storage dtype; LLM.int8()",
    activation=activation,
)

"""optimum-quanto: `quanto_qmap.json` beside the weights names the modules.

    int8, float8   weight._data [out, in], weight._scale [out, 1]: q * scale
    int4, int2     weight._data._data uint8, weight._scale, weight._shift [rows, 1]: scale * q - shift, rounded twice

With more than 128 input features, rows are groups of 128 of them (96, 64 or 32 if 128 does not divide), and blocks of
rows share a byte, the first in the least significant bits. The file does not state how many rows form one row of the
weight; the bias, the configuration or the caller does. Kernels of convolutions [out, in, ..] are grouped in the same
way, over all axes after the first; without groups, codes keep their axes.
"""

from __future__ import annotations

import dataclasses
import math
import re

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import packed
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, refused, static, with_outputs
from jaxquant.io.hf.to_qtensor import flat_blocks, qtensor

__all__ = ["QUANTO"]


def read(m: Module) -> QTensor:
    """The weight of one module."""
    if m.has(".weight._data"):
        weight = m.array(".weight._data", np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ndim=RANKS)
        scale = m.magnitudes(".weight._scale")
        ones = (1,) * (weight.ndim - 1)
        scale = scale.reshape(1, *ones) if scale.size == 1 else scale
        if scale.size != 1:
            m.check(".weight._scale", scale.shape, (weight.shape[0], *ones))
        qtype = "int8" if weight.dtype == np.int8 else weight.dtype.name
        return QTensor(weight, scale, None, qtype=qtype, dtype=scale.dtype)
    raw = m.array(".weight._data._data", np.uint8, ndim=RANKS)
    scale, shift = m.scales(".weight._scale", ndim=raw.ndim), m.scales(".weight._shift", ndim=raw.ndim)
    rows, columns = scale.shape[0], math.prod(raw.shape[1:])
    m.check(".weight._shift", shift.shape, scale.shape)
    m.check(".weight._scale", scale.shape, (rows, *(1,) * (raw.ndim - 1)))
    bits = _bits(m, raw.shape[0], rows)
    blocks = 8 // bits
    m.check(".weight._data._data", raw.shape, (-(-rows // blocks), *raw.shape[1:]))
    parts = [(raw >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1) for i in range(blocks)]
    codes = np.concatenate(parts)[:rows]
    shape = _shape(m, rows, columns) if raw.ndim == 2 else codes.shape
    index = flat_blocks(shape, columns)
    if raw.ndim > 2:  # a kernel without groups
        index = index[..., :1]
    scale, shift = (v.reshape(-1)[index] for v in (scale, shift))
    stream = packed(codes.reshape(shape), bits)
    return qtensor(stream, scale, offset=-shift, bits=bits, length=shape[-1], dtype=scale.dtype)


def _bits(m: Module, packed_rows: int, rows: int) -> int:
    """The width of codes that the configuration states, or the only one that the shapes allow."""
    entry = m.config.get(m.prefix)
    stated = (entry if isinstance(entry, dict) else m.config).get("weights")
    said = {"qint4": 4, "int4": 4, "qint2": 2, "int2": 2}.get(str(stated))
    fitting = [bits for bits in (4, 2) if packed_rows == -(-rows * bits // 8)]
    if said is None and len(fitting) == 2:
        rule, todo = "int4 and int2 both fit the shapes", "Add quanto_qmap.json, which says which of them it is"
        raise m.error(rule, ".weight._data._data", todo=todo, rows=rows, packed_rows=packed_rows)
    if said is None and not fitting:
        m.check(".weight._data._data", (packed_rows,), (-(-rows * 4 // 8),))
    return said or fitting[0]


def _group_of(length: int) -> int:
    """The group size for ``length`` input features."""
    return next((g for g in (128, 96, 64, 32) if length > 128 and length % g == 0), length)


def _shape(m: Module, rows: int, columns: int) -> tuple[int, ...]:
    """The weight's own shape."""
    if m.shape_given is not None:
        out, *rest = m.shape_given
        if not rest or out * math.prod(rest) != rows * columns or _group_of(math.prod(rest)) != columns:
            todo, given = "Correct shapes", tuple(m.shape_given)
            raise m.error("the given shape does not fit", ".weight._scale", todo=todo, given=given, rows=rows)
        return out, *rest
    if columns not in (128, 96, 64, 32):
        return rows, columns
    bias = m.maybe(".bias")
    if bias is not None:
        m.used.discard(m.named(".bias"))
    outs = [len(bias)] if bias is not None and bias.ndim == 1 else _expected(m)
    fitting = {(out, rows * columns // out) for out in outs if out and rows % out == 0}
    fitting = {(out, length) for out, length in fitting if _group_of(length) == columns}
    if len(fitting) != 1:
        todo = f"Pass shapes={{{m.prefix!r}: (out_features, in_features)}}"
        raise m.error("the file does not say the shape of this weight", ".weight._data._data", todo=todo, rows=rows)
    return fitting.pop()


def _expected(m: Module) -> list[int]:
    """Output features by the configuration, for modules with the usual names."""
    c = m.checkpoint.config
    heads, hidden = c.get("num_attention_heads"), c.get("hidden_size")
    if type(heads) is not int or type(hidden) is not int or heads < 1:
        return []
    head = c.get("head_dim") or hidden // heads
    wide = c.get("intermediate_size")
    outs = {
        r"(q_proj|query)": heads * head,
        r"(k_proj|v_proj|key|value)": (c.get("num_key_value_heads") or heads) * head,
        r"(o_proj|out_proj|down_proj|fc2)": hidden,
        r"(gate_proj|up_proj|fc1)": wide,
        r"lm_head": c.get("vocab_size"),
    }
    return [n for pattern, n in outs.items() if re.search(rf"(^|\.){pattern}$", m.prefix) and type(n) is int]


def activation(m: Module) -> Activation | None:
    """A static range of inputs; outputs, after the bias, are rounded to a range as well.

    The library calibrates with both. By default it then rounds no outputs that an operation would have to turn back to
    float, in the model in memory; the file does not say so, and a model that is loaded from it rounds all of them.
    """
    entry = m.config.get(m.prefix)
    stated = (entry if isinstance(entry, dict) else m.config).get("activations")
    if stated in (None, "none"):
        idle = tuple(n for side in ("input", "output") if (n := f"{m.prefix}.{side}_scale") in m.checkpoint.tensors)
        if stated is None and not all((m.checkpoint.array(name).astype(np.float32) == 1).all() for name in idle):
            raise refused(m, "activations", None, "the file has their scales, and does not say of which type they are")
        return Activation(None, used=idle)
    qtype = {"qint8": "int8", "int8": "int8", "qfloat8": _FP8, "qfloat8_e4m3fn": _FP8, "float8": _FP8}.get(str(stated))
    qtype = "float8_e5m2" if stated == "qfloat8_e5m2" else qtype
    if qtype is None:
        raise refused(m, "activations", stated)
    output = f"{m.prefix}.output_scale"
    value = m.checkpoint.array(output) if output in m.checkpoint.tensors else np.ones(())
    found = static(m, f"activations={stated}", qtype)
    if (value.astype(np.float32) == 1).all():
        return dataclasses.replace(found, used=(*found.used, output))
    return with_outputs(m, found, "output_scale", float(value.reshape(-1)[0]))


_FP8 = "float8_e4m3fn"

QUANTO = Format(
    "quanto",
    methods=("quanto",),
    names=(
        Naming(marks=(".weight._data._data", ".weight._data", ".weight._scale")),
        Naming(
            "",
            ("._data._data", "._data", "._scale"),
            tensors={
                ".weight._data._data": "._data._data",
                ".weight._data": "._data",
                ".weight._scale": "._scale",
                ".weight._shift": "._shift",
                ".bias": "_bias",
            },
            keeps=("_bias",),
        ),
    ),
    read=read,
    layouts="int8, float8, int4 and int2 in groups",
    activation=activation,
)

"""torchao's tensor subclasses, as its safetensors support flattens them.

The header's metadata holds, for each parameter P.weight, {"_type", "_data", "_tensor_data_names"} as JSON; its parts
are the tensors P._weight_PART.

    Int8Tensor                 qdata int8, scale, zero_point    (q - z) * s; act_quant_scale and act_quant_zero_point
                                                                  of a static range of its activations
    IntxUnpackedToInt8Tensor   the same in groups, 1 to 8 bits
    Float8Tensor               qdata fp8, scale                 q * s

Older repositories hold pickled subclasses, which are not opened. The int4 layouts of GPU kernels are refused by name.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxquant.core import observers
from jaxquant.core.errors import QuantError
from jaxquant.core.granularity import PerTensor
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import packed
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, dynamic, given, refused, whole
from jaxquant.io.hf.to_qtensor import aligned, spread
from jaxquant.io.strict_json import Json, parse

__all__ = ["TORCHAO"]

_DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def _described(checkpoint: HFCheckpoint, name: str, text: str) -> dict[str, Json] | None:
    """The metadata of a parameter; None if it is a plain tensor."""
    if "_type" not in text or name == "tensor_names":
        return None
    try:
        entry = parse(text)
    except ValueError as error:
        todo = "The checkpoint is damaged: fetch it again"
        raise checkpoint.error(f"the description of a tensor is not JSON ({error})", name, todo=todo) from None
    plain = not isinstance(entry, dict) or entry.get("_type") in (None, "Tensor")
    return None if plain else entry


#: Parts of an Int8Tensor with a static range of its activations.
_STATIC = ("act_quant_scale", "act_quant_zero_point")


def _inner(m: Module) -> Module:
    """The parts of a parameter P, whose names begin with P's place and ``_weight_``."""
    owner, _, name = m.prefix.rpartition(".")
    inner = Module(m.checkpoint, f"{owner}._{name}_" if owner else f"_{name}_", m.naming, m.config)
    inner.used = m.used
    return inner


def _find(checkpoint: HFCheckpoint) -> list[str]:
    return [name for name, text in checkpoint.metadata().items() if _described(checkpoint, name, text)]


def read(m: Module) -> QTensor:
    """One parameter."""
    entry = _described(m.checkpoint, m.prefix, m.checkpoint.metadata()[m.prefix])
    assert entry is not None
    kind, data = entry["_type"], entry.get("_data")
    data = data if isinstance(data, dict) else {}
    inner = _inner(m)
    for part in _STATIC:
        inner.maybe(part)
    if inner.has("act_pre_scale"):
        rule = "its input is multiplied by a scale for each feature, which no layer before it holds"
        todo = "Quantize the model without SmoothQuant or AWQ, or ask for its float weights"
        raise inner.error(rule, "act_pre_scale", todo=todo)
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"):
        todo = "Quantize the model with Int8, Intx or Float8 weight-only configs, or ask for its float weights"
        raise m.error(f"the layout of {kind} belongs to one GPU kernel and is not read", todo=todo)
    codes = inner.array("qdata", np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ndim=RANKS)
    block = data.get("block_size")
    scale = _blocks(inner, "scale", inner.magnitudes("scale"), codes.shape, block)
    zero = inner.maybe("zero_point", np.int8, np.int32)
    if zero is not None:
        zero = _blocks(inner, "zero_point", zero, codes.shape, block) if zero.any() else None
    written = data.get("dtype")
    dtype = _DTYPES.get(str(written.get("_data"))) if isinstance(written, dict) else None
    dtype = scale.dtype if dtype is None else dtype
    if codes.dtype != np.int8:
        return QTensor(codes, scale, zero, qtype=codes.dtype.name, dtype=dtype)
    target = data.get("target_dtype")
    bits = str(target.get("_data")).removeprefix("int") if isinstance(target, dict) else "8"
    if bits not in ("1", "2", "3", "4", "5", "6", "7", "8"):
        raise m.error("target_dtype must be an integer of 1 to 8 bits", todo="Check the format", target_dtype=target)
    n = max(int(bits), 2)
    half = 1 << (n - 1)
    if zero is not None and (zero.min() < -half or zero.max() >= half):
        got = {"least": int(zero.min()), "greatest": int(zero.max()), "target_dtype": f"int{n}"}
        raise inner.error("a zero point is not a code of the type", "zero_point", todo="Fetch it again", **got)
    if n == 8:
        return QTensor(codes, scale, zero, qtype="int8", dtype=dtype)
    if codes.min() < -half or codes.max() >= half:
        raise inner.error("a code is wider than its type", "qdata", todo="Fetch it again", target_dtype=f"int{n}")
    stream = packed((codes.astype(np.int16) + half).astype(np.uint8), n)
    return QTensor(stream, scale, zero, qtype=f"int{n}", dtype=dtype, length=codes.shape[-1])


def _blocks(m: Module, part: str, values: np.ndarray, shape: tuple[int, ...], block: Json) -> np.ndarray:
    full = aligned(values, shape)
    said = isinstance(block, list) and len(block) == len(shape) and all(type(n) is int and n > 0 for n in block)
    found = None if full is None else spread(full, shape, tuple(block) if said else (None,) * len(shape))
    if found is None:
        got = {"shape": values.shape, "block_size": block, "weight": shape}
        raise m.error("the values fit no blocks of the weight", part, todo="Check the format", **got)
    return found


def activation(m: Module) -> Activation | None:
    """The activation scheme in ``act_quant_kwargs`` or ``activation_quantization``."""
    entry = _described(m.checkpoint, m.prefix, m.checkpoint.metadata()[m.prefix])
    data = (entry or {}).get("_data")
    data = data if isinstance(data, dict) else {}
    kind = _word(data.get("activation_quantization"), "_data")
    if kind is not None:
        if kind.lower() != "int8_asym_per_token":
            raise refused(m, "activation_quantization", kind)
        return dynamic("int8", symmetric=False)
    how = data.get("act_quant_kwargs")
    if how is None:
        return None
    said = how.get("_data") if isinstance(how, dict) else None
    if not isinstance(how, dict) or not isinstance(said, dict):
        raise refused(m, "act_quant_kwargs", how)
    kinds = {"QuantizeTensorToFloat8Kwargs": "float8_e4m3fn", "QuantizeTensorToInt8Kwargs": "int8"}
    qtype, granularity = kinds.get(str(how.get("_type"))), _word(said.get("granularity"), "_type")
    written = _word(said.get("float8_dtype"), "_data")
    if qtype == "float8_e4m3fn" and written is not None:
        qtype = written if written in ("float8_e4m3fn", "float8_e5m2") else None
    mapping = _word(said.get("mapping_type"), "_data") or "SYMMETRIC"
    if qtype is None or granularity not in ("PerRow", "PerTensor") or mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        raise refused(m, "act_quant_kwargs", how)
    inner = _inner(m)
    if inner.has(_STATIC[0]):
        tensors = {part.rpartition("quant_")[2]: inner.maybe(part) for part in _STATIC}
        if granularity != "PerTensor" or qtype != "int8" or said.get("reduce_range"):
            raise refused(m, "act_quant_kwargs", how, "a static range is one int8 range for the whole tensor")
        names = tuple(inner.named(part) for part in _STATIC if inner.has(part))
        return given(m, "act_quant_kwargs", qtype, tensors, names, symmetric=mapping == "SYMMETRIC")
    shared: dict[str, Json] = {} if granularity == "PerRow" else {"granularity": PerTensor()}
    if qtype == "int8":
        qtype = "int7" if said.get("reduce_range") else "int8"  # -64 .. 63, for processors whose sums overflow
        return whole(qtype, **shared) if mapping == "SYMMETRIC" else dynamic(qtype, symmetric=False, **shared)
    least, most = said.get("hp_value_lb"), said.get("hp_value_ub")
    if least is None and most is None:
        return dynamic(qtype, **shared)
    try:
        bounds = observers.Bounded(float(least or 0), None if most is None else float(most))
    except (QuantError, TypeError, ValueError):
        why = "hp_value_lb and hp_value_ub must be bounds of a range"
        raise refused(m, "act_quant_kwargs", how, why) from None
    return dynamic(qtype, calibration=bounds, **shared)


def _word(value: Json, key: str) -> str | None:
    """A value of the metadata as text; classes and enumerations are stored as objects."""
    value = value.get(key) if isinstance(value, dict) else value
    return None if value is None else str(value)


TORCHAO = Format(
    "torchao",
    methods=("torchao",),
    names=(Naming(""),),
    read=read,
    layouts="Int8Tensor, IntxUnpackedToInt8Tensor, Float8Tensor in safetensors",
    find=_find,
    activation=activation,
)

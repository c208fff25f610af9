"""compressed-tensors, as llm-compressor writes it: the tensors of a module determine its layout.

    weight int8 [out, in], weight_scale              int-quantized, naive-quantized; (q - weight_zero_point) * scale
    weight fp8 [out, in], weight_scale               float-quantized: per tensor, channel or block
    weight fp8, weight_scale uint8 [out, in / 32]    mxfp8-quantized
    weight_packed int32 [out, words], weight_scale,  pack-quantized: offset binary (code + 2**(bits - 1)), a bit stream
      weight_shape, weight_zero_point, weight_g_idx    along the row; zero points along the rows of a column
    weight_packed uint8 [out, in / 2], weight_scale fp8 [out, in / 16], weight_global_scale
                                                     nvfp4-pack-quantized: e2m1 * (scale / global_scale)
    weight_packed uint8, weight_scale uint8          mxfp4-pack-quantized: e2m1 * 2**(scale - 127)

Stacked experts have these shapes behind an axis of experts, and one global scale for each or for all of them; kernels
of convolutions are [out, in, ..] with a scale per output. A parameter NAME has NAME_packed, NAME_scale and so on.

From version 0.18 on, 3-, 5-, 6- and 7-bit codes are one dense stream; before, a word held 32 // bits codes and was
padded. The number of words tells the two apart.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

from jaxquant.core import observers
from jaxquant.core.errors import QuantError
from jaxquant.core.granularity import PerGroup, PerTensor
from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of, packed, unpacked
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import NARROW, Activation, dynamic, in_unit, refused, static, whole, with_outputs
from jaxquant.io.hf.stated import matches
from jaxquant.io.hf.to_qtensor import E2M1, Grouping, aligned, grouping, qtensor, spread
from jaxquant.io.strict_json import Json

__all__ = ["COMPRESSED_TENSORS"]

_SPARSE = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask")


def _refuse(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    places = [config, config.get("sparsity_config"), *_groups(config)]
    formats = [place.get("format") for place in places if isinstance(place, dict)]
    if found := [f for f in formats if f in _SPARSE]:
        todo = "Decompress it with the compressed-tensors version that wrote it"
        raise error(f"the 2:4 sparse format {found[0]!r} was removed from compressed-tensors", todo=todo)
    if config.get("transform_config"):
        todo = "Ask for a checkpoint without online transforms"
        raise error("its activations are rotated at run time, which a weight alone cannot express", todo=todo)


def _groups(config: dict[str, Json]) -> list[dict[str, Json]]:
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def _weights(m: Module) -> list[dict[str, Json]]:
    """The ``weights`` of the config groups that can be the module's."""
    return [group["weights"] for group in _groups_of(m)]


def _groups_of(m: Module) -> list[dict[str, Json]]:
    """The config groups that can be the module's.

    A target that is the module's name counts before an expression that matches it, and that before the name of a class,
    which may be that of any module. If no group names it, every group may be meant.
    """
    named: dict[str, list[dict[str, Json]]] = {"name": [], "expression": [], "class": [], "": []}
    for group in _groups(m.config):
        targets, weights = group.get("targets"), group.get("weights")
        if isinstance(weights, dict):
            texts = [t for t in targets if isinstance(t, str)] if isinstance(targets, list) else []
            for kind in {_names(m, target) for target in texts} or {""}:
                named[kind].append(group)
    return next((found[:1] if kind == "expression" else found for kind, found in named.items() if found), [])


def _names(m: Module, target: str) -> str:
    """How a target matches the module: by its "name", an "expression", possibly its "class", or not at all ("")."""
    if target.startswith("re:"):
        return "expression" if matches(re.match, target[3:], m.prefix, m.checkpoint.error) else ""
    if m.prefix == target or m.prefix.endswith("." + target):
        return "name"
    return "class" if "." not in target and target not in m.checkpoint.owners else ""


def _block(weights: dict[str, Json]) -> tuple[int | None, int | None]:
    """Rows and columns of a block; None where the configuration does not state them."""
    structure, size = weights.get("block_structure"), weights.get("group_size")
    if isinstance(structure, str):
        structure = [int(n) for n in re.findall(r"\d+", structure)]
    if isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure):
        return structure[0], structure[1]
    return None, size if type(size) is int and size > 0 else None


def _spread(m: Module, suffix: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points as one per block of [.., out, in], or of a kernel [out, in, ..]."""
    full = aligned(values, shape, out_first=not m.is_parameter)
    if full is not None and full.size == 1:
        return full
    blocks = {_block(weights) for weights in _weights(m)} if len(shape) < 4 else set()  # a kernel has one per output
    blocks = blocks or {(None, None)}
    found: list[np.ndarray] = []
    if full is not None and all(n in (1, size) for n, size in zip(full.shape, shape[:-2], strict=False)):
        tried = [spread(full, shape, _sizes(m, full.shape, shape, rows, columns)) for rows, columns in blocks]
        found = [value for value in tried if value is not None]
    if found and all(np.array_equal(value, found[0]) for value in found):
        return found[0]
    rule = "one value per tensor, row, group or block is needed, by the configuration of the module"
    got = {"shape": values.shape, "weight": shape, "blocks": tuple(blocks)}
    raise m.error(rule, suffix, todo="Check group_size and block_structure in its config group", **got)


def _sizes(
    m: Module, counts: tuple[int, ...], shape: tuple[int, ...], rows: int | None, columns: int | None
) -> tuple[int | None, ...]:
    """Elements of a block along each axis, as `spread` takes them."""
    *stack, out, length = zip(counts, shape, strict=True)
    if m.is_parameter and length[0] == length[1] and out[0] != out[1]:  # [.., in, out]: groups are of rows
        last = (rows or columns, 1)
    else:
        last = (1 if out[0] == out[1] else rows, length[1] if length[0] == 1 else columns)
    return (*(size if n == 1 else None for n, size in stack), *last)


def read(m: Module) -> QTensor:
    """One weight."""
    if m.has(".weight_packed"):
        return _integers(m) if m.array(".weight_packed", np.int32, np.uint8).dtype == np.int32 else _fp4(m)
    weight = m.array(".weight", np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ndim=RANKS)
    if m.has(".weight_scale") and m.array(".weight_scale").dtype in (np.uint8, ml_dtypes.float8_e8m0fnu):
        scale = _spread(m, ".weight_scale", m.exponents(".weight_scale"), weight.shape)
        return QTensor(weight, scale, None, qtype="float8_e4m3fn", dtype=m.dtype)
    raw = m.scales(".weight_scale") if weight.dtype == np.int8 else m.magnitudes(".weight_scale")
    scale = _spread(m, ".weight_scale", raw, weight.shape)
    zero = m.maybe(".weight_zero_point", np.int8, ml_dtypes.float8_e4m3fn)
    if zero is not None and not zero.astype(np.float32).any():
        zero = None
    if zero is not None:
        m.check(".weight_zero_point", zero.shape, raw.shape)
        zero = _spread(m, ".weight_zero_point", zero, weight.shape)
    qtype = "int8" if weight.dtype == np.int8 else weight.dtype.name
    return QTensor(weight, scale, zero, qtype=qtype, dtype=raw.dtype)


def _fp4(m: Module) -> QTensor:
    codes = m.array(".weight_packed", np.uint8, ndim=RANKS)
    length = 2 * codes.shape[-1]
    if not m.has(".weight_global_scale"):
        scale = m.exponents(".weight_scale", ndim=codes.ndim)
        m.check(".weight_scale", scale.shape, (*codes.shape[:-1], length // 32))
        return QTensor(codes, scale, None, qtype="mxfp4", dtype=m.dtype, length=length)
    local = m.magnitudes(".weight_scale", ml_dtypes.float8_e4m3fn, ndim=codes.ndim)
    m.check(".weight_scale", local.shape, (*codes.shape[:-1], length // 16))
    top = m.unit(".weight_global_scale", stack=codes.shape[:-2])
    unit = np.float32(1) / top
    # The reference divides by the global scale. If multiplying by its reciprocal gives another bit in any result, over
    # all scales and codes that occur, the quotients are stored instead.
    used = np.unique(local.view(np.uint8)).view(ml_dtypes.float8_e4m3fn).astype(np.float32)[:, None, None]
    tops, units = top.reshape(-1), unit.reshape(-1)
    same = (E2M1[:, None] * (used / tops)).astype(m.dtype) == (E2M1[:, None] * (used * units)).astype(m.dtype)
    if same.all():
        scale = QTensor(local, unit, None, qtype="float8_e4m3fn", dtype=np.float32)
    else:
        m.notes.append("scales divided out to float32, as a reciprocal would round")
        scale = local.astype(np.float32) / top
    return QTensor(codes, scale, None, qtype="nvfp4", dtype=m.dtype, length=length)


def _integers(m: Module) -> QTensor:
    words = m.array(".weight_packed", np.int32, ndim=RANKS).view(np.uint32)
    given = m.array(".weight_shape", np.int64, np.int32)
    scale = m.scales(".weight_scale")
    shape = tuple(int(n) for n in given.reshape(-1))
    if len(shape) != words.ndim or shape[:-1] != words.shape[:-1] or shape[-1] < 1:
        raise m.error("weight_shape does not fit weight_packed", ".weight_shape", todo="Fetch it again", found=given)
    out, length = shape[-2], shape[-1]
    bits, dense = _width(m, words.shape[-1], length)
    stream = _stream(words, bits, length, dense=dense)
    zero = m.maybe(".weight_zero_point", np.int32, np.int8)
    group, permutation = None, None
    g_idx = m.maybe(".weight_g_idx", np.int32, np.int64, ndim=1)
    if g_idx is not None and not (g_idx == -1).all():
        if len(shape) > 2:
            raise m.error("reordered columns of stacked weights are not read", ".weight_g_idx", todo="Leave them out")
        m.check(".weight_g_idx", g_idx.shape, (length,))
        m.check(".weight_scale", scale.shape, (out, *scale.shape[-1:]))
        if g_idx.min() < 0 or g_idx.max() >= scale.shape[-1]:
            got = {"greatest": int(g_idx.max()), "groups": scale.shape[-1]}
            raise m.error("g_idx names a group that has no scales", ".weight_g_idx", todo="Fetch it again", **got)
        group = grouping(g_idx.astype(np.int64))
        stream, permutation = group.stream(stream, bits, length), group.permutation
        if permutation is not None:
            m.notes.append("act-order: columns stored by group")
    if zero is not None:
        zero = _zeros(m, zero, bits, out, scale)
    return qtensor(
        stream,
        _grouped(m, ".weight_scale", scale, shape, group),
        zero_point=None if zero is None else _grouped(m, ".weight_zero_point", zero, shape, group),
        permutation=permutation,
        bits=bits,
        length=length,
        dtype=scale.dtype,
        signed=True,
    )


def _grouped(m: Module, suffix: str, values: np.ndarray, shape: tuple[int, ...], group: Grouping | None) -> np.ndarray:
    return _spread(m, suffix, values, shape) if group is None else group.scale(values)


def _width(m: Module, words: int, length: int) -> tuple[int, bool]:
    """Bits of a code, and whether the codes are one dense stream."""
    configured = [b for w in _weights(m) if type(b := w.get("num_bits")) is int and 1 <= b <= 8]
    old = str(m.config.get("version", "")).split(".")[:2]
    padded_first = len(old) == 2 and all(n.isdigit() for n in old) and tuple(map(int, old)) < (0, 18)
    found: dict[int, bool] = {}
    for bits in configured:
        layouts = {True: -(-length * bits // 32), False: -(-length // (32 // bits))}
        for dense in (padded_first, not padded_first):
            if layouts[dense] == words and bits > 1:
                found[bits] = dense
    if len(found) == 1:
        return found.popitem()
    got = {"words": words, "columns": length, "num_bits": tuple(configured)}
    rule = f"{'several configured widths fit' if found else 'no configured width fits'} weight_packed"
    raise m.error(rule, ".weight_packed", todo="Check the targets and num_bits of the config groups", **got)


def _stream(words: np.ndarray, bits: int, length: int, *, dense: bool) -> np.ndarray:
    """A bit stream along the last axis from words along it."""
    stream = bytes_of(words)
    if dense or 32 % bits == 0:
        return stream
    each = 32 // bits
    codes = (words[..., None] >> (np.arange(each, dtype=np.uint32) * np.uint32(bits))) & np.uint32((1 << bits) - 1)
    return packed(codes.astype(np.uint8).reshape(*words.shape[:-1], -1)[..., :length], bits)


def _zeros(m: Module, zero: np.ndarray, bits: int, out: int, scale: np.ndarray) -> np.ndarray:
    """Signed zero points of the scale's shape: packed along the rows, or one per byte."""
    if zero.dtype == np.int8 or zero.ndim < 2:
        m.check(".weight_zero_point", zero.shape, scale.shape)
        if zero.min() < -(1 << (bits - 1)) or zero.max() >= 1 << (bits - 1):
            got = {"least": int(zero.min()), "greatest": int(zero.max()), "num_bits": bits}
            raise m.error("a zero point is not a code of the type", ".weight_zero_point", todo="Fetch it again", **got)
        return zero.astype(np.int8)
    rows = {True: -(-out * bits // 32), False: -(-out // (32 // bits))}
    dense = next((d for d, n in rows.items() if n == zero.shape[-2]), None)
    wanted = (*scale.shape[:-2], rows[True if dense is None else dense], *scale.shape[-1:])
    m.check(".weight_zero_point", zero.shape, wanted)
    columns = np.ascontiguousarray(np.swapaxes(zero.view(np.uint32), -1, -2))
    codes = unpacked(_stream(columns, bits, out, dense=bool(dense)), bits, out)
    signed = (codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return np.ascontiguousarray(np.swapaxes(signed, -1, -2))


#: The library rounds a block's largest magnitude up to a power of two from 1.75 times one on: just above this number.
_UP_FROM = float(np.nextafter(np.float32(1.75), np.float32(0)))


def activation(m: Module) -> Activation | None:
    """The activation scheme in ``input_activations`` of the module's group, beside ``output_activations``."""
    groups = _groups_of(m)
    found = _inputs(m, groups)
    outputs = [group["output_activations"] for group in groups if group.get("output_activations")]
    if not outputs or re.search(r"\b[kv]_proj$", m.prefix):  # those are of the cache
        return found
    return with_outputs(m, found or Activation(None), "output_activations", outputs[0])


def _inputs(m: Module, groups: Sequence[dict[str, Json]]) -> Activation | None:
    stated = [group.get("input_activations") or None for group in groups]
    if len(groups) > 1 and any(one != stated[0] for one in stated):
        raise refused(m, "config_groups", len(groups), "several groups can be meant, which differ in input_activations")
    how = stated[0] if stated else None
    if how is None:
        return None
    if not isinstance(how, dict):
        raise refused(m, "input_activations", how, "it must be a JSON object")
    kind, bits, strategy = how.get("type", "int"), how.get("num_bits", 8), how.get("strategy")
    symmetric, group, wide = how.get("symmetric", True) is not False, how.get("group_size"), how.get("dynamic", False)
    if how.get("actorder") or how.get("block_structure"):
        raise refused(m, "input_activations", how)
    if strategy is None:
        strategy = "group" if isinstance(group, int) and group > 0 else "token" if wide is True else "tensor"
    qtype = f"int{bits}" if kind == "int" and bits in range(2, 9) else None
    if kind == "float" and symmetric:
        exponents = how.get("scale_dtype") in ("torch.uint8", "uint8")
        qtype = {8: "mxfp8" if exponents else "float8_e4m3fn", 4: "mxfp4" if exponents else "nvfp4"}.get(bits)
    if qtype is None or (kind == "float" and bits == 8 and how.get("format") == "e5m2"):
        raise refused(m, "input_activations", how, "there is no such type")
    if qtype == "nvfp4":
        if wide != "local" or strategy != "tensor_group" or group != 16:
            raise refused(m, "input_activations", how)
        return in_unit(m, "input_activations", "input_global_scale", inverse=True)
    if wide is False and strategy == "tensor":
        return static(m, "input_activations", qtype, symmetric=symmetric)
    more = how.get("observer_kwargs")
    narrow = isinstance(more, dict) and more.get(NARROW) is True
    ranged = whole if kind == "int" and symmetric and not narrow else functools.partial(dynamic, symmetric=symmetric)
    if wide is True and strategy == "token" and not qtype.startswith("mx"):
        return ranged(qtype)
    if wide is True and strategy == "tensor" and not qtype.startswith("mx"):
        return ranged(qtype, granularity=PerTensor())
    if wide is True and strategy == "group" and qtype.startswith("mx") and group in (None, 32):
        return dynamic(qtype, calibration=observers.RoundedUp(_UP_FROM))
    if wide is True and strategy == "group" and isinstance(group, int) and group > 0:
        return ranged(qtype, granularity=PerGroup(group))
    raise refused(m, "input_activations", how)


COMPRESSED_TENSORS = Format(
    "compressed-tensors",
    methods=("compressed-tensors", "compressed_tensors"),
    names=(
        Naming(marks=(".weight_packed", ".weight_scale")),
        Naming(
            "",
            ("_packed",),
            words=("_scale",),
            tensors={
                ".weight": "",
                ".weight_packed": "_packed",
                ".weight_shape": "_shape",
                ".weight_scale": "_scale",
                ".weight_zero_point": "_zero_point",
                ".weight_g_idx": "_g_idx",
                ".weight_global_scale": "_global_scale",
            },
            keeps=("_bias",),
        ),
    ),
    read=read,
    layouts="int-, naive-, pack-quantized (dense and padded, g_idx), float-quantized, nvfp4, mxfp4, mxfp8",
    refuse=_refuse,
    activation=activation,
)

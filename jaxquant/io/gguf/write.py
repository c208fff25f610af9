"""`save_gguf`: arrays and QTensors to a GGUF file, codes and scales unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.blocks import spread
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor, Scale, scale_values
from jaxquant.io.arrays import PackedLeaves, Values, to_host
from jaxquant.io.gguf.block_types import BlockType, Parts, Scales
from jaxquant.io.gguf.container import TensorInfo, Value, write_gguf
from jaxquant.io.gguf.names import ARCHITECTURES, has_names, heads_of, interleave, norm_of_gemma, to_gguf
from jaxquant.io.gguf.types import BY_NAME, PLAIN
from jaxquant.io.slices import rows, runs_of_rows, stored_by_rows

__all__ = ["block_type", "save_gguf"]

#: The type for number type, number type of two-level scales, and whether there are offsets.
_CHOSEN = {
    (kind.qtype, kind.nested, kind.shifted): kind
    for kind in BY_NAME.values()
    if kind.join is not None and kind.name != "TQ1_0"
}


def save_gguf(
    path: str | os.PathLike[str],
    params: Mapping[str, Values],
    *,
    metadata: Mapping[str, Value],
    names: Literal["gguf", "hf"] = "gguf",
    types: Mapping[str, str] | None = None,
) -> None:
    """Writes a GGUF file whose tensors hold the unchanged codes and scales of QTensors.

    Values are not quantized again. A QTensor [..., out, in] fits a type if its number type, blocks and scales do:

        int8, int4, int5    groups of a multiple of 32, scales that float16 holds     Q8_0, Q4_0, Q5_0
        uint4, uint5        the same, with offsets that float16 holds                 Q4_1, Q5_1
        int2                codes -1, 0, 1, groups of a multiple of 256               TQ2_0 (or TQ1_0)
        iq4_nl, mxfp4       groups of 32                                              IQ4_NL, MXFP4
        nvfp4               groups of 16, the scale of the whole tensor 1         NVFP4
        two-level scales    as `load_gguf` makes them                                 Q2_K to Q6_K, IQ4_XS

    Unsigned codes with the zero point in the middle (uint4 and 8) count as the signed type. To quantize for this
    format:
    ``QuantSpec("int4", granularity=PerGroup(32), scale_dtype="float16")``.

    Args:
      path: the file to create or replace; it appears only when it is complete.
      params: a flat dict from names to arrays and QTensors.
      metadata: by key: NumPy scalars and arrays, bool, str, lists of str; ``general.architecture`` must be among them.
        `load_gguf` returns it. For architectures of Llama's kind the rows of attn_q and attn_k are interleaved as
        llama.cpp expects, which requires the numbers of heads in the metadata.
      names: ``"hf"`` if the names in ``params`` are Hugging Face's; only for architectures whose names are known.
      types: name -> type, to override the default choice.

    Raises:
      QuantError: before writing, if a leaf fits no type, naming it and the reason, or if the metadata does not meet the
        conditions above; also if the path cannot be a file, another writer has it, or the disk is full.
      OSError: if the place is not writable.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.gguf")
      ...     jq.io.save_gguf(path, {"output_norm.weight": jnp.ones(8)}, metadata={"general.architecture": "llama"})
      ...     jq.io.load_gguf(path)[0]["output_norm.weight"].shape
      (8,)

    Source: as `load_gguf`.
    """
    if not isinstance(metadata.get("general.architecture"), str):
        todo = "Give the one of the file the model came from, or llama.cpp's name for it"
        raise quant_error("save_gguf", "the metadata needs general.architecture", todo=todo, keys=tuple(metadata))
    if parts := tuple(key for key in metadata if key.startswith("split.")):
        todo = "Leave these keys out: what is written is one file"
        raise quant_error("save_gguf", "the metadata says that the file is one of several parts", todo=todo, keys=parts)
    if names not in ("gguf", "hf"):
        raise quant_error("save_gguf", "names must be 'gguf' or 'hf'", todo="Use one of them", names=names)
    if names == "hf" and not has_names(metadata):
        todo = f"Rename the tensors and use names='gguf'; known are {', '.join(ARCHITECTURES)}"
        found = metadata["general.architecture"]
        raise quant_error(
            "save_gguf", "llama.cpp's names of the architecture are not known", todo=todo, architecture=found
        )
    wanted = dict(types or {})
    if unknown := sorted(wanted.keys() - params.keys()):
        todo = "Use the names of params"
        raise quant_error("save_gguf", "types names tensors that are not there", todo=todo, names=tuple(unknown))
    params = PackedLeaves(params)
    tensors: dict[str, TensorInfo] = {}
    source: dict[str, tuple[str, int | None]] = {}
    for key, leaf in params.items():
        name = key if names == "gguf" else _renamed(key, metadata)
        if name in tensors:
            raise quant_error("save_gguf", "two tensors have one name", todo="Rename one", path=key, name=name)
        leaf = _stored(leaf, name, metadata)
        kind = block_type(leaf, key, wanted.get(key))
        tensors[name] = TensorInfo(kind, tuple(leaf.shape))
        heads = heads_of(name, metadata)
        count = (*tensors[name].shape, 0)[0]
        if heads is not None and (heads == 0 or not count or count % (2 * heads)):
            todo = "Add attention.head_count and attention.head_count_kv of the architecture to the metadata"
            raise quant_error("save_gguf", "the rows must be heads of an even size", todo=todo, path=key, heads=heads)
        source[name] = key, heads

    def read(name: str) -> np.ndarray:
        key, heads = source[name]
        info = tensors[name]
        blocks = _in_slices(_stored(params[key], name, metadata), info)
        if heads is None:
            return blocks
        each = blocks if len(info.shape) > 1 else blocks.reshape(*info.shape, -1)
        return interleave(each, heads).reshape(info.stored_shape)

    write_gguf(path, metadata, tensors, read)


def _renamed(name: str, metadata: Mapping[str, Value]) -> str:
    """llama.cpp's name of a tensor; a name that is none of Hugging Face's layers stays."""
    found = to_gguf(name, metadata) or name
    if found.startswith("model."):
        todo = "Leave it out, or rename the tensors and use names='gguf'"
        architecture = metadata["general.architecture"]
        raise quant_error("save_gguf", "llama.cpp has no name for it", todo=todo, path=name, architecture=architecture)
    return found


def _stored(leaf: Values, name: str, metadata: Mapping[str, Value]) -> Values:
    """The leaf as the file has it: of Gemma's norms with 1 added, in float32, since 16 bits hold fewer digits of it."""
    if isinstance(leaf, QTensor) or not norm_of_gemma(name, metadata):
        return leaf
    return to_host(leaf).astype(np.float32) + np.float32(1)


def block_type(leaf: Values, path: str, wanted: str | None = None, *, function: str = "save_gguf") -> BlockType:
    """The type that holds a leaf without change.

    Raises:
      QuantError: if no type holds it, or the wanted type does not.
    """

    def error(rule: str, **got: Any) -> QuantError:
        return quant_error(function, rule, path=path, **got)

    if wanted is not None and wanted not in BY_NAME:
        raise error("unknown type", todo=f"Use one of {', '.join(BY_NAME)}", type=wanted)
    if not isinstance(leaf, QTensor):
        dtype = getattr(leaf, "dtype", None)
        kind = None if dtype is None else PLAIN.get(np.dtype(dtype))
        if kind is None or len(leaf.shape) > 4:
            todo = f"Cast it to one of {', '.join(k.name for k in PLAIN.values())}, with at most four axes"
            raise error("not an array that the format has a type for", todo=todo, leaf=leaf)
        if wanted not in (None, kind.name):
            raise error(f"the array is {kind.name}", todo="Cast or quantize it first", type=wanted)
        return kind
    qtype = _signed_type(leaf) or leaf.qtype
    nested = leaf.scale.qtype if isinstance(leaf.scale, QTensor) and leaf.qtype != "nvfp4" else None
    shifted = leaf.offset is not None
    kind = _CHOSEN.get((qtype, nested, shifted))
    if wanted is not None and kind is not None:
        other = BY_NAME[wanted]
        kind = other if (other.qtype, other.nested, other.shifted) == (kind.qtype, kind.nested, kind.shifted) else None
    if kind is None or leaf.permutation is not None or (leaf.zero_point is not None and qtype == leaf.qtype):
        todo = "Dequantize it, or quantize it to a type in the table of save_gguf"
        raise error("no type holds these codes and scales without quantizing again", todo=todo, weight=repr(leaf))
    shape, blocks = (1, *leaf.shape), (1, *leaf.scale.shape)
    if shape[-1] % kind.elements or len(shape) > 5:
        todo = "Keep this one in float, or quantize it to a type with smaller blocks"
        raise error(f"rows of {kind.name} are whole blocks of {kind.elements}", todo=todo, shape=leaf.shape)
    group = shape[-1] // blocks[-1]
    if group % (kind.elements // kind.groups):
        todo = f"Quantize with groups of {kind.elements // kind.groups} along the last axis"
        raise error(f"a group of {kind.name} has {kind.elements // kind.groups} elements", todo=todo, group_size=group)
    _check_values(leaf, kind, error)
    return kind


def _signed_type(q: QTensor) -> str | None:
    """The signed type that equals unsigned codes with the zero point in the middle; None if the zero point is not."""
    info = q.type
    if q.zero_point is None or info.kind != "int" or info.signed:
        return None
    middle = 1 << (info.bits - 1)
    return f"int{info.bits}" if bool(jnp.all(q.zero_point == middle)) else None


def _check_values(q: QTensor, kind: BlockType, error: Callable[..., QuantError]) -> None:
    if kind.qtype == "int2" and not bool(jnp.all(q.logical_codes() >= -1)):
        todo = "Quantize with narrow_range=True"
        raise error(f"codes of {kind.name} are -1, 0 and 1", todo=todo, weight=repr(q))
    if kind.qtype == "nvfp4":
        assert isinstance(q.scale, QTensor)
        if not bool(jnp.all(scale_values(q.scale.scale) == 1)):
            todo = "Save it with save_hf, which has a place for it"
            raise error("the format has no scale of the whole tensor", todo=todo, scale=q.scale.scale)
        return
    if kind.qtype == "mxfp4":
        return
    for name in ("scale", "offset"):
        value = getattr(q, name)
        if value is None:
            continue
        exact = np.asarray(scale_values(value.scale if isinstance(value, QTensor) else value))
        with np.errstate(over="ignore"):
            lost = int(np.count_nonzero(exact.astype(np.float16).astype(exact.dtype) != exact))
        if lost:
            todo = "Quantize with scale_dtype='float16'"
            raise error(f"each {name} must be a float16 number", todo=todo, lost=lost, of=exact.size)


def _in_slices(leaf: Values, info: TensorInfo) -> np.ndarray:
    """The bytes of a leaf, uint8 of ``info.stored_shape``, made some rows at a time."""
    if not isinstance(leaf, QTensor) or leaf.ndim < 2 or not stored_by_rows(leaf):
        return _blocks(leaf, info)
    leaf, out = jax.tree.map(to_host, leaf), np.empty(info.stored_shape, np.uint8)
    for begin, end in runs_of_rows(leaf):
        out[begin:end] = _blocks(rows(leaf, begin, end), TensorInfo(info.type, (end - begin, *info.shape[1:])))
    return out


def _blocks(leaf: Values, info: TensorInfo) -> np.ndarray:
    """The bytes of a leaf, uint8 of ``info.stored_shape``."""
    kind = info.type
    if not isinstance(leaf, QTensor):
        array = np.asarray(leaf)
        return (
            np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            .reshape(-1)
            .view(np.uint8)
            .reshape(info.stored_shape)
        )
    assert kind.join is not None
    *outer, length = info.shape
    count = length // kind.elements
    codes = np.asarray(leaf.logical_codes())
    if leaf.zero_point is not None:
        codes = (codes.astype(np.int16) - (1 << (leaf.type.bits - 1))).astype(np.int8)

    def grouped(value: jax.Array | np.ndarray, per_block: int) -> np.ndarray:
        """Expands one entry per block of the QTensor to one per group of the format."""
        return spread(np.asarray(value), (*outer, count * per_block)).reshape(*outer, count, per_block)

    def scales(value: Scale) -> np.ndarray | Scales:
        if isinstance(value, QTensor):
            assert not isinstance(value.scale, QTensor)  # no type of the table nests so deep
            unit = grouped(value.scale, 1).astype(np.float16)
            return Scales(grouped(value.logical_codes(), kind.groups), unit, value.qtype)
        dtype = value.dtype if kind.qtype == "mxfp4" else np.float16
        return grouped(value, kind.groups).astype(dtype)

    if kind.qtype == "nvfp4":
        assert isinstance(leaf.scale, QTensor)
        scale = grouped(leaf.scale.codes, kind.groups)
    else:
        scale = scales(leaf.scale)
    offset = None if leaf.offset is None else scales(leaf.offset)
    return kind.join(Parts(codes.reshape(*outer, count, kind.elements), scale, offset))

"""`load_gguf`: tensors of a GGUF file to arrays and QTensors, codes unchanged."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Literal

import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import Shardings, placing
from jaxquant.io.bits import stored
from jaxquant.io.gguf.block_types import Scales
from jaxquant.io.gguf.container import TensorInfo, Value
from jaxquant.io.gguf.names import ARCHITECTURES, has_names, heads_of, norm_of_gemma, separate, to_hugging_face
from jaxquant.io.gguf.split import GGUFModel
from jaxquant.io.mapped import Leaves
from jaxquant.ops.targets import Platform

__all__ = ["GGUFInfo", "GGUFLeaves", "load_gguf"]


@dataclasses.dataclass(frozen=True)
class GGUFInfo:
    """The metadata of a GGUF file, and how its tensors were read.

    Attributes:
      architecture: ``general.architecture``, or None.
      kind: ``general.type``, such as ``"mmproj"`` for a model's image encoder; ``"model"`` if the file does not say.
      files: the file, or all parts of a split file.
      metadata: by key: NumPy scalars and arrays, str, lists of str, in the form that `save_gguf` takes. For a split
        file, the metadata of the first part, without the keys that number the parts.
      types: tensor -> ggml's name of its type, by the names of ``params``.
      reordered: the tensors whose rows were returned to Hugging Face's order.
    """

    architecture: str | None
    kind: str
    files: tuple[str, ...]
    metadata: dict[str, Value]
    types: dict[str, str]
    reordered: tuple[str, ...]


def load_gguf(
    path: str | os.PathLike[str],
    *,
    names: Literal["gguf", "hf"] = "gguf",
    dtype: DTypeLike = np.float32,
    sharding: Shardings = None,
    target: Platform | None = None,
) -> tuple[dict[str, PyTree], GGUFInfo]:
    """Reads a GGUF file: quantized tensors become `QTensor`s with the codes and scales of the file.

    F32, F16, BF16 and the integer types come as arrays; Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS,
    TQ1_0, TQ2_0, MXFP4 and NVFP4 as QTensors of logical shape [out, in]. The K-quants and IQ4_XS keep their two levels
    of scales. For types with a shift, ``d * q + m``, ``m`` is the QTensor's offset. ``dequantize()`` gives the values
    of ggml's own reference, bit for bit.

    The rows of attn_q and attn_k, which llama.cpp's converter interleaves for architectures of Llama's kind, are
    returned to the order that Hugging Face's rotary embedding expects. The 1 that the converter adds to the norms of
    Gemma is subtracted.

    Args:
      path: the file, or any part of a split file (``model-00001-of-00003.gguf``); all parts are read, and must be in
        the same directory. Files are mapped, not read as a whole.
      names: ``"gguf"`` for the names in the file (``blk.0.attn_q.weight``), ``"hf"`` for Hugging Face's
        (``model.layers.0.self_attn.q_proj.weight``), if the names of the architecture are known; a name without a
        counterpart stays unchanged.
      dtype: float dtype that QTensors dequantize to, rounded once.
      sharding: where to put each leaf as it is read, by the names in ``params``; as for `load_hf`.
      target: the platform that codes are laid out for, ``"cpu"``, ``"tpu"`` or ``"gpu"``; by default the platform that
        each leaf is put on. See `jaxquant.ops.lay_out`.

    Returns:
      ``(params, info)``: a flat dict from names to arrays and QTensors, and a `GGUFInfo`.

    Raises:
      QuantError: if the file is damaged, a part of it is missing or of another model, it holds an adapter or statistics
        instead of a model, or the names of the architecture are not known; also, with the tensor's name, if a tensor's
        type is not supported (IQ1, IQ2, IQ3: their codebooks are not part of this package) or a scale is not finite.
      OSError: if it cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity=jq.PerGroup(32), scale_dtype="float16")
      >>> w = jq.quantize(jnp.linspace(-1.0, 1.0, 128).reshape(2, 64), spec, reduce_axes=(-1,))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.gguf")
      ...     jq.io.save_gguf(path, {"output.weight": w}, metadata={"general.architecture": "llama"})
      ...     params, info = jq.io.load_gguf(path)
      >>> params["output.weight"], info.types
      (QTensor(int4[2, 64] -> float32, group 32 on axis -1, symmetric, 72 B), {'output.weight': 'Q4_0'})

    Source: ggml's block layouts, which the modules of ``jaxquant/io/gguf`` describe. Reference: gguf 0.19.0.
    """
    leaves = GGUFLeaves(path, names=names, dtype=dtype)
    place = placing(sharding, "load_gguf", target)
    params = {name: place(name, leaves[name]) for name in leaves}
    architecture = leaves.file.metadata.get("general.architecture")
    architecture = architecture if isinstance(architecture, str) else None
    kind, files = str(leaves.file.metadata.get("general.type", "model")), tuple(leaves.file.paths)
    return params, GGUFInfo(architecture, kind, files, leaves.file.metadata, leaves.types, leaves.reordered)


class GGUFLeaves(Leaves):
    """The leaves of a file.

    Attributes:
      file: the container, of one file or of parts.
      types: name -> ggml's name of the tensor's type.
      reordered: the tensors whose rows are returned to Hugging Face's order.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        names: Literal["gguf", "hf"] = "gguf",
        dtype: DTypeLike = np.float32,
        function: str = "load_gguf",
    ):
        if names not in ("gguf", "hf"):
            raise quant_error(function, "names must be 'gguf' or 'hf'", todo="Use one of them", names=names)
        self.file, self._dtype = GGUFModel(path, function=function), np.dtype(dtype)
        _check_kind(self.file)
        _check_types(self.file)
        if names == "hf" and not has_names(self.file.metadata):
            todo = f"Use names='gguf'; known are {', '.join(ARCHITECTURES)}"
            found = self.file.metadata.get("general.architecture")
            raise self.file.error(
                "Hugging Face's names of the architecture are not known", todo=todo, architecture=found
            )
        self._inside: dict[str, str] = {}
        for name in self.file.tensors:
            key = (to_hugging_face(name, self.file.metadata) or name) if names == "hf" else name
            if key in self._inside:
                todo = "Load it with names='gguf'"
                raise self.file.error("two tensors would have one name", name, todo=todo, other=self._inside[key])
            self._inside[key] = name
        super().__init__(self._inside, self.file.paths)
        self.types = {key: self.file.tensors[name].type.name for key, name in self._inside.items()}
        metadata = self.file.metadata
        self.reordered = tuple(key for key, name in self._inside.items() if heads_of(name, metadata) is not None)

    def __getitem__(self, key: str) -> QTensor | np.ndarray:
        self.file.forget()  # pages of the leaf before
        name = self._inside[key]
        info, blocks, heads = self.file.tensors[name], self.file.blocks(name), heads_of(name, self.file.metadata)
        if heads is not None:
            blocks = _separated(self.file, name, info, blocks, heads)
        leaf = _leaf(self.file, name, info, blocks, self._dtype)
        if not isinstance(leaf, QTensor) and norm_of_gemma(name, self.file.metadata):
            return leaf - np.ones((), leaf.dtype)
        return leaf


#: Values of ``general.type`` for files that hold no weights of a model.
_NOT_WEIGHTS = {
    "adapter": "an adapter, which is added to a model that is in another file",
    "imatrix": "statistics of the activations of a model that is in another file",
}


def _check_kind(file: GGUFModel) -> None:
    """Raises for files that do not hold weights."""
    kind = file.metadata.get("general.type", "model")
    what = _NOT_WEIGHTS.get(kind) if isinstance(kind, str) else None
    if what is not None:
        todo = "Read the model; llama.cpp merges an adapter into one"
        raise file.error(f"the file holds {what}", "general.type", todo=todo, type=kind)


def _check_types(file: GGUFModel) -> None:
    refused = {name: info.type for name, info in file.tensors.items() if info.type.refused}
    if refused:
        name, kind = next(iter(refused.items()))
        todo = "Quantize the model to another type, such as Q4_K or IQ4_XS, with llama.cpp"
        rule = f"tensors of type {kind.name} are not supported: {kind.refused}"
        raise file.error(
            rule, name, todo=todo, tensors=len(refused), types=tuple(sorted({k.name for k in refused.values()}))
        )


def _separated(file: GGUFModel, name: str, info: TensorInfo, blocks: np.ndarray, heads: int) -> np.ndarray:
    """The blocks of a tensor with interleaved rows, in Hugging Face's order."""
    rows = info.shape[0] if info.shape else 0
    if not heads or rows % (2 * heads):
        todo = "The file is damaged, or its general.architecture is wrong"
        raise file.error("the rows must be heads of an even size", name, todo=todo, heads=heads, rows=rows)
    if len(info.shape) == 1:  # a bias, whose rows are its elements
        return separate(blocks.reshape(rows, -1), heads).reshape(blocks.shape)
    return separate(blocks, heads)


def _leaf(file: GGUFModel, name: str, info: TensorInfo, blocks: np.ndarray, dtype: np.dtype) -> QTensor | np.ndarray:
    kind = info.type
    if kind.dtype is not None:
        return np.ascontiguousarray(blocks).view(kind.dtype.newbyteorder("<")).reshape(info.shape)
    assert kind.split is not None
    assert kind.qtype is not None
    parts = kind.split(blocks)
    rows = info.shape[:-1]

    def joined(values: np.ndarray) -> np.ndarray:
        return values.reshape(*rows, math.prod(values.shape) // math.prod(rows) if 0 not in rows else 0)

    def quantized(
        codes: np.ndarray, scale: QTensor | np.ndarray, offset: QTensor | np.ndarray | None, qtype: str, dtype: np.dtype
    ) -> QTensor:
        codes, length = stored(joined(codes), QTYPES[qtype])
        return QTensor(codes, scale, None, offset, qtype=qtype, dtype=dtype, length=length)

    def scale(value: np.ndarray | Scales) -> QTensor | np.ndarray:
        if isinstance(value, Scales):
            unit = joined(_finite(file, name, value.unit))
            return quantized(value.codes, unit, None, value.qtype, np.dtype(np.float32))
        return joined(_finite(file, name, value))

    scales = scale(parts.scale)
    if kind.qtype == "nvfp4":
        whole = np.ones((1,) * len(info.shape), np.float32)
        scales = QTensor(scales, whole, None, qtype="float8_e4m3fn", dtype=np.float32)
    offset = None if parts.shift is None else scale(parts.shift)
    if offset is not None and not isinstance(offset, QTensor):
        offset = offset.astype(np.float32)  # the dtype in which the sum is formed
    return quantized(parts.codes, scales, offset, kind.qtype, dtype)


def _finite(file: GGUFModel, name: str, scale: np.ndarray) -> np.ndarray:
    bad = int(np.count_nonzero(~np.isfinite(scale.astype(np.float32))))
    if bad:
        todo = "The file is damaged, or was made from weights with NaN or inf"
        raise file.error("scales must be finite", name, todo=todo, not_finite=bad, scales=scale.size)
    return scale

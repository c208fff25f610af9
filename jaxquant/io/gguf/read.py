"""`load_gguf`: tensors of a GGUF file to arrays and QTensors, codes unchanged."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor, from_codes
from jaxquant.io.arrays import to_device
from jaxquant.io.gguf.container import GGUFFile, TensorInfo
from jaxquant.io.gguf.names import heads_of, separate, to_hugging_face
from jaxquant.io.gguf.parts import Scales

__all__ = ["GGUFInfo", "load_gguf"]


@dataclasses.dataclass(frozen=True)
class GGUFInfo:
    """What a GGUF file says about itself.

    Attributes:
      architecture: ``general.architecture``, or None.
      metadata: by key: NumPy scalars and arrays, str, lists of str; what `save_gguf` takes.
      types: tensor -> ggml's name of its type, by the names of ``params``.
      reordered: the tensors whose rows were brought back to Hugging Face's order.
    """

    architecture: str | None
    metadata: dict[str, Any]
    types: dict[str, str]
    reordered: tuple[str, ...]


def load_gguf(
    path: str | os.PathLike[str], *, names: Literal["gguf", "hf"] = "gguf", dtype: Any = jnp.float32
) -> tuple[dict[str, Any], GGUFInfo]:
    """Reads a GGUF file: quantized tensors become `QTensor`s with the codes and scales of the file.

    F32, F16, BF16 and the integer types come as arrays; Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS,
    TQ1_0, TQ2_0, MXFP4 and NVFP4 as QTensors of logical shape [out, in]. The K-quants and IQ4_XS keep their two levels
    of scales. Where a type has a shift, ``d * q + m``, ``m`` is the QTensor's offset. ``dequantize()`` gives the
    values of ggml's own reference, bit for bit.

    The rows of attn_q and attn_k, which llama.cpp's converter interleaves for architectures of Llama's kind, are
    brought back to the order that Hugging Face's rotary embedding expects.

    Args:
      path: the file; it is mapped, not read as a whole.
      names: ``"gguf"`` for the names in the file (``blk.0.attn_q.weight``), ``"hf"`` for Hugging Face's
        (``model.layers.0.self_attn.q_proj.weight``); a name without a counterpart stays as it is.
      dtype: float dtype that QTensors dequantize to, rounded once.

    Returns:
      ``(params, info)``: a flat dict from names to arrays and QTensors, and a `GGUFInfo`.

    Raises:
      QuantError: if the file is damaged, has a type that is not supported (IQ1, IQ2, IQ3: their codebooks are not part
        of this package), or a scale that is not finite; with the tensor's name.
      OSError: if it cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> spec = jq.QuantSpec("int4", granularity="per_group", group_size=32, scale_dtype="float16")
      >>> w = jq.quantize(jnp.linspace(-1.0, 1.0, 128).reshape(2, 64), spec, reduce_axes=(-1,))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.gguf")
      ...     jq.io.save_gguf(path, {"output.weight": w}, metadata={"general.architecture": "llama"})
      ...     params, info = jq.io.load_gguf(path)
      >>> params["output.weight"], info.types
      (QTensor(int4[2, 64] -> float32, group 32 on axis -1, symmetric, 72 B), {'output.weight': 'Q4_0'})

    Source: ggml's block layouts; each family's file in ``jaxquant/io/gguf`` has them. Reference: gguf 0.19.0.
    """
    if names not in ("gguf", "hf"):
        raise quant_error("load_gguf", "names must be 'gguf' or 'hf'", todo="Use one of them", names=names)
    file = GGUFFile(path)
    _check_types(file)
    params: dict[str, Any] = {}
    types: dict[str, str] = {}
    reordered = []
    for name, info in file.tensors.items():
        key = (to_hugging_face(name) or name) if names == "hf" else name
        heads = heads_of(name, file.metadata)
        blocks = file.blocks(name)
        if heads is not None:
            blocks = _separated(file, name, info, blocks, heads)
            reordered.append(key)
        params[key], types[key] = _leaf(file, name, info, blocks, np.dtype(dtype)), info.type.name
    architecture = file.metadata.get("general.architecture")
    return params, GGUFInfo(
        architecture if isinstance(architecture, str) else None, file.metadata, types, tuple(reordered)
    )


def _check_types(file: GGUFFile) -> None:
    refused = {name: info.type for name, info in file.tensors.items() if info.type.refused}
    if refused:
        name, kind = next(iter(refused.items()))
        todo = "Quantize the model to another type, such as Q4_K or IQ4_XS, with llama.cpp"
        rule = f"tensors of type {kind.name} are not supported: {kind.refused}"
        raise file.error(
            rule, name, todo=todo, tensors=len(refused), types=tuple(sorted({k.name for k in refused.values()}))
        )


def _separated(file: GGUFFile, name: str, info: TensorInfo, blocks: np.ndarray, heads: int) -> np.ndarray:
    """The blocks of a tensor with interleaved rows, in Hugging Face's order."""
    rows = info.shape[0] if info.shape else 0
    if not heads or rows % (2 * heads):
        todo = "The file is damaged, or of an architecture that is not what it says"
        raise file.error("the rows must be heads of an even size", name, todo=todo, heads=heads, rows=rows)
    if len(info.shape) == 1:  # a bias, whose rows are its elements
        return separate(blocks.reshape(rows, -1), heads).reshape(blocks.shape)
    return separate(blocks, heads)


def _leaf(file: GGUFFile, name: str, info: TensorInfo, blocks: np.ndarray, dtype: np.dtype) -> Any:
    kind = info.type
    if kind.dtype is not None:
        array = np.ascontiguousarray(blocks).view(kind.dtype.newbyteorder("<")).reshape(info.shape)
        return to_device(array)
    assert kind.split is not None
    assert kind.qtype is not None
    parts = kind.split(blocks)
    rows = info.shape[:-1]

    def joined(values: np.ndarray) -> jax.Array:
        return to_device(values.reshape(*rows, -1))

    def scale(value: np.ndarray | Scales) -> Any:
        if isinstance(value, Scales):
            unit = _finite(file, name, value.unit)
            return from_codes(joined(value.codes), joined(unit), None, qtype=value.qtype, dtype=jnp.float32)
        return joined(_finite(file, name, value))

    scales = scale(parts.scale)
    if kind.qtype == "nvfp4":
        whole = jnp.ones((1,) * len(info.shape), jnp.float32)
        scales = QTensor(scales, whole, None, qtype="float8_e4m3fn", dtype=jnp.float32)
    offset = None if parts.shift is None else scale(parts.shift)
    if offset is not None and not isinstance(offset, QTensor):
        offset = offset.astype(jnp.float32)  # the dtype in which the sum is formed
    return from_codes(joined(parts.codes), scales, None, offset, qtype=kind.qtype, dtype=dtype)


def _finite(file: GGUFFile, name: str, scale: np.ndarray) -> np.ndarray:
    bad = int(np.count_nonzero(~np.isfinite(scale.astype(np.float32))))
    if bad:
        todo = "The file is damaged, or was made from weights with NaN or inf"
        raise file.error("scales must be finite", name, todo=todo, not_finite=bad, scales=scale.size)
    return scale

"""MLX: ``weight`` in words of 32 bits, ``scales``, and ``biases`` or exponents; weights [out, in], groups along in.

A weight of the affine mode is ``q * scale + bias`` with unsigned q: for a zero point z the bias is ``-z * scale``,
which must be exact in the dtype of the scales. The modes mxfp4, mxfp8 and nvfp4 have no biases; their scales are bytes.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.io.bits import patterns
from jaxquant.io.export.integers import check_integers, check_matrix, group_size, grouped, words
from jaxquant.io.export.interface import Layout
from jaxquant.io.strict_json import Json

__all__ = ["MLX"]

_GROUPS = (32, 64, 128)
_EXPONENTS = ("mxfp4", "mxfp8")


def _check(q: QTensor, error: Callable[..., QuantError]) -> None:
    abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(q))
    if (scales := _fp8_scales(q)) is not None:
        check_matrix(q, error)
        if not abstract and not (np.asarray(scales.scale) == 1).all():
            todo = "Quantize to mxfp4, or write compressed-tensors"
            raise error("the mode nvfp4 has no scale of the whole weight", todo=todo, scale=scales.scale)
        return
    if q.qtype in _EXPONENTS:
        check_matrix(q, error)
        return
    check_integers(q.replace(offset=None), (2, 3, 4, 5, 6, 8), error)
    if q.permutation is not None:
        raise error("the format has no reordered columns", todo="Write gptq instead", weight=repr(q))
    if group_size(q) not in _GROUPS:
        todo = f"Quantize with granularity=PerGroup(size), of size {', '.join(map(str, _GROUPS))}"
        raise error("the groups of the format are others", todo=todo, weight=repr(q))
    if abstract and q.zero_point is not None:
        todo = "Quantize symmetrically, such as to int4: then each bias is the scale times a power of two"
        raise error("zero points times scales must be numbers of the scales' dtype", todo=todo, weight=repr(q))
    if not abstract:
        scale, exact = _affine(q.replace(scale=scale_values(q.scale)) if isinstance(q.scale, QTensor) else q)
        if lost := int(np.count_nonzero(exact.astype(scale.dtype) != exact)):
            todo = "Quantize symmetrically: then each bias is the scale times a power of two"
            raise error("zero points times scales must be numbers of the scales' dtype", todo=todo, lost=lost)


def _fp8_scales(q: QTensor) -> QTensor | None:
    """The scales of nvfp4, which are quantized; None of other types."""
    return q.scale if q.qtype == "nvfp4" and isinstance(q.scale, QTensor) else None


def _affine(q: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """The scales, and in float64 the biases, which are the values of unsigned code 0; [out, groups]."""
    _, scale, zero, _ = grouped(q)
    scale = np.ascontiguousarray(scale)
    bias = -zero.astype(np.float64) * scale.astype(np.float64)
    return scale, bias if q.offset is None else bias + np.asarray(q.offset).astype(np.float64)


def _tensors(q: QTensor) -> dict[str, np.ndarray]:
    if (fp8 := _fp8_scales(q)) is not None:
        return {"weight": _words(patterns(q), 4), "scales": np.asarray(fp8.codes).view(np.uint8)}
    if q.qtype in _EXPONENTS:
        exponents = (np.asarray(scale_values(q.scale)).astype(np.float32).view(np.uint32) >> 23).astype(np.uint8)
        return {"weight": _words(patterns(q).view(np.uint8), q.type.bits), "scales": exponents}
    scale, bias = _affine(q)
    return {"weight": _words(grouped(q).codes, q.type.bits), "scales": scale, "biases": bias.astype(scale.dtype)}


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    return words(codes, bits).view(np.uint32)


def _entry(q: QTensor) -> dict[str, Json]:
    mode = q.qtype if q.type.kind != "int" else "affine"
    return {"group_size": group_size(q), "bits": q.type.bits, "mode": mode}


def _config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Json]:
    """The most common settings, and the settings of other weights under their names."""
    del floats  # MLX recognises them by the missing scales
    entries = {name: _entry(q) for name, q in weights.items()}
    counts = collections.Counter(tuple(entry.items()) for entry in entries.values())
    most = dict(counts.most_common(1)[0][0])
    return {**most, **{name: entry for name, entry in entries.items() if entry != most}}


def _nested(q: QTensor) -> bool:
    return _fp8_scales(q) is not None


MLX = Layout("mlx", _check, _tensors, _config, keys=("quantization", "quantization_config"), nested=_nested)

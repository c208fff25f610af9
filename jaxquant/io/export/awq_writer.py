"""AWQ, the layout of its GEMM kernel: ``qweight``, ``qzeros``, ``scales``; weights [in, out], packed along out.

Four bits; nibble i of a word holds column ``8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.io.export.integers import check_half, check_integers, common_group_size, group_size, grouped, words
from jaxquant.io.export.interface import Layout
from jaxquant.io.strict_json import Json

__all__ = ["AWQ"]

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


def _check(q: QTensor, error: Callable[..., QuantError]) -> None:
    check_integers(q, (4,), error)
    if q.permutation is not None:
        raise error("the format has no reordered columns", todo="Write gptq instead", weight=repr(q))
    if any(n % 32 for n in q.shape):
        raise error("both sides must be multiples of 32", todo="Keep this weight in float", shape=q.shape)
    check_half(q, error)


def _columns(values: np.ndarray) -> np.ndarray:
    """int32 words of [rows, out], in the format's order."""
    return words(values.reshape(values.shape[0], -1, 8)[..., _ORDER].reshape(values.shape), 4)


def _tensors(q: QTensor) -> dict[str, np.ndarray]:
    codes, scale, zero, _ = grouped(q)
    return {"qweight": _columns(codes.T), "qzeros": _columns(zero.T), "scales": scale.T.astype(np.float16)}


def _config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Json]:
    size = common_group_size(weights.values())
    if size is None or size < 0:
        sizes = {group_size(q) for q in weights.values()}
        todo = "Quantize all weights with one group size, or write compressed-tensors"
        raise quant_error("save_hf", "one file has one group size", todo=todo, group_size=tuple(sorted(sizes)))
    return {
        "bits": 4,
        "group_size": size,
        "modules_to_not_convert": list(floats) or None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


AWQ = Layout("awq", _check, _tensors, _config)

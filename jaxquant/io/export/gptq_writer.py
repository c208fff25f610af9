"""GPTQ: ``qweight``, ``qzeros``, ``scales``, ``g_idx``; weights [in, out], packed along in.

Symmetric weights are written as version 1 (``checkpoint_format: gptq``), which stores the zero point minus 1. Weights
with zero points are written as version 2 (``gptq_v2``), which stores them unchanged. One file has one number of bits
and one group size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.io.export.integers import check_half, check_integers, common_group_size, group_size, grouped, words
from jaxquant.io.export.interface import Layout
from jaxquant.io.strict_json import Json

__all__ = ["GPTQ"]


def _symmetric(q: QTensor) -> bool:
    return q.zero_point is None


def _check(q: QTensor, error: Callable[..., QuantError]) -> None:
    check_integers(q, (2, 3, 4, 8), error)
    if any(n % 32 for n in q.shape):
        raise error("both sides must be multiples of 32", todo="Keep this weight in float", shape=q.shape)
    check_half(q, error)


def _tensors(q: QTensor) -> dict[str, np.ndarray]:
    bits, (codes, scale, zero, group) = q.type.bits, grouped(q)
    stored = zero - np.uint8(1) if _symmetric(q) else zero
    return {
        "qweight": words(codes, bits).T,
        "qzeros": words(stored.T & np.uint8((1 << bits) - 1), bits),
        "scales": scale.T.astype(np.float16),
        "g_idx": group,
    }


def _config(weights: Mapping[str, QTensor], floats: Sequence[str]) -> dict[str, Json]:
    widths, symmetric = {q.type.bits for q in weights.values()}, {_symmetric(q) for q in weights.values()}
    size = common_group_size(weights.values())
    if size is None or len(widths) > 1 or len(symmetric) > 1:
        sizes = {group_size(q) for q in weights.values()}
        todo = "Write compressed-tensors, which has groups of modules, or quantize all weights alike"
        rule = "one file has one number of bits, one group size, and zero points everywhere or nowhere"
        raise quant_error("save_hf", rule, todo=todo, bits=tuple(sorted(widths)), group_size=tuple(sorted(sizes)))
    version = "gptq" if symmetric == {True} else "gptq_v2"
    return {
        "bits": widths.pop(),
        "checkpoint_format": version,
        "desc_act": any(q.permutation is not None for q in weights.values()),
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in floats},
        "format": version,
        "group_size": size,
        "lm_head": False,
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": symmetric.pop(),
    }


GPTQ = Layout("gptq", _check, _tensors, _config, files=lambda config: {"quantize_config.json": config})

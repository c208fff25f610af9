"""NVIDIA ModelOpt: `hf_quant_config.json` beside the weights, or quant_method "modelopt".

NVFP4   weight uint8 [out, in / 2], weight_scale fp8 [out, in / 16], weight_scale_2 float32: e2m1 * (s * s2)
FP8     weight fp8 [out, in], weight_scale float32
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.layout import spread
from jaxquant.io.hf.module import Format, Module

__all__ = ["MODELOPT"]

_BLOCK = 128  # rows and columns of a block of FP8_PB_WO and its like


def _refuse(config: dict[str, Any], error: Callable[..., QuantError]) -> None:
    algorithm = _said(config).get("quant_algo")
    if isinstance(algorithm, str) and "AWQ" in algorithm:
        todo = "Export it as NVFP4, FP8 or in another format"
        rule = "its weights are scaled by pre_quant_scale, which belongs to the layer before"
        raise error(rule, todo=todo, quant_algo=algorithm)


def _said(config: dict[str, Any]) -> dict[str, Any]:
    """What hf_quant_config.json has under "quantization", and config.json by itself."""
    outer, inner = {k: v for k, v in config.items() if k != "quantization"}, config.get("quantization")
    return outer | inner if isinstance(inner, dict) else outer


def _stated(_: HFCheckpoint, config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The configuration of one module: ``quantized_layers`` has those of mixed precision by name."""
    said = _said(config)
    layers = said.get("quantized_layers")
    own = layers.get(prefix) if isinstance(layers, dict) else None
    return said | own if isinstance(own, dict) else said


def read(m: Module) -> QTensor:
    """The weight of one module."""
    _refuse(m.config, m.error)
    algorithm = m.config.get("quant_algo")
    weight = m.array(".weight", np.uint8, ml_dtypes.float8_e4m3fn, ndim=2)
    if algorithm not in (None, "MIXED_PRECISION") and ("NVFP4" in str(algorithm)) != (weight.dtype == np.uint8):
        m.problems.append(f"{m.name} has codes in {weight.dtype.name}, though the configuration says {algorithm}")
    if weight.dtype == np.uint8:
        local = m.magnitudes(".weight_scale", ml_dtypes.float8_e4m3fn, ndim=2)
        m.check(".weight_scale", local.shape, (weight.shape[0], weight.shape[1] // 8))
        scale = QTensor(local, m.unit(".weight_scale_2"), None, qtype="float8_e4m3fn", dtype=np.float32)
        return QTensor(weight, scale, None, qtype="nvfp4", dtype=m.dtype, length=2 * weight.shape[1])
    scale = m.magnitudes(".weight_scale")
    scale = scale.reshape(1, 1) if scale.size == 1 else scale.reshape(len(scale), -1)
    found = spread(scale, weight.shape, (_BLOCK, _BLOCK) if "PB" in str(algorithm) else (None, None))
    if found is None:
        raise m.error(
            "the scales fit no blocks of the weight", ".weight_scale", todo="Check the format", scale=scale.shape
        )
    return QTensor(weight, found, None, qtype="float8_e4m3fn", dtype=m.dtype)


MODELOPT = Format(
    "ModelOpt",
    methods=("modelopt", "modelopt_fp4", "modelopt_fp8"),
    marks={".weight_scale": ".weight"},
    read=read,
    layouts="NVFP4, FP8",
    refuse=_refuse,
    stated=_stated,
)

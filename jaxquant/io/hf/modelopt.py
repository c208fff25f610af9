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
from jaxquant.io.hf.layout import spread
from jaxquant.io.hf.module import Format, Module

__all__ = ["MODELOPT"]


def _refuse(config: dict[str, Any], error: Callable[..., QuantError]) -> None:
    inner = config.get("quantization")
    algorithm = config.get("quant_algo") or (inner.get("quant_algo") if isinstance(inner, dict) else None)
    if isinstance(algorithm, str) and "AWQ" in algorithm:
        todo = "Export it as NVFP4, FP8 or in another format"
        raise error("its weights are scaled by pre_quant_scale, which belongs to the layer before", todo=todo)


def read(m: Module) -> QTensor:
    """The weight of one module."""
    weight = m.array(".weight", np.uint8, ml_dtypes.float8_e4m3fn, ndim=2)
    if weight.dtype == np.uint8:
        local = m.scales(".weight_scale", ml_dtypes.float8_e4m3fn, ndim=2)
        m.check(".weight_scale", local.shape, (weight.shape[0], weight.shape[1] // 8))
        unit = m.scales(".weight_scale_2", np.float32)
        if unit.size != 1:
            raise m.error(
                "there must be one scale for the weight", ".weight_scale_2", todo="Fetch it again", found=unit
            )
        scale = QTensor(local, unit.reshape(1, 1), None, qtype="float8_e4m3fn", dtype=np.float32)
        return QTensor(weight, scale, None, qtype="nvfp4", dtype=m.dtype, length=2 * weight.shape[1])
    scale = m.scales(".weight_scale")
    scale = scale.reshape(1, 1) if scale.size == 1 else scale.reshape(len(scale), -1)
    found = spread(scale, weight.shape, (None, None))
    if found is None:
        raise m.error(
            "the blocks do not divide the weight", ".weight_scale", todo="Check the format", scale=scale.shape
        )
    return QTensor(weight, found, None, qtype="float8_e4m3fn", dtype=m.dtype)


MODELOPT = Format(
    "ModelOpt",
    methods=("modelopt", "modelopt_fp4", "modelopt_fp8"),
    marks={".weight_scale": ".weight"},
    read=read,
    layouts="NVFP4, FP8",
    keeps=(".input_scale", ".k_scale", ".v_scale", ".output_scale"),
    refuse=_refuse,
)

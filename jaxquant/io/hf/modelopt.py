"""NVIDIA ModelOpt: `hf_quant_config.json` beside the weights, or quant_method "modelopt".

NVFP4   weight uint8 [out, in / 2], weight_scale fp8 [out, in / 16], weight_scale_2 float32: e2m1 * (s * s2)
FP8     weight fp8 [out, in], weight_scale float32: for the weight, for each row, or for blocks of 128 x 128
MXFP8   the same, weight_scale uint8 [out, in / 32]: the exponents

Fused experts are parameters: NAME [experts, out, in] or, where the model multiplies it so, [experts, in, out];
NAME_weight_scale and NAME_weight_scale_2. Packed codes and their scales keep the order of the axes: [experts, in / 2,
out] and [experts, in / 16, out].
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, dynamic, in_unit, refused, static
from jaxquant.io.hf.to_qtensor import aligned, in_blocks, in_unstated_blocks
from jaxquant.io.strict_json import Json

__all__ = ["MODELOPT"]

_BLOCK = 128  # rows and columns of a block of FP8_PB_WO and similar algorithms


def _refuse(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    algorithm = _said(config).get("quant_algo")
    if isinstance(algorithm, str) and "AWQ" in algorithm:
        todo = "Export it as NVFP4, FP8 or in another format"
        rule = "its weights are scaled by pre_quant_scale, which belongs to the layer before"
        raise error(rule, todo=todo, quant_algo=algorithm)


def _said(config: dict[str, Json]) -> dict[str, Json]:
    """The quantization settings: "quantization" in hf_quant_config.json, or the top level in config.json."""
    outer, inner = {k: v for k, v in config.items() if k != "quantization"}, config.get("quantization")
    return outer | inner if isinstance(inner, dict) else outer


def _stated(_: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json]:
    """The configuration of one module: ``quantized_layers`` has those of mixed precision by name."""
    said = _said(config)
    layers = said.get("quantized_layers")
    own = layers.get(prefix) if isinstance(layers, dict) else None
    return said | own if isinstance(own, dict) else said


def read(m: Module) -> QTensor:
    """One weight."""
    _refuse(m.config, m.error)
    algorithm = m.config.get("quant_algo")
    weight = m.array(".weight", np.uint8, ml_dtypes.float8_e4m3fn, ndim=RANKS)
    if algorithm not in (None, "MIXED_PRECISION") and ("NVFP4" in str(algorithm)) != (weight.dtype == np.uint8):
        m.problems.append(f"{m.name} has codes in {weight.dtype.name}, though the configuration says {algorithm}")
    if weight.dtype == np.uint8:
        return _nvfp4(m, weight)
    powers = m.has(".weight_scale") and m.array(".weight_scale").dtype in (np.uint8, ml_dtypes.float8_e8m0fnu)
    scale = m.exponents(".weight_scale") if powers else m.magnitudes(".weight_scale")
    values = aligned(scale, weight.shape, out_first=not m.is_parameter)
    found = None
    if values is not None and (powers or "PB" in str(algorithm)):
        found = in_blocks(values, weight.shape, [(1, 32) if powers else (_BLOCK, _BLOCK)])
    elif values is not None:
        found = in_unstated_blocks(values, weight.shape, (_BLOCK,))
    if found is None:
        raise m.error(
            "the scales fit no blocks of the weight", ".weight_scale", todo="Check the format", scale=scale.shape
        )
    return QTensor(weight, found, None, qtype="float8_e4m3fn", dtype=m.dtype)


def _nvfp4(m: Module, codes: np.ndarray) -> QTensor:
    local = m.magnitudes(".weight_scale", ml_dtypes.float8_e4m3fn, ndim=codes.ndim)
    *stack, rows, columns = codes.shape
    transposed = m.is_parameter and codes.ndim == 3 and local.shape == (*stack, rows // 8, columns)
    if not transposed:
        m.check(".weight_scale", local.shape, (*stack, rows, columns // 8))
    unit = m.unit(".weight_scale_2", stack=tuple(stack))
    scale = QTensor(local, unit, None, qtype="float8_e4m3fn", dtype=np.float32)
    if transposed:
        codes = np.ascontiguousarray(np.swapaxes(codes, 1, 2))
        return QTensor(codes, scale, None, qtype="nvfp4", dtype=m.dtype, minor=(-2,), length=2 * rows)
    return QTensor(codes, scale, None, qtype="nvfp4", dtype=m.dtype, length=2 * columns)


_STATIC = ("FP8", "W8A8_FP8")
_PER_TOKEN = ("FP8_PER_CHANNEL_PER_TOKEN",)
_ALONE = ("FP8_PB_WO", "FP8_PER_TENSOR_WO", "W4A16_NVFP4", "NVFP4_WEIGHT_ONLY", "W4A16_MXFP4")


def activation(m: Module) -> Activation | None:
    """Of fp8, a static range or one for each token; of MXFP8 and NVFP4, blocks."""
    algorithm = m.config.get("quant_algo")
    given = m.prefix + ("_input_scale" if m.is_parameter else ".input_scale") in m.checkpoint.tensors
    if algorithm in _ALONE:
        return None
    if algorithm in _PER_TOKEN:
        return dynamic("float8_e4m3fn")
    if algorithm == "MXFP8":
        return dynamic("mxfp8")
    four = m.checkpoint.tensors[m.named(".weight")].dtype == np.uint8
    if four and (given or "NVFP4" in str(algorithm)):
        return in_unit(m, f"quant_algo={algorithm}", "input_scale", inverse=False)
    if algorithm in (*_STATIC, None, "MIXED_PRECISION") and (given or algorithm in _STATIC):
        return static(m, f"quant_algo={algorithm}", "float8_e4m3fn")
    if algorithm in (None, "MIXED_PRECISION"):
        return None
    raise refused(m, "quant_algo", algorithm)


MODELOPT = Format(
    "ModelOpt",
    methods=("modelopt", "modelopt_fp4", "modelopt_fp8"),
    names=(
        Naming(marks=(".weight_scale",)),
        Naming(
            "",
            ("_weight_scale",),
            tensors={".weight": "", ".weight_scale": "_weight_scale", ".weight_scale_2": "_weight_scale_2"},
            keeps=("_bias",),
        ),
    ),
    read=read,
    layouts="NVFP4, FP8, MXFP8; fused experts",
    activation=activation,
    refuse=_refuse,
    stated=_stated,
)

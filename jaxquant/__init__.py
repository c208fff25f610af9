"""jaxquant: quantization for JAX.

Layers; imports point down only:

    models            6  decoders that run from a checkpoint: generate, evaluate (loaded on first use)
    report            6  compare: where the error is, as a table and one HTML page (loaded on first use)
    linen, nnx, io    5  Flax layers; checkpoints (loaded on first use)
    qat               5  training: learned steps, schedules, losses, which leaves an optimizer may see
    calibration       5  statistics, calibration in turns and over hosts, distill
    invariances       5  scales, rotations and biases that move between parameters: smoothquant, awq, rotate
    mixed             5  several schemes for a budget of bytes: sensitivity, allocate, refine
    transform         4  quantize_model; make_plan, quantize_params, quantized, calibrate, explain
    ptq               3  quantizers: rtn, clipped, gptq; what transforms are made of: scales, bases
    rules             3  Rule, OpRule: which parameters get which OpSpec
    recipes           2  named OpSpecs
    ops               2  quantized primitives: dot_general, einsum, conv_general_dilated, take; lay_out, shardings
    core              1  QuantSpec, QTensor, quantize, dequantize, fake_quant, observers
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant import calibration, invariances, mixed, ops, ptq, qat, recipes
from jaxquant.core import observers
from jaxquant.core.affine import quantize
from jaxquant.core.errors import QuantError
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.granularity import PerChannel, PerGroup, PerTensor
from jaxquant.core.qtensor import QTensor, dequantize
from jaxquant.core.qtypes import dtype_table
from jaxquant.core.scale_zero_point import scale_zero_point
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.rules import OpRule, Rule
from jaxquant.transform.calibrate import act_state, calibrate
from jaxquant.transform.explain import explain
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantize_model import quantize_model
from jaxquant.transform.quantized import quantized

if TYPE_CHECKING:
    from jaxquant import io, linen, models, nnx, optim
    from jaxquant.report import compare

__version__ = "0.1.0"

__all__ = [
    "OpRule",
    "OpSpec",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "Plan",
    "QTensor",
    "QuantError",
    "QuantSpec",
    "Rule",
    "act_state",
    "calibrate",
    "calibration",
    "compare",
    "dequantize",
    "dequantize_params",
    "dtype_table",
    "explain",
    "fake_quant",
    "invariances",
    "io",
    "linen",
    "make_plan",
    "mixed",
    "models",
    "nnx",
    "observers",
    "ops",
    "optim",
    "ptq",
    "qat",
    "quantize",
    "quantize_model",
    "quantize_params",
    "quantized",
    "recipes",
    "scale_zero_point",
]

_ON_USE = ("io", "linen", "models", "nnx", "optim")


def __getattr__(name: str) -> Any:
    if name == "compare":
        return importlib.import_module("jaxquant.report").compare
    if name in _ON_USE:
        return importlib.import_module(f"jaxquant.{name}")
    if name == "statistics":  # its older name
        return calibration
    raise AttributeError(f"module 'jaxquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""From float params to quantized ones, and any function of params to the same function in low precision.

make_plan        rules and a trace -> Plan
quantize_params  float leaves -> QTensors
quantized        fn -> fn in low precision
"""

from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import quantized

__all__ = ["Plan", "dequantize_params", "make_plan", "quantize_params", "quantized"]

"""From float params to quantized ones, and any function of params to the same function in low precision.

make_plan        rules and a trace -> Plan
quantize_params  float leaves -> QTensors
quantized        fn -> fn in low precision
calibrate        statistics of the inputs of planned weights; act_state: static ranges from them;
                 merge_stats: of several hosts
shardings        where the arrays of QTensors lie, from where the float params lie
"""

# Imported for the handlers that they register with the interpreter.
from jaxquant.transform import calls as calls
from jaxquant.transform import manual as manual
from jaxquant.transform import operations as operations
from jaxquant.transform import statistics
from jaxquant.transform import views as views
from jaxquant.transform.calibrate import act_state, calibrate, merge_stats
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.params import dequantize_params, quantize_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantized import quantized
from jaxquant.transform.shardings import shardings

__all__ = [
    "Plan",
    "act_state",
    "calibrate",
    "dequantize_params",
    "make_plan",
    "merge_stats",
    "quantize_params",
    "quantized",
    "shardings",
    "statistics",
]

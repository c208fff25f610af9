"""From float params to quantized ones, and any function of params to the same function in low precision.

make_plan        rules and a trace -> Plan
quantize_params  float leaves -> QTensors
quantize_sequentially  calibrate and quantize_params in turns
quantized        fn -> fn in low precision; by a plan, or a StatedPlan, which becomes one when fn is traced
quantize_model   all of these in one call
calibrate        statistics of the inputs of planned weights; act_state: static ranges from them;
                 merge_stats: of several hosts
precondition     a function whose weights are multiplied in another basis; precondition_params
scale_pairs      the per-channel scales that can move from one parameter to another; rescale
smoothquant      scales on input channels, along such pairs (also awq, equalize) or online (.._bases)
rotation_groups  the orthogonal matrices that can move into parameters, and where; rotate, fold_gains
distill          scales and biases tuned until the outputs are those of the float function
sensitivity      what each weight costs by candidate spec; allocate: the best choice for a budget of bytes
shardings        where the arrays of QTensors lie, from where the float params lie
"""

# Imported for the handlers that they register with the interpreter.
from jaxquant.transform import calls as calls
from jaxquant.transform import joined as joined
from jaxquant.transform import operations as operations
from jaxquant.transform import shard_map as shard_map
from jaxquant.transform import statistics
from jaxquant.transform import weight_views as weight_views
from jaxquant.transform.allocation import allocate, refine
from jaxquant.transform.analysis.biases import biases
from jaxquant.transform.analysis.rotations import RotationGroup, rotation_groups
from jaxquant.transform.analysis.scales import ScalePair, scale_pairs
from jaxquant.transform.calibrate import act_state, calibrate, merge_stats
from jaxquant.transform.change_of_basis import precondition, precondition_params
from jaxquant.transform.distill import distill, relative_error
from jaxquant.transform.explain import Explanation, explain
from jaxquant.transform.folding import correct_bias, fold_gains, rescale, rotate
from jaxquant.transform.learning import LearnedRotations, learn_rotations
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.params import dequantize_params, quantize_params, update_params
from jaxquant.transform.plan import Plan
from jaxquant.transform.quantize_model import QuantizedModel, quantize_model
from jaxquant.transform.quantized import quantized
from jaxquant.transform.sensitivity import Sensitivity, sensitivity
from jaxquant.transform.sequential import quantize_sequentially
from jaxquant.transform.shardings import shardings
from jaxquant.transform.smoothing import awq, awq_bases, equalize, rotation_bases, smooth_bases, smoothquant

__all__ = [
    "Explanation",
    "LearnedRotations",
    "Plan",
    "QuantizedModel",
    "RotationGroup",
    "ScalePair",
    "Sensitivity",
    "act_state",
    "allocate",
    "awq",
    "awq_bases",
    "biases",
    "calibrate",
    "correct_bias",
    "dequantize_params",
    "distill",
    "equalize",
    "explain",
    "fold_gains",
    "learn_rotations",
    "make_plan",
    "merge_stats",
    "precondition",
    "precondition_params",
    "quantize_model",
    "quantize_params",
    "quantize_sequentially",
    "quantized",
    "refine",
    "relative_error",
    "rescale",
    "rotate",
    "rotation_bases",
    "rotation_groups",
    "scale_pairs",
    "sensitivity",
    "shardings",
    "smooth_bases",
    "smoothquant",
    "statistics",
    "update_params",
]

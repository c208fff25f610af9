"""From float params to quantized ones, and any function of params to the same function in low precision.

trace, interpreter       a function as a jaxpr, evaluated with weights in it; primitives, weights, products: its words
weight_views, operations, calls, joined, shard_map   the handlers of primitives that a weight reaches
make_plan, plan          rules and a trace -> Plan; misfits: groups that do not divide; stated: plans of checkpoints
params                   quantize_params: float leaves -> QTensors; dequantize_params
quantized                fn -> fn in low precision; backward_pass: what it hands to its derivative
quantize_model           all of these in one call
calibrate, statistics    statistics of the inputs of planned weights; act_state: static ranges; sequential: in turns
explain                  the compiled program, weight by weight
analysis                 which scales, rotations and biases can move between parameters
folding, smoothing, learning, change_of_basis   what moves them: the room `jaxquant.invariances`
sensitivity, allocation  several schemes for a budget of bytes: the room `jaxquant.mixed`
distill                  scales and biases tuned until the outputs are those of the float function
"""

# Imported for the handlers that they register with the interpreter.
from jaxquant.transform import calls as calls
from jaxquant.transform import joined as joined
from jaxquant.transform import operations as operations
from jaxquant.transform import shard_map as shard_map
from jaxquant.transform import weight_views as weight_views

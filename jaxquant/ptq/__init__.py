"""Post-training quantization: one algorithm per file, each a pure function of a weight and its statistics.

A *quantizer* is ``method(w, spec, *, reduce_axes, stats=None) -> QTensor``; `quantize_params` takes any of them.

    rtn      round to nearest, with the range of the spec's calibration
    clipped  round to nearest, with the range of least output error
    autoround  rounding and ranges learned by signed gradients
    descend  codes and scales of another quantizer, improved one at a time
    double_quantized  any quantizer, with the scales in 8 bits
    hqq      round to nearest, with the zero point of least absolute error
    gptq     round in turn; weights still to come compensate each error

A *basis* is a change of basis of a weight's input channels, before it is quantized; see
`jaxquant.invariances.precondition`.

    bases    ChannelScale, Rotation, Orthogonal

    scaling  smooth_scale, awq_scale: scales of the channels; awq_clip: clips of the weights
"""

from jaxquant.ptq import bases, scaling
from jaxquant.ptq.autoround import autoround
from jaxquant.ptq.clipped import clipped
from jaxquant.ptq.descend import descend
from jaxquant.ptq.double import double_quantized
from jaxquant.ptq.gptq import gptq
from jaxquant.ptq.hqq import hqq
from jaxquant.ptq.rtn import rtn

__all__ = [
    "autoround",
    "bases",
    "clipped",
    "descend",
    "double_quantized",
    "gptq",
    "hqq",
    "rtn",
    "scaling",
]

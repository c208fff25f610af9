"""Post-training quantization: one algorithm per file, each a pure function of a weight and its statistics.

A *quantizer* is ``method(w, spec, *, reduce_axes, stats=None) -> QTensor``; `quantize_params` takes any of them.

    rtn      round to nearest, with the range that the spec's calibration gives
    clipped  round to nearest, with the range of least output error
    gptq     round in turn, each error made up for by the weights still to come
"""

from jaxquant.ptq.clipped import clipped
from jaxquant.ptq.gptq import gptq
from jaxquant.ptq.rtn import rtn

__all__ = ["clipped", "gptq", "rtn"]

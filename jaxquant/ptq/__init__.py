"""Post-training quantization: one algorithm per file, each a pure function of a weight and its statistics.

A *quantizer* is ``method(w, spec, *, reduce_axes, stats=None) -> QTensor``; `quantize_params` takes any of them.

    rtn     round to nearest, with the range that the spec's calibration gives
"""

from jaxquant.ptq.rtn import rtn

__all__ = ["rtn"]

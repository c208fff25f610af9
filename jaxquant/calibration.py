"""Calibration beyond `jaxquant.calibrate`: what to collect, over several hosts, in turns, and tuning afterwards.

Gram, ChannelMean, ChannelAbsMax, Range   statistics that `calibrate(collect={...})` takes; `Statistic`: one of your own
merge_stats              statistics of several hosts as if one had seen all their batches
quantize_sequentially    each weight calibrated on the outputs of the quantized weights before it
distill                  scales and vectors tuned until the outputs are those of the float function
Distillation             its settings, for `quantize_model`: a method and distillation in one call
"""

from jaxquant.transform.calibrate import merge_stats
from jaxquant.transform.distill import Distillation, distill
from jaxquant.transform.sequential import quantize_sequentially
from jaxquant.transform.statistics import ChannelAbsMax, ChannelMean, Gram, Inputs, Range, Rows, Statistic

__all__ = [
    "ChannelAbsMax",
    "ChannelMean",
    "Distillation",
    "Gram",
    "Inputs",
    "Range",
    "Rows",
    "Statistic",
    "distill",
    "merge_stats",
    "quantize_sequentially",
]

"""Quantization-aware training: learned steps, schedules, losses, and the leaves that an optimizer trains.

leaves      which leaves train: trainable, split, merge, check_trainable, refuse_quantized, freeze_quantized
steps       learned_steps: LSQ, LSQ+ and PACT; labels for Optax; clamp_steps
schedules   scheduled: float first, fewer bits later; with_bits; to_nearest: after stochastic rounding
ranges      observed and update_ranges: moving averages of activation ranges in a compiled step, which can be frozen
losses      distillation_loss: towards the float model
updates     update_params: steps and averages of weights that are quantized already
batch_norm  fold_batch_norms: into the convolutions before them
"""

from jaxquant.qat.batch_norm import fold_batch_norms
from jaxquant.qat.leaves import check_trainable, freeze_quantized, merge, refuse_quantized, split, trainable
from jaxquant.qat.losses import distillation_loss
from jaxquant.qat.ranges import observed, update_ranges
from jaxquant.qat.schedules import scheduled, to_nearest, with_bits
from jaxquant.qat.steps import clamp_steps, labels, learned_steps
from jaxquant.qat.updates import update_params

__all__ = [
    "check_trainable",
    "clamp_steps",
    "distillation_loss",
    "fold_batch_norms",
    "freeze_quantized",
    "labels",
    "learned_steps",
    "merge",
    "observed",
    "refuse_quantized",
    "scheduled",
    "split",
    "to_nearest",
    "trainable",
    "update_params",
    "update_ranges",
    "with_bits",
]

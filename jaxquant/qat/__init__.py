"""Quantization-aware training: learned steps, schedules, losses, and which leaves an optimizer may see.

leaves     which leaves train: trainable, split, merge, check_trainable, refuse_quantized, freeze_quantized
steps      learned_steps: LSQ, LSQ+ and PACT; labels for Optax; clamp_steps
"""

from jaxquant.qat.leaves import check_trainable, freeze_quantized, merge, refuse_quantized, split, trainable
from jaxquant.qat.steps import clamp_steps, labels, learned_steps

__all__ = [
    "check_trainable",
    "clamp_steps",
    "freeze_quantized",
    "labels",
    "learned_steps",
    "merge",
    "refuse_quantized",
    "split",
    "trainable",
]

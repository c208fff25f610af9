"""Kernels for TPUs.

On import they replace plain computations of `jaxquant.core` that this compiler turns into slow code.
"""

from jaxquant.ops.kernels.tpu import blocks, quantize

__all__ = ["blocks", "quantize"]

"""Kernels for TPUs.

What `jaxquant.core` computes plainly, and this compiler slowly, is replaced on import.
"""

from jaxquant.ops.kernels.tpu import quantize

__all__ = ["quantize"]

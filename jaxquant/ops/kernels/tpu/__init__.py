"""Kernels for TPUs.

On import they replace plain computations of `jaxquant.core` and `jaxquant.ops` that this compiler turns into slow code.
"""

from jaxquant.ops.kernels.tpu import blocks, columns, produced, quantize

__all__ = ["blocks", "columns", "produced", "quantize"]

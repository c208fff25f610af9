"""Kernels for XLA's CPU backend, chosen by what it compiles well; `machine` asks it.

What `jaxquant.core` computes plainly, and this backend slowly, is replaced on import.
"""

from jaxquant.ops.kernels.cpu import layout, patterns, quantizing, ranges

__all__ = ["layout", "patterns", "quantizing", "ranges"]

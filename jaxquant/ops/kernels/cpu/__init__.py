"""Kernels for XLA's CPU backend, in forms that it compiles well; `machine` tests which dots have fast kernels.

On import they replace plain computations of `jaxquant.core` that this backend compiles to slow code.
"""

from jaxquant.ops.kernels.cpu import layout, patterns, quantizing, ranges

__all__ = ["layout", "patterns", "quantizing", "ranges"]

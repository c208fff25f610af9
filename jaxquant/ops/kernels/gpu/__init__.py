"""Kernels for GPUs, in Pallas' Triton dialect; quantizing on them replaces what `jaxquant.core` says plainly."""

from jaxquant.ops.kernels.gpu import quantizing

__all__ = ["quantizing"]

"""Kernels for GPUs, in Pallas' Triton dialect; their quantization replaces the plain one of `jaxquant.core`."""

from jaxquant.ops.kernels.gpu import quantizing

__all__ = ["quantizing"]

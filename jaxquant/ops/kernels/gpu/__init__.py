"""Kernels for GPUs, in Pallas' Triton dialect."""

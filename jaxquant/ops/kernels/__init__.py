"""Kernels: each says which problems it takes, on which platforms, and runs. `jaxquant.ops.select` has them in order.

The modules here are portable. `cpu`, `tpu` and `gpu` have what is there for one compiler, and nothing of them is
lowered for another platform.
"""

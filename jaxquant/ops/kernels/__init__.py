"""Kernels: each says which problems it takes and on which platforms, and runs them. `jaxquant.ops.select` orders them.

The modules here are portable. `cpu`, `tpu` and `gpu` hold kernels for one compiler each, which are lowered for their
own platform only.
"""

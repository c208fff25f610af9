"""Marks of tests that a setting of JAX makes senseless."""

import jax
import pytest

makes_nan = pytest.mark.skipif(jax.config.jax_debug_nans, reason="makes NaN on purpose, which jax_debug_nans forbids")
promotes = pytest.mark.skipif(
    jax.config.jax_numpy_dtype_promotion == "strict",
    reason="mixes dtypes on purpose, which jax_numpy_dtype_promotion='strict' refuses before jaxquant can",
)
needs_jit = pytest.mark.skipif(jax.config.jax_disable_jit, reason="tells compiled from eager: jax_disable_jit is set")

"""Marks of tests that a setting of JAX makes senseless."""

from typing import Any

import jax
import pytest

config: Any = jax.config  # its settings are attributes that its type does not have

makes_nan = pytest.mark.skipif(config.jax_debug_nans, reason="makes NaN on purpose, which jax_debug_nans forbids")
promotes = pytest.mark.skipif(
    config.jax_numpy_dtype_promotion == "strict",
    reason="mixes dtypes on purpose, which jax_numpy_dtype_promotion='strict' refuses before jaxquant can",
)
optax_promotes = pytest.mark.skipif(
    config.jax_numpy_dtype_promotion == "strict",
    reason="Optax multiplies floats by counts of int32, which jax_numpy_dtype_promotion='strict' refuses",
)
flax_promotes = pytest.mark.skipif(
    config.jax_numpy_dtype_promotion == "strict",
    reason="Flax promotes the dtypes of a layer, which jax_numpy_dtype_promotion='strict' refuses",
)
donates = pytest.mark.skipif(config.jax_debug_nans, reason="jax_debug_nans keeps arguments that are donated")
draws = pytest.mark.skipif(config.jax_enable_x64, reason="chance decides, and draws are others in 64 bits")
documented = pytest.mark.skipif(
    config.jax_enable_x64 or config.jax_numpy_dtype_promotion == "strict" or config.jax_disable_jit,
    reason="documentation shows dtypes and draws of 32 bits, trains with Optax, which promotes, and compiles ahead",
)
needs_jit = pytest.mark.skipif(
    config.jax_disable_jit, reason="tells compiled from eager, or trains in a compiled step: jax_disable_jit is set"
)

"""Marks of tests that a setting of JAX makes senseless."""

import jax
import pytest

makes_nan = pytest.mark.skipif(jax.config.jax_debug_nans, reason="makes NaN on purpose, which jax_debug_nans forbids")
needs_jit = pytest.mark.skipif(jax.config.jax_disable_jit, reason="tells compiled from eager: jax_disable_jit is set")

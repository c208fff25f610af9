"""64-bit types within a block, on every supported version of JAX."""

from typing import Any

import jax
import jax.experimental


def double_precision():
    """A context in which 64-bit types are on."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    older: Any = jax.experimental  # where JAX 0.6 has it
    return older.enable_x64()

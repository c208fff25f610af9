"""64-bit types within a block, on every supported version of JAX."""

import jax


def double_precision():
    """A context in which 64-bit types are on."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # its older place

    return enable_x64()

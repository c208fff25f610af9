"""The gradient of codes, which are integers: JAX's ``float0`` zeros, which raise when something computes with them."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import numpy as np

from jaxquant.core.errors import quant_error

__all__ = ["NoGradient", "guarded"]


class NoGradient(np.ndarray):
    """``float0`` zeros that raise `QuantError` in arithmetic, where NumPy's and JAX's errors name no remedy.

    ``jax.grad(..., allow_int=True)`` of a function of QTensors returns these for the codes. JAX takes them wherever
    it takes ``float0`` arrays, so that such gradients pass through `jax.jit` and ``jax.jvp`` as before. An optimizer
    computes with them in its first update.
    """

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise quant_error(
            "QTensor",
            "codes are integers and have no gradient, so that no optimizer can update them",
            todo="Train float parameters through jaxquant.quantized and quantize them afterwards, or give the "
            "optimizer the float leaves alone: trained, frozen = jaxquant.qat.split(params)",
            shape=self.shape,
        )

    # NumPy asks the first, JAX the second.
    __array_ufunc__ = __jax_array__ = _refuse


def guarded(leaf: Any) -> Any:
    """The leaf, or `NoGradient` in place of a ``float0`` array. Such an array has a shape and no values."""
    if (
        getattr(leaf, "dtype", None) != jax.dtypes.float0
        or isinstance(leaf, NoGradient)
        or not hasattr(leaf, "__array__")
    ):
        return leaf
    return np.zeros(leaf.shape, jax.dtypes.float0).view(NoGradient)

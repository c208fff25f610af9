"""`TrainedTensor`: the codes of a float array in training, and the float array that gets the gradient."""

from __future__ import annotations

from typing import TypeGuard

import jax
from jax.typing import DTypeLike

from jaxquant.core.affine import minor_axes
from jaxquant.core.qtensor import FIELDS, Operand, QTensor, from_codes

__all__ = ["TrainedTensor", "as_quantized", "is_in_training", "is_stored_in_elements"]


@jax.tree_util.register_pytree_with_keys_class
class TrainedTensor(QTensor):
    """A QTensor of codes for the forward pass, with the float array that its gradient goes to.

    Attributes:
      real: the fake-quantized array, differentiable; None where only values are needed. If an op uses the codes alone,
        XLA drops the computation of this array.
    """

    __slots__ = ("real",)

    real: jax.Array | None

    def __init__(self, q: QTensor, real: jax.Array | None):
        super().__init__(**{name: getattr(q, name) for name in FIELDS})
        self.real = real

    @property
    def differentiable(self) -> jax.Array:
        """The fake-quantized array, of a tensor that has one."""
        assert self.real is not None
        return self.real

    @property
    def frozen(self) -> QTensor:
        """The codes alone."""
        return QTensor(**{name: getattr(self, name) for name in FIELDS})

    def tree_flatten_with_keys(self):
        children, aux = super().tree_flatten_with_keys()
        return (*children, (jax.tree_util.GetAttrKey("real"), self.real)), aux

    def tree_flatten(self):
        children, aux = super().tree_flatten()
        return (*children, self.real), aux

    @classmethod
    def tree_unflatten(cls, aux, children):
        *fields, real = children
        return cls(QTensor.tree_unflatten(aux, fields), real)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The fake-quantized array, differentiable if ``real`` is there."""
        if self.real is None:
            return super().dequantize(dtype)
        return self.real.astype(self.dtype if dtype is None else dtype)


def as_quantized(x: TrainedTensor, axes: tuple[int, ...]) -> QTensor:
    """The QTensor that `jaxquant.quantize` would store for a weight with these ``reduce_axes``."""
    minor = minor_axes(tuple(axis - x.ndim for axis in axes), x.ndim)
    return from_codes(x.logical_codes(), x.scale, x.zero_point, x.offset, qtype=x.qtype, dtype=x.dtype, minor=minor)


def is_in_training(x: Operand) -> bool:
    """Whether an operand is a float array, or was quantized from one on the way."""
    return not isinstance(x, QTensor) or isinstance(x, TrainedTensor)


def is_stored_in_elements(x: Operand) -> TypeGuard[QTensor]:
    """Whether an operand is stored with one code per element, unpermuted, and groups along one axis at most."""

    if not isinstance(x, QTensor) or is_in_training(x) or x.layout == "packed" or x.permutation is not None:
        return False
    cut = [i - x.ndim for i, (n, s) in enumerate(zip(x.shape, x.scale.shape, strict=True)) if 1 < s < n]
    return cut == ([] if x.split is None else [x.split])

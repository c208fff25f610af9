"""LLM.int8(): an int8 product, with the few input features that hold outliers in float."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.ops.dot import contract

__all__ = ["llm_int8"]


def _checked(x: jax.Array, w: QTensor, threshold: float) -> None:
    if not isinstance(w, QTensor) or w.qtype != "int8" or w.zero_point is not None or w.ndim != 2:
        todo = "Pass quantize(w, QuantSpec('int8'), reduce_axes=(-2,)) of a weight [in, out]"
        raise quant_error("llm_int8", "the weight must be a symmetric int8 QTensor of two axes", todo=todo, w=w)
    if w.scale.shape != (1, w.shape[1]) or w.offset is not None or w.permutation is not None:
        todo = "Quantize it with granularity=PerChannel() over axis -2"
        raise quant_error("llm_int8", "the weight must have one scale per output", todo=todo, scale=w.scale)
    if x.ndim < 1 or x.shape[-1] != w.shape[0] or not jnp.issubdtype(x.dtype, jnp.floating):
        todo = "Pass floats [..., in]"
        raise quant_error("llm_int8", "x does not fit the weight", todo=todo, x=x, shape=w.shape)
    if not threshold >= 0:
        raise quant_error("llm_int8", "threshold must not be negative", todo="Use 6.0, or 0", threshold=threshold)


def llm_int8(x: jax.Array, w: QTensor, bias: jax.Array | None = None, *, threshold: float = 6.0) -> jax.Array:
    """``x @ w`` with features that hold an outlier in the dtype of x, and all others in int8.

    A feature is an outlier if it holds any ``|x| >= threshold``. With O the outliers, and each row of x quantized by
    the absmax of its other elements,

        y = s_x s_w (x_q[:, not O] @ w_q[not O]) + bias + x[:, O] @ w[O]

    Both products are dense, with zeros in place of the other's features, since the number of outliers is only known at
    run time. The second product is skipped if there is no outlier.

    Args:
      x: floats [..., in]; float16 in the reference.
      w: int8 `QTensor` [in, out] with one scale per output.
      bias: floats [out], or None.
      threshold: the smallest magnitude of an outlier; 0: no outliers.

    Returns:
      Floats [..., out] of x's dtype.

    Raises:
      QuantError: if the weight is another kind of QTensor, or shapes do not fit.

    Gradient: as `dot_general` with such a spec.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ops.llm_int8 import llm_int8
      >>> x = jnp.array([[0.5, 100.0, -0.25, 1.0]])
      >>> w = jq.quantize(jnp.eye(4), jq.QuantSpec("int8"), reduce_axes=(-2,))
      >>> print(llm_int8(x, w), llm_int8(x, w, threshold=0.0))
      [[  0.503937  100.         -0.2519685   1.       ]] [[  0.78740156 100.           0.           0.78740156]]

    Source: Dettmers et al. 2022 (arXiv:2208.07339), section 3.2; bitsandbytes, whose codes and (to the rounding of
    float16) results these are.
    """
    x = jnp.asarray(x)
    _checked(x, w, threshold)
    spec = OpSpec(act=QuantSpec("int8"), outliers=threshold or math.inf)
    numbers = ((x.ndim - 1,), (0,)), ((), ())
    y = contract("llm_int8", x, w, numbers, lax.Precision.HIGHEST, jnp.float32, spec, None, None)
    if bias is not None:
        y = y + bias.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return y.astype(x.dtype)

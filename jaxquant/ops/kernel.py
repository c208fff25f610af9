"""Which kernel a product runs on, before there is a program: what the plan says of each weight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.core.abstract import abstract
from jaxquant.core.arithmetic import promoted
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.ops import conv, ragged
from jaxquant.ops.floats import own_dtype
from jaxquant.ops.formulation import way
from jaxquant.ops.matrix import Axes, Packed, canonical
from jaxquant.ops.trained import TrainedTensor

__all__ = ["kernel"]

_NAMES = {
    "integer": "int8",
    "digits": "int8 digits",
    "folded": "int8 digits",
    "lanes": "float32 loop",
    "blocks": "{} blocks",
    "minifloat": "bfloat16",
    "dequantized": "{}",
}

_MANY = 1 << 20  # rows: more than any choice depends on


@functools.cache
def kernel(
    rows: int | None,
    columns: int,
    length: int,
    spec: OpSpec,
    dtype: Any,
    op: str = "dot_general",
    window: tuple[int, ...] = (),
) -> str:
    """The formulation of ``[rows, length] x [columns, length]`` on the default device, in a word or two.

    Args:
      rows: of the activation; None where they are not known, and count as many.
      columns, length: of the weight: output channels, and what is contracted.
      spec: how both are quantized; the weight is stored.
      dtype: of the float arrays.
      op: ``"dot_general"``, ``"conv_general_dilated"`` or ``"ragged_dot"``.
      window: of a convolution, a `jaxquant.ops.conv.Window`.

    Returns:
      ``"int8"``: a product of int8; ``"int8 digits"``: one, with the float activation in digits; ``"float32 loop"``: a
      loop over the codes, for one row; ``"float32 blocks"``, ``"bfloat16 blocks"``: float dots with blocks of the
      weight that are decoded in turn; ``"float32"``, ``"bfloat16"``, ``"float16"``: a dot of values. What the compiled
      program makes of it is for `jaxquant.explain` to say.

    Example:
      >>> from jaxquant import recipes
      >>> from jaxquant.ops.kernel import kernel
      >>> kernel(8, 64, 64, recipes.nf4(), "float32")
      'float32 blocks'
    """
    axes, found, platform = Axes((), (0,), (1,)), [], jax.default_backend()

    def run(x: Any, w: Any) -> None:
        left = canonical(TrainedTensor(x, None) if isinstance(x, QTensor) else x, axes)
        right = canonical(w, axes)
        wide = promoted(dtype, jnp.float32)
        if op != "dot_general":
            left, right = (v.unpacked() if isinstance(v, Packed) else v for v in (left, right))
            if op == "ragged_dot":
                how = ragged.choose(left, right)
            else:
                how = conv.choose(platform, left, right, conv.Window(*window))
            own = own_dtype((jnp.dtype(dtype),), None) if platform != "cpu" else None
            found.append((how, own or wide))
        elif left is None or right is None:
            found.append(("dequantized", wide))
        else:
            found.append(way(platform, left, right, None, jnp.dtype(dtype)))

    def operand(size: int, spec: QuantSpec | None, *, stored: bool) -> Any:
        if spec is None:
            return jax.ShapeDtypeStruct((size, length), jnp.dtype(dtype))
        return abstract((size, length), jnp.dtype(dtype), spec, (-1,), stored=stored)

    most = _MANY if rows is None else rows
    jax.eval_shape(run, operand(most, spec.act, stored=False), operand(columns, spec.weight, stored=True))
    formulation, multiplied = found[0]
    return _NAMES[formulation].format(jnp.dtype(multiplied).name)

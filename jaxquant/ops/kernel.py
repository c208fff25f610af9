"""Predicts the kernel of a product before it is compiled; `jaxquant.plan` reports it for each weight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core.abstract import abstract
from jaxquant.core.by_platform import Target, target_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.relayout import laid_out
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.ops.axes import Axes
from jaxquant.ops.kernels.tpu.matrices import as_matrices
from jaxquant.ops.problem import Convolution, Geometry, Problem, Product, RaggedProduct, Window
from jaxquant.ops.select import select
from jaxquant.ops.targets import layout_for
from jaxquant.ops.trained import TrainedTensor

__all__ = ["kernel"]

_MANY = 1 << 20  # rows: more than any choice depends on


@functools.cache
def kernel(
    rows: int | None,
    columns: int,
    length: int,
    spec: OpSpec,
    dtype: DTypeLike,
    op: str = "dot_general",
    window: tuple[int, ...] = (),
    target: Target | None = None,
    *,
    in_stack: bool = False,
    experts: int = 1,
) -> str:
    """The name of the kernel for ``[rows, length] x [columns, length]``.

    Args:
      rows: of the activation; None if unknown, which counts as many.
      columns, length: of the weight: output channels, and the contracted length.
      spec: how both are quantized; the weight is stored.
      dtype: of the float arrays.
      op: ``"dot_general"``, ``"conv_general_dilated"`` or ``"ragged_dot"``.
      window: of a convolution, a `jaxquant.ops.problem.Window`.
      target: what the program is lowered for, with codes laid out for it; None: the default device.
      experts: the number of experts of a ragged product, each with ``columns``.
      in_stack: whether the weight is a layer of a stack that a scan goes through.

    Returns:
      ``"int8"``: a product of int8; ``"int8 residual split"``: one, with the float activation in int8 digits;
      ``"float32 GEMV"``: a loop over the codes, for one row; ``"float32 blocks"``, ``"bfloat16 blocks"``: float dots
      with blocks of the weight that are decoded in turn; ``"bfloat16, decoded"``: a dot that decodes codes in its
      operand; ``"float32"``, ``"bfloat16"``, ``"float16"``: a dot of values. `jaxquant.explain` reports the
      instructions of the compiled program.

    Example:
      >>> from jaxquant import recipes
      >>> from jaxquant.ops.kernel import kernel
      >>> kernel(8, 64, 64, recipes.nf4(), "float32")
      'float32 blocks'
    """
    on = target_of(jax.devices()[0]) if target is None else target

    def operand(shape: tuple[int, ...], spec: QuantSpec | None, axes: tuple[int, ...], *, stored: bool) -> Any:
        if spec is None:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        found = abstract(shape, jnp.dtype(dtype), spec, axes, stored=stored)
        if not stored:
            return TrainedTensor(found, None)
        if on.platform == "cpu":
            return found
        layout = layout_for("tpu" if on.platform == "tpu" else "gpu", found)
        laid = jax.eval_shape(lambda q: laid_out(q, layout), found)
        return jax.eval_shape(_first_layer, laid) if in_stack else laid

    most, own = _MANY if rows is None else rows, jnp.dtype(dtype)
    if op == "ragged_dot":
        x = operand((most, length), spec.act, (-1,), stored=False)
        w = operand((experts, length, columns), spec.weight, (-2,), stored=True)
        sizes: Any = jax.ShapeDtypeStruct((experts,), jnp.int32)
        problem: Problem = RaggedProduct(x, w, None, own, sizes)
    elif op == "conv_general_dilated":
        geometry = Geometry((0, 1, 2), (0, 1, 2), (0, 1, 2), (1,), ((0, 0),), (1,), (1,), *window[:2] or (1, 1))
        x = operand((most, length, 1), spec.act, (-2, -1), stored=False)
        w = operand((columns, length, 1), spec.weight, (-2, -1), stored=True)
        problem = Convolution(x, w, None, own, geometry, Window(*window))
    else:
        x = operand((most, length), spec.act, (-1,), stored=False)
        w = operand((columns, length), spec.weight, (-1,), stored=True)
        problem = Product(x, w, None, own, Axes((), (0,), (1,)), Axes((), (0,), (1,)))
        problem = jax.eval_shape(as_matrices, problem) if on.platform == "tpu" else problem
    return select(problem, on).name


def _first_layer(w: QTensor) -> QTensor:
    """A weight as the only layer of a stack, as a scan hands it to a product."""
    stack = jax.tree.map(lambda v: v[None], w)
    return w.layer_of(stack, jnp.int32(0)) if stack.stays_in_stack else w

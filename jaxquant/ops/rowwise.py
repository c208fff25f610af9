"""Functions of rows, such as a norm or a gated activation function, and activations that are made by one.

A kernel that quantizes an activation can compute such a function itself, a row at a time, so that the activation is
neither written to memory nor read. `jaxquant.transform.analysis.rows` finds the function in a traced program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, primitives

from jaxquant.core.affine import as_codes
from jaxquant.core.qtensor import QTensor
from jaxquant.core.replaceable import Replaceable
from jaxquant.core.specs import QuantSpec

__all__ = ["ELEMENTWISE", "REDUCTIONS", "Form", "Produced", "RowFunction", "Step", "produced_codes"]

Form = Literal["rows", "row", "column", "scalar"]
"""How many numbers a value has beside a matrix [M, K]: as many, one for each row, one for each column, or one."""

ELEMENTWISE: dict[Primitive, Callable[..., jax.Array]] = {
    primitives.add_p: jnp.add,
    primitives.sub_p: jnp.subtract,
    primitives.mul_p: jnp.multiply,
    primitives.div_p: jnp.divide,
    primitives.max_p: jnp.maximum,
    primitives.min_p: jnp.minimum,
    primitives.neg_p: lax.neg,
    primitives.abs_p: lax.abs,
    primitives.exp_p: lax.exp,
    primitives.tanh_p: lax.tanh,
    primitives.logistic_p: lax.logistic,
    primitives.rsqrt_p: lax.rsqrt,
    primitives.sqrt_p: lax.sqrt,
    primitives.square_p: lax.square,
    primitives.integer_pow_p: lax.integer_pow,
}
"""Operations on floats that kernels compute, as functions of arrays that broadcast."""

REDUCTIONS: dict[Primitive, tuple[Callable[..., jax.Array], Callable[..., jax.Array]]] = {
    primitives.reduce_sum_p: (jnp.add, jnp.sum),
    primitives.reduce_max_p: (jnp.maximum, jnp.max),
}
"""Reductions along rows: how two parts of a row are joined, and how one is reduced."""


class Step(NamedTuple):
    """One operation.

    Attributes:
      primitive: of `ELEMENTWISE`, or of `REDUCTIONS` along the last axis.
      operands: the places of inputs and of results of earlier steps, inputs first; or numbers, as `float.hex` writes
        them, since 1.0 is equal to the place 1, and 0.0 to -0.0.
      power: the exponent of ``integer_pow``.
    """

    primitive: Primitive
    operands: tuple[int | str, ...]
    power: int | None = None


@dataclasses.dataclass(frozen=True)
class RowFunction:
    """A function of matrices, whose result has rows that depend on the same row of each input alone.

    Attributes:
      inputs: the form of each input.
      steps: its operations; the last is the result, [M, K].
    """

    inputs: tuple[Form, ...]
    steps: tuple[Step, ...]

    def of_pieces(
        self, read: Callable[[int, slice], jax.Array], write: Callable[[slice, jax.Array], None], pieces: list[slice]
    ) -> None:
        """Computes some rows by pieces of their columns, in float32, once for each reduction and once for the result.

        Args:
          read: ``(input, piece) -> [rows, columns]``, either 1 where the input's form is so.
          write: ``(piece, values)``, of the result.
          pieces: all columns, in pieces of one size.
        """
        reduced: dict[int, jax.Array] = {}

        def value(at: int | str, piece: slice, known: dict[int, jax.Array]) -> jax.Array | float:
            """An input or a result in a piece, in which each is computed once."""
            if isinstance(at, str):
                return float.fromhex(at)
            if at in reduced:
                return reduced[at]
            if at not in known:
                step = self.steps[at - len(self.inputs)] if at >= len(self.inputs) else None
                known[at] = read(at, piece).astype(jnp.float32) if step is None else computed(step, piece, known)
            return known[at]

        def computed(step: Step, piece: slice, known: dict[int, jax.Array]) -> jax.Array:
            values = [value(at, piece, known) for at in step.operands]
            return ELEMENTWISE[step.primitive](*values, *(() if step.power is None else (step.power,)))

        def in_all_columns(at: int | str, piece: slice) -> jax.Array:
            """A value in each column of a piece, also if it is the same in all."""
            v = jnp.asarray(value(at, piece, {}))
            return jnp.broadcast_to(v, (v.shape[0] if v.ndim else 1, piece.stop - piece.start))

        for place, step in enumerate(self.steps, len(self.inputs)):
            if step.primitive in REDUCTIONS:
                join, reduce = REDUCTIONS[step.primitive]
                parts = (in_all_columns(step.operands[0], piece) for piece in pieces)
                reduced[place] = reduce(functools.reduce(join, parts), axis=1, keepdims=True)
        for piece in pieces:
            write(piece, jnp.asarray(value(len(self.inputs) + len(self.steps) - 1, piece, {})))


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Produced:
    """The inputs and the function that make an activation.

    Attributes:
      inputs: arrays of a program. Those in the form of rows have the activation's last axis, and as many rows.
      function: makes the activation of them.
    """

    inputs: tuple[jax.Array, ...]
    function: RowFunction

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], RowFunction]:
        return self.inputs, self.function

    @classmethod
    def tree_unflatten(cls, function: RowFunction, inputs: tuple[jax.Array, ...]) -> Produced:
        return cls(tuple(inputs), function)


@Replaceable
def produced_codes(
    x: jax.Array, inputs: tuple[jax.Array, ...], *, function: RowFunction, spec: QuantSpec, axes: tuple[int, ...]
) -> QTensor:
    """`as_codes` of an activation by its own range. A platform may replace it, to compute x of the inputs it needs."""
    del inputs, function
    return as_codes(x, spec, axes)

"""`ragged_dot` with quantized operands: rows of one matrix, each times the matrix of its group."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxquant.core.arithmetic import promoted
from jaxquant.core.errors import quant_error
from jaxquant.core.indices import widened
from jaxquant.core.qtensor import QTensor
from jaxquant.core.sizes import number
from jaxquant.core.specs import OpSpec
from jaxquant.core.types import PyTree
from jaxquant.ops.kernels.dequantized import in_own_dtype
from jaxquant.ops.operands import Call, Pair, Side, precision_of, refuse_product_specs, refuse_range
from jaxquant.ops.problem import RaggedProduct
from jaxquant.ops.select import run
from jaxquant.ops.tangents import straight_through
from jaxquant.ops.trained import TrainedTensor, as_quantized

__all__ = ["ragged_dot"]


@dataclasses.dataclass(frozen=True)
class _Ragged(Call):
    """The static half of a `ragged_dot` call."""

    lhs: Side
    rhs: Side
    precision: lax.PrecisionLike
    dtype: DTypeLike

    def keep(self, *operands: PyTree) -> tuple[jax.Array, None]:
        lhs, rhs, lhs_static, rhs_static, sizes = operands
        x, experts = self.lhs.quantized(lhs, lhs_static), self.rhs.quantized(rhs, rhs_static)
        known = math.inf not in map(number, experts.shape)
        stored = _with_stored_experts if isinstance(experts, TrainedTensor) and known else None
        return run(RaggedProduct(x, experts, self.precision, self.dtype, sizes), stored), None

    def reference(self, *operands: PyTree) -> jax.Array:
        lhs, rhs, lhs_static, rhs_static, sizes = operands
        problem = RaggedProduct(lhs, rhs, self.precision, self.dtype, sizes)
        return in_own_dtype(problem, self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static))

    def again(self, *operands: PyTree) -> jax.Array:
        """Multiplies every row by every matrix and keeps the product of its group: JAX transposes the gradient of
        `jax.lax.ragged_dot` no further.
        """
        lhs, rhs, lhs_static, rhs_static, sizes = operands
        x, experts = self.lhs.real(lhs, lhs_static), self.rhs.real(rhs, rhs_static)
        wide = promoted(x.dtype, experts.dtype)
        products = jnp.einsum("mk,ekn->men", x.astype(wide), experts.astype(wide), precision=self.precision)
        row, ends = jnp.arange(x.shape[0])[:, None], jnp.cumsum(sizes)[None]
        mine = (ends - sizes[None] <= row) & (row < ends)
        return jnp.sum(jnp.where(mine[..., None], products, 0), axis=1).astype(self.dtype)


def _with_stored_experts(problem: RaggedProduct) -> RaggedProduct:
    """A product in training as the frozen model's, with the experts as `quantize` stores them."""
    assert isinstance(problem.w, TrainedTensor)
    return dataclasses.replace(problem, w=as_quantized(problem.w, (1,)))


def ragged_dot(
    lhs: ArrayLike | QTensor,
    rhs: ArrayLike | QTensor,
    group_sizes: ArrayLike,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    spec: OpSpec | None = None,
    act_scale: ArrayLike | None = None,
    act_zero_point: ArrayLike | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` whose operands may be quantized, or are quantized on the way: mixtures of experts.

    Row i of ``lhs`` is multiplied by the matrix of the group it falls in; rows beyond the last group give 0. Stored
    experts have kernels that multiply them as `dot_general` multiplies one weight, and read those with rows. Products
    without such a kernel, which a plan and `jaxquant.explain` name, are products of all experts: int8 with int32
    accumulation for integers with one scale per output channel, else the float product of the dequantized operands.

    Args:
      lhs: [M, K], the activation: a float array or a QTensor.
      rhs: [E, K, N], the experts: a float array or a QTensor reduced over axis -2.
      group_sizes: integers [E]: rows of each expert, in order.
      precision, preferred_element_type, spec, act_scale, act_zero_point: as for `dot_general`.

    Returns:
      Array [M, N].

    Raises:
      QuantError: on shapes that do not fit, and as `dot_general`.

    Gradient: as `dot_general`, of every order, in both modes. Part of a second derivative takes the product of every
      row with every matrix, since JAX transposes the gradient of `jax.lax.ragged_dot` no further.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import ops, recipes
      >>> x, experts = jnp.ones((4, 8)), jnp.stack([jnp.ones((8, 2)), 2 * jnp.ones((8, 2))])
      >>> ops.ragged_dot(x, experts, jnp.array([1, 3]), spec=recipes.w8a8())[:, 0]
      Array([ 8., 16., 16., 16.], dtype=float32)
    """
    function = "ragged_dot"
    pair = Pair.of(function, lhs, rhs, spec, weight=1)
    refuse_product_specs(function, pair.spec)
    lhs, rhs, sizes = pair.lhs, pair.rhs, jnp.asarray(group_sizes)
    fits = lhs.ndim == 2 and rhs.ndim == 3 and lhs.shape[1] == rhs.shape[1] and sizes.shape == rhs.shape[:1]
    if not fits or not jnp.issubdtype(sizes.dtype, jnp.integer):
        todo = "Give lhs [M, K], rhs [E, K, N] and integer group_sizes [E]"
        got = {"lhs": lhs.shape, "rhs": rhs.shape, "group_sizes": sizes}
        raise quant_error(function, "the operands do not fit each other", todo=todo, **got)
    if pair.floats is not None:
        refuse_range(function, act_scale, act_zero_point)
        return lax.ragged_dot(*pair.floats, sizes, precision, preferred_element_type)
    dtype, precision = pair.result_dtype(preferred_element_type), precision_of(function, precision)
    if 0 in lhs.shape or 0 in rhs.shape:
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    sides = pair.sides((1,), (1,))
    static = pair.static(sides, act_scale, act_zero_point)
    how = _Ragged(*sides, precision=precision, dtype=dtype)
    return straight_through(how, lhs, rhs, *static, widened(sizes))

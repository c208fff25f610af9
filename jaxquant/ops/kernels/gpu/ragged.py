"""Ragged products on a GPU: each tile of rows is multiplied by the codes of its expert, which are decoded in registers.

XLA:GPU multiplies all rows by every expert, and keeps the products that are wanted: for 2,048 rows and eight experts of
[4096, 14336] an H100 needs 1.9 ms, at its peak, where the products that are wanted take .24. It also writes experts of
4 bits to memory in bfloat16. The kernel is that of `jaxquant.ops.kernels.gpu.product`. It does not read an expert that
has no rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import QTensor
from jaxquant.ops.kernels.decoded import multiplied_dtype
from jaxquant.ops.kernels.gpu.decoded import (
    Place,
    activation,
    decodes,
    has_blocks,
    has_places,
    in_int8,
    result_dtype,
    stored,
    weight_arrays,
)
from jaxquant.ops.kernels.gpu.scaled import in_e4m3, multiplies_float8
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.kernels.segments import spans
from jaxquant.ops.problem import EXPERTS, ROWS, Kernel, RaggedProduct, in_stored_order
from jaxquant.ops.trained import is_in_training

__all__ = ["TritonExperts", "TritonFloat8Experts", "run"]


@dataclasses.dataclass(frozen=True)
class TritonExperts(Kernel[RaggedProduct]):
    """A ragged product of stored experts.

    Attributes:
      dtype: of the values that are decoded.
      integers: whether both sides are int8 with one scale for each row and each column.
    """

    operation = RaggedProduct
    platforms = ("cuda",)

    dtype: DTypeLike
    integers: bool = False

    @property
    def name(self) -> str:
        """As of products of one weight."""
        return "int8, scaled by Triton" if self.integers else f"{jnp.dtype(self.dtype).name}, decoded by Triton"

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: stored experts of one code per element, with the limits of `decoded.TritonDecoded`.

        Codes of a layer in bytes that take 2 to 4 GiB have places that Pallas cannot count.
        """
        x, w = problem.x, problem.w
        if not isinstance(w, QTensor) or is_in_training(w) or w.length is not None or w.permutation is not None:
            return None
        if not has_blocks(problem) or (isinstance(x, QTensor) and x.permutation is not None):
            return None
        place = Place.of(w, EXPERTS)
        dtype = multiplied_dtype(problem)
        if place is None or not decodes(w, place, dtype) or not has_places(w.kept, stored(w, place)[1]):
            return None
        rows = isinstance(x, QTensor) and in_int8(x) and x.scale.shape[1] == 1
        whole = rows and place.groups == 1 and w.type.kind == "int"
        if whole and place.length > overflow_limit(128, 128):
            return None
        return cls(dtype, whole and w.symmetric and w.type.signed and w.type.bits == 8)

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, self.dtype)


@dataclasses.dataclass(frozen=True)
class TritonFloat8Experts(TritonExperts):
    """e4m3 on both sides, with one scale for each row and each column, on chips that multiply it."""

    @property
    def name(self) -> str:
        """As of products of one weight."""
        return "float8_e4m3fn, scaled by Triton"

    @classmethod
    def runs_on(cls, target: Target) -> bool:
        """As for `Kernel`."""
        return multiplies_float8(target)

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`."""
        x, w = problem.x, problem.w
        both = all(isinstance(v, QTensor) and in_e4m3(v) and v.scale.shape[1] == 1 for v in (x, w))
        if not both or not is_default(problem.precision) or super().takes(problem) is None:
            return None
        return cls(jnp.float8_e4m3fn)


def run(problem: RaggedProduct, dtype: DTypeLike, *, interpret: bool = False) -> jax.Array:
    """The product of a problem that `TritonExperts` takes; the arguments are those of `decoded.run`."""
    from jaxquant.ops.kernels.gpu.experts import experts_product  # Pallas takes long to load

    w, axes = in_stored_order(problem.weight, EXPERTS)
    values, rows = activation(problem.x, ROWS, dtype)
    weight, how, stack = weight_arrays(w, axes)
    segments = spans(problem.sizes, values.shape[1])
    given: dict[str, Any] = {"rows": None if rows is None else rows[0], **stack, "interpret": interpret}
    return experts_product(values[0], segments, weight, how, result_dtype(problem), dtype, **given)

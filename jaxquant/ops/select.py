"""Chooses the kernel of a product from an ordered table: the first kernel that takes a problem runs it.

The choice is made from shapes, dtypes and number types when a program is lowered, for the platform that it is lowered
for. The plan uses the same table. On the CPU:

| weight | activation | rows M | kernel |
|---|---|---|---|
| integer, one scale per row or two-level, or groups of 1024 or more | integer, likewise | any | `int8.Int8` |
| integer, one scale per row or two-level | float | few, see `residual.most_rows` | `residual.ResidualSplit` |
| integer, scales along K and the same for all rows | float | likewise | `residual.ScaledResidualSplit` |
| integer, fp8, or 4 bits of another kind | any | 1 | `gemv.Gemv`, if its loops fit |
| anything else that is stored quantized | any | any | `blocked.Blocked` |
| quantized on the way; float64 | | | `dequantized.Float`, `dequantized.Dequantized` |

A ragged product by stored experts is a loop over tiles of rows, each with one of these kernels and its own expert. A
tile has twice as many rows as an expert has on average, 64 at most; that number chooses the kernel.
Where XLA does not serve int8 dots (`jaxquant.ops.kernels.cpu.machine`), the last three take the place of the first.
A symbolic number of rows, in a program that is exported for every batch, counts as many. Where K is symbolic, products
of integers are float products.

On TPUs and GPUs a weight with one code per element is decoded within the product (`jaxquant.ops.kernels.decoded`; on
CUDA `jaxquant.ops.kernels.gpu.decoded`, where XLA would write its values to memory; experts of a ragged product by
`jaxquant.ops.kernels.gpu.ragged`). Integers on both sides with one scale per row are an int8 product, and all others
are products of dequantized values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive

from jaxquant.core.by_platform import Target, by_platform
from jaxquant.core.types import PyTree
from jaxquant.ops.kernels import convolution, decoded, dequantized, integer, ragged
from jaxquant.ops.kernels.cpu import convolution as cpu_convolution
from jaxquant.ops.kernels.cpu import floats
from jaxquant.ops.kernels.cpu.experts import EachExpert
from jaxquant.ops.kernels.cpu.products import PRODUCTS
from jaxquant.ops.kernels.gpu import decoded as gpu_decoded
from jaxquant.ops.kernels.gpu import ragged as gpu_ragged
from jaxquant.ops.kernels.gpu import scaled as gpu_scaled
from jaxquant.ops.kernels.tpu import decoded as tpu_decoded
from jaxquant.ops.kernels.tpu import grouped
from jaxquant.ops.kernels.tpu import int8 as tpu_int8
from jaxquant.ops.kernels.tpu import ragged as tpu_ragged
from jaxquant.ops.kernels.tpu.dots import as_it_is, has_few_rows
from jaxquant.ops.kernels.tpu.matrices import as_matrices
from jaxquant.ops.problem import Kernel, Problem, Product

__all__ = ["TABLE", "run", "select"]

TABLE: tuple[type[Kernel[Any]], ...] = (
    # On the CPU.
    *PRODUCTS,
    cpu_convolution.Int8Convolution,
    cpu_convolution.ResidualSplitConvolution,
    EachExpert,
    # Elsewhere codes are decoded within the product.
    gpu_decoded.TritonDecoded,
    gpu_decoded.TritonLayer,
    gpu_scaled.TritonInt8,
    gpu_scaled.TritonFloat8,
    gpu_ragged.TritonFloat8Experts,
    gpu_ragged.TritonExperts,
    tpu_ragged.ByteExperts,
    tpu_ragged.RaggedExperts,
    tpu_decoded.Float8Decoded,
    grouped.ManyRows,
    grouped.ByteSums,
    grouped.ByteValues,
    grouped.FloatSums,
    grouped.FloatValues,
    grouped.GroupedSums,
    grouped.GroupedValues,
    grouped.ColumnSums,
    grouped.ColumnValues,
    tpu_decoded.BatchedDecoded,
    decoded.BatchedDecoded,
    decoded.Decoded,
    # Everywhere.
    convolution.Int8Convolution,
    ragged.Int8Ragged,
    dequantized.ExactBfloat16,
    tpu_int8.Int8Blocks,
    tpu_int8.Int8Layer,
    tpu_int8.DigitsLayer,
    tpu_int8.Bfloat16Layer,
    integer.Int8,
    dequantized.ScaledActivation,
    floats.Float,
    dequantized.Float,
    floats.Dequantized,
    dequantized.Dequantized,
)
"""All kernels, in order of preference."""


def select(problem: Problem, target: Target) -> Kernel[Any]:
    """The kernel for a problem on a target: the first of `TABLE` that takes it."""
    for kind in TABLE:
        if isinstance(problem, kind.operation) and kind.runs_on(target):
            kernel = kind.takes(problem)
            if kernel is not None:
                return kernel.on(target)
    raise AssertionError("the last kernels of the table take everything")


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernel of a problem on each platform.

    Attributes:
      stored: turns the problem of a weight in training into that of the weight as stored after training, or None.
    """

    stored: Callable[[Any], Problem] | None

    def on(self, target: Target, *operands: PyTree) -> jax.Array:
        """The product of a problem, in the requested dtype."""
        (problem,) = operands
        if not isinstance(problem, Product) or target.platform == "cpu":
            return self._run(problem, target)
        if target.platform != "tpu":
            return self._run(problem.with_groups_on_one_axis(), target)
        if problem.placed is not None:
            return problem.on_each_device(lambda part: self.on(target, part))
        matrices = as_matrices(problem.with_groups_on_one_axis())
        out = self._run(matrices, target)
        return (as_it_is(out) if has_few_rows(matrices) else out).reshape(problem.result_shape)

    def _run(self, problem: Problem, target: Target) -> jax.Array:
        kernel = select(problem, target)
        if target.platform == "cpu" and self.stored is not None:
            kernel, problem = _as_stored(kernel, problem, self.stored(problem), target)
        return kernel.run(problem).astype(problem.result)

    def like(self, *operands: PyTree) -> jax.Array:
        """An array of the product's shape and dtype."""
        (problem,) = operands
        return problem.like()

    def stands_for(self, *operands: PyTree) -> tuple[Primitive, dict[str, Any]] | None:
        """The float operation."""
        (problem,) = operands
        return problem.float_operation


def _as_stored(kernel: Kernel[Any], problem: Problem, stored: Problem, target: Target) -> tuple[Kernel[Any], Problem]:
    """The kernel and the problem of the frozen model, unless the one in training is exact and so agrees with it."""
    found = select(stored, target)
    exact = found.exact and found == kernel and all(form.groups == 1 for form in stored.quantized)
    return (kernel, problem) if exact else (found, stored)


def run(problem: Problem, stored: Callable[[Any], Problem] | None = None) -> jax.Array:
    """The product, in the requested dtype, by the kernel for the platform that the program is lowered for.

    It counts as a constant for derivatives, which `jaxquant.ops.tangents` defines.

    Args:
      problem: what is computed.
      stored: makes the same problem with the weight as stored after training; hashable. On the CPU that problem is
        computed instead if its kernel differs, so that both models agree to the last bit. Programs for other platforms
        do not contain it.
    """
    return by_platform(_Kernels(stored), problem)

"""Which kernel computes a product: one ordered table, and the first kernel that takes a problem runs.

What a kernel takes is decided from shapes, dtypes and types of numbers, when a program is traced: for each platform
that it may be lowered for. The plan asks the same table. On the CPU:

| weight | activation | rows M | kernel |
|---|---|---|---|
| integer, one scale per row or two-level, or groups of 1024 or more | integer, likewise | any | `int8.Int8` |
| integer, one scale per row or two-level | float | few, see `residual.most_rows` | `residual.ResidualSplit` |
| integer, scales along K and the same for all rows | float | likewise | `residual.ScaledResidualSplit` |
| integer, fp8, or 4 bits of another kind | any | 1 | `gemv.Gemv`, if its loops fit |
| anything else that is stored quantized | any | any | `blocked.Blocked` |
| what is quantized on the way; float64 | | | `dequantized.Float`, `dequantized.Dequantized` |

Where XLA does not serve int8 dots (`jaxquant.ops.kernels.cpu.machine`), the last three take the place of the first.
Rows whose number is a symbol, in a program that is exported for every batch, count as many. Where K is a symbol,
products of integers are float products.

On TPUs and GPUs a weight with one code per element is decoded within the product (`jaxquant.ops.kernels.decoded`; on
CUDA `jaxquant.ops.kernels.gpu.decoded`, where XLA would write its values to memory),
integers on both sides with one scale per row are an int8 product, and all others are products of dequantized values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import get_args

import jax
from jax import lax

from jaxquant.ops.kernels import convolution, decoded, dequantized, integer, ragged
from jaxquant.ops.kernels.cpu import blocked, floats, gemv, int8, residual
from jaxquant.ops.kernels.cpu import convolution as cpu_convolution
from jaxquant.ops.kernels.cpu import ragged as cpu_ragged
from jaxquant.ops.kernels.gpu import decoded as gpu_decoded
from jaxquant.ops.kernels.gpu import int8 as gpu_int8
from jaxquant.ops.kernels.tpu import decoded as tpu_decoded
from jaxquant.ops.kernels.tpu import grouped
from jaxquant.ops.kernels.tpu.dots import as_it_is, has_few_rows
from jaxquant.ops.problem import Kernel, Platform, Problem, Product

__all__ = ["TABLE", "run", "select"]

TABLE: tuple[type[Kernel], ...] = (
    # On the CPU.
    floats.ExactBfloat16,
    blocked.BlockedIntegers,
    int8.Int8,
    residual.ResidualSplit,
    residual.ScaledResidualSplit,
    gemv.Gemv,
    blocked.Blocked,
    cpu_convolution.Int8Convolution,
    cpu_convolution.ResidualSplitConvolution,
    cpu_ragged.ResidualSplitRagged,
    # Elsewhere codes are decoded within the product.
    gpu_decoded.TritonDecoded,
    gpu_int8.TritonInt8,
    grouped.GroupedSums,
    grouped.GroupedValues,
    tpu_decoded.BatchedDecoded,
    decoded.BatchedDecoded,
    decoded.Decoded,
    # Everywhere.
    convolution.Int8Convolution,
    ragged.Int8Ragged,
    dequantized.ExactBfloat16,
    integer.Int8,
    dequantized.ScaledActivation,
    floats.Float,
    dequantized.Float,
    floats.Dequantized,
    dequantized.Dequantized,
)
"""Every kernel, in the order in which they are asked."""


def select(problem: Problem, platform: Platform) -> Kernel:
    """The kernel for a problem on a platform: the first of `TABLE` that takes it."""
    for kind in TABLE:
        if platform in kind.platforms and isinstance(problem, kind.operation):
            kernel = kind.takes(problem)
            if kernel is not None:
                return kernel
    raise AssertionError("the last kernels of the table take everything")


def _as_frozen(
    frozen: Callable[[], Problem], trained: Kernel, result: Callable[[Kernel, Problem], jax.Array]
) -> dict[str, Callable[[], jax.Array]]:
    """The branch for the CPU that computes a product as the frozen model does, unless ``trained`` is exact in both.

    The kernel is chosen of shapes alone: the weight is packed inside of the branch.
    """
    found: list[tuple[Kernel, bool]] = []

    def look() -> None:
        stored = frozen()
        kernel = select(stored, "cpu")
        exact = kernel.exact and kernel == trained and all(form.groups == 1 for form in stored.quantized)
        found.append((kernel, exact))

    jax.eval_shape(look)
    ((kernel, exact),) = found
    return {} if exact else {"cpu": lambda: result(kernel, frozen())}


def run(problem: Problem, frozen: Callable[[], Problem] | None = None) -> jax.Array:
    """The product, in the dtype that is asked for, by the kernel for the platform that the program is lowered for.

    Args:
      problem: what is computed.
      frozen: makes the same, with the weight as it is stored once training is over. On the CPU it is computed in its
        place where another kernel would be chosen for it, so that both models agree to the last bit. Programs for
        other platforms hold nothing of it.
    """

    def result(kernel: Kernel, problem: Problem) -> jax.Array:
        return kernel.run(problem).astype(problem.result)

    def on_tpu(kernel: Kernel, problem: Problem) -> jax.Array:
        return as_it_is(result(kernel, problem))

    chosen = {platform: (select(problem, platform), problem) for platform in get_args(Platform)}
    other = chosen.pop("other")
    own = {name: functools.partial(result, *how) for name, how in chosen.items() if how != other}
    if frozen is not None:
        own |= _as_frozen(frozen, chosen["cpu"][0], result)
    if isinstance(problem, Product) and has_few_rows(problem):
        own["tpu"] = functools.partial(on_tpu, *chosen["tpu"])
    return lax.platform_dependent(**own, default=functools.partial(result, *other)) if own else result(*other)

"""Convolutions of integers on the CPU, in the one layout for which XLA's library has a fast path."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.ops.kernels import convolution
from jaxquant.ops.kernels.convolution import convolved_codes, fits_int32, is_whole, one_image
from jaxquant.ops.kernels.cpu import machine
from jaxquant.ops.kernels.cpu.blocks import sum_of_parts
from jaxquant.ops.kernels.cpu.residual import digit_count, digit_matrix
from jaxquant.ops.problem import Convolution, Kernel
from jaxquant.ops.quantized_matrix import Matrix

__all__ = ["Int8Convolution", "ResidualSplitConvolution"]


class Int8Convolution(convolution.Int8Convolution):
    """The int8 convolution in that layout."""

    platforms = ("cpu",)

    @classmethod
    def takes(cls, problem: Convolution) -> Kernel[Convolution] | None:
        """As for `Kernel`: if the library serves int8."""
        return None if machine.int8_dots() == "none" else super().takes(problem)

    def run(self, problem: Convolution) -> jax.Array:
        """As for `Kernel`."""
        x, kernel = problem.matrices()
        return _restored(problem, _convolved(problem, x, kernel))


@dataclasses.dataclass(frozen=True)
class ResidualSplitConvolution(Kernel[Convolution]):
    """The residual split of a float activation: further images of one int8 convolution, weighted and summed.

    Attributes:
      digits: how many.
    """

    operation = Convolution
    platforms = ("cpu",)

    digits: int
    title = "int8 residual split"

    @classmethod
    def takes(cls, problem: Convolution) -> Kernel[Convolution] | None:
        """As for `Kernel`: if the library serves int8, and there is one feature group.

        Digits have one scale per image, which is too coarse for separate feature groups and no gain for small kernels.
        """
        if machine.int8_dots() == "none":
            return None
        x, kernel = problem.forms
        if not isinstance(x, jax.ShapeDtypeStruct) or x.dtype == jnp.float64 or not is_whole(kernel):
            return None
        fits = problem.window.feature_groups == 1 and fits_int32(x, kernel, problem.window)
        return cls(digit_count(problem.precision)) if fits else None

    def run(self, problem: Convolution) -> jax.Array:
        """As for `Kernel`."""
        x, kernel = problem.matrices()
        out = _convolved(problem, digit_matrix(x, self.digits), kernel)
        return _restored(problem, sum_of_parts(out, self.digits, 0))


def _convolved(problem: Convolution, x: Matrix, kernel: Matrix) -> jax.Array:
    """[images, spatial..., features]; there may be more images than the operand has."""
    g = problem.geometry
    images, features = (
        _codes(x, problem.x.shape, g.lhs_spec, kernel=False),
        _codes(kernel, problem.w.shape, g.rhs_spec, kernel=True),
    )
    last = images.ndim - 1
    lift = (1,) * (images.ndim - problem.x.ndim)  # for a spatial axis that was added
    dilate = [(0, 0, d - 1) for d in (1, *lift, *g.lhs_dilation, 1)]
    geometry = dataclasses.replace(
        g,
        lhs_spec=(0, last, *range(1, last)),
        rhs_spec=(last, last - 1, *range(last - 1)),
        out_spec=(0, last, *range(1, last)),
        strides=lift + g.strides,
        padding=((0, 0),) * len(lift) + g.padding,
        lhs_dilation=(1,) * (last - 1),
        rhs_dilation=lift + g.rhs_dilation,
    )
    # The library has no fast path for dilated images.
    dilated, ones = (lax.pad(v, jnp.int8(0), dilate) for v in (images, one_image(images, geometry)))
    return convolved_codes(geometry, dilated, ones, features, x, kernel)


def _restored(problem: Convolution, out: jax.Array) -> jax.Array:
    """[images, spatial..., features] in the order that the call asks for."""
    spec = problem.geometry.out_spec
    canonical = (spec[0], *spec[2:], spec[1])
    if len(canonical) == 3:
        out = out[:, 0]
    return _reordered(out, tuple(canonical.index(i) for i in range(len(canonical))))


def _reordered(x: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """`jnp.transpose` over as few merged axes as possible.

    XLA folds a transpose into the layout of a convolution and then leaves the fast path; the reshapes here prevent
    this.
    """
    runs: list[list[int]] = []
    for axis in order:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    merged = sorted(runs)
    shape = x.shape
    x = x.reshape([math.prod(shape[i] for i in run) for run in merged])
    return jnp.transpose(x, [merged.index(run) for run in runs]).reshape([shape[i] for i in order])


def _codes(x: Matrix, shape: tuple[int, ...], spec: tuple[int, ...], *, kernel: bool) -> jax.Array:
    """Codes as [images, spatial..., features], or [spatial..., input features, output features] for a kernel.

    One spatial axis becomes two: XLA has no fast path for convolutions of rank 1.
    """
    rows_first = (spec[0], *(i for i in range(len(shape)) if i != spec[0]))
    target = (*spec[2:], spec[1], spec[0]) if kernel else (spec[0], *spec[2:], spec[1])
    codes = x.codes.reshape(-1, *(shape[i] for i in rows_first[1:]))
    codes = _reordered(codes, tuple(rows_first.index(i) for i in target))
    return jnp.expand_dims(codes, 0 if kernel else 1) if len(shape) == 3 else codes

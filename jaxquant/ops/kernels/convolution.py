"""Convolutions of integers: int8 with int32 accumulation, zero points corrected exactly."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TypeGuard

import jax
import jax.numpy as jnp

from jaxquant.ops.forms import Form
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.problem import Convolution, Geometry, Kernel, Window
from jaxquant.ops.quantized_matrix import Matrix, Packed

__all__ = ["Int8Convolution", "convolved_codes", "fits_int32", "is_whole", "one_image"]


@dataclasses.dataclass(frozen=True)
class Int8Convolution(Kernel[Convolution]):
    """An int8 convolution of integers with one scale per image and one per output feature."""

    operation = Convolution
    platforms = ("tpu",)

    title = "int8"

    @classmethod
    def takes(cls, problem: Convolution) -> Kernel[Convolution] | None:
        """As for `Kernel`: on TPUs.

        cuDNN has no convolution from int8 to int32, and XLA refuses to compile one for NVIDIA GPUs.
        """
        x, kernel = problem.forms
        return cls() if is_whole(x) and is_whole(kernel) and fits_int32(x, kernel, problem.window) else None

    def run(self, problem: Convolution) -> jax.Array:
        """As for `Kernel`."""
        x, kernel = problem.matrices()
        return int8_convolution(problem.geometry, x, kernel, problem.x.shape, problem.w.shape)


def is_whole(form: Form | Matrix) -> TypeGuard[Matrix]:
    """Whether an operand consists of integers with one scale per row."""
    return isinstance(form, Matrix | Packed) and form.integer and form.groups == 1


def fits_int32(x: Form | Matrix, kernel: Matrix, window: Window) -> bool:
    """Whether sums fit an int32, or can be split along the input features (with one feature group)."""
    if window.batch_groups > 1:
        return False
    longest = overflow_limit(x.reach if isinstance(x, Matrix) else 127, kernel.reach)
    return kernel.shape[2] <= longest or (window.feature_groups == 1 and window.places <= longest)


def codes_in(x: Matrix, shape: tuple[int, ...], spec: tuple[int, ...]) -> jax.Array:
    """Codes of images or of a kernel in the operand's own order of axes; digits may have added images."""
    order = (spec[0], *(i for i in range(len(shape)) if i != spec[0]))
    codes = x.codes.reshape(-1, *(shape[i] for i in order[1:]))
    return jnp.transpose(codes, [order.index(i) for i in range(len(shape))])


def int8_convolution(
    g: Geometry, lhs: Matrix, rhs: Matrix, lshape: tuple[int, ...], rshape: tuple[int, ...]
) -> jax.Array:
    """The convolution of the real values, in float32.

    Args:
      g: the geometry.
      lhs: images as rows.
      rhs: output features as rows.
      lshape, rshape: the shapes of the operands.
    """
    x, kernel = codes_in(lhs, lshape, g.lhs_spec), codes_in(rhs, rshape, g.rhs_spec)
    return convolved_codes(g, x, one_image(x, g), kernel, lhs, rhs)


def one_image(x: jax.Array, g: Geometry) -> jax.Array:
    """An image of ones, of the shape of the images."""
    return jnp.ones_like(_part(x, g.lhs_spec[0], 0, 1))


def convolved_codes(
    g: Geometry, x: jax.Array, ones: jax.Array, kernel: jax.Array, lhs: Matrix, rhs: Matrix
) -> jax.Array:
    """The convolution of codes in the geometry's order of axes, with the scales and zero points of two matrices.

    Padding stands for real 0, so it adds 0 to each of the four sums of (q_l - z_l)(q_r - z_r).

    Args:
      g: the geometry.
      x: codes of images.
      ones: one image, 1 where images have codes and 0 where they are padded already.
      kernel: codes of the kernel.
      lhs, rhs: the images and the kernel as matrices.
    """
    images, features = g.out_spec[:2]
    of_image, of_feature = ([-1 if i == axis else 1 for i in range(len(g.out_spec))] for axis in (images, features))
    lz = None if lhs.zero_point is None else lhs.zero_point.reshape(of_image)
    rz = None if rhs.zero_point is None else rhs.zero_point.reshape(of_feature)
    conv = functools.partial(g.conv, result=jnp.int32)

    def all_features(sums: jax.Array) -> jax.Array:
        """Repeats sums with one output channel per feature group for each output feature."""
        return jnp.repeat(sums, kernel.shape[g.rhs_spec[0]] // g.feature_groups, axis=features)

    def exact(x: jax.Array, ones: jax.Array, kernel: jax.Array) -> jax.Array:
        one_feature = jnp.ones_like(_part(kernel, g.rhs_spec[0], 0, g.feature_groups))
        out = conv(x, kernel)
        if rz is not None:
            out = out - rz * all_features(conv(x, one_feature))
        if lz is not None:
            out = out - lz * conv(ones, kernel)
        if lz is not None and rz is not None:
            out = out + lz * rz * all_features(conv(ones, one_feature))
        return out.astype(jnp.float32)

    summed, places = kernel.shape[g.rhs_spec[1]], math.prod(kernel.shape[i] for i in g.rhs_spec[2:])
    step = max(overflow_limit(lhs.reach, rhs.reach) // places, 1)
    if summed <= step:
        out = exact(x, ones, kernel)
    else:
        cuts = []
        for i in range(0, summed, step):
            some, some_ones = (_part(v, g.lhs_spec[1], i, i + step) for v in (x, ones))
            cuts.append(exact(some, some_ones, _part(kernel, g.rhs_spec[1], i, i + step)))
        out = functools.reduce(jnp.add, cuts)
    return out * lhs.scale.reshape(of_image) * rhs.scale.reshape(of_feature)


def _part(x: jax.Array, axis: int, start: int, stop: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, min(stop, x.shape[axis]), axis=axis)

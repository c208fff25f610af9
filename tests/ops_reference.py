"""What the tests of `jaxquant.ops` compare with: float64 NumPy on the values that the operands stand for.

`unequal` makes arrays whose magnitude differs along every axis, and `error` weighs every row and column of a product
alike, so that a scale on the wrong axis shows however small its channel is.
"""

import string
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from jaxquant import OpSpec, QTensor, QuantSpec, fake_quant, ops, quantize
from jaxquant.core.arithmetic import promoted
from jaxquant.core.by_platform import Platform, Target
from jaxquant.ops.axes import Axes
from jaxquant.ops.problem import Product
from jaxquant.ops.select import select

MATMUL = (((1,), (0,)), ((), ()))

INTEGER = 1e-6  # both sides integers, and everything that is multiplied in float32
WEIGHT_ONLY = 1e-4  # a float activation at the default precision: two int8 digits
DIGITS = 1 / (2 * 127 * 254)  # what two digits may be off by, in units of a row's largest element


def slow_but(cases, *fast):
    """Cases for parametrize, slow unless they are named: each compiles programs of its own."""
    assert set(fast) <= set(cases)
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def unequal(seed, shape, dtype: DTypeLike = np.float32, *, decades=1.0):
    """Normal numbers with magnitudes over ``decades`` decades along every axis."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    for axis, n in enumerate(shape):
        x *= 10 ** (decades * (rng.random(n) - 0.5)).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jax.device_put(x.astype(np.float32).astype(dtype))


def spec_of(qtype, granularity="per_channel", *, group=8, symmetric=True, **kwargs):
    """A QuantSpec; ``group`` counts only where the granularity asks for it."""
    size = group if granularity == "per_group" else None
    return QuantSpec(qtype, granularity=granularity, group_size=size, symmetric=symmetric, **kwargs)


def real(x, spec=None, axes=(), scale=None, zero_point=None):
    """The float64 values that an operand of an op stands for."""
    if isinstance(x, QTensor):
        x = x.dequantize(promoted(x.dtype, jnp.float32))
    elif spec is not None:
        x = x.astype(promoted(x.dtype, jnp.float32))
        x = fake_quant(x, spec, reduce_axes=axes, scale=scale, zero_point=zero_point)
    return np.asarray(x, np.float64)


def dot(lhs, rhs, numbers):
    """lax.dot_general in float64."""
    (lc, rc), (lb, rb) = [[[a % x.ndim for a in axes] for axes, x in zip(p, (lhs, rhs), strict=True)] for p in numbers]
    letters = iter(string.ascii_letters)
    left = [next(letters) for _ in range(lhs.ndim)]
    right = [next(letters) for _ in range(rhs.ndim)]
    for a, b in zip(lc + lb, rc + rb, strict=True):
        right[b] = left[a]
    batch = [left[a] for a in lb]
    rows = [c for c in left if c not in batch and c not in {left[a] for a in lc}]
    columns = [c for i, c in enumerate(right) if i not in (*rc, *rb)]
    return np.einsum(f"{''.join(left)},{''.join(right)}->{''.join(batch + rows + columns)}", lhs, rhs)


def error(got, want, size=None):
    """Relative Frobenius error, with every entry in units of ``size`` (its own natural magnitude) if that is given."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    unit = np.ones_like(want) if size is None else np.where(size == 0, 1, size)
    norm = np.linalg.norm(want / unit)
    difference = np.linalg.norm((got - want) / unit)
    return difference / norm if norm else difference


def dot_error(got, lhs, rhs, numbers):
    """Error of a product, its entries in units of (norm of the row) x (norm of the column)."""
    return error(got, dot(lhs, rhs, numbers), np.sqrt(dot(lhs**2, rhs**2, numbers)))


def digits_off(lhs, rhs, numbers, *, weight_left=False):
    """What rounding a float activation to two digits can do to each entry of a product, at most."""
    x, w = (rhs, lhs) if weight_left else (lhs, rhs)
    axes = tuple(numbers[0][1 if weight_left else 0])
    largest = np.broadcast_to(np.abs(x).max(axis=axes, keepdims=True, initial=0), x.shape)
    pair = (np.abs(w), largest) if weight_left else (largest, np.abs(w))
    return DIGITS * dot(*pair, numbers)


def check_dot(lhs, rhs, numbers=MATMUL, bound=INTEGER, *, spec=None, precision=None, **kwargs):
    """Runs ops.dot_general, holds it against the reference, and returns what it gave."""
    got = ops.dot_general(lhs, rhs, numbers, precision, spec=spec, **kwargs)
    left, right = dot_values(lhs, rhs, numbers, spec, **kwargs)
    check_product(got, left, right, numbers, bound, weight_left=isinstance(lhs, QTensor))
    return got


def check_product(got, left, right, numbers=MATMUL, bound=INTEGER, *, weight_left=False):
    """Holds a product against its float64 operands: on the whole by ``bound``, and weight-only entry by entry."""
    assert dot_error(got, left, right, numbers) <= bound
    if bound >= WEIGHT_ONLY:
        size = np.sqrt(dot(left**2, right**2, numbers))
        off = np.abs(np.asarray(got, np.float64) - dot(left, right, numbers))
        assert np.all(off <= 1.001 * digits_off(left, right, numbers, weight_left=weight_left) + INTEGER * size)


def dot_values(lhs, rhs, numbers=MATMUL, spec=None, act_scale=None, act_zero_point=None, **_) -> tuple[Any, Any]:
    """The float64 values of both operands of a product."""
    spec = spec or OpSpec()
    weight_left = isinstance(lhs, QTensor) and not isinstance(rhs, QTensor)
    specs = (spec.weight, spec.act) if weight_left else (spec.act, spec.weight)
    given = ((None, None), (act_scale, act_zero_point))
    left, right = given if weight_left else given[::-1]
    (lc, rc), _ = numbers
    return real(lhs, specs[0], tuple(lc), *left), real(rhs, specs[1], tuple(rc), *right)


def quantized(x, spec, axes=(-2,)):
    """`quantize`, as the tests call it everywhere."""
    return quantize(x, spec, reduce_axes=axes)


def kernel_of(x, w, numbers=MATMUL, precision=None, platform: Platform = "cpu"):
    """The class of the kernel that takes a product, by name."""
    (xc, wc), (xb, wb) = numbers
    problem = Product.of(x, w, Axes.of(x.ndim, xb, xc), Axes.of(w.ndim, wb, wc), precision, jnp.float32)
    return type(select(problem, Target(platform))).__name__

"""A Pallas kernel for weights that are packed: float activations times 4-bit integers, decoded in registers.

XLA may or may not fuse the decoding of a packed weight into the product on a GPU; where it does not, the weight is
written to memory in float and read again, eight times what is stored. This kernel reads the bytes once: a program per
block of output channels walks along the contraction, a group at a time, splits each byte into its two codes, scales
them, and multiplies them with the even and the odd elements of the activation.

It has run in Pallas' interpreter only, no GPU having been at hand. So it is not in the table of kernels: call it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.ops.forms import Axes, Packed, packed

__all__ = ["packed_dot"]

_TRITON: Any = getattr(triton, "CompilerParams", None) or getattr(triton, "TritonCompilerParams")  # noqa: B009

_ROWS = 16  # the least that a tensor core multiplies
_COLUMNS = (128, 64, 32, 16)  # of a program, the first that divides what there is
_LONGEST, _SHORTEST = 128, 32  # codes that one step takes


def packed_dot(x: jax.Array, w: QTensor, *, interpret: bool | None = None) -> jax.Array:
    """``x @ w`` for a 4-bit integer weight, ``y[m, n] = sum_k x[m, k] (q[k, n] - z[k, n]) s[k, n]``, by one kernel.

    Args:
      x: [..., K], float32, bfloat16 or float16; products are rounded to nothing and summed in float32.
      w: [K, N], reduced over axis -2: int4 or uint4, one scale (and integer zero point, offset) per channel or group.
      interpret: run in Pallas' interpreter; None: where the default device is no GPU.

    Returns:
      Array [..., N] of x's dtype.

    Raises:
      QuantError: for another kind of weight, a K that is not x's, or sizes that the kernel has no blocks for: N that
        16 does not divide, groups that are no power of two from 32.

    Gradient: none.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.ops.kernels.gpu.packed import packed_dot
      >>> w = jq.quantize(jnp.eye(64), jq.QuantSpec("int4"), reduce_axes=(-2,))
      >>> bool(jnp.allclose(packed_dot(jnp.ones((2, 64)), w), 1.0))
      True
    """
    matrix = packed(w, Axes((), (1,), (0,))) if isinstance(w, QTensor) and w.ndim == 2 else None
    if matrix is None or matrix.qtype.kind != "int" or matrix.qtype.bits != 4 or matrix.multiplier is not None:
        todo = "Quantize it to int4 or uint4 with reduce_axes=(-2,), or use ops.dot_general"
        raise quant_error("packed_dot", "the weight must be [K, N] of packed 4-bit integers", todo=todo, w=w)
    n, k = matrix.shape[1:]
    if x.shape[-1:] != (k,):
        raise quant_error("packed_dot", "the last axis of x is not K", todo="Transpose one", x=x.shape, w=w.shape)
    columns = next((c for c in _COLUMNS if n % c == 0), None)
    step = min(k // matrix.groups, _LONGEST)
    if columns is None or step < _SHORTEST or step & (step - 1) or k % step:
        todo = "Use ops.dot_general, or a group size of 32, 64 or 128 and N divisible by 16"
        raise quant_error("packed_dot", "no blocks of the kernel fit", todo=todo, shape=w.shape, groups=matrix.groups)
    rows = x.reshape(-1, k)
    padded = jnp.pad(rows, ((0, -rows.shape[0] % _ROWS), (0, 0)))
    if interpret is None:
        interpret = jax.default_backend() not in ("gpu", "cuda", "rocm")
    out = _call(padded, matrix, columns, step, interpret)
    return out[: rows.shape[0]].reshape(*x.shape[:-1], n)


def _call(x: jax.Array, w: Packed, columns: int, step: int, interpret: bool) -> jax.Array:
    """The kernel over a grid of blocks of rows and of columns."""
    (rows, k), n = x.shape, w.shape[1]
    per_group = {"scale": w.scale, "zero": w.zero_point, "offset": w.offset}
    given = {name: jnp.broadcast_to(v[0], (n, v.shape[2])) for name, v in per_group.items() if v is not None}
    kernel = functools.partial(
        _kernel, names=tuple(given), step=step, per=k // w.groups // step, lowest=int(w.qtype.qmin)
    )
    activation = pl.BlockSpec((_ROWS, k // 2), lambda i, j: (i, 0))
    weights = [pl.BlockSpec((columns, v.shape[1]), lambda i, j: (j, 0)) for v in (w.bytes[0], *given.values())]
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, n), x.dtype),
        grid=(rows // _ROWS, n // columns),
        in_specs=[activation, activation, *weights],
        out_specs=pl.BlockSpec((_ROWS, columns), lambda i, j: (i, j)),
        interpret=interpret,
        compiler_params=_TRITON(num_warps=4),
    )(x[:, 0::2], x[:, 1::2], w.bytes[0], *given.values())


def _kernel(even: Any, odd: Any, stored: Any, *rest: Any, names: tuple[str, ...], step: int, per: int, lowest: int):
    """One block: activations [rows, K / 2] twice, bytes [columns, K / 2], what there is per group [columns, G]."""
    *values, out = rest
    half = step // 2

    def add(i: Any, total: jax.Array) -> jax.Array:
        here, group = pl.ds(i * half, half), pl.ds(i // per, 1)
        of = {name: ref[:, group].astype(jnp.float32) for name, ref in zip(names, values, strict=True)}
        both = stored[:, here].astype(jnp.int32)
        for x, bits in ((even, both & 15), (odd, both >> 4)):
            q = (bits + lowest).astype(jnp.float32)
            real = ((q - of["zero"]) if "zero" in of else q) * of["scale"]
            real = (real + of["offset"] if "offset" in of else real).astype(x.dtype)
            total += lax.dot_general(x[:, here], real, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST, jnp.float32)
        return total

    start = jnp.zeros(out.shape, jnp.float32)
    out[...] = lax.fori_loop(0, even.shape[1] // half, add, start).astype(out.dtype)

"""A GPU's product of rows and their experts, under `jax.vmap`, and partitioned over devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.devices import Arguments, Letters, Mapped, Name, named, on_devices
from jaxquant.ops.kernels.gpu.product import Weight, product
from jaxquant.ops.kernels.gpu.tiling import Decoding
from jaxquant.ops.kernels.segments import Segments

__all__ = ["experts_product"]

_OWN = {"x": "mk", "rows": "m", "numbers": "m", "starts": "_e", "ends": "_e", "layers": "_e"}
_LETTERS = Letters(_OWN, "_e", "_e", "mn", "ke")


def experts_product(
    x: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    w: Weight,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    *,
    rows: jax.Array | None = None,
    stack: Weight | None = None,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The product of each row and its expert, under `jax.vmap` and shardings too.

    Partitions of rows, experts, k and columns are kept. Where experts or k are partitioned, the results of the devices
    are added. A stack is read where it is, as by `jaxquant.ops.kernels.gpu.batched.batched`.

    Args:
      x: [M, K].
      segments: int32 [E], the first row of each expert and the end of its rows.
      w: arrays with axes [1, E] in front.
      how, result, dtype, interpret: as for `jaxquant.ops.kernels.gpu.product.product`.
      rows: [M], or None.
      stack: the arrays of w that are layers of a stack: the whole stack, with axes of layers and E in front.
      layer: int32 [1], the index of w in the stack.

    Returns:
      [M, N]; 0 where a row has no expert.
    """
    starts, ends = (v[None] for v in segments)
    layers = None if layer is None else jnp.broadcast_to(layer, starts.shape)
    numbers = lax.iota(jnp.int32, x.shape[0])
    own = {"x": x, "rows": rows, "numbers": numbers, "starts": starts, "ends": ends, "layers": layers}
    given = named({**own, **w._asdict()}, stack)

    def one(of: Arguments, w: Weight, how: Decoding) -> jax.Array:
        w = w._make(None if v is None else v.reshape(-1, *v.shape[2:]) for v in w)
        x, rows, found = of[Name("x")], of.get(Name("rows")), _segments(of)
        out = product(x, w, how, result, dtype, rows=rows, segments=found, interpret=interpret)
        return jnp.where(found.cover(lax.iota(jnp.int32, x.shape[0]))[:, None], out, 0)

    return on_devices(given, how, _LETTERS, one, _mapped)


def _mapped(args: Mapped, call: Callable[[Arguments], jax.Array]) -> jax.Array:
    """There are more rows, by more experts or by the same ones in more segments."""
    of, m = dict(args.of), args.of[Name("numbers")].shape[-1]
    arrays_of_w = [name for name in of if name.of in Weight._fields]
    more = any(args.has[name] for name in arrays_of_w)
    for name in [name for name in of if more or name not in arrays_of_w]:
        v = args.every(name)
        if name.of in ("starts", "ends"):
            v = v + m * jnp.arange(args.size, dtype=v.dtype)[:, None, None]
        # [size, S, E, ...]: experts of all are beside each other if weights are mapped, else segments.
        if more and name.of not in ("x", "rows", "numbers"):
            v = jnp.moveaxis(v, 0, 1)
            of[name] = v.reshape(v.shape[0], -1, *v.shape[3:])
        else:
            of[name] = v.reshape(-1, *v.shape[2:])
    of[Name("numbers")] = lax.iota(jnp.int32, args.size * m)
    out = call(of)
    return out.reshape(args.size, m, -1)


def _segments(of: Arguments) -> Segments:
    """The segments of the rows of one device."""
    numbers, starts, ends = (of[Name(name)] for name in ("numbers", "starts", "ends"))
    start, end = (jnp.clip(v - numbers[0], 0, numbers.shape[0]) for v in (starts, ends))
    experts = starts.shape[1]
    expert = jnp.broadcast_to(lax.iota(jnp.int32, experts), starts.shape)
    place = expert + experts * of[Name("layers")] if Name("layers") in of else expert
    return Segments(*(v.reshape(-1) for v in (start, end, expert, place)))

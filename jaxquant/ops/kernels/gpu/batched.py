"""A GPU's product for batches of matrices, under `jax.vmap`, and partitioned over devices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.devices import Arguments, Letters, Mapped, Name, named, on_devices
from jaxquant.ops.kernels.gpu.product import Weight, product
from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["batched"]

_LETTERS = Letters({"x": "abmk", "rows": "abm", "layer": "a"}, "ab", "_b", "abmn", "k")


def batched(
    x: jax.Array,
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
    """The kernel's product for all matrices of two axes A and B, under `jax.vmap` and shardings too.

    B is the axis of experts, A that of `jax.vmap`, of size 1 without it. Partitions of all axes but that of layers are
    kept. If k is partitioned, the partial sums of the devices are added. A stack is read where it is. If its parts do
    not lie as the product needs them, the layer is read instead, whose parts XLA moves.

    Args:
      x: [A, B, M, K].
      w: arrays with A and B in front.
      how, result, dtype, interpret: as for `jaxquant.ops.kernels.gpu.product.product`.
      rows: [A, B, M], or None.
      stack: the arrays of w that are layers of a stack: the whole stack, with layers and B in front.
      layer: int32 [A], the indices of w in the stack.

    Returns:
      [A, B, M, N].
    """
    given = named({"x": x, "rows": rows, **w._asdict(), "layer": layer}, stack)

    def one(of: Arguments, w: Weight, how: Decoding) -> jax.Array:
        x, rows, layer = (of.get(Name(name)) for name in ("x", "rows", "layer"))
        assert x is not None
        return _each(x, w, rows, layer, how, result, dtype, interpret=interpret)

    return on_devices(given, how, _LETTERS, one, _mapped)


def _mapped(args: Mapped, call: Callable[[Arguments], jax.Array]) -> jax.Array:
    """Weights make A and the stack longer; activations for one weight are more rows."""
    size, of, has = args.size, dict(args.of), args.has
    if any(has[name] for name in of if name.of not in ("x", "rows")):
        stacked = [name for name in of if name.stacked]
        longer = any(has[name] for name in stacked)
        several = {name: args.every(name) for name in of if longer or not name.stacked}
        if longer:
            layers = several[stacked[0]].shape[1]
            several[Name("layer")] += layers * jnp.arange(size, dtype=jnp.int32)[:, None]
        out = call(of | {name: v.reshape(-1, *v.shape[2:]) for name, v in several.items()})
        return out.reshape(size, -1, *out.shape[1:])
    for name in (Name("x"), Name("rows")):
        if name in of:
            v = jnp.moveaxis(args.every(name), 0, 2)
            of[name] = v.reshape(*v.shape[:2], -1, *v.shape[4:])
    out = call(of)
    return jnp.moveaxis(out.reshape(*out.shape[:2], size, -1, out.shape[3]), 2, 0)


def _each(
    x: jax.Array,
    w: Weight,
    rows: jax.Array | None,
    layer: jax.Array | None,
    how: Decoding,
    result: DTypeLike,
    dtype: DTypeLike,
    *,
    interpret: bool,
) -> jax.Array:
    """`batched` on one device."""
    many = x.shape[0] * x.shape[1]

    def one(x: jax.Array, w: Weight, rows: jax.Array | None, layer: jax.Array | None) -> jax.Array:
        return product(x, w, how, result, dtype, rows=rows, layer=layer, repeated=many, interpret=interpret)

    stacked = [name in how.stacked for name in Weight._fields]
    of_a, of_b = Weight._make(None if s else 0 for s in stacked), Weight._make(1 if s else 0 for s in stacked)
    return jax.vmap(jax.vmap(one, (0, of_b, 0, None)), (0, of_a, 0, 0))(x, w, rows, layer)

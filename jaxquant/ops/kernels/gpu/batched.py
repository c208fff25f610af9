"""A GPU's product for batches of matrices, under `jax.vmap`, and partitioned over devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.arguments import Name, letters_of, named, part_of, pieces_of, several, weight_of
from jaxquant.ops.kernels.gpu.partition import partitioned
from jaxquant.ops.kernels.gpu.product import Weight, product
from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["batched"]


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
    names = list(given)  # all that is closed over below: arrays would outlive their trace in the rules
    stacked = [name for name in names if name.stacked]

    def local(cuts: Mapping[str, int], without: Collection[int]) -> Callable[..., jax.Array]:
        part = part_of(how, cuts)

        def run(*arrays: jax.Array) -> jax.Array:
            of = {name: v for i, (name, v) in enumerate(zip(names, arrays, strict=True)) if i not in without}
            w, now = weight_of(of, part)
            x, rows, layer = (of.get(Name(name)) for name in ("x", "rows", "layer"))
            assert x is not None
            return _each(x, w, rows, layer, now, result, dtype, interpret=interpret)

        return run

    def mapped(size: int, is_mapped: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        """The batched function: weights make A and the stack longer; activations for one weight are more rows."""
        of, has = dict(zip(names, arrays, strict=True)), dict(zip(names, is_mapped, strict=True))

        def every(name: Name) -> jax.Array:
            return of[name] if has[name] else jnp.broadcast_to(of[name][None], (size, *of[name].shape))

        if any(has[name] for name in names if name.of not in ("x", "rows")):
            longer = any(has[name] for name in stacked)
            several = {name: every(name) for name in names if longer or not name.stacked}
            if longer:
                layers = several[stacked[0]].shape[1]
                several[Name("layer")] += layers * jnp.arange(size, dtype=jnp.int32)[:, None]
            of |= {name: v.reshape(-1, *v.shape[2:]) for name, v in several.items()}
            out = call(*of.values())
            return out.reshape(size, -1, *out.shape[1:]), True
        for name in (Name("x"), Name("rows")):
            if name in of:
                v = jnp.moveaxis(every(name), 0, 2)
                of[name] = v.reshape(*v.shape[:2], -1, *v.shape[4:])
        out = call(*of.values())
        return jnp.moveaxis(out.reshape(*out.shape[:2], size, -1, out.shape[3]), 2, 0), True

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> jax.Array:
        unmoved = [names.index(name) for name in stacked]
        return partitioned(local, arrays, _axes(how, names, arrays), _pieces(how, arrays[0]), "k", unmoved)

    call.def_vmap(mapped)
    return call(*given.values())


def _axes(how: Decoding, names: list[Name], arrays: tuple[jax.Array, ...]) -> tuple[list[str], list[str]]:
    """Letters of the axes of operands and result, for `partitioned`."""
    others = {"x": "abmk", "rows": "abm", "layer": "a"}

    def of(name: Name, shape: tuple[int, ...]) -> str:
        return others.get(name.of) or letters_of(name, "_b" if name.stacked else "ab", how, shape)

    return [of(name, v.shape) for name, v in zip(names, arrays, strict=True)], ["abmn"]


def _pieces(how: Decoding, x: jax.Array) -> dict[str, int]:
    """The number of pieces that an axis can be partitioned into."""
    return several(pieces_of(how) | {"a": x.shape[0], "b": x.shape[1], "m": x.shape[2]})


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

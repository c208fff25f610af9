"""A GPU's product of rows and their experts, under `jax.vmap`, and partitioned over devices."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.ops.kernels.gpu.arguments import Name, letters_of, named, part_of, pieces_of, several, weight_of
from jaxquant.ops.kernels.gpu.partition import partitioned
from jaxquant.ops.kernels.gpu.product import Weight, product
from jaxquant.ops.kernels.gpu.tiling import Decoding
from jaxquant.ops.kernels.segments import Segments

__all__ = ["experts_product"]


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
    names = list(given)  # all that is closed over below: arrays would outlive their trace in the rules
    stacked = [name for name in names if name.stacked]

    def local(cuts: Mapping[str, int], without: Collection[int]) -> Callable[..., jax.Array]:
        part = part_of(how, cuts)

        def run(*arrays: jax.Array) -> jax.Array:
            of = {name: v for i, (name, v) in enumerate(zip(names, arrays, strict=True)) if i not in without}
            w, now = weight_of(of, part)
            w = w._make(None if v is None else v.reshape(-1, *v.shape[2:]) for v in w)
            x = of[Name("x")]
            found = _segments(of)
            out = product(x, w, now, result, dtype, rows=of.get(Name("rows")), segments=found, interpret=interpret)
            has = found.cover(lax.iota(jnp.int32, x.shape[0]))
            return jnp.where(has[:, None], out, 0)

        return run

    def mapped(size: int, is_mapped: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        """The batched function: there are more rows, by more experts or by the same ones in more segments."""
        of, has = dict(zip(names, arrays, strict=True)), dict(zip(names, is_mapped, strict=True))
        m = of[Name("numbers")].shape[-1]
        arrays_of_w = [name for name in names if name.of in w._fields]
        more = any(has[name] for name in arrays_of_w)
        for name, v in of.items():
            if name in arrays_of_w and not more:
                continue
            v = v if has[name] else jnp.broadcast_to(v[None], (size, *v.shape))
            if name.of in ("starts", "ends"):
                v = v + m * jnp.arange(size, dtype=v.dtype)[:, None, None]
            # [size, S, E, ...]: experts of all are beside each other if weights are mapped, else segments.
            if more and name.of not in ("x", "rows", "numbers"):
                v = jnp.moveaxis(v, 0, 1)
                of[name] = v.reshape(v.shape[0], -1, *v.shape[3:])
            else:
                of[name] = v.reshape(-1, *v.shape[2:])
        of[Name("numbers")] = lax.iota(jnp.int32, size * m)
        out = call(*of.values())
        return out.reshape(size, m, -1), True

    @jax.custom_batching.custom_vmap
    def call(*arrays: jax.Array) -> jax.Array:
        unmoved = [names.index(name) for name in stacked]
        return partitioned(local, arrays, _axes(how, names, arrays), _pieces(how, names, arrays), "ke", unmoved)

    call.def_vmap(mapped)
    return call(*given.values())


def _segments(of: Mapping[Name, jax.Array]) -> Segments:
    """The segments of the rows of one device."""
    numbers, starts, ends = (of[Name(name)] for name in ("numbers", "starts", "ends"))
    start, end = (jnp.clip(v - numbers[0], 0, numbers.shape[0]) for v in (starts, ends))
    experts = starts.shape[1]
    expert = jnp.broadcast_to(lax.iota(jnp.int32, experts), starts.shape)
    place = expert + experts * of[Name("layers")] if Name("layers") in of else expert
    return Segments(*(v.reshape(-1) for v in (start, end, expert, place)))


def _axes(how: Decoding, names: list[Name], arrays: tuple[jax.Array, ...]) -> tuple[list[str], list[str]]:
    """Letters of the axes of operands and result, for `partitioned`."""
    others = {"x": "mk", "rows": "m", "numbers": "m", "starts": "_e", "ends": "_e", "layers": "_e"}

    def of(name: Name, shape: tuple[int, ...]) -> str:
        return others.get(name.of) or letters_of(name, "_e", how, shape)

    return [of(name, v.shape) for name, v in zip(names, arrays, strict=True)], ["mn"]


def _pieces(how: Decoding, names: list[Name], arrays: tuple[jax.Array, ...]) -> dict[str, int]:
    """The number of pieces that an axis can be partitioned into."""
    x, starts = (arrays[names.index(Name(name))] for name in ("x", "starts"))
    return several(pieces_of(how) | {"m": x.shape[0], "e": starts.shape[1]})

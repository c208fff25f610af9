"""Ragged products on a GPU: each tile of rows is multiplied by the codes of its expert, which are decoded in registers.

XLA:GPU multiplies all rows by every expert, and keeps the products that are wanted: for 2,048 rows and eight experts of
[4096, 14336] an H100 needs 1.9 ms, at its peak, where the products that are wanted take .24. It also writes experts of
4 bits to memory in bfloat16. The kernel is that of `jaxquant.ops.kernels.gpu.product`. It does not read an expert that
has no rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxquant.core.by_platform import Target
from jaxquant.core.qtensor import QTensor
from jaxquant.ops.forms import Axes
from jaxquant.ops.kernels.decoded import multiplied_dtype
from jaxquant.ops.kernels.gpu.decoded import (
    Place,
    activation,
    decodes,
    has_blocks,
    has_places,
    in_int8,
    result_dtype,
    stored,
    with_stack,
)
from jaxquant.ops.kernels.gpu.scaled import in_e4m3, multiplies_float8
from jaxquant.ops.kernels.integer import overflow_limit
from jaxquant.ops.kernels.precision import is_default
from jaxquant.ops.problem import Kernel, RaggedProduct, in_stored_order
from jaxquant.ops.trained import is_in_training

if TYPE_CHECKING:
    from jaxquant.ops.kernels.gpu.product import Name, Weight
    from jaxquant.ops.kernels.gpu.segments import Segments
    from jaxquant.ops.kernels.gpu.tiling import Decoding

__all__ = ["TritonExperts", "TritonFloat8Experts", "experts_product", "run"]

_ROWS, _EXPERTS = Axes.of(2, (), (1,)), Axes.of(3, (0,), (1,))


@dataclasses.dataclass(frozen=True)
class TritonExperts(Kernel[RaggedProduct]):
    """A ragged product of stored experts.

    Attributes:
      dtype: of the values that are decoded.
      integers: whether both sides are int8 with one scale for each row and each column.
    """

    operation = RaggedProduct
    platforms = ("cuda",)

    dtype: DTypeLike
    integers: bool = False

    @property
    def name(self) -> str:
        """As of products of one weight."""
        return "int8, scaled by Triton" if self.integers else f"{jnp.dtype(self.dtype).name}, decoded by Triton"

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`: stored experts of one code per element, with the limits of `decoded.TritonDecoded`."""
        x, w = problem.x, problem.w
        if not isinstance(w, QTensor) or is_in_training(w) or w.length is not None or w.permutation is not None:
            return None
        if not has_blocks(problem):
            return None
        place = Place.of(w, _EXPERTS)
        dtype = multiplied_dtype(problem)
        if place is None or not decodes(w, place, dtype) or not has_places(w.kept, stored(w, place)[1]):
            return None
        rows = isinstance(x, QTensor) and in_int8(x) and x.scale.shape[1] == 1
        whole = rows and place.groups == 1 and w.type.kind == "int"
        if whole and place.length > overflow_limit(128, 128):
            return None
        return cls(dtype, whole and w.symmetric and w.type.bits == 8)

    def run(self, problem: RaggedProduct) -> jax.Array:
        """As for `Kernel`."""
        return run(problem, self.dtype)


@dataclasses.dataclass(frozen=True)
class TritonFloat8Experts(TritonExperts):
    """e4m3 on both sides, with one scale for each row and each column, on chips that multiply it."""

    @property
    def name(self) -> str:
        """As of products of one weight."""
        return "float8_e4m3fn, scaled by Triton"

    @classmethod
    def runs_on(cls, target: Target) -> bool:
        """As for `Kernel`."""
        return multiplies_float8(target)

    @classmethod
    def takes(cls, problem: RaggedProduct) -> Kernel[RaggedProduct] | None:
        """As for `Kernel`."""
        x, w = problem.x, problem.w
        both = all(isinstance(v, QTensor) and in_e4m3(v) and v.scale.shape[1] == 1 for v in (x, w))
        if not both or not is_default(problem.precision) or super().takes(problem) is None:
            return None
        return cls(jnp.float8_e4m3fn)


def run(problem: RaggedProduct, dtype: DTypeLike, *, interpret: bool = False) -> jax.Array:
    """The product of a problem that `TritonExperts` takes; the arguments are those of `decoded.run`."""
    w, axes = in_stored_order(problem.weight, _EXPERTS)
    values, rows = activation(problem.x, _ROWS, dtype)
    weight, how, stack = with_stack(w, axes)
    sizes = problem.sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    given: dict[str, Any] = {"rows": None if rows is None else rows[0], **stack, "interpret": interpret}
    return experts_product(values[0], (ends - sizes, ends), weight, how, result_dtype(problem), dtype, **given)


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
    are added. A stack is read where it is, as by `jaxquant.ops.kernels.gpu.product.batched`.

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
    from jaxquant.ops.kernels.gpu.partition import partitioned
    from jaxquant.ops.kernels.gpu.product import Name, named, part_of, product, weight_of

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
    from jaxquant.ops.kernels.gpu.product import Name
    from jaxquant.ops.kernels.gpu.segments import Segments

    numbers, starts, ends = (of[Name(name)] for name in ("numbers", "starts", "ends"))
    start, end = (jnp.clip(v - numbers[0], 0, numbers.shape[0]) for v in (starts, ends))
    experts = starts.shape[1]
    expert = jnp.broadcast_to(lax.iota(jnp.int32, experts), starts.shape)
    place = expert + experts * of[Name("layers")] if Name("layers") in of else expert
    return Segments(*(v.reshape(-1) for v in (start, end, expert, place)))


def _axes(how: Decoding, names: list[Name], arrays: tuple[jax.Array, ...]) -> tuple[list[str], list[str]]:
    """Letters of the axes of operands and result, for `partitioned`."""
    from jaxquant.ops.kernels.gpu.product import letters_of

    others = {"x": "mk", "rows": "m", "numbers": "m", "starts": "_e", "ends": "_e", "layers": "_e"}

    def of(name: Name, shape: tuple[int, ...]) -> str:
        return others.get(name.of) or letters_of(name, "_e", how, shape)

    return [of(name, v.shape) for name, v in zip(names, arrays, strict=True)], ["mn"]


def _pieces(how: Decoding, names: list[Name], arrays: tuple[jax.Array, ...]) -> dict[str, int]:
    """The number of pieces that an axis can be partitioned into."""
    from jaxquant.ops.kernels.gpu.product import Name, pieces_of, several

    x, starts = (arrays[names.index(Name(name))] for name in ("x", "starts"))
    return several(pieces_of(how) | {"m": x.shape[0], "e": starts.shape[1]})

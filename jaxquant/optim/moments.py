"""Moments of an optimizer as `QTensor`s: their number types, their form, and their quantization.

A moment is split into blocks of consecutive numbers in row-major order, each with its largest magnitude in float32 and
one code per number:

    m ~ grid(code) * absmax                    a dynamic map, on [-1, 1] or [0, 1]
    v ~ (code + 1) * absmax / 16               uint4 for moments of squares: linear, and no code means 0

If blocks end on the axes' boundaries, the `QTensor` has the parameter's shape and sharding. Otherwise it is the
flattened array, padded with zeros, as [blocks, numbers in a block].
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxquant.core.arithmetic import nan_where
from jaxquant.core.blocks import BlockView, block_shape, groups_fit, scale_shape
from jaxquant.core.codec import nearest_codes
from jaxquant.core.errors import quant_error
from jaxquant.core.granularity import PerGroup
from jaxquant.core.qtensor import QTensor, from_codes
from jaxquant.core.qtypes import QTYPES, QType

__all__ = ["EIGHT_BITS", "FOUR_BITS", "Storage", "as_form", "as_parameter", "real", "stored"]

_SIGNED, _UNSIGNED = ("dynamic8", "dynamic4"), ("udynamic8", "uint4")
_TINY = float(ml_dtypes.finfo(np.float32).tiny)


Parameter: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""A parameter, or its shape."""

StoredMoment: TypeAlias = QTensor | jax.Array
"""A moment in stored form: quantized, or float32."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """How an optimizer keeps its moments.

    Attributes:
      signed: number type of moments that have both signs: ``"dynamic8"`` or ``"dynamic4"``.
      unsigned: number type of moments of squares: ``"udynamic8"``, or ``"uint4"``, whose code c stands for
        (c + 1) / 16 of the largest, so that no update divides by 0.
      block: numbers that share a scale.
      smallest: parameters of fewer numbers than this keep moments in float32.
      exempt: parameters keep moments in float32 if one of these patterns occurs in their path (`re.search`). By default
        embeddings do: squares of rarely used rows can be so small compared to the block's largest that they round to 0,
        which makes the row's next step too large.

    Raises:
      QuantError: on another type, a block or size that is not a positive integer, or an invalid pattern.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxquant import optim
      >>> tx = optim.adamw8bit(1e-3, storage=optim.Storage(exempt=("embed", "head")))
      >>> moments = tx.init({"head": jnp.ones((64, 256)), "kernel": jnp.ones((64, 256))})[0].moments
      >>> moments["m"]["head"].dtype, moments["m"]["kernel"]
      (dtype('float32'), QTensor(dynamic8[64, 256] -> float32, per channel on axis -2, symmetric, 16.2 KiB))

    Source: Dettmers et al. 2022 (arXiv:2110.02861) for 8 bits; Li et al. 2023 (arXiv:2309.01507) for 4.
    """

    signed: str = "dynamic8"
    unsigned: str = "udynamic8"
    block: int = 256
    smallest: int = 4096
    exempt: str | tuple[str, ...] = ("(?i)embed",)

    def __post_init__(self) -> None:
        for name, types in (("signed", _SIGNED), ("unsigned", _UNSIGNED)):
            if getattr(self, name) not in types:
                raise self._error(f"{name} must be a type for such moments", f"Use {' or '.join(types)}", name)
        for name, least in (("block", 2), ("smallest", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self._error(f"{name} must be an integer from {least} on", "Use the default", name)
        if self.block % 2:
            raise self._error("a block must have whole bytes", "Use an even number", "block")
        patterns = (self.exempt,) if isinstance(self.exempt, str) else tuple(self.exempt)
        object.__setattr__(self, "exempt", patterns)
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                raise self._error("exempt must be regular expressions", "Escape what is special", "exempt") from None

    def _error(self, rule: str, todo: str, name: str) -> Exception:
        got: dict[str, Any] = {name: getattr(self, name)}
        return quant_error("Storage", rule, todo=todo, **got)

    def zeros(self, p: jax.Array, path: str, *, signed: bool) -> StoredMoment:
        """A moment of zeros for a parameter: a `QTensor`, or a float32 array if the parameter is exempt."""
        if p.size < max(self.smallest, 1) or any(re.search(pattern, path) for pattern in self.exempt):
            return jnp.zeros_like(p, jnp.float32)
        info = QTYPES[self.signed if signed else self.unsigned]
        shape, blocks = self.form(p.shape)
        return _quantized_zeros(info, shape, blocks)

    def form(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of codes and scales for a parameter of this shape."""
        axes = tuple(range(-len(shape), 0))
        if shape and groups_fit(shape, axes, self.block) and shape[-1] % 2 == 0:
            return tuple(shape), scale_shape(shape, block_shape(shape, PerGroup(self.block), axes))
        blocks = -(-int(np.prod(shape, dtype=np.int64)) // self.block)
        return (blocks, self.block), (blocks, 1)


EIGHT_BITS = Storage()
"""bitsandbytes' scheme: the dynamic maps of 8 bits, blocks of 256; embeddings in float32."""

FOUR_BITS = Storage("dynamic4", "uint4", 128)
"""Li et al.'s blocks of 128: a dynamic map of 4 bits, and a linear one without 0 for squares."""


def as_form(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Reshapes an array to the shape of its codes."""
    if x.shape == shape:
        return x
    return jnp.pad(x.reshape(-1), (0, shape[0] * shape[1] - x.size)).reshape(shape)


def as_parameter(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Inverse of `as_form`."""
    return x if x.shape == shape else x.reshape(-1)[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


def _in_rows(q: QTensor) -> QTensor:
    """A moment with one row per block, in the same row-major memory."""
    n, per = q.scale.size, q.size // q.scale.size
    flat = lambda x: None if x is None else x.reshape(n, 1)  # noqa: E731
    rest = {"scale": flat(q.scale), "zero_point": flat(q.zero_point)}
    return q.replace(codes=q.stored.reshape(n, -1), length=None if q.length is None else per, **rest)


def _quantized(x: jax.Array, info: QType, blocks: tuple[int, ...]) -> QTensor:
    """The nearest codes of a float32 array.

    On the CPU each row is one block, in the same memory, since XLA vectorizes loops over two axes. Elsewhere the array
    keeps its own shape, so that its tiles and shards stay in place.
    """

    def by_rows(x: jax.Array) -> QTensor:
        n = math.prod(blocks)
        q = _quantized_as_it_lies(x.reshape(n, -1), info, (n, 1))
        codes = q.stored.reshape(*x.shape[:-1], -1)
        flat = lambda v: None if v is None else v.reshape(blocks)  # noqa: E731
        length = None if q.length is None else x.shape[-1]
        return q.replace(codes=codes, scale=flat(q.scale), zero_point=flat(q.zero_point), length=length)

    plain = functools.partial(_quantized_as_it_lies, info=info, blocks=blocks)
    return jax.lax.platform_dependent(x, cpu=by_rows, default=plain)


def _quantized_as_it_lies(x: jax.Array, info: QType, blocks: tuple[int, ...]) -> QTensor:
    """The nearest codes of a float32 array. A block with NaN or infinity gets scale NaN: it stays visible."""
    view = BlockView.of_scale(x.shape, blocks)
    each = view.split(x)
    absmax = jnp.max(jnp.where(jnp.isnan(each), jnp.inf, jnp.abs(each)), axis=view.axes, keepdims=True)
    unit = each * jnp.where(absmax >= _TINY, 1 / absmax, 0)
    zero_point = None
    if info.kind == "table":
        codes, scale = nearest_codes(unit, info), jnp.where(absmax >= _TINY, absmax, 1)
    else:
        steps = int(info.qmax) + 1
        codes = jnp.clip(jnp.rint(unit * steps) - 1, 0, info.qmax).astype(info.code_dtype)
        scale = jnp.maximum(absmax / steps, _TINY)
        zero_point = jnp.full(blocks, -1, jnp.int8)
    scale = nan_where(~jnp.isfinite(absmax), scale)
    return from_codes(view.join(codes), view.join_scale(scale), zero_point, qtype=info.name, dtype=jnp.float32)


def _quantized_zeros(info: QType, shape: tuple[int, ...], blocks: tuple[int, ...]) -> QTensor:
    """`_quantized` of zeros, from constants: both codes in a byte are equal."""
    zero = int(np.argmin(np.abs(info.table))) if info.kind == "table" else 0
    scale, zero_point = (1.0, None) if info.kind == "table" else (_TINY, jnp.full(blocks, -1, jnp.int8))
    rest: dict[str, Any] = {"qtype": info.name, "dtype": jnp.float32}
    if info.packed:
        zero, rest, shape = zero * 17, {**rest, "length": shape[-1]}, (*shape[:-1], shape[-1] // 2)
    return QTensor(jnp.full(shape, zero, jnp.uint8), jnp.full(blocks, scale, jnp.float32), zero_point, **rest)


def stored(x: jax.Array, like: StoredMoment) -> StoredMoment:
    """Stores a float32 moment in the form of ``like``: a `QTensor` of its type and blocks, or a float32 array."""
    if not isinstance(like, QTensor):
        return x
    return _quantized(as_form(x, like.shape), like.type, tuple(like.scale.shape))


def real(moment: StoredMoment, shape: tuple[int, ...]) -> jax.Array:
    """The values of a moment, in float32 and the parameter's shape."""
    if not isinstance(moment, QTensor):
        return moment
    x = jax.lax.platform_dependent(
        moment, cpu=lambda q: _in_rows(q).dequantize().reshape(q.shape), default=QTensor.dequantize
    )
    return as_parameter(x, shape)

"""`QTensor`: a quantized array, as a pytree whose law is ``x ~ (q - zero_point) * scale + offset``."""

from __future__ import annotations

import functools
import math
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.arithmetic import finfo
from jaxquant.core.blocks import BlockView
from jaxquant.core.codec import from_bits, from_int4, to_bits, values_of
from jaxquant.core.describe import granularity, granularity_by_axes
from jaxquant.core.errors import quant_error
from jaxquant.core.jitted import jitted
from jaxquant.core.layout import (
    Layout,
    inverse,
    nbytes_of,
    own_dtype,
    stored_order,
    transpose,
    viewed,
    written_transposed,
)
from jaxquant.core.no_gradient import guarded
from jaxquant.core.packing import pack, packed_length, unpack
from jaxquant.core.qtypes import FACTOR, QTYPES, QType
from jaxquant.core.stack import Layer
from jaxquant.core.types import PyTree
from jaxquant.core.units import in_bytes

__all__ = [
    "FIELDS",
    "LEAVES",
    "Operand",
    "QTensor",
    "Scale",
    "cast",
    "dequantize",
    "flat",
    "from_codes",
    "scale_values",
]

#: The fields of a QTensor that are arrays (or None, or a QTensor).
LEAVES = ("codes", "scale", "zero_point", "offset", "permutation", "seal")


#: The arguments of the constructor.
FIELDS = (*LEAVES, "qtype", "dtype", "minor", "length", "split", "joined")


Operand: TypeAlias = "jax.Array | QTensor"
"""The array that an operation takes, in float or quantized."""


Scale: TypeAlias = "jax.Array | QTensor"
"""Scales, one for each block; a `QTensor` where they are quantized themselves."""


_Static = tuple[str, np.dtype, tuple[int, ...], int | None, int | None, int]
"""The fields of a QTensor that are no arrays, in their order."""


def _is_array(leaf: object) -> bool:
    """Whether a leaf has the attributes of an array, as tracers, shapes and layers of a stack do."""
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


@functools.cache
def _type(name: str) -> QType:
    return FACTOR if name == FACTOR.name else QTYPES[name]


@jax.tree_util.register_pytree_with_keys_class
class QTensor:
    """A quantized array.

    The law is ``x ~ (q - zero_point) * scale + offset``, with ``q`` the grid value of a code and ``scale``,
    ``zero_point`` and ``offset`` repeated over their blocks. Made by `quantize`, by `quantize_params` and by the
    checkpoint readers; the constructor stores what it is given, since JAX itself calls it with tracers, shapes and
    None.

    Static fields hold no absolute axis and no absolute shape, so that a QTensor with a leading axis on every leaf can
    be scanned, vmapped, stacked and sliced like the float array it stands for.

    Arithmetic by `jax.tree.map` reaches codes and scales apart. Where it changes the dtype of the codes, what uses the
    result raises. ``a + a``, ``-a`` and ``a * 2`` of integers do not: use `jaxquant.qat.update_params`, or pass
    ``is_leaf=lambda x: isinstance(x, QTensor)``.

    There is no ``__jax_array__``: using a QTensor where a float array is expected raises instead of dequantizing
    silently. Call `dequantize`, or use the functions in `jaxquant.ops`.

    Attributes:
      codes: uint8 bit patterns packed along the last axis for types below 8 bits, else int8, uint8 or fp8; stored with
        the ``minor`` axes last (contraction-minor). Or one code per element: in int8 or uint8, which views make; in
        int4, of which a TPU has two in a byte, as a signed code, the pattern of a 4-bit float, or 8 less than any other
        code (`jaxquant.core.layout.Layout`). Codes of fp8 are stored as bytes, or in their own dtype beside a seal.
      scale: float array of the logical rank, one entry per block, positive unless imported otherwise; or a QTensor,
        where the scales are quantized themselves (nvfp4, double quantization), or the product of two factors that are
        multiplied one after the other, each product rounded (LLM.int8(); ``qtype="float32"``).
      zero_point: the code of real 0, an integer array of the scale's shape, or None. Some imported formats have floats;
        ``q - zero_point`` is then rounded to their dtype, as the format's own library does.
      offset: real units added to each block (formats that store minima instead of zero points), a float array of the
        scale's shape, or a QTensor, or None. The product is rounded to its dtype before it is added.
      permutation: where columns were reordered to make groups consecutive (GPTQ's act-order): stored position j along
        the `permuted_axis` holds the logical element ``permutation[j]``. Of the logical rank, with size 1 on the other
        axes unless the tensor is stacked; or None.
      seal: False for each block along the axes without groups, where codes are in fp8; or None. fp8 keeps its dtype in
        arithmetic, and a bool does not.
      qtype: name of the number type.
      dtype: dtype of the dequantized array.
      minor: the logical axes (negative) that are stored last, in this order.
      length: codes in a stored row; None unless packed.
      split: the logical axis (negative) that is stored as two, blocks of whole groups and their elements; or None.
      joined: how many of the last stored axes are stored as one, each with scales of its own; 0 if none are. (Static
        fields have no sizes: the scale has them.)

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> w = jnp.linspace(-1.0, 1.0, 256 * 512).reshape(256, 512)
      >>> spec = jq.QuantSpec("int4", granularity=jq.PerGroup(64))
      >>> jq.quantize(w, spec, reduce_axes=(-2,))
      QTensor(int4[256, 512] -> float32, group 64 on axis -2, symmetric, 72.0 KiB)
    """

    __slots__ = (
        *("dtype", "joined", "kept", "length", "minor", "offset", "permutation", "qtype"),
        *("scale", "seal", "split", "zero_point"),
    )

    kept: jax.Array | Layer
    scale: Scale
    zero_point: jax.Array | None
    offset: Scale | None
    permutation: jax.Array | None
    seal: jax.Array | None
    qtype: str
    dtype: np.dtype
    minor: tuple[int, ...]
    length: int | None
    split: int | None
    joined: int

    def __init__(
        self,
        codes: Any,
        scale: Any,
        zero_point: Any,
        offset: Any = None,
        permutation: Any = None,
        seal: Any = None,
        *,
        qtype: str,
        dtype: DTypeLike,
        minor: tuple[int, ...] = (),
        length: int | None = None,
        split: int | None = None,
        joined: int = 0,
    ):
        self.kept = viewed(codes, own_dtype(qtype), np.dtype(np.uint8)) if seal is None else codes
        self.scale, self.zero_point = scale, zero_point
        self.offset, self.permutation, self.seal = offset, permutation, seal
        self.qtype, self.dtype = qtype, np.dtype(dtype)
        self.minor, self.length, self.split, self.joined = tuple(minor), length, split, joined

    # -- pytree ----------------------------------------------------------------------------------------------------
    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[object, PyTree], ...], _Static]:
        children, aux = QTensor.tree_flatten(self)
        return tuple((jax.tree_util.GetAttrKey(n), x) for n, x in zip(LEAVES, children, strict=True)), aux

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], _Static]:
        children = (self.kept, self.scale, self.zero_point, self.offset, self.permutation, self.seal)
        return children, (self.qtype, self.dtype, self.minor, self.length, self.split, self.joined)

    @classmethod
    def tree_unflatten(cls, aux: _Static, children: Iterable[PyTree]) -> QTensor:
        qtype, dtype, minor, length, split, joined = aux
        codes, *rest, seal = children
        leaves = dict(zip(LEAVES, (guarded(codes), *rest, guarded(seal)), strict=True))
        return cls(**leaves, qtype=qtype, dtype=dtype, minor=minor, length=length, split=split, joined=joined)

    @property
    def stored(self) -> jax.Array:
        """The leaf of codes as an array: cut out of its stack if it is a `Layer`."""
        return self.kept.array() if isinstance(self.kept, Layer) else self.kept

    @property
    def codes(self) -> jax.Array:
        """The codes in their own dtype. Codes of fp8 are stored as uint8 patterns, or in fp8 beside a seal."""
        if self.seal is not None:  # floats, but codes have no gradient
            traced = isinstance(stored := self.stored, jax.core.Tracer)
            return jax.lax.stop_gradient(typing.cast(jax.Array, stored)) if traced else stored
        return viewed(self.stored, np.dtype(np.uint8), own_dtype(self.qtype))

    # -- attributes of an array ----------------------------------------------------------------------------------------
    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, equal to the float array's."""
        stored = self._stored_shape
        return tuple(stored[i] for i in inverse(self.stored_order))

    @property
    def _stored_shape(self) -> tuple[int, ...]:
        """The sizes of the logical axes in stored order."""
        stored, at = tuple(self.kept.shape), self.block_axis
        if self.length is not None:
            return (*stored[:-1], self.length)
        if self.joined:
            stored = (*stored[:-1], *self._joined_sizes)
        return stored if at is None else (*stored[:at], stored[at] * stored[at + 1], *stored[at + 2 :])

    @property
    def _joined_sizes(self) -> tuple[int, ...]:
        """The sizes of the axes that are stored as one."""
        return tuple(self.scale.shape[axis] for axis in self.stored_order[self.ndim - self.joined :])

    @property
    def block_axis(self) -> int | None:
        """Where blocks of the ``split`` axis are stored; their elements are on the next axis."""
        return None if self.split is None else self.stored_order.index(self.ndim + self.split)

    @property
    def ndim(self) -> int:
        """Rank of the logical array."""
        return len(self.kept.shape) - (self.split is not None) + max(self.joined - 1, 0)

    @property
    def size(self) -> int:
        """Elements of the logical array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """True bytes of all leaves (codes, scales, zero points and so on), from bit widths."""
        return sum(nbytes_of(leaf) for leaf in jax.tree.leaves(self, is_leaf=lambda x: isinstance(x, Layer)))

    @property
    def symmetric(self) -> bool:
        """Whether there is neither zero point nor offset."""
        return self.zero_point is None and self.offset is None

    @property
    def type(self) -> QType:
        """The number type, in full."""
        return _type(self.qtype)

    @property
    def stored_order(self) -> tuple[int, ...]:
        """The logical axes in the order in which codes are stored."""
        return stored_order(self.ndim, self.minor)

    @property
    def permuted_axis(self) -> int:
        """The axis of the permutation, if there is one: the one that is split, or else the last stored one."""
        return self.stored_order[-1] if self.split is None else self.ndim + self.split

    def replace(self, **fields: Any) -> QTensor:
        """A QTensor with other fields than this one."""
        fields = {"codes": self.kept} | fields  # as they are kept: a layer stays in its stack
        return QTensor(**{name: getattr(self, name) for name in FIELDS if name not in fields} | fields)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """The float array this stands for; see `jaxquant.dequantize`."""
        return dequantize(self, dtype)

    # To a type checker, what raises does not exist.
    if not TYPE_CHECKING:

        def __array__(self, *_, **__):
            """No conversion by NumPy, which would make an array of one Python object of it."""
            todo = "Run the function through jaxquant.quantized, call .dequantize() for its values, or keep it with "
            todo += "jaxquant.io.save"
            raise quant_error("QTensor", "this is no array", todo=todo, tensor=repr(self))

        def __getattr__(self, name):
            """Called for attributes that do not exist, such as those of arrays: T, astype, at, mean."""
            todo = "Call .dequantize() for its values, or run the function through jaxquant.quantized"
            message = f"QTensor has no attribute {name!r}, since it is no array. {todo}."
            raise AttributeError(message, name=name, obj=self)

        def _no_operator(self, *_):
            """No operator of Python's: in a function of params, `jaxquant.quantized` replaces the operations."""
            todo = "Run the function through jaxquant.quantized, use jaxquant.ops, or call .dequantize() for its values"
            raise quant_error("QTensor", "operators take arrays, and this is none", todo=todo, tensor=repr(self))

        __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_operator
        __matmul__ = __rmatmul__ = __pow__ = __neg__ = __abs__ = __getitem__ = _no_operator

    def checked(self, path: str | None = None) -> QTensor:
        """Returns itself; raises if its leaves are no codes and scales, and names the parameter's path if given.

        Asked where values are made of codes, since JAX builds trees of anything: shapes, shardings, gradients, flags.
        """
        if not self._fits():
            codes, scale = (leaf if _is_array(leaf) else type(leaf).__name__ for leaf in (self.kept, self.scale))
            raise quant_error(
                "QTensor",
                f"its leaves are no {self.qtype} codes and scales: something has computed with them",
                path=path,
                todo="Dequantize, compute, and quantize again; let jax.tree.map treat it as a leaf with "
                "is_leaf=lambda x: isinstance(x, QTensor)",
                codes=codes,
                scale=scale,
            )
        return self

    def _fits(self) -> bool:
        """Whether codes have the dtype and the axes that the static fields say, and scales a place for each block."""
        codes, scale = self.kept, self.scale
        if not _is_array(codes) or not (isinstance(scale, QTensor) or _is_array(scale)):
            return False
        if isinstance(scale, QTensor) and not scale._fits():
            return False
        if self.qtype == FACTOR.name:
            dtype = np.dtype(np.float32)
        else:
            own = self.seal is not None or (self.type.kind == "int" and self.length is None)
            dtype = self.type.code_dtype if own else np.dtype(np.uint8)
        if codes.dtype != dtype and not self.in_int4:
            return False
        named = (*self.minor, *(() if self.split is None else (self.split,)))
        if self.ndim != len(scale.shape) or any(axis < -self.ndim for axis in named):
            return False
        if self.seal is not None and (not _is_array(self.seal) or self.seal.dtype != bool):
            return False
        if self.length is not None and codes.shape[-1:] != (packed_length(self.length, self.type.bits),):
            return False
        return all(n % s == 0 for n, s in zip(self.shape, scale.shape, strict=True))

    @property
    def in_int4(self) -> bool:
        """Whether the codes are an array of int4."""
        return self.length is None and self.kept.dtype == jnp.int4 and self.type.packed and self.type.bits <= 4

    def unpacked(self) -> jax.Array:
        """Codes one per element (``type.code_dtype``), in stored order: the ``minor`` axes last."""
        self.checked()
        if self.in_int4:
            return from_int4(self.stored.reshape(self._stored_shape), self.type)
        if self.length is None:
            return self.codes.reshape(self._stored_shape) if self.is_reshaped else self.codes
        return from_bits(unpack(self.codes, self.type.bits, self.length), self.type)

    def logical_codes(self) -> jax.Array:
        """Codes one per element, in the logical axis order; a permuted axis stays permuted."""
        return transpose(self.unpacked(), inverse(self.stored_order))

    def store(self, minor: tuple[int, ...]) -> QTensor:
        """The same values with other axes stored last, counted from the end; ``()`` is the float array's own order.

        Raises:
          QuantError: if an axis is not one from ``-ndim`` to -1, or is named twice.
        """
        if tuple(minor) == self.minor:
            return self
        if len(set(minor)) != len(minor) or not set(minor) <= set(range(-self.ndim, 0)):
            todo = f"Name axes from {-self.ndim} to -1, each once"
            raise quant_error("store", "minor must be axes counted from the end", todo=todo, minor=minor, tensor=self)
        return (_stored if self.unpermuting_adds else _store)(self, tuple(minor))

    @property
    def layout(self) -> Layout:
        """The layout of the codes; see `jaxquant.core.layout.Layout`. Only fp8 has the native one."""
        if self.seal is not None:
            return "native"
        one_each = self.length is None and (self.type.packed or self.split is not None)
        return "elements" if one_each else "packed"

    @property
    def unpermuting_adds(self) -> bool:
        """Whether `unpermuted` computes values that are sums, which a program of more than it could round otherwise."""
        quantized = (v for v in (self.scale, self.offset) if isinstance(v, QTensor))
        return self.permutation is not None and any(_adds(v) for v in quantized)

    def apart(self) -> QTensor:
        """The same values, with codes copied out if they are a `Layer` of a stack."""
        return self.replace(codes=self.codes) if isinstance(self.kept, Layer) else self

    @property
    def stays_in_stack(self) -> bool:
        """Whether kernels find the layers of this stack in it: codes one per element, or those of experts."""
        return self.length is None or self.ndim == 4

    def layer_of(self, stack: QTensor, index: jax.Array) -> QTensor:
        """This layer, with its codes given as a `Layer` of the stack, without a copy."""
        return self.replace(codes=Layer(stack, index))

    def in_stack(self, value: Any) -> Any:
        """The array of the whole stack in place of ``kept``, or of a scale, zero point or offset: the very object.

        Any other value is unchanged. So are scales that are no slices of the stack's: those of a layer that was
        transposed, whose blocks were divided, or whose scales are no longer quantized.
        """
        if not isinstance(self.kept, Layer):
            return value
        stack = self.kept.stack
        if value is self.kept:
            return stack.kept
        own, whole = (jax.tree.leaves((q.scale, q.zero_point, q.offset)) for q in (self, stack))
        pairs = zip(own, whole, strict=True) if self.minor == stack.minor and len(own) == len(whole) else ()
        return next((v for leaf, v in pairs if leaf is value and leaf.shape == v.shape[1:]), value)

    @property
    def layer(self) -> jax.Array | None:
        """The index of this layer in its stack; None if it is in none."""
        return self.kept.index if isinstance(self.kept, Layer) else None

    @property
    def is_reshaped(self) -> bool:
        """Whether an axis is stored as two, or several as one."""
        return self.split is not None or self.joined > 0

    def whole(self) -> QTensor:
        """The same with no axis split, and none joined."""
        if not self.is_reshaped:
            return self
        if self.permutation is not None and self.permuted_axis != self.stored_order[-1]:
            return self.unpermuted()  # without the split, the last stored axis would be the permuted one
        return self.replace(codes=self.stored.reshape(self._stored_shape), split=None, joined=0)

    def unjoined(self) -> QTensor:
        """The same with no axes joined."""
        if not self.joined:
            return self
        return self.replace(codes=self.stored.reshape(*self.kept.shape[:-1], *self._joined_sizes), joined=0)

    def unpermuted(self) -> QTensor:
        """The same values with their elements in logical order: one scale per element where groups are scattered."""
        permutation = self.permutation
        if permutation is None:
            return self
        axis, n = self.permuted_axis, self.shape[self.permuted_axis]

        def move(x: jax.Array) -> jax.Array:
            return _unpermute(x, permutation, axis)

        def spread(value: jax.Array) -> jax.Array:
            return value if value.shape[axis] == 1 else move(jnp.repeat(value, n // value.shape[axis], axis=axis))

        def whole(value: Scale) -> Scale:
            return value if value.shape[axis] == 1 else spread(flat(value))

        zero_point = None if self.zero_point is None else spread(self.zero_point)
        offset = None if self.offset is None else whole(self.offset)
        rest: dict[str, Any] = {"qtype": self.qtype, "dtype": self.dtype, "minor": self.minor}
        codes = move(self.logical_codes())
        return from_codes(codes, whole(self.scale), zero_point, offset, **rest)

    @property
    def scheme(self) -> str:
        """How it is quantized, in words, without its shape.

        Example:
          >>> import jax.numpy as jnp, jaxquant as jq
          >>> spec = jq.QuantSpec("int4", granularity=jq.PerGroup(64))
          >>> jq.quantize(jnp.ones((128, 8)), spec, reduce_axes=(-2,)).scheme
          'int4, groups of 64, symmetric'
        """
        shared = granularity(self.shape, tuple(self.scale.shape))
        words = [self.qtype, shared, "symmetric" if self.symmetric else "asymmetric"]
        words += ["two-level scales"] if isinstance(self.scale, QTensor) else []
        words += ["act-order"] if self.permutation is not None else []
        return ", ".join(words)

    def __repr__(self) -> str:
        try:
            shape, size = self.shape, in_bytes(self.nbytes)
            per = granularity_by_axes(shape, tuple(self.scale.shape))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # leaves that are not arrays
            return f"QTensor({self.qtype}, codes={self.kept!r}, scale={self.scale!r}, zero_point={self.zero_point!r})"
        kind = "symmetric" if self.symmetric else "asymmetric"
        kind += "" if self.permutation is None else ", permuted"
        size += {"packed": "", "elements": ", one code per element", "native": ", codes in fp8"}[self.layout]
        return f"QTensor({self.qtype}[{', '.join(map(str, shape))}] -> {self.dtype.name}, {per}, {kind}, {size})"


def from_codes(
    codes: jax.Array,
    scale: Scale,
    zero_point: jax.Array | None,
    offset: Scale | None = None,
    permutation: jax.Array | None = None,
    *,
    qtype: str,
    dtype: DTypeLike,
    minor: tuple[int, ...] = (),
) -> QTensor:
    """A QTensor from codes in logical order (but for the permutation), one per element.

    Args:
      codes: the array's codes (``QType.code_dtype``).
      scale: one per block, of the array's rank; float array or QTensor.
      zero_point, offset: of the scale's shape, or None.
      permutation: the order of the codes along the last stored axis, or None; see `QTensor`.
      qtype: name of the number type.
      dtype: dtype of the dequantized array.
      minor: axes to store last.

    Returns:
      The `QTensor`, its codes packed if the type is narrower than a byte.
    """
    info = _type(qtype)
    order, length, stored = stored_order(codes.ndim, minor), None, codes
    if info.packed:
        length = codes.shape[order[-1]]
        stored = pack(to_bits(codes, info), info.bits, order[-1])
    # XLA fuses packing with no other operation, so a plain transpose of the bytes is fast.
    stored = transpose(stored, order) if info.packed else written_transposed(stored, order=tuple(order))
    return QTensor(stored, scale, zero_point, offset, permutation, qtype=qtype, dtype=dtype, minor=minor, length=length)


def _stored(q: QTensor, minor: tuple[int, ...]) -> QTensor:
    q = q.unpermuted()
    return from_codes(q.logical_codes(), q.scale, q.zero_point, q.offset, qtype=q.qtype, dtype=q.dtype, minor=minor)


_store = jitted(static_argnums=1)(_stored)  # one program, also in eager use


def _unpermute(x: jax.Array, permutation: jax.Array, axis: int) -> jax.Array:
    """``y`` with ``y[permutation[j]] = x[j]`` along an axis."""
    place = jnp.argsort(permutation, axis=axis)
    if place.size == x.shape[axis]:
        return jnp.take(x, place.reshape(-1), axis=axis)
    return jnp.take_along_axis(x, place, axis=axis)


@overload
def flat(value: Scale) -> jax.Array: ...


@overload
def flat(value: Scale | None) -> jax.Array | None: ...


def flat(value: Scale | None) -> jax.Array | None:
    """A per-block value as an array: its dequantized values if it is quantized itself."""
    return dequantize(value) if isinstance(value, QTensor) else value


def scale_values(scale: Scale) -> jax.Array:
    """The real scales of a QTensor's ``scale`` field, quantized or not, in at least float32."""
    if isinstance(scale, QTensor):
        return dequantize(scale)
    if scale.dtype == jnp.float8_e8m0fnu:  # powers of two have no gradient in their own type
        scale = jax.lax.stop_gradient(scale)
    return scale if scale.dtype == jnp.float64 else scale.astype(jnp.float32)


def _factors(scale: Scale) -> tuple[jax.Array, ...]:
    """The factors of the grid values, in the order of multiplication."""
    if not isinstance(scale, QTensor) or scale.qtype != FACTOR.name:
        return (scale_values(scale),)
    # The barrier keeps XLA from folding two constants into one.
    first = jax.lax.optimization_barrier(jax.lax.stop_gradient(scale.logical_codes()))
    return first, jnp.broadcast_to(scale_values(scale.scale), first.shape)


def cast(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``x.astype(dtype)``, but numbers that overflow become the largest finite one.

    A code may stand for up to half a step more than the largest element, which no dtype can always hold.
    """
    info = finfo(dtype)
    if info.maxexp <= finfo(x.dtype).maxexp:
        x = jnp.clip(x, float(info.min), float(info.max))
    return x.astype(dtype)


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> jax.Array:
    """The float array a QTensor stands for: ``(q - zero_point) * scale + offset``.

    It is formed in float32 (float64 for a float64 tensor) and rounded once to ``dtype``. Only where an imported format
    has zero points or offsets in a narrower float dtype is the intermediate value rounded to that dtype first, and
    where its scale has two factors, to float32 between them, as by the format's own library.

    Args:
      q: the quantized array.
      dtype: float dtype of the result; by default the dtype of the array that was quantized.

    Returns:
      Array of ``q.shape``.

    Raises:
      QuantError: if ``q`` is not a QTensor or ``dtype`` is not a float dtype.

    Gradient: with respect to ``scale``, ``q - zero_point``; to ``offset``, 1; codes are integers and have none.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> q = jq.quantize(jnp.array([-1.0, 0.0, 0.5, 1.0]), jq.QuantSpec("int8"), reduce_axes=(-1,))
      >>> jq.dequantize(q).round(3)
      Array([-1.   ,  0.   ,  0.504,  1.   ], dtype=float32)

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 1.
    """
    if not isinstance(q, QTensor):
        raise quant_error("dequantize", "the operand must be a QTensor", todo="Pass what quantize returned", q=q)
    try:
        out = np.dtype(q.dtype if dtype is None else dtype)
    except TypeError:
        out = None
    if out is None or not jnp.issubdtype(out, jnp.floating):
        raise quant_error(
            "dequantize", "dtype must be a float dtype", todo="Use float32, bfloat16 or float16", dtype=dtype
        )
    q.checked()
    # One program, also in eager use: an operation at a time would compile up to 20. A sum after a product stays apart
    # from it there, or the compiler may round the two as one.
    return (_dequantized if _adds(q) else _dequantize)(q, out)


def _adds(q: QTensor) -> bool:
    """Whether an offset is added to its values or to those of its scales."""
    return q.offset is not None or (isinstance(q.scale, QTensor) and _adds(q.scale))


def _dequantized(q: QTensor, out: np.dtype) -> jax.Array:
    compute = jnp.float64 if np.dtype(q.dtype) == np.float64 else jnp.float32
    view = BlockView.of_scale(q.shape, tuple(q.scale.shape))
    values = view.split(values_of(jax.lax.stop_gradient(q.logical_codes()), q.type, compute))
    if q.zero_point is not None:
        values = _rounded(values - view.split_scale(q.zero_point).astype(compute), q.zero_point.dtype)
    for factor in _factors(q.scale):
        values = values * view.split_scale(factor).astype(compute)
    if q.offset is not None:
        values = _rounded(values, q.offset.dtype) + view.split_scale(scale_values(q.offset)).astype(compute)
    values = cast(view.join(values), out)
    return values if q.permutation is None else _unpermute(values, q.permutation, q.permuted_axis)


_dequantize = jitted(static_argnums=1)(_dequantized)


def _rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``x`` with the precision of a narrower float dtype; XLA would leave the two casts out."""
    if not jnp.issubdtype(dtype, jnp.floating) or finfo(dtype).bits >= finfo(x.dtype).bits:
        return x
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)

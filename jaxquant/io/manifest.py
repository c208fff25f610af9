"""Trees to manifest nodes and back; the grammar is in `jaxquant.io.native`.

`encode` returns the node and the arrays to write, `decode` the tree with a `SavedArray` in the place of each array.
They do no input or output. Both check a QTensor by the same rules, so that every tree that can be saved can be loaded:
`check_qtensor` before its arrays are read, `check_values` after.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jaxquant.core import finite
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.layout import minor_of
from jaxquant.core.packing import packed_length
from jaxquant.core.paths import Params, key_of
from jaxquant.core.qtensor import QTensor, Scale, scale_values
from jaxquant.core.qtypes import FACTOR, QTYPES
from jaxquant.core.relayout import laid_out
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import to_host
from jaxquant.io.patterns import NAMELESS, pattern_spec
from jaxquant.io.safetensors import DTYPES, SafetensorsFile, TensorSpec, is_shape
from jaxquant.io.strict_json import Json

__all__ = [
    "DAMAGED",
    "MAX_DEPTH",
    "Encoder",
    "SavedArray",
    "check_qtensor",
    "check_values",
    "decode",
    "encode",
    "not_finite",
    "stored_spec",
]

DAMAGED = "The file is damaged: fetch it or save it again"
"""The remedy for values that `check_values` refuses in a file."""

#: The deepest nesting of containers, counting a QTensor in the place of a scale. Deeper trees are mistakes (a list that
#: holds itself) or attacks on the stack.
MAX_DEPTH = 100
_SUPPORTED = {dtype.name: dtype for dtype in (*DTYPES.values(), *NAMELESS)}
_FIELDS = ("qtype", "dtype", "minor", "length", "codes", "scale", "zero_point")
_RARE = ("offset", "permutation")  # left out of the manifest if None


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """An array in a file that is not read yet: its name in the file, its dtype and its shape."""

    name: str
    spec: TensorSpec

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the array."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.spec.shape


def stored_spec(spec: TensorSpec) -> TensorSpec:
    """The stored form of an array: unchanged, or as bit patterns."""
    return pattern_spec(spec) if spec.dtype in NAMELESS else spec


def _joined(path: tuple[str, ...]) -> str:
    return "/".join(path) or "array"  # a tree may be a single array, and a key may be empty


# -- the rules, in both directions -------------------------------------------------------------------------------------


_KEYS = "all strings or all 64-bit integers"  # JAX cannot sort a mixture


def _are_keys(keys: list[Hashable]) -> bool:
    return all(isinstance(key, str) for key in keys) or all(
        type(key) is int and -(1 << 63) <= key < 1 << 63 for key in keys
    )


def check_qtensor(q: QTensor, error: Callable[..., QuantError]) -> None:
    """Raises ``error(rule, todo=..., **got)`` unless the static fields, dtypes and shapes of ``q`` fit together."""
    todo = "Make it with quantize, or check the code that made it"
    if not isinstance(q.qtype, str) or q.qtype not in (*QTYPES, FACTOR.name):
        raise error("unknown number type", todo=f"Use one of {', '.join(QTYPES)}", qtype=q.qtype)
    if q.qtype == FACTOR.name and not (q.symmetric and q.permutation is None and math.prod(q.scale.shape) == 1):
        rule = "a scale of two factors has one outer factor, no zero point and no permutation"
        raise error(rule, todo=todo, scale=q.scale)
    info, codes, ndim = q.type, q.codes, len(q.codes.shape)
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype.name not in _SUPPORTED:
        raise error("dtype must be a float dtype", todo="Use float32, bfloat16 or float16", dtype=q.dtype)
    if codes.dtype != (np.uint8 if info.packed else info.code_dtype):
        raise error(f"not the dtype of {q.qtype} codes", todo=todo, codes=codes)
    if not info.packed and q.length is not None:
        raise error(f"{q.qtype} codes are not packed and have no length", todo=todo, length=q.length)
    if info.packed:
        if type(q.length) is not int or q.length < 0 or not ndim:
            raise error("packed codes need their length", todo=todo, length=q.length, codes=codes)
        if codes.shape[-1] != packed_length(q.length, info.bits):
            rule = f"{q.length} {q.qtype} codes take {packed_length(q.length, info.bits)} bytes"
            raise error(rule, todo=todo, length=q.length, codes=codes)
    if not all(type(axis) is int and -ndim <= axis < 0 for axis in q.minor) or len(set(q.minor)) != len(q.minor):
        raise error(f"minor must be different axes from -{ndim} to -1", todo=todo, minor=q.minor)
    if not jnp.issubdtype(q.scale.dtype, jnp.floating):
        raise error("scales must be floats", todo=todo, scale=q.scale)
    blocks = tuple(q.scale.shape)
    if len(blocks) != ndim or not all(n == s or (s and n % s == 0) for n, s in zip(q.shape, blocks, strict=True)):
        raise error("there must be one scale per block, and blocks that divide the array", todo=todo, scale=blocks)
    if q.zero_point is not None:
        if tuple(q.zero_point.shape) != blocks:
            raise error("zero_point must have the shape of scale", todo=todo, zero_point=q.zero_point, scale=blocks)
        if not any(jnp.issubdtype(q.zero_point.dtype, kind) for kind in (jnp.integer, jnp.floating)):
            raise error("zero points must be numbers", todo=todo, zero_point=q.zero_point)
    if isinstance(q.zero_point, QTensor) or isinstance(q.permutation, QTensor):
        raise error("zero points and permutations are arrays", todo=todo, weight=repr(q))
    if q.offset is not None and (tuple(q.offset.shape) != blocks or not jnp.issubdtype(q.offset.dtype, jnp.floating)):
        raise error("offset must be floats of the shape of scale", todo=todo, offset=q.offset, scale=blocks)
    if q.permutation is not None:
        last = q.stored_order[-1] if ndim else None
        allowed = tuple((n,) if i == last else (1, n) for i, n in enumerate(q.shape))
        found = tuple(q.permutation.shape)
        if len(found) != ndim or not ndim or any(n not in ok for n, ok in zip(found, allowed, strict=True)):
            raise error("the permutation must be one of the last stored axis", todo=todo, permutation=q.permutation)
        if not jnp.issubdtype(q.permutation.dtype, jnp.integer):
            raise error("a permutation has integers", todo=todo, permutation=q.permutation)


def check_values(q: QTensor, error: Callable[..., QuantError], *, todo: str) -> None:
    """Raises ``error(rule, todo=todo, **got)`` unless all numbers are finite and the permutation is one."""
    with np.errstate(all="ignore"):  # an overflow is found below
        scale, offset = scale_values(q.scale), None if q.offset is None else scale_values(q.offset)
    parts = {"the codes of a weight": q.codes, "scales": scale, "zero points": q.zero_point, "offsets": offset}
    for what, numbers in parts.items():
        if numbers is not None and (bad := not_finite(numbers)):
            raise error(f"{what} must be finite", todo=todo, bad=bad, weight=repr(q))
    if q.permutation is not None:
        axis = q.stored_order[-1]
        numpy: Any = jnp if isinstance(q.permutation, jax.Array) else np
        order = numpy.moveaxis(numpy.sort(q.permutation, axis), axis, -1)
        if bool(numpy.any(order != numpy.broadcast_to(numpy.arange(order.shape[-1]), order.shape))):
            raise error("a permutation must have each position once", todo=todo, weight=repr(q))


def not_finite(x: jax.Array | np.ndarray) -> int:
    """The number of elements of an array that are NaN or infinite; a large one on devices is looked at there."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return 0
    return finite.not_finite(x) if isinstance(x, jax.Array) else int(np.count_nonzero(~np.isfinite(to_host(x))))


# -- to nodes ----------------------------------------------------------------------------------------------------------


def encode(params: Params) -> tuple[Json, dict[str, tuple[jax.Array | np.ndarray, TensorSpec]]]:
    """The node of a tree, and its arrays by name, each with its spec; `QuantError` if something cannot be saved."""
    encoder = Encoder()
    return encoder.node(params, ()), encoder.arrays


class Encoder:
    """Makes nodes, and collects their arrays under names that are not ``taken``."""

    def __init__(self, taken: Collection[str] = ()):
        self.arrays: dict[str, tuple[jax.Array | np.ndarray, TensorSpec]] = {}
        self._taken = taken

    def node(self, value: PyTree, path: tuple[str, ...]) -> Json:
        place = _joined(path)
        self._check_depth(path, place)
        if value is None:
            return None
        if isinstance(value, QTensor):
            return self.qtensor(value, path, place)
        if type(value) in (list, tuple):
            return {type(value).__name__: [self.node(item, (*path, str(i))) for i, item in enumerate(value)]}
        children = value if isinstance(value, Mapping) else _children(value, place)
        if children is not None:
            keys = _checked_keys(children, place)
            return {"dict": [[key, self.node(children[key], (*path, str(key)))] for key in keys]}
        return self.array(value, place)

    def qtensor(self, q: QTensor, path: tuple[str, ...], place: str) -> Json:
        self._check_depth(path, place)
        own = q.is_reshaped or q.seal is not None
        if getattr(q.codes, "dtype", None) == jnp.int4 or own:  # files have packed codes
            q = laid_out(q.checked(), "packed")
        fields = {
            "codes": self.array(q.codes, f"{place}.codes"),
            "scale": self.per_block(q.scale, (*path, "scale"), f"{place}.scale"),
            "zero_point": None if q.zero_point is None else self.array(q.zero_point, f"{place}.zero_point"),
        }
        for name in _RARE:
            if getattr(q, name) is not None:
                fields[name] = self.per_block(getattr(q, name), (*path, name), f"{place}.{name}")

        def error(rule: str, **got: Any) -> QuantError:
            return quant_error("save", rule, path=place, **got)

        check_qtensor(q, error)
        check_values(q, error, todo="Look for NaN and inf in the array that was quantized")
        static = {"qtype": q.qtype, "dtype": q.dtype.name, "minor": list(q.minor), "length": q.length}
        return {"qtensor": static | fields}

    def per_block(self, value: Scale, path: tuple[str, ...], place: str) -> Json:
        return self.qtensor(value, path, place) if isinstance(value, QTensor) else self.array(value, place)

    def array(self, value: PyTree, place: str) -> Json:
        spec = _checked_array(value, place)
        name = self._unused(place)
        self.arrays[name] = (value, spec)
        if spec.dtype not in NAMELESS:
            return name
        return {"bits": {"name": name, "dtype": spec.dtype.name, "shape": list(spec.shape)}}

    def _check_depth(self, path: tuple[str, ...], place: str) -> None:
        if len(path) > MAX_DEPTH:
            rule, todo = f"the tree is more than {MAX_DEPTH} levels deep", "Look for a container that holds itself"
            raise quant_error("save", rule, todo=todo, path=place[:200])

    def _unused(self, place: str) -> str:
        # Half of a surrogate pair is a character to Python and not to UTF-8.
        place = place.encode("utf-8", "backslashreplace").decode()
        names = itertools.chain([place], (f"{place}~{n}" for n in itertools.count(2)))
        return next(n for n in names if n not in self.arrays and n not in self._taken and n != "__metadata__")


def _children(value: PyTree, place: str) -> dict[Hashable, PyTree] | None:
    """The children of an instance of a class registered with JAX, by the names of its key paths; None for a leaf."""
    found = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)[0]
    if any(not path for path, _ in found):
        return None
    children = {key_of(path[0]): child for path, child in found}
    if len(children) != len(found):
        todo = "Give its children different keys where it is registered"
        raise quant_error("save", "a container has a key twice", todo=todo, path=place, type=type(value).__qualname__)
    return children


def _checked_keys(value: Mapping[Any, PyTree], place: str) -> list[Any]:
    keys = list(value)
    if not _are_keys(keys):
        rule, types = f"the keys of a dict must be {_KEYS}", tuple(sorted({type(key).__name__ for key in keys}))
        raise quant_error("save", rule, todo="Rename the keys", path=place, types=types)
    return sorted(keys)


def _checked_array(value: object, place: str) -> TensorSpec:
    """The spec of a leaf that can be saved."""

    def error(rule: str, **got: Any) -> QuantError:
        return quant_error("save", rule, path=place, **got)

    if isinstance(value, jax.core.Tracer):
        raise error("a traced array has no values yet", todo="Call save outside jit, grad and vmap", leaf=value)
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise error("only arrays can be saved", todo=_remedy(value), leaf=value, type=type(value).__qualname__)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise error("a random key is not an array", todo="Save jax.random.key_data(key)", dtype=str(value.dtype))
    dtype = value.dtype.newbyteorder("=")
    if dtype not in NAMELESS and dtype not in DTYPES.values():
        raise error("this dtype cannot be saved", todo=f"Cast it to one of {', '.join(_SUPPORTED)}", dtype=str(dtype))
    if not is_shape(value.shape):
        raise error("too many or too large dimensions", todo="Reshape it", shape=value.shape)
    if isinstance(value, jax.Array):
        if value.is_deleted():
            raise error("the array was deleted or donated", todo="Save what the function returned", dtype=dtype)
        if not (value.is_fully_addressable or value.is_fully_replicated):
            todo = "Gather it first, for example with jax.experimental.multihost_utils.process_allgather"
            raise error("parts of the array are on other machines", todo=todo, dtype=dtype, shape=value.shape)
    return TensorSpec(dtype, value.shape)


def _remedy(value: object) -> str:
    if isinstance(value, int | float | complex):
        return "Make it an array with jnp.asarray"
    if callable(value):
        return "Save the arrays of the module alone, for example nnx.state(model) or equinox.filter(model, is_array)"
    return "Register its class with JAX (jax.tree_util.register_dataclass), or make it of dicts, lists and arrays"


# -- from nodes --------------------------------------------------------------------------------------------------------


def decode(file: SafetensorsFile, *roots: tuple[Json, tuple[str, ...]]) -> list[PyTree]:
    """The tree of each root, a node and its path, with a `SavedArray` for each array of the file.

    Raises:
      QuantError: if the nodes do not fit the file's arrays.
    """
    decoder = _Decoder(file)
    trees = [decoder.tree(node, path) for node, path in roots]
    if decoder.unused:
        name = min(decoder.unused)
        raise decoder.error("the manifest does not mention this array", (name,), arrays=len(decoder.unused))
    return trees


class _Decoder:
    def __init__(self, file: SafetensorsFile):
        self.file, self.unused = file, dict(file.tensors)

    def error(self, rule: str, path: tuple[str, ...], /, *, todo: str = "", **got: Any) -> QuantError:
        # The remedy for the maker of a QTensor does not help a reader of the file, so it is replaced.
        todo = "The manifest does not describe this file: save it again, or remove 'jaxquant' from its metadata"
        return self.file.error(rule, _joined(path), todo=todo, **got)

    def tree(self, node: Json, path: tuple[str, ...]) -> PyTree:
        self._check_depth(path)
        if node is None:
            return None
        kind, content = next(iter(node.items())) if isinstance(node, dict) and len(node) == 1 else (None, None)
        if kind == "dict":
            return self.dict(content, path)
        if kind in ("list", "tuple") and isinstance(content, list):
            items = [self.tree(item, (*path, str(i))) for i, item in enumerate(content)]
            return items if kind == "list" else tuple(items)
        if kind == "qtensor":
            return self.qtensor(content, path)
        return self.array(node, path)

    def dict(self, content: Json, path: tuple[str, ...]) -> dict[Hashable, PyTree]:
        if not isinstance(content, list) or not all(isinstance(item, list) and len(item) == 2 for item in content):
            raise self.error("a dict must be a list of [key, node]", path, node=content)
        keys = [key for key, _ in content]
        if not _are_keys(keys):
            raise self.error(f"the keys of a dict must be {_KEYS}", path, keys=tuple(keys))
        if len(set(keys)) != len(keys):
            raise self.error("a dict has a key twice", path, keys=tuple(keys))
        return {key: self.tree(value, (*path, str(key))) for key, value in content}

    def qtensor(self, content: Json, path: tuple[str, ...]) -> QTensor:
        if not isinstance(content, dict) or not set(_FIELDS) <= set(content):
            raise self.error(f"a QTensor needs the fields {', '.join(_FIELDS)}", path, node=content)
        self._check_depth(path)
        dtype, minor, scale = (content[name] for name in ("dtype", "minor", "scale"))
        if not isinstance(dtype, str) or dtype not in _SUPPORTED:
            raise self.error("unknown dtype", path, dtype=dtype)
        if not isinstance(minor, list):
            raise self.error("minor must be a list of axes", path, minor=minor)
        if not isinstance(content["qtype"], str):
            raise self.error("unknown number type", path, qtype=content["qtype"])
        q = QTensor(
            self.array(content["codes"], (*path, "codes")),
            self.per_block(scale, (*path, "scale")),
            *(
                None if content.get(name) is None else self.per_block(content[name], (*path, name))
                for name in ("zero_point", *_RARE)
            ),
            qtype=content["qtype"],
            dtype=_SUPPORTED[dtype],
            minor=tuple(minor),
            length=content["length"],
        )
        check_qtensor(q, lambda rule, **got: self.error(rule, path, **got))
        return q.replace(minor=minor_of(q.stored_order))  # earlier versions wrote some orders by all axes

    def per_block(self, node: Json, path: tuple[str, ...]) -> QTensor | SavedArray:
        inner = node.get("qtensor") if isinstance(node, dict) else None
        return self.array(node, path) if inner is None else self.qtensor(inner, path)

    def array(self, node: Json, path: tuple[str, ...]) -> SavedArray:
        if isinstance(node, str):
            return SavedArray(node, self._take(node, path))
        bits = node.get("bits") if isinstance(node, dict) else None
        if not isinstance(bits, dict) or not {"name", "dtype", "shape"} <= set(bits):
            raise self.error("not a node of the manifest", path, node=node)
        name, dtype, shape = bits["name"], bits["dtype"], bits["shape"]
        if not isinstance(dtype, str) or _SUPPORTED.get(dtype) not in NAMELESS:
            raise self.error("not a dtype that is stored as bit patterns", path, dtype=dtype)
        if not is_shape(shape):
            raise self.error("not the shape of an array", path, shape_in_manifest=shape)
        spec, stored = TensorSpec(_SUPPORTED[dtype], tuple(shape)), self._take(name, path)
        if stored != pattern_spec(spec):
            raise self.error(f"{dtype}{shape} takes uint8{list(pattern_spec(spec).shape)}", path, array=stored)
        return SavedArray(name, spec)

    def _check_depth(self, path: tuple[str, ...]) -> None:
        if len(path) > MAX_DEPTH:
            raise self.error(f"the tree is more than {MAX_DEPTH} levels deep", path[:3])

    def _take(self, name: Json, path: tuple[str, ...]) -> TensorSpec:
        if not isinstance(name, str) or name not in self.unused:
            twice = isinstance(name, str) and name in self.file.tensors
            raise self.error("this array occurs twice" if twice else "this array is not in the file", path, name=name)
        return self.unused.pop(name)

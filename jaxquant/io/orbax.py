"""Trees with QTensors in Orbax checkpoints, with a manifest of the fields that Orbax drops.

Orbax restores a QTensor as a plain dict, without its static fields, and does not store some narrow dtypes. Here the
arrays of a tree are saved flat, under numbers, and beside them, as JSON, the manifest of `jaxquant.io.native` and the
dtype and shape of every array. Arrays that Orbax cannot store, or not at their true size, are saved as bit patterns:
fp8 element by element, on their own devices, others packed.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import Params, is_qtensor
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import Shardings
from jaxquant.io.manifest import DAMAGED, SavedArray, check_values, decode, encode, stored_spec
from jaxquant.io.patterns import NAMELESS, from_patterns, to_patterns
from jaxquant.io.safetensors import DTYPES, TensorSpec, is_shape
from jaxquant.io.strict_json import Json

__all__ = ["load_orbax", "save_orbax"]

_VERSION = 1
_HELD = frozenset(np.dtype(d) for d in ("?", "i1", "i2", "i4", "u1", "u2", "u4", "f2", "f4", ml_dtypes.bfloat16))


def _library() -> Any:
    try:
        import orbax.checkpoint
    except ModuleNotFoundError:
        todo = "Run: pip install orbax-checkpoint"
        raise quant_error("orbax", "Orbax is not installed", todo=todo) from None
    return orbax.checkpoint


def save_orbax(directory: str | os.PathLike[str], params: Params) -> None:
    """Saves a tree of arrays and QTensors as an Orbax checkpoint; each device writes its own shards.

    Args:
      directory: where to write; it must not exist.
      params: as for `jaxquant.io.save`.

    Raises:
      QuantError: as `jaxquant.io.save`, or if Orbax is not installed.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> q = jq.quantize(jnp.eye(4), jq.QuantSpec("int4"), reduce_axes=(-1,))
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jq.io.save_orbax(os.path.join(directory, "step"), {"w": q})
      ...     jq.io.load_orbax(os.path.join(directory, "step"))["w"]
      QTensor(int4[4, 4] -> float32, per channel on axis -2, symmetric, 24 B)

    Source: https://orbax.readthedocs.io.
    """
    library = _library()
    node, arrays = encode(params)
    entries = {
        name: [f"{i:06}", spec.dtype.name, list(spec.shape)] for i, (name, (_, spec)) in enumerate(arrays.items())
    }
    held = {entries[name][0]: _held(value, spec) for name, (value, spec) in arrays.items()}
    manifest = {"version": _VERSION, "tree": node, "arrays": entries}
    items = library.args.Composite(
        arrays=library.args.StandardSave(held or {"none": jnp.zeros(1)}), jaxquant=library.args.JsonSave(manifest)
    )
    with library.Checkpointer(library.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(os.path.abspath(directory), items)


def load_orbax(directory: str | os.PathLike[str], *, shardings: Shardings = None) -> Params:
    """Restores a checkpoint of `save_orbax`, with every static field.

    Args:
      directory: of the checkpoint.
      shardings: a tree in the structure of the saved one with a `jax.sharding.Sharding` for each array, as
        `jaxquant.shardings` returns; None for the default device.

    Returns:
      The tree; arrays of 64-bit dtypes as NumPy arrays where JAX would halve their width.

    Raises:
      QuantError: if there is no manifest, it contradicts itself or the arrays, scales or codes are NaN or infinite,
        or Orbax is not installed.
    """
    library = _library()
    place = os.path.abspath(directory)
    if not os.path.isdir(os.path.join(place, "jaxquant")):
        todo = "Restore it with Orbax, or save it with save_orbax"
        raise quant_error("load_orbax", "the checkpoint has no manifest of jaxquant", todo=todo, path=place)
    with library.Checkpointer(library.CompositeCheckpointHandler()) as checkpointer:
        manifest = checkpointer.restore(place, library.args.Composite(jaxquant=library.args.JsonRestore())).jaxquant
        source = _Arrays(place, manifest)
        (tree,) = decode(source, (manifest["tree"], ()))  # type: ignore[arg-type]
        where = None if shardings is None else dict(_named(tree, shardings, source))
        wanted = {
            source.keys[name]: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=_default(where, name))
            for name, spec in source.stored.items()
        }
        restored = checkpointer.restore(
            place,
            library.args.Composite(
                arrays=library.args.StandardRestore(wanted or {"none": jax.ShapeDtypeStruct((1,), jnp.float32)})
            ),
        ).arrays

    def one(leaf: PyTree) -> PyTree:
        value = jax.tree.map(lambda saved: _value(restored[source.keys[saved.name]], source.specs[saved.name]), leaf)
        if isinstance(value, QTensor):
            name = leaf.codes.name.removesuffix(".codes")
            check_values(value, functools.partial(source.error, name=name), todo=DAMAGED)
        return value

    return jax.tree.map(one, tree, is_leaf=is_qtensor)


class _Arrays:
    """The checked arrays of a manifest, in the form that `decode` reads."""

    def __init__(self, path: str, manifest: Json):
        self.path = path
        entries = manifest.get("arrays") if isinstance(manifest, dict) else None
        if not isinstance(entries, dict) or manifest.get("version") != _VERSION or "tree" not in manifest:
            raise self.error("not a manifest of this version", todo="Save it again")
        self.keys: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        known = {dtype.name: dtype for dtype in (*DTYPES.values(), *NAMELESS)}
        for name, entry in entries.items():
            if not isinstance(entry, list) or len(entry) != 3 or entry[1] not in known or not is_shape(entry[2]):
                raise self.error("not an array", name, todo="Save it again", entry=entry)
            self.keys[name], self.specs[name] = str(entry[0]), TensorSpec(known[entry[1]], tuple(entry[2]))
        #: In the form that `decode` reads: arrays whose dtype has no name in safetensors are bit patterns.
        self.tensors = {name: stored_spec(spec) for name, spec in self.specs.items()}
        self.stored = {name: _held_spec(spec) for name, spec in self.specs.items()}

    def error(self, rule: str, name: str | None = None, *, todo: str, **got: Any) -> QuantError:
        place = self.path if name is None else f"{self.path}, {name[:200]!r}"
        return quant_error("load_orbax", rule, todo=todo, path=place, **got)


def _held_spec(spec: TensorSpec) -> TensorSpec:
    if spec.dtype in _HELD:
        return spec
    if spec.dtype.itemsize == 1 and spec.dtype not in NAMELESS:
        return TensorSpec(np.dtype(np.uint8), spec.shape)
    if spec.dtype in NAMELESS:
        return stored_spec(spec)
    return TensorSpec(np.dtype(np.uint8), (*spec.shape, spec.dtype.itemsize))


def _held(value: jax.Array | np.ndarray, spec: TensorSpec) -> jax.Array | np.ndarray:
    """The array in a form that Orbax stores."""
    if spec.dtype in _HELD:
        return jnp.asarray(value)
    if spec.dtype.itemsize == 1 and spec.dtype not in NAMELESS:
        return lax.bitcast_convert_type(jnp.asarray(value), jnp.uint8)
    if spec.dtype in NAMELESS:
        return jnp.asarray(to_patterns(np.asarray(value)))
    raw = np.ascontiguousarray(value, spec.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
    return jnp.asarray(raw.reshape(_held_spec(spec).shape))


def _value(held: jax.Array, spec: TensorSpec) -> jax.Array | np.ndarray:
    """Inverse of `_held`."""
    if spec.dtype in _HELD:
        return held
    if spec.dtype.itemsize == 1 and spec.dtype not in NAMELESS:
        return lax.bitcast_convert_type(held, spec.dtype)
    host = np.asarray(held)
    array = (
        from_patterns(host, spec) if spec.dtype in NAMELESS else host.reshape(-1).view(spec.dtype).reshape(spec.shape)
    )
    return array if jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype else jnp.asarray(array)


def _named(tree: Any, shardings: Any, source: _Arrays) -> list[tuple[str, Any]]:
    """(name, sharding) of each array."""
    saved, treedef = jax.tree.flatten(tree)
    try:
        where = treedef.flatten_up_to(shardings)
    except ValueError as reason:
        todo = "Give the tree of jaxquant.shardings"
        raise source.error(f"shardings do not fit the tree ({reason})", todo=todo) from None
    assert all(isinstance(leaf, SavedArray) for leaf in saved)
    return [(leaf.name, sharding) for leaf, sharding in zip(saved, where, strict=True)]


def _default(where: dict[str, Any] | None, name: str) -> Any:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0]) if where is None else where[name]

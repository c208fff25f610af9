"""jaxquant's own checkpoints: a tree of arrays and QTensors in one safetensors file.

Any reader of safetensors sees plain arrays, each at its true size:

    params/Dense_0/bias                     an array, under the keys that lead to it, joined by "/"
    params/Dense_0/kernel.codes             a QTensor's codes, as in memory (sub-byte codes packed in uint8)
    params/Dense_0/kernel.scale             its scales; if they are quantized themselves (nvfp4, double quantization),
    params/Dense_0/kernel.scale.codes         they have arrays of their own
    params/Dense_0/kernel.scale.scale
    params/Dense_0/kernel.zero_point        its zero points, if it has any; in the same way .offset and .permutation

A tree that is a single array has the name "array". Where two paths give one name ("a/b" may be one key or two), "~2",
"~3" ... is appended. Readers do not parse names: the structure is in the manifest, a JSON text under "jaxquant" in the
file's ``__metadata__``:

    {"version": 1, "tree": <node>, "state": <node>, "metadata": {...}, "plan": "..."}

    <node> = null                                        None
           | "name"                                      the array of that name
           | {"bits": {"name", "dtype", "shape"}}        an array whose dtype safetensors has no name for: int4, uint4,
                                                         int2, uint2, float4_e2m1fn, float8_e3m4, float8_e4m3,
                                                         float8_e4m3b11fnuz, complex128
           | {"dict": [[key, <node>], ...]}              keys are all strings or all integers
           | {"list": [<node>, ...]}
           | {"tuple": [<node>, ...]}
           | {"qtensor": {"qtype", "dtype", "minor", "length", "codes", "scale", "zero_point"}}
                                                         the fields of a `QTensor`; the last three are nodes, like
                                                         "offset" and "permutation", which are left out if None

The array of a "bits" node is uint8: the elements, row-major, as one little-endian bit stream (two int4 to a byte, the
first in the low half). "metadata" is the user's, "plan" the text of ``plan.to_json()`` or null. "state" holds the
plan's state, under names that begin with "state"; it is left out if there is none. Every array of the file occurs in
the tree or the state exactly once. Readers ignore unknown fields of the manifest, and refuse unknown versions.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxquant.core.errors import QuantError, printable, quant_error
from jaxquant.core.paths import Params, is_qtensor
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import Values, to_device, to_host
from jaxquant.io.manifest import (
    DAMAGED,
    MAX_DEPTH,
    Encoder,
    SavedArray,
    check_values,
    decode,
    encode,
    not_finite,
    stored_spec,
)
from jaxquant.io.mapped import Leaves
from jaxquant.io.patterns import NAMELESS, from_patterns, to_patterns
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_parts, write_safetensors
from jaxquant.io.strict_json import Json, parse
from jaxquant.io.template import fit
from jaxquant.ops.targets import Platform, check_target, lay_out
from jaxquant.transform.plan import Plan

__all__ = [
    "NativeLeaves",
    "SavedMetadata",
    "SavedModel",
    "load",
    "load_native_model",
    "read_metadata",
    "save",
    "save_leaves",
]

_KEY = "jaxquant"
_VERSION = 1


class SavedMetadata(NamedTuple):
    """The metadata and the plan of a checkpoint.

    Attributes:
      metadata: the ``metadata`` given to `save`; the strings of ``__metadata__`` for a file that `save` did not write.
      plan: the JSON text of the plan given to `save`, or None.
    """

    metadata: dict[str, Json]
    plan: str | None


class SupportsJson(Protocol):
    """A plan: an object that makes text of itself."""

    def to_json(self) -> str:
        """The text."""
        ...


class SavedModel(NamedTuple):
    """A saved model with its plan: run it by ``jq.quantized(fn, plan, state)(params, ...)``.

    Attributes:
      params: the parameters.
      plan: the `jaxquant.Plan` given to `save`, or None.
      state: the ``state`` given to `save`, or None.
    """

    params: Params
    plan: Plan | None
    state: PyTree


# -- save --------------------------------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    params: Params,
    *,
    plan: SupportsJson | None = None,
    state: PyTree = None,
    metadata: Mapping[str, Json] | None = None,
) -> None:
    """Writes a tree of arrays and QTensors to one safetensors file, every array at its true size, bit for bit.

    The whole tree is checked before writing starts. Arrays are written one by one, so memory never holds a second copy
    of the model. The file appears (or replaces an older one) only when it is complete; after any failure the older one
    is untouched. For the layout see `jaxquant.io.native`.

    Args:
      path: the file to create or replace, usually ``*.safetensors``; its directory must exist.
      params: dicts (with string or integer keys), lists, tuples and None, nested, with JAX arrays, NumPy arrays and
        QTensors as leaves. Other mappings, such as flax's FrozenDict, are saved as dicts. An instance of a class that
        is registered with JAX (a dataclass, a named tuple, a module of Equinox, a state of NNX) is saved as a dict too,
        under the names of its key paths and without its static fields; ``load(path, like=...)`` restores the class.
        NumPy arrays are loaded as JAX arrays.
      plan: an object with a ``to_json()`` method, whose text is stored, such as a `jaxquant.Plan`; see
        `jaxquant.io.load_model`.
      state: the plan's state, such as static ranges; a tree like ``params``.
      metadata: JSON values by name: strings, numbers, booleans, None, lists and dicts of these.

    Raises:
      QuantError: on any other leaf or container (Python numbers, functions, classes that JAX does not know, random
        keys, traced, deleted or remote arrays), state without a plan, a QTensor whose fields contradict each other or
        whose scales are not finite, metadata that JSON would change, a path that cannot be a file or that another
        writer has, or a full disk. NaN in a plain array is saved like any other value.
      OSError: if the place is not writable.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant.io import load, save
      >>> w = jnp.linspace(-1.0, 1.0, 32).reshape(8, 4)
      >>> params = {"kernel": jq.quantize(w, jq.QuantSpec("int4"), reduce_axes=(-2,)), "bias": jnp.zeros(4)}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save(path, params)
      ...     load(path)["kernel"]
      QTensor(int4[8, 4] -> float32, per channel on axis -1, symmetric, 32 B)

    Source: the container is safetensors (https://github.com/huggingface/safetensors); the manifest is our own.
    """
    node, arrays = encode(params)
    text = _plan_text(plan)
    more = {}
    if state is not None:
        if text is None:
            todo = "Pass the plan that the state belongs to"
            raise quant_error("save", "state is of no use without its plan", todo=todo, plan=plan)
        encoder = Encoder(taken=arrays)
        more["state"] = encoder.node(state, ("state",))
        for name, (value, _) in encoder.arrays.items():
            if bad := not_finite(value):
                todo = "Look for NaN and inf in the training or calibration that it comes from"
                raise quant_error("save", "state must be finite", todo=todo, path=name, bad=bad)
        arrays |= encoder.arrays
    manifest = _manifest_text(node, _checked_metadata(metadata), text, **more)
    specs = {name: stored_spec(spec) for name, (_, spec) in arrays.items()}
    write_safetensors(path, specs, lambda name: _stored(arrays[name][0]), {_KEY: manifest})


def _stored(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """An array in the form that the container stores."""
    array = to_host(leaf)
    return to_patterns(array) if array.dtype in NAMELESS else array


def _manifest_text(node: Json, metadata: dict[str, Json], plan: str | None, **more: Json) -> str:
    manifest = {"version": _VERSION, "tree": node, **more, "metadata": metadata, "plan": plan}
    return json.dumps(manifest, separators=(",", ":"))


def _checked_metadata(metadata: Mapping[str, Json] | None) -> dict[str, Json]:
    try:
        given = dict(metadata or {})
        if parse(json.dumps(given)) == given:
            return given
    except (TypeError, ValueError, RecursionError):
        pass
    todo = "Use dicts with string keys, lists, strings, finite numbers, booleans and None"
    raise quant_error("save", "metadata must be what JSON can hold", todo=todo, metadata=metadata)


def _plan_text(plan: SupportsJson | None) -> str | None:
    if plan is None:
        return None
    text = plan.to_json() if hasattr(plan, "to_json") else None
    if not isinstance(text, str):
        todo = "Pass a Plan; of a model from another library's directory, model.plan.plan_for(fn, params, *args)"
        raise quant_error(
            "save", "plan must have a method to_json() that gives text", todo=todo, plan=type(plan).__name__
        )
    return text


# -- load --------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, like: PyTree = None, target: Platform | None = None) -> Params:
    """Reads a file of `save`, or any other safetensors file.

    The file is mapped and copied to the default device array by array. Its content is not trusted and never executed:
    every size is compared with the size of the file before memory is allocated.

    Args:
      path: the file.
      like: a template for the result: a pytree of arrays, `jax.ShapeDtypeStruct`s or QTensors, such as the model's
        float parameters from `jax.eval_shape`. The file must have the template's keys and logical shapes; a saved
        QTensor may stand for a float array. Kinds of dtype must agree (float, integer, ...), widths may differ; values
        are not cast. The result has the template's containers.
      target: the platform that codes are laid out for, ``"cpu"``, ``"tpu"`` or ``"gpu"``; by default that of the
        default device. See `jaxquant.ops.lay_out`.

    Returns:
      The saved tree: dicts (keys in order), lists, tuples, None, QTensors and JAX arrays. A file without a jaxquant
      manifest gives a dict of its arrays, nested at each "/" of the names (flat if one name is the beginning of
      another, as in "a" and "a/b"). Arrays of 64-bit dtypes are loaded as NumPy arrays if `jax_enable_x64` is off,
      since JAX would halve their width.

    Raises:
      QuantError: if the file is truncated, damaged or contradicts itself, naming the place in it; or, with all
        differences in one message, if it does not fit ``like``.
      OSError: if the file cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import jax, jax.numpy as jnp
      >>> from jaxquant.io import load, save
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save(path, {"layer": [jnp.ones(3), None]})
      ...     load(path, like={"layer": [jax.ShapeDtypeStruct((3,), jnp.float32), None]})
      {'layer': [Array([1., 1., 1.], dtype=float32), None]}

    A file with a plan that quantizes activations gives a `UserWarning`: its weights alone give other results.

    Source: the container is safetensors (https://github.com/huggingface/safetensors); the manifest is our own.
    """
    check_target("load", target)
    if os.path.isdir(path):
        todo = "Use jaxquant.io.load_model, or load_hf, for a directory of another library"
        raise quant_error("load", "the path is a directory", todo=todo, path=os.fspath(path))
    file = _File(path, "load", target)
    if file.runs_otherwise():
        text = f"load: {file.path} says how its activations are quantized, and this gives its weights alone"
        warnings.warn(f"{printable(text)}. Use load_model, and run the model with its plan.", stacklevel=2)
    return file.params(like)


def load_native_model(
    function: str, path: str | os.PathLike[str], like: PyTree = None, target: Platform | None = None
) -> SavedModel:
    """`jaxquant.io.load_model` of a file."""
    check_target(function, target)
    file = _File(path, function, target)
    return SavedModel(file.params(like), None if file.plan is None else Plan.from_json(file.plan), file.state())


class _File(SafetensorsFile):
    """A safetensors file, with or without a manifest; its tree and state have a `SavedArray` in place of each array."""

    def __init__(self, path: str | os.PathLike[str], function: str, target: Platform | None = None):
        super().__init__(path, function=function)
        self._target: Platform | None = target
        manifest = _manifest(self)
        if manifest is None:
            self.tree, self._state, self.plan = _by_names(self), None, None
        else:
            self.tree, self._state = decode(self, (manifest["tree"], ()), (manifest.get("state"), ("state",)))
            self.plan = manifest["plan"]

    def read(self, tree: PyTree) -> PyTree:
        """Reads the arrays of a tree to the default device; QTensors one by one, laid out for the target."""

        def one(leaf: QTensor | SavedArray) -> QTensor | jax.Array | np.ndarray:
            return lay_out(jax.tree.map(to_device, self.leaf(leaf)), self._target)

        return jax.tree.map(one, tree, is_leaf=is_qtensor)

    def leaf(self, saved: PyTree) -> QTensor | np.ndarray:
        """Reads a `SavedArray`, or a QTensor of them, to NumPy arrays that may be views of the file."""
        read = jax.tree.map(self._array, saved)
        if isinstance(read, QTensor):
            name = saved.codes.name.removesuffix(".codes")
            check_values(read, lambda rule, **got: self.error(rule, name, **got), todo=DAMAGED)
        return read

    def _array(self, entry: SavedArray) -> np.ndarray:
        array = self.array(entry.name)
        return from_patterns(array, entry.spec) if entry.dtype in NAMELESS else array

    def params(self, like: PyTree) -> Params:
        """The tree, in the containers of the template if one is given."""
        if like is None:
            return self.read(self.tree)
        leaves, treedef = fit(self.tree, like, self.error)
        return jax.tree.unflatten(treedef, [self.read(leaf) for leaf in leaves])

    def state(self) -> PyTree:
        """The state; None if there is none."""
        for saved in jax.tree.leaves(self._state):
            if bad := not_finite(self._array(saved)):
                raise self.error("state must be finite", saved.name, todo=DAMAGED, bad=bad)
        return self.read(self._state)

    def runs_otherwise(self) -> bool:
        """Whether the parameters give other results without the plan than with it."""
        if self.plan is None:
            return False
        with contextlib.suppress(QuantError):  # a plan of another library
            plan = Plan.from_json(self.plan)
            return bool(plan.products) or any(item.spec.act is not None for item in plan.items)
        return False


class NativeLeaves(Leaves):
    """The leaves of a file by path, "/" between the keys."""

    def __init__(self, path: str | os.PathLike[str], *, function: str):
        self.file = _File(path, function)
        self._entries = dict(_flat(self.file.tree))
        super().__init__(self._entries, [self.file.path])

    def runs_otherwise(self) -> bool:
        """Whether the file has a plan that quantizes activations, so that the weights alone give other results."""
        return self.file.runs_otherwise()

    def __getitem__(self, name: str) -> QTensor | np.ndarray:
        self.file.forget()  # pages of the leaf before
        return self.file.leaf(self._entries[name])


def _flat(tree: PyTree, path: str = "") -> Iterator[tuple[str, QTensor | SavedArray]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        yield from _flat(value, f"{path}/{key}" if path else str(key))
    if not isinstance(tree, dict | list | tuple | None):
        yield path, tree


def save_leaves(path: str | os.PathLike[str], leaves: Mapping[str, Values]) -> None:
    """`save` of a flat dict whose leaves are read twice: first to check all of them, then to write each."""
    nodes: list[Json] = []
    specs: dict[str, TensorSpec] = {}
    for name in sorted(leaves):
        encoder = Encoder(taken=specs)
        nodes.append([name, encoder.node(leaves[name], (name,))])
        specs |= {array: stored_spec(spec) for array, (_, spec) in encoder.arrays.items()}

    def parts() -> Iterator[dict[str, np.ndarray]]:
        written: set[str] = set()
        for name in sorted(leaves):
            encoder = Encoder(taken=written)
            encoder.node(leaves[name], (name,))
            yield {array: _stored(value) for array, (value, _) in encoder.arrays.items()}
            written |= encoder.arrays.keys()

    write_parts(path, specs, parts(), {_KEY: _manifest_text({"dict": nodes}, {}, None)})


def read_metadata(path: str | os.PathLike[str]) -> SavedMetadata:
    """The metadata and the plan of a checkpoint, without its arrays.

    Args:
      path: a file that `save` wrote, or any other safetensors file.

    Returns:
      A `SavedMetadata`: ``metadata`` and ``plan``.

    Raises:
      QuantError: if the file is truncated, damaged or contradicts itself.
      OSError: if the file cannot be opened.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp
      >>> from jaxquant.io import read_metadata, save
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "model.safetensors")
      ...     save(path, {"bias": jnp.zeros(4)}, metadata={"step": 100})
      ...     read_metadata(path)
      SavedMetadata(metadata={'step': 100}, plan=None)
    """
    file = SafetensorsFile(path, function="read_metadata")
    manifest = _manifest(file)
    if manifest is None:
        return SavedMetadata(dict(file.metadata), None)
    return SavedMetadata(manifest["metadata"], manifest["plan"])


def _manifest(file: SafetensorsFile) -> dict[str, Json] | None:
    text = file.metadata.get(_KEY)
    if text is None:
        return None

    def error(rule: str, **got: Any) -> QuantError:
        todo = f"Save it again, or remove {_KEY!r} from its metadata to load the bare arrays"
        return file.error(rule, _KEY, **{"todo": todo, **got})

    try:
        manifest = parse(text)
    except ValueError as reason:
        raise error(f"the manifest is not JSON ({reason})") from None
    if not isinstance(manifest, dict):
        raise error("the manifest must be a JSON object", manifest=manifest)
    if manifest.get("version") != _VERSION:
        rule = f"this version of jaxquant reads version {_VERSION} of the manifest"
        raise error(rule, todo="Update jaxquant", version=manifest.get("version"))
    if not {"tree", "metadata", "plan"} <= set(manifest):
        raise error("the manifest needs tree, metadata and plan", fields=tuple(manifest))
    metadata, plan = manifest["metadata"], manifest["plan"]
    if not isinstance(metadata, dict) or not isinstance(plan, str | None):
        raise error("metadata must be a JSON object and plan text", metadata=metadata, plan=plan)
    return manifest


def _by_names(file: SafetensorsFile) -> dict[str, PyTree]:
    """The arrays of a file without a manifest."""
    flat = {name: SavedArray(name, spec) for name, spec in file.tensors.items()}
    tree: dict[str, PyTree] = {}
    for name, entry in flat.items():
        *parents, last = name.split("/")
        if len(parents) > MAX_DEPTH:
            todo = "Rename the array"
            raise file.error(f"the name is more than {MAX_DEPTH} levels deep", name, todo=todo, levels=len(parents))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                return flat
        if last in node:
            return flat
        node[last] = entry
    return tree

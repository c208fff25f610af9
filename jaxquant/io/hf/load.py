"""`load_hf`: a checkpoint directory, quantized by any library, as a tree of QTensors and arrays."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.io.arrays import Shardings, Values, placing, to_device
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.formats import detect
from jaxquant.io.hf.leaves import HFLeaves
from jaxquant.io.hf.names import NameMap, nested
from jaxquant.io.rules import Assigned, assign
from jaxquant.io.strict_json import Json
from jaxquant.ops.targets import Platform
from jaxquant.ptq.rtn import rtn
from jaxquant.rules import Rule

__all__ = ["CheckpointInfo", "Read", "load_hf", "open_hf", "read_hf"]


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """The contents of a directory; prints as a table.

    Attributes:
      directory: its path.
      format: the format's name, ``"float"`` if no weight is quantized.
      config: the quantization configuration, with the versions that the file names.
      model: ``config.json``.
      files: the safetensors files.
      modules: name of each quantized weight -> its description, with remarks.
      floats: names of the tensors that are unchanged from the file.
      problems: faults of the checkpoint that were corrected.
      activations: names of the tensors that describe activations: static scales and zero points of inputs, outputs and
        of the cache of keys and values. They are in the result under these names, unchanged.
      runs_otherwise: whether the checkpoint quantizes activations, or keys and values, so that the weights alone give
        other results.
      skipped: names of tensors that match a quantizing rule but stay unchanged -> why.
    """

    directory: str
    format: str
    config: dict[str, Json]
    model: dict[str, Json]
    files: tuple[str, ...]
    modules: dict[str, str]
    floats: tuple[str, ...]
    problems: tuple[str, ...]
    activations: tuple[str, ...] = ()
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    runs_otherwise: bool = False

    def __str__(self) -> str:
        width = max(map(len, self.modules), default=0)
        lines = [f"{self.directory}: {self.format}, {len(self.files)} file{'s' if len(self.files) > 1 else ''}"]
        lines += [f"  {name.ljust(width)}  {what}" for name, what in self.modules.items()]
        what = f", of which {len(self.activations)} describe activations" if self.activations else ""
        lines.append(f"  {len(self.floats)} tensors as they are{what}")
        lines += [f"  {name} stays in float: {why}" for name, why in self.skipped.items()]
        return "\n".join(map(printable, [*lines, *(f"  problem: {text}" for text in self.problems)]))


def load_hf(
    directory: str | os.PathLike[str],
    *,
    rules: Sequence[Rule] | None = None,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    target: Platform | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, PyTree], CheckpointInfo]:
    """Reads a Hugging Face directory, quantized by any supported library or in float; codes stay unchanged.

    The format is recognised from the configuration, and the layout of each module from its tensors. Files are mapped
    and read tensor by tensor; a weight never exists in float, except in the formats that have no grid (AQLM, VPTQ) and
    the float weights that ``rules`` quantize. Files are never executed, and files outside the directory are not read.
    For the formats, see the documentation.

    Args:
      directory: with ``config.json`` and safetensors files, in shards or not.
      rules: quantize the weights of a float checkpoint as they are read, by their names in the checkpoint. The
        contracted axis is the last one, as in ``torch.nn.Linear`` and embeddings, or that of the model's family for
        experts, unless a rule gives ``reduce_axes``. ``info.skipped`` lists tensors that match but stay in float.
      names: the path of each tensor in the model, and its transposition: see `jaxquant.io.NameMap`.
      dtype: float dtype of arrays, and of the values of QTensors; by default the checkpoint's.
      sharding: where to put each leaf as it is read: a `jax.sharding.Sharding`, or a dict or function from the names in
        the result ("/" between the keys) to a sharding or None. Arrays of a QTensor follow as in `jaxquant.shardings`.
      target: the platform that codes are laid out for, ``"cpu"``, ``"tpu"`` or ``"gpu"``; by default the platform that
        each leaf is put on. See `jaxquant.ops.lay_out`.
      shapes: (out, in), or the shape of a convolution's kernel, of modules whose file does not state it (quanto, int4
        and int2).

    Returns:
      ``(params, info)``. Without ``names``, params is a flat dict from names in the file to arrays; a quantized module
      is one `QTensor` of shape [out, in] under ``<module>.weight``, which holds its codes, scales and zero points.
      Tensors that describe activations (``input_scale``, ``k_scale`` and the like) stay unchanged, and
      ``info.activations`` names them. ``info`` is a `CheckpointInfo`.

    Raises:
      QuantError: if the format is not supported (with the reason), if the configuration and the shapes do not determine
        how a module is quantized, or if a file is damaged: tensors are missing, unknown, or of a wrong dtype or shape,
        or scales are invalid in the format, such as NaN; naming file and tensor.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jq.io.save(os.path.join(directory, "model.safetensors"), {"proj.weight": jnp.ones((4, 64))})
      ...     params, info = jq.io.load_hf(directory, rules=[jq.Rule("proj", jq.recipes.w8a16())])
      >>> params["proj.weight"]
      QTensor(int8[4, 64] -> float32, per channel on axis -2, symmetric, 272 B)
      >>> info.format
      'float'

    A directory that quantizes activations gives a `UserWarning`, since its weights alone give other results.
    `load_model` reads both.

    Source: the formats' own libraries; each reader's module describes the layout to the byte.
    """
    found = read_hf("load_hf", directory, rules, names, dtype, sharding, target, shapes)
    if found.info.runs_otherwise:
        place = os.fsdecode(directory)
        text = f"load_hf: {place} says how its activations are quantized, and this gives its weights alone"
        warnings.warn(f"{printable(text)}. Use load_model, and run the model with its plan.", stacklevel=2)
    return found.params, found.info


@dataclasses.dataclass(frozen=True)
class Read:
    """The result of `read_hf`.

    Attributes:
      params: the parameters, including tensors that describe activations unless they were dropped.
      info: the contents of the directory.
      leaves: the leaves of the directory.
      paths: name in the file -> path in the params, for each leaf.
    """

    params: dict[str, PyTree]
    info: CheckpointInfo
    leaves: HFLeaves
    paths: dict[str, str]


def read_hf(
    function: str,
    directory: str | os.PathLike[str],
    rules: Sequence[Rule] | None = None,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    target: Platform | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    drop: Callable[[HFLeaves], Collection[str]] = lambda leaves: (),
) -> Read:
    """`load_hf` that also returns the origin of each leaf; ``drop``: names that are not read."""
    checkpoint = HFCheckpoint(directory, function=function)
    form, config = detect(checkpoint)
    if rules is not None and form is not None:
        todo = "Leave rules out, or load the float checkpoint"
        raise quant_error(function, f"the checkpoint is quantized already, as {form.name}", todo=todo, rules=len(rules))
    leaves = HFLeaves(checkpoint, form, config, dtype=_checked_dtype(function, dtype), shapes=shapes)
    plain = {name: checkpoint.tensors[name] for name in leaves.plain}
    assignment = assign(plain, rules or (), checkpoint.error, checkpoint.config)
    assigned = assignment.weights
    place = placing(sharding, function, target)
    left_out = frozenset(drop(leaves))
    kept = [name for name in leaves if name not in left_out]
    targets = None if names is None else names.resolve(kept, checkpoint.error)
    result: dict[str, Values] = {}
    paths: dict[str, str] = {}
    for name in kept:
        path = name
        leaf: Values = leaves[name]
        if name in assigned:
            stored = leaf.dtype.name
            leaf = _quantized(checkpoint, name, leaf, assigned[name])
            leaves.described[name] = f"{leaf!r}, from {stored}"
        if targets is not None:
            renamed = targets[name]
            if renamed is None:
                continue
            path, turn = renamed
            leaf = leaf if turn is None else turn(leaf)
        result[path] = place(path, leaf)
        paths[name] = path
    info = CheckpointInfo(
        os.fsdecode(directory),
        "float" if form is None else form.name,
        config,
        checkpoint.config,
        tuple(checkpoint.files),
        leaves.described,
        tuple(name for name in leaves.plain if name not in assigned),
        leaves.problems,
        tuple(leaves.activations),
        assignment.skipped,
        leaves.runs_otherwise(),
    )
    return Read(result if names is None else nested(result), info, leaves, paths)


def open_hf(directory: str | os.PathLike[str], *, function: str) -> HFLeaves:
    """The leaves of a directory, each read on access."""
    checkpoint = HFCheckpoint(directory, function=function)
    return HFLeaves(checkpoint, *detect(checkpoint))


def _checked_dtype(function: str, dtype: DTypeLike | None) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise quant_error(function, "dtype must be a float dtype", todo="Use float32, bfloat16 or float16", dtype=dtype)
    return found


def _quantized(checkpoint: HFCheckpoint, name: str, array: QTensor | np.ndarray, how: Assigned) -> QTensor:
    assert not isinstance(array, QTensor)  # `assign` refuses weights that are quantized
    if not np.isfinite(array).all():
        raise checkpoint.error("a weight must be finite", name, todo="A checkpoint with NaN or inf cannot be quantized")
    return rtn(to_device(array), how.whole(array.shape), reduce_axes=how.reduce_axes)

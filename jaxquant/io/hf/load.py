"""`load_hf`: a checkpoint directory, quantized by any library, as a tree of QTensors and arrays."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import Rule
from jaxquant.io.arrays import to_device
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.formats import detect
from jaxquant.io.hf.module import Format, Module
from jaxquant.io.hf.names import NameMap, nested
from jaxquant.io.manifest import check_qtensor
from jaxquant.io.rules import assign
from jaxquant.ptq.rtn import rtn
from jaxquant.transform.paths import nearest
from jaxquant.transform.shardings import shardings as leaf_shardings

__all__ = ["CheckpointInfo", "load_hf"]

_FUNCTION = "load_hf"
_CODES = tuple(
    np.dtype(d) for d in (np.int8, np.uint8, np.uint32, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int32)
)


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What was found in a directory; prints as a table.

    Attributes:
      directory: where it is.
      format: the format's name, ``"float"`` where nothing is quantized.
      config: the quantization configuration, with the versions that the file names.
      model: ``config.json``.
      files: the safetensors files.
      modules: name of each quantized weight -> what it is, and what is worth saying about it.
      floats: names of the tensors that are what they were in the file.
      problems: what is wrong with the checkpoint and was put right.
    """

    directory: str
    format: str
    config: dict[str, Any]
    model: dict[str, Any]
    files: tuple[str, ...]
    modules: dict[str, str]
    floats: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, self.modules), default=0)
        lines = [f"{self.directory}: {self.format}, {len(self.files)} file{'s' if len(self.files) > 1 else ''}"]
        lines += [f"  {name.ljust(width)}  {what}" for name, what in self.modules.items()]
        lines.append(f"  {len(self.floats)} tensors as they are")
        return "\n".join([*lines, *(f"  problem: {text}" for text in self.problems)])


def load_hf(
    directory: str | os.PathLike[str],
    *,
    rules: Sequence[Rule] | None = None,
    names: NameMap | None = None,
    dtype: Any = None,
    sharding: Any = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[dict[str, Any], CheckpointInfo]:
    """Reads a Hugging Face directory, whatever library quantized it; codes are taken over unchanged.

    The format is recognised from the configuration, and each module by the tensors that it has. Files are mapped and
    read tensor by tensor; a weight never exists in float, except in the formats that have no grid (AQLM, VPTQ) and the
    float weights that ``rules`` quantize. Nothing in a file is executed, and no file outside of the directory is
    looked at. For the formats, see the documentation.

    Args:
      directory: with ``config.json`` and safetensors files, in shards or not.
      rules: quantize the weights of a float checkpoint as they are read, by the names that they have in it: contracted
        along the last axis, as ``torch.nn.Linear`` and embeddings are, unless a rule gives ``reduce_axes``.
      names: what each tensor is called in the model, and how it is turned: see `jaxquant.io.NameMap`.
      dtype: float dtype for arrays and for what QTensors dequantize to; by default that of the checkpoint.
      sharding: where to put each leaf as it is read: a `jax.sharding.Sharding`, or a dict or function from the names in
        the result ("/" between the keys) to one or None. Arrays of a QTensor follow as in `jaxquant.shardings`.
      shapes: (out, in) of modules whose file does not say it (quanto, int4 and int2).

    Returns:
      ``(params, info)``. Without ``names``, params is a flat dict from names in the file to arrays; a quantized module
      is one `QTensor` of shape [out, in] under ``<module>.weight``, with all that belongs to it inside. Tensors that
      describe activations (``input_scale`` and the like) stay as they are. ``info`` is a `CheckpointInfo`.

    Raises:
      QuantError: if the format is not supported (with the reason), or a file is damaged: tensors that are missing,
        unknown, of a wrong dtype or shape, or scales that are not finite; with file and tensor.

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

    Source: the formats' own libraries; each reader's module has the layout to the byte.
    """
    checkpoint = HFCheckpoint(directory, function=_FUNCTION)
    form, config = detect(checkpoint)
    if rules is not None and form is not None:
        todo = "Leave rules out, or load the float checkpoint"
        raise quant_error(
            _FUNCTION, f"the checkpoint is quantized already, as {form.name}", todo=todo, rules=len(rules)
        )
    reader = _Reader(checkpoint, form, config, _checked_dtype(dtype), shapes)
    plain = reader.plain_names()
    assigned = assign({name: checkpoint.tensors[name] for name in plain}, rules or (), checkpoint.error)
    place = _placing(sharding)
    targets = None if names is None else names.resolve([m.name for m in reader.modules] + plain, checkpoint.error)
    result: dict[str, Any] = {}

    def put(name: str, leaf: Any) -> None:
        path = name
        if targets is not None:
            target = targets[name]
            if target is None:
                return
            path, turn = target
            leaf = turn(leaf) if turn is not None else leaf
        result[path] = place(path, leaf)

    described: dict[str, str] = {}
    for module in reader.modules:
        leaf = reader.read(module)
        described[module.name] = "; ".join([_describe(leaf), *module.notes])
        put(module.name, leaf)
    reader.check_rest()
    for name in plain:
        array = checkpoint.array(name)
        if name in assigned:
            leaf = _quantized(checkpoint, name, array, assigned[name], reader.dtype)
            described[name] = f"{leaf!r}, from {array.dtype.name}"
        else:
            leaf = array.astype(reader.dtype) if reader.dtype is not None and _is_float(array) else array
        put(name, leaf)
    info = CheckpointInfo(
        os.fsdecode(directory),
        "float" if form is None else form.name,
        config,
        checkpoint.config,
        tuple(checkpoint.files),
        described,
        tuple(n for n in plain if n not in assigned),
        tuple(dict.fromkeys(p for m in reader.modules for p in m.problems)),
    )
    return (result if names is None else nested(result)), info


class _Reader:
    """The modules of a checkpoint, and which tensors belong to them."""

    def __init__(
        self,
        checkpoint: HFCheckpoint,
        form: Format | None,
        config: dict[str, Any],
        dtype: np.dtype | None,
        shapes: Mapping[str, tuple[int, int]] | None,
    ):
        self.checkpoint, self.form, self.dtype = checkpoint, form, dtype
        found = {} if form is None else form.modules(checkpoint)
        self.modules = [Module(checkpoint, p, target, config, shapes) for p, target in found.items()]
        unknown = sorted(set(shapes or ()) - set(found))
        if unknown:
            todo = f"Nearest modules: {nearest(unknown[0], found)}"
            raise quant_error(_FUNCTION, "shapes names a module that is not quantized", todo=todo, module=unknown[0])

    def plain_names(self) -> list[str]:
        """Tensors that are part of no quantized module, or stay beside its weight."""
        keeps = () if self.form is None else (".bias", *self.form.keeps)
        owners, weights = {m.prefix for m in self.modules}, {m.name for m in self.modules}

        def owned(name: str) -> bool:
            if any(name.endswith(k) and name.removesuffix(k) in owners for k in keeps):
                return False
            return name in weights or self._owner(name, owners) is not None

        return [name for name in self.checkpoint.tensors if not owned(name)]

    def _owner(self, name: str, owners: set[str]) -> str | None:
        """The quantized module that a tensor belongs to, by its name."""
        if self.form is not None and self.form.find is not None:  # torchao: P._weight_PART
            owner, _, last = name.rpartition(".")
            return next((o for o in owners if f"{owner}._{o.rpartition('.')[2]}_" in f"{owner}.{last}"), None)
        head = name
        while head:
            head = head.rpartition(".")[0]
            if head in owners:
                rest = name[len(head) :]
                parts = () if self.form is None else self.form.parts
                return head if rest.count(".") == 1 or rest.startswith(".weight.") or rest in parts else None
        return next((o for o in (name.rpartition("_")[0], name.rpartition("_scale_inv")[0]) if o in owners), None)

    def read(self, module: Module) -> Any:
        """The leaf of a module, of NumPy arrays."""
        assert self.form is not None
        with np.errstate(all="ignore"):  # what overflows is found below
            leaf = self.form.read(module)
        if isinstance(leaf, QTensor):
            for q in (leaf, leaf.scale, leaf.offset):
                if isinstance(q, QTensor):
                    check_qtensor(q, module.error)
        floats = [leaf.scale, leaf.zero_point, leaf.offset] if isinstance(leaf, QTensor) else [leaf]
        for value in jax.tree.leaves(floats):
            if _is_float(value) and not np.isfinite(value.astype(np.float32)).all():
                todo = "The checkpoint is damaged: fetch it again"
                raise module.error("scales and what comes of them must be finite", todo=todo, shape=value.shape)
        if isinstance(leaf, QTensor):
            return leaf if self.dtype is None else leaf.replace(dtype=self.dtype)
        return leaf if self.dtype is None else leaf.astype(self.dtype)

    def check_rest(self) -> None:
        """Raises for tensors that no reader has asked for."""
        used = {name for m in self.modules for name in m.used}
        plain = set(self.plain_names())
        for name in self.checkpoint.tensors:
            if name not in used and name not in plain:
                todo = "Check the format; a reader that ignored it could be wrong about the weight"
                raise self.checkpoint.error("an unknown tensor beside a quantized weight", name, todo=todo)
        for name in plain:
            spec = self.checkpoint.tensors[name]
            if name.endswith("weight") and spec.dtype in _CODES and name not in used:
                rule = "codes without scales" if self.form else "codes, and no configuration that says of which format"
                todo = "Fetch all files of the checkpoint again"
                raise self.checkpoint.error(rule, name, todo=todo, dtype=spec.dtype.name)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, QTensor):
        return repr(leaf)
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _checked_dtype(dtype: Any) -> np.dtype | None:
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        raise quant_error(
            _FUNCTION, "dtype must be a float dtype", todo="Use float32, bfloat16 or float16", dtype=dtype
        )
    return found


# -- float weights, quantized as they are read ---------------------------------------------------------------------


def _quantized(checkpoint: HFCheckpoint, name: str, array: np.ndarray, rule: Rule, dtype: np.dtype | None) -> QTensor:
    spec = None if rule.spec is None else rule.spec.weight
    assert spec is not None
    if not np.isfinite(array.astype(np.float32)).all():
        raise checkpoint.error("a weight must be finite", name, todo="A checkpoint with NaN or inf cannot be quantized")
    w = jnp.asarray(array if dtype is None else array.astype(dtype))
    return rtn(w, spec, reduce_axes=rule.reduce_axes or (-1,))


# -- where leaves go -------------------------------------------------------------------------------------------------


def _placing(sharding: Any) -> Callable[[str, Any], Any]:
    """A function that puts a leaf of NumPy arrays where it belongs."""
    if sharding is None or isinstance(sharding, jax.sharding.Sharding):
        of: Callable[[str], Any] = lambda path: sharding  # noqa: E731
    elif isinstance(sharding, Mapping):
        of = sharding.get
    elif callable(sharding):
        of = sharding
    else:
        todo = "Give a Sharding, or a dict or function from names to shardings"
        raise quant_error(_FUNCTION, "not a sharding", todo=todo, sharding=type(sharding).__name__)

    def place(path: str, leaf: Any) -> Any:
        where = of(path)
        if where is None:
            return jax.tree.map(to_device, leaf)
        return jax.tree.map(to_device, leaf, leaf_shardings({path: leaf}, {path: where})[path])

    return place

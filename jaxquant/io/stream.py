"""`quantize_hf`: quantizes a checkpoint of any size tensor by tensor.

Memory holds one tensor's codes and a slice of its float rows at most, and JAX compiles one program for each width of a
weight; ``tests/io/test_stream.py`` measures the peaks. All checks that do not need the values run before the first byte
is written; `jaxquant.io.directory` describes how interruptions are handled.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.granularity import PerTensor
from jaxquant.core.packing import packed_length
from jaxquant.core.qtensor import QTensor, scale_values
from jaxquant.core.refusals import Refusals
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.io.bits import packed, patterns
from jaxquant.io.directory import SHARD_BYTES, Layout, Piece, identity, in_shards, write_directory
from jaxquant.io.heap import give_back
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.formats import detect
from jaxquant.io.hf.unclaimed import check_unclaimed
from jaxquant.io.mapped import Leaves
from jaxquant.io.rules import Assigned, Assignment, assign
from jaxquant.io.safetensors import TensorSpec
from jaxquant.io.save_hf import export_config, export_piece, float_modules, layout_of
from jaxquant.io.sharded import Checkpoint
from jaxquant.io.strict_json import Json
from jaxquant.ptq.double import double_quantized
from jaxquant.ptq.named import quantizer
from jaxquant.ptq.rtn import rtn
from jaxquant.rules import Rule
from jaxquant.transform.misfits import fitted

__all__ = ["QuantizePlan", "QuantizedLeaves", "plan_quantize_hf", "quantize_hf"]

_FUNCTION = "quantize_hf"
#: Elements of a weight that are quantized at a time. XLA and the allocator take several times the size of a slice, in
#: the pools of several threads; this must be small compared to the memory of the interpreter and JAX.
_SLICE = 1 << 18
_LARGEST_FILE = 64 << 20
#: Endings of files that are not copied: weights in other forms, and files that are written again.
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".index.json")


@dataclasses.dataclass(frozen=True)
class QuantizePlan:
    """The planned output of `quantize_hf`.

    Attributes:
      weights: name of each quantized weight -> its QTensor, as shapes.
      specs: name of each quantized weight -> how each matrix in it is quantized.
      floats: names of the tensors that stay unchanged.
      skipped: names of unchanged tensors that match a quantizing rule -> why they stay unchanged.
      notes: names of quantized weights that are not quantized as their rule says -> how, and why.
      left_out: files and directories of the source that are not copied.
      links: files of the source that are links -> their targets, which are copied.
      before: bytes of the source's tensors.
      after: bytes of the output.
      layout: the assignment of tensors to files.
      source: the identity of the source.
    """

    weights: dict[str, QTensor]
    specs: dict[str, QuantSpec]
    floats: tuple[str, ...]
    skipped: dict[str, str]
    notes: dict[str, str]
    left_out: tuple[str, ...]
    links: dict[str, str]
    before: int
    after: int
    layout: Layout
    source: dict[str, Json]


def quantize_hf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    rules: Sequence[Rule],
    *,
    format: str = "compressed-tensors",
    method: str | Callable[..., QTensor] = rtn,
    grams: str | os.PathLike[str] | None = None,
    moved: str | os.PathLike[str] | None = None,
    act: QuantSpec | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int, str], object] | None = None,
) -> QuantizePlan:
    """Quantizes a float checkpoint on disk to one that other libraries read.

    Weights are the tensors ``<module>.weight`` [out, in], and the experts of families of models whose layout is known
    (``jaxquant/io/experts.py``): [experts, out, in] or [experts, in, out]. Each row of ``in`` of each expert is
    quantized independently, so that slices of rows can be quantized in turn. Stacked experts keep their names and axes;
    among the formats, only compressed-tensors supports them. The plan's ``skipped`` lists tensors that match a
    quantizing rule but stay unchanged.

    Names, shapes, group sizes, formats, names of files and the room on the disk are checked before writing starts. The
    destination appears when it is complete. Until then ``DESTINATION.partial`` exists, which a second call with the
    same arguments continues, to the same bytes.

    Args:
      source: a directory of a float checkpoint, as for `load_hf`; it is not changed.
      destination: must not exist, or be empty.
      rules: the first that matches a weight's name wins; ``Rule(pattern, None)`` keeps it in float. For experts of
        other models, and kernels [in, out], a rule gives the contracted axis: ``reduce_axes=(-1,)`` or ``(-2,)``.
      format: as for `save_hf`.
      method: a quantizer or its name, such as `jaxquant.ptq.rtn` or ``"hqq"``; with ``grams`` also one that needs
        statistics, such as ``"gptq"``.
      grams: a safetensors file (or a directory of such files) with the Gram matrix x^T x [in, in] of the inputs of each
        weight, under the weight's name; [experts, in, in] for experts. A weight is then quantized as a whole, and
        memory holds the weight and its Gram matrix.
      moved: a safetensors file (or a directory of such files) with float tensors to take in place of the source's of
        the same names, such as weights and norms between which scales have moved.
      act: as for `save_hf`.
      shard_bytes: size that a file should not exceed; an interruption loses at most the work on one file.
      progress: called with the bytes written, all bytes, and the name of the tensor that comes next.

    Returns:
      The `QuantizePlan`.

    Raises:
      QuantError: before writing: if the source is damaged or quantized already, a rule matches no weight or experts
        whose layout is not known, a group size does not divide, a Gram matrix is missing or of another size, the format
        does not support the result, or the disk is too full. While writing: if a weight or a Gram matrix holds NaN or
        inf, with its name, or the disk fills up; the same call continues where this one has ended.
      OSError: if a file cannot be read or written.

    Example:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> with tempfile.TemporaryDirectory() as d:
      ...     jq.io.save(os.path.join(d, "model.safetensors"), {"proj.weight": jnp.eye(64), "norm": jnp.ones(64)})
      ...     plan = jq.io.quantize_hf(d, os.path.join(d, "int8"), [jq.Rule("proj", jq.recipes.w8a16())])
      ...     jq.io.load_hf(os.path.join(d, "int8"))[0]["proj.weight"]
      QTensor(int8[64, 64] -> float32, per channel on axis -2, symmetric, 4.2 KiB)
    """
    options: dict[str, Any] = {"format": format, "method": method, "grams": grams, "moved": moved, "act": act}
    plan = plan_quantize_hf(source, rules, **options, shard_bytes=shard_bytes)
    write_directory(destination, plan.layout, source=plan.source, function=_FUNCTION, progress=progress)
    return plan


def plan_quantize_hf(
    source: str | os.PathLike[str],
    rules: Sequence[Rule],
    *,
    format: str = "compressed-tensors",
    method: str | Callable[..., QTensor] = rtn,
    grams: str | os.PathLike[str] | None = None,
    moved: str | os.PathLike[str] | None = None,
    act: QuantSpec | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> QuantizePlan:
    """Runs all checks of `quantize_hf` and returns its plan, without writing."""
    found = QuantizedLeaves(source, rules, method=method, grams=grams, moved=moved)
    checkpoint, leaves = found.checkpoint, found.abstract
    config = checkpoint.config
    layout = layout_of(format, act, function=_FUNCTION)
    pieces = []
    for name, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            read = functools.partial(found.__getitem__, name)
            pieces.append(export_piece(layout, name, leaf, read, function=_FUNCTION))
        else:
            pieces.append(Piece({name: checkpoint.tensors[name]}, functools.partial(_copied, found, name)))
    weights = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, QTensor)}
    modules = {name.removesuffix(".weight"): leaf for name, leaf in weights.items()}
    others, left_out = _other_files(checkpoint.path)
    read = [*(file.path for file in checkpoint.files.values()), *(os.path.join(checkpoint.path, n) for n in others)]
    links = {os.path.basename(path): os.path.realpath(path) for path in read if os.path.islink(path)}
    files = {**others, **export_config(layout, modules, float_modules(leaves), config)}
    described = {
        "files": identity(file.path for file in checkpoint.files.values()),
        "rules": [rule.to_dict() for rule in rules],
        "format": format,
        "method": found.method,
        "act": None if act is None else act.to_dict(),
        "grams": None if found.grams is None else identity(file.path for file in found.grams.files.values()),
    }
    arranged = in_shards(pieces, files, shard_bytes, function=_FUNCTION)
    before = sum(spec.nbytes for spec in checkpoint.tensors.values())
    floats = tuple(name for name in leaves if name not in weights)
    told = found.skipped, found.notes, left_out, links
    return QuantizePlan(weights, found.specs, floats, *told, before, arranged.nbytes, arranged, described)


class QuantizedLeaves(Leaves):
    """The leaves of a float checkpoint, quantized by rules on access.

    Args:
      source, rules, method, grams, moved: as for `quantize_hf`.

    Attributes:
      checkpoint: the float checkpoint.
      abstract: the leaves, as shapes.
      specs: name of each quantized weight -> how each matrix in it is quantized.
      skipped: names of tensors that match a quantizing rule but stay in float -> why.
      notes: names of quantized weights that are not quantized as their rule says -> how, and why.
      method: the quantizer's name.
      grams: the Gram matrices on disk, or None.

    Raises:
      QuantError: as `quantize_hf`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        rules: Sequence[Rule],
        *,
        method: str | Callable[..., QTensor] = rtn,
        grams: str | os.PathLike[str] | None = None,
        moved: str | os.PathLike[str] | None = None,
    ):
        method = quantizer(_FUNCTION, method)
        partial = isinstance(method, functools.partial)
        self.method = repr(method) if partial else getattr(method, "__name__", repr(method))
        self.checkpoint = checkpoint = HFCheckpoint(source, function=_FUNCTION)
        if "quantization_config" in checkpoint.config or detect(checkpoint)[0] is not None:
            todo = "Take the float checkpoint, or convert this one"
            raise checkpoint.error("the checkpoint is quantized already", "config.json", todo=todo)
        check_unclaimed(checkpoint, None, checkpoint.tensors)
        if moved is not None:
            checkpoint.replace(Checkpoint(moved, function=_FUNCTION))
        base = method.func if isinstance(method, functools.partial) else method
        nested = [rule for rule in rules if rule.spec and rule.spec.weight and rule.spec.weight.two_level]
        if base is double_quantized or nested:
            todo = "Quantize in memory and save with jq.io.save, which keeps them"
            raise checkpoint.error("scales that are quantized themselves are not written slice by slice", todo=todo)
        assignment, self.notes = _assignment(checkpoint, rules)
        self.skipped = assignment.skipped
        self.specs = {name: how.spec for name, how in assignment.weights.items()}
        lies = {name: _lies(checkpoint.tensors[name].shape, how) for name, how in assignment.weights.items()}
        self.grams = None if grams is None else _grams(grams, lies)
        self.abstract: dict[str, PyTree] = {}
        self._reads: dict[str, Callable[[], QTensor]] = {}
        for name, stored in checkpoint.tensors.items():
            if name not in lies:
                self.abstract[name] = jax.ShapeDtypeStruct(stored.shape, stored.dtype)
                continue
            how, lie = assignment.weights[name], lies[name]
            quantize = functools.partial(method, spec=how.spec, reduce_axes=(-1,))
            rows = lie.rows(how.spec) if self.grams is None else lie.out
            self.abstract[name] = _without_values(quantize, stored, lie, rows, with_gram=self.grams is not None)
            self._reads[name] = functools.partial(_quantized, checkpoint, name, quantize, lie, rows, self.grams)
        super().__init__(checkpoint.tensors, [file.path for file in checkpoint.files.values()])

    def __getitem__(self, name: str) -> QTensor | np.ndarray:
        if name in self._reads:
            if self.grams is not None:  # the weight before was quantized as a whole
                give_back()
            return self._reads[name]()
        self.checkpoint.files[self.checkpoint.place[name]].forget()  # pages of the leaf before
        return self.checkpoint.array(name)


def _assignment(checkpoint: HFCheckpoint, rules: Sequence[Rule]) -> tuple[Assignment, dict[str, str]]:
    """The quantization of each weight by the rules, and the notes of `QuantizePlan`."""
    assignment = assign(checkpoint.tensors, rules, checkpoint.error, checkpoint.config)
    weights: dict[str, Assigned] = {}
    skipped, notes = dict(assignment.skipped), dict[str, str]()
    refusals = Refusals(_FUNCTION)
    for name, how in assignment.weights.items():
        shape = checkpoint.tensors[name].shape
        with refusals.gather():
            if len(shape) not in (2, 3) or 0 in shape or how.reduce_axes not in ((-1,), (-2,)):
                rule = "weights are matrices or stacks of matrices, quantized along one of their last two axes"
                got = {"shape": shape, "reduce_axes": how.reduce_axes}
                raise checkpoint.error(rule, name, todo="Leave it out with Rule(pattern, None)", **got)
            one = (shape[0] // how.stack, *shape[1:])
            spec, why = fitted(_FUNCTION, name, how.rule, OpSpec(weight=how.spec), one, how.reduce_axes)
            if spec is not None and spec.weight is not None:
                weights[name] = dataclasses.replace(how, spec=spec.weight)
                notes |= {name: why} if why else {}
            else:
                skipped[name] = why
    refusals.close()
    if not weights:
        raise quant_error(_FUNCTION, "no rule quantizes a weight", todo="Add one with a weight spec", rules=len(rules))
    return Assignment(weights, skipped), notes


class _Lies(NamedTuple):
    """The layout of the matrices in a weight.

    Attributes:
      shape: of the weight.
      stack: the number of matrices.
      out, width: the sizes of a matrix; ``width`` is the contracted one.
      turned: whether each matrix is stored as [in, out].
    """

    shape: tuple[int, ...]
    stack: int
    out: int
    width: int
    turned: bool

    def rows(self, spec: QuantSpec) -> int:
        """Rows that are quantized at a time: the whole matrix if a row's codes depend on other rows."""
        if isinstance(spec.granularity, PerTensor) or spec.type.scale_format == "e4m3" or spec.rounding != "nearest":
            return self.out
        rows = max(1, _SLICE // max(1, self.width))
        return rows if self.stack == 1 else min(rows, self.out)

    def matrices(self, w: np.ndarray) -> Iterator[np.ndarray]:
        """Each matrix, [out, in]."""
        for matrix in w.reshape(self.stack, -1, self.shape[-1]):
            yield np.ascontiguousarray(matrix.T) if self.turned else matrix


def _lies(shape: tuple[int, ...], how: Assigned) -> _Lies:
    stack = how.stack if len(shape) == 2 else shape[0]
    rows, columns = math.prod(shape[:-1]) // stack, shape[-1]
    turned = how.reduce_axes == (-2,)
    return _Lies(shape, stack, columns if turned else rows, rows if turned else columns, turned)


def _copied(leaves: QuantizedLeaves, name: str) -> Mapping[str, np.ndarray]:
    leaf = leaves[name]
    assert not isinstance(leaf, QTensor)
    return {name: leaf}


def _grams(path: str | os.PathLike[str], lies: Mapping[str, _Lies]) -> Checkpoint:
    """The Gram matrices on disk, one for each weight, or a stack for a weight of experts."""
    found = Checkpoint(path, function=_FUNCTION)
    for name, lie in lies.items():
        stored = found.tensors.get(name)
        wanted = (lie.width, lie.width) if len(lie.shape) == 2 and lie.stack == 1 else (lie.stack, lie.width, lie.width)
        if stored is None or stored.shape != wanted or not np.issubdtype(stored.dtype, np.floating):
            got = {"stored": stored, "near": difflib.get_close_matches(name, found.tensors, 3, 0.4)}
            todo = f"Save the sum of x^T x over its inputs, float32 {list(wanted)}, under the weight's name"
            raise found.error("a Gram matrix is missing, or is another weight's", name, todo=todo, **got)
    return found


def _stats(gram: jax.Array | np.ndarray) -> dict[str, dict[str, jax.Array | np.ndarray]]:
    """One Gram matrix [in, in] in the form of `jaxquant.calibrate`."""
    return {"gram": {"gram": gram[None]}}


def _quantized(
    checkpoint: Checkpoint,
    name: str,
    quantize: Callable[..., QTensor],
    lie: _Lies,
    rows: int,
    grams: Checkpoint | None,
) -> QTensor:
    """A weight of NumPy arrays, quantized matrix by matrix."""
    file, done = checkpoint.files[checkpoint.place[name]], []
    for i, w in enumerate(lie.matrices(checkpoint.array(name))):
        file.forget()
        each = quantize
        if grams is not None:
            each = functools.partial(quantize, stats=_stats(_gram(grams, name, i, lie)))
        q = _matrix(checkpoint, name, w, each, rows)
        done.append(_turned(q, lie) if lie.turned else q)
    if lie.stack == 1 and len(lie.shape) == 2:
        return done[0]
    leaves = jax.tree.map(lambda *x: np.stack(x), *done)
    return leaves if len(lie.shape) == 3 else jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), leaves)


def _gram(grams: Checkpoint, name: str, i: int, lie: _Lies) -> np.ndarray:
    """The Gram matrix of one of the matrices of a weight."""
    gram = np.array(grams.array(name).reshape(lie.stack, lie.width, lie.width)[i], np.float32)
    grams.forget()
    if not np.isfinite(gram).all():
        todo = "Find the batch that holds NaN or inf, or inputs beyond 1e19, whose squares overflow"
        raise grams.error("a Gram matrix must be finite", name, todo=todo)
    return gram


def _matrix(checkpoint: Checkpoint, name: str, w: np.ndarray, quantize: Callable[..., QTensor], rows: int) -> QTensor:
    """A matrix [out, in] of NumPy arrays, quantized in slices of rows."""
    file, parts = checkpoint.files[checkpoint.place[name]], []
    for begin in range(0, w.shape[0], rows):
        part = np.array(w[begin : begin + rows])
        file.forget()
        if not _finite(part):
            todo = "A checkpoint with NaN or inf cannot be quantized"
            raise checkpoint.error("a weight must be finite", name, todo=todo)
        count = len(part)
        if count < rows:  # pad, so that one program serves all weights of this width
            part = np.concatenate([part, np.repeat(part[-1:], rows - count, 0)])
        parts.append(jax.tree.map(lambda x, count=count: np.asarray(x)[:count], _flat(quantize(jax.device_put(part)))))
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _turned(q: QTensor, lie: _Lies) -> QTensor:
    """Transposes a matrix [out, in] to [in, out], stored codes included."""
    codes = patterns(q).T if q.length is not None else q.codes.T
    fields = {key: None if (x := getattr(q, key)) is None else x.T for key in ("scale", "zero_point", "offset")}
    if q.length is None:
        return q.replace(codes=np.ascontiguousarray(codes), **fields)
    return q.replace(codes=packed(np.ascontiguousarray(codes), q.type.bits), length=lie.out, **fields)


def _finite(part: np.ndarray) -> bool:
    """Whether all elements are finite; for bfloat16 by the exponent's bits, which is seven times as fast."""
    if part.dtype == ml_dtypes.bfloat16:
        return bool(((part.view(np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(part).all())


def _without_values(
    quantize: Callable[..., QTensor], stored: TensorSpec, lie: _Lies, rows: int, *, with_gram: bool
) -> QTensor:
    """The quantized weight as shapes; it is traced for a slice, so once for all weights of a width."""
    w = jax.ShapeDtypeStruct((rows, lie.width), stored.dtype)
    if with_gram:
        h = jax.ShapeDtypeStruct((lie.width, lie.width), np.float32)
        part = jax.eval_shape(lambda w, h: _flat(quantize(w, stats=_stats(h))), w, h)
    else:
        part = jax.eval_shape(lambda w: _flat(quantize(w)), w)

    def whole(x: jax.ShapeDtypeStruct, last: int | None = None) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0] * lie.out // rows, *x.shape[1:])
        if lie.turned:
            shape = shape[::-1] if last is None else (lie.width, last)
        return jax.ShapeDtypeStruct(_stacked(shape, lie), x.dtype)

    result = jax.tree.map(whole, part)
    if part.length is None or not lie.turned:
        return result
    return result.replace(codes=whole(part.codes, packed_length(lie.out, part.type.bits)), length=lie.out)


def _stacked(shape: tuple[int, ...], lie: _Lies) -> tuple[int, ...]:
    """The shape of the stack of an array over all matrices, from the shape for one matrix."""
    if len(lie.shape) == 3:
        return (lie.stack, *shape)
    return (lie.stack * shape[0], *shape[1:])


def _flat(q: QTensor) -> QTensor:
    """A slice with float scales; quantized scales would have separate groups and offsets in each slice."""
    return q.replace(scale=scale_values(q.scale)) if isinstance(q.scale, QTensor) else q


def _other_files(path: str) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The tokenizer and other files beside the weights that are copied, and the names of files that are not.


    Links are followed to regular files only, not to directories or devices.
    """
    taken: dict[str, bytes] = {}
    left = []
    for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
        place = os.path.join(path, name)
        if name.startswith(".") or name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if not os.path.isfile(place) or name.endswith(_LEFT) or os.path.getsize(place) > _LARGEST_FILE:
            left.append(name)
            continue
        with open(place, "rb") as file:
            taken[name] = file.read()
    return taken, tuple(left)

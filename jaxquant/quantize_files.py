"""Resolves the options of ``jaxquant quantize``: weights, number type and scales for each format."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxquant.core.affine import quantize as quantize_array
from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.granularity import PerGroup, grouped
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.files import Watched
from jaxquant.io import plan_quantize_hf, quantize_hf, save_gguf
from jaxquant.io.directory import Layout, Piece
from jaxquant.io.gguf.write import block_type
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.native import save_leaves
from jaxquant.io.safetensors import TensorSpec
from jaxquant.io.save_hf import FORMATS, export_piece, layout_of
from jaxquant.io.sharded import Checkpoint
from jaxquant.io.stream import QuantizedLeaves, QuantizePlan
from jaxquant.models.calibration import calibrated
from jaxquant.models.to_gguf import described
from jaxquant.models.tokenizer import read_text, tokenizer_of
from jaxquant.recipes import recipe as named
from jaxquant.rules import Rule
from jaxquant.transform.methods import Method, method_of

__all__ = ["TARGETS", "Scheme", "quantize", "rules_of", "scheme_of"]

_F = "quantize"
#: Layouts that can be written: directories, and single files.
TARGETS = (*FORMATS, "gguf", "native")
#: Embeddings and the head.
_KEEP = r"(^|\.)(lm_head|embed_tokens|embeddings|word_embeddings|wte|wpe|shared)\b"
#: Routers of mixtures of experts: small, and rounding them changes which experts run.
_ROUTERS = r"\.(gate|router|shared_expert_gate)\.weight$"


class _Habit(NamedTuple):
    """The defaults of a format.

    Attributes:
      qtype: number type of the weights, by bits.
      groups: group size, by bits; a width that is missing has one scale for each output.
      scale_dtype: of the scales; None: that of the checkpoint.
    """

    qtype: dict[int, str]
    groups: dict[int, int]
    scale_dtype: str | None = None


_WIDTHS = range(2, 9)
_INTEGERS = {n: f"int{n}" for n in _WIDTHS}
_UNSIGNED = {n: f"uint{n}" for n in _WIDTHS}
_FEW = {n: 64 for n in _WIDTHS if n < 8}
_ALL = dict.fromkeys(_WIDTHS, 64)
_HABITS = {
    "compressed-tensors": _Habit(_INTEGERS, _FEW),
    "gptq": _Habit(_INTEGERS, _FEW, "float16"),
    "awq": _Habit(_UNSIGNED, _FEW, "float16"),
    "bitsandbytes": _Habit({4: "nf4"}, {4: 64}),
    "mlx": _Habit(_INTEGERS, _ALL),
    "gguf": _Habit(_INTEGERS, dict.fromkeys(_WIDTHS, 32), "float16"),
    "native": _Habit(_INTEGERS, _FEW),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The options of a call; None stands for the default of the format.

    Attributes:
      recipe: the name of a recipe; alone.
      qtype: number type of the weights.
      bits: their width, in place of a type.
      group_size: inputs that share a scale; -1: all of them.
      asymmetric: with zero points.
      scale_dtype: of the scales.
    """

    recipe: str | None = None
    qtype: str | None = None
    bits: int | None = None
    group_size: int | None = None
    asymmetric: bool = False
    scale_dtype: str | None = None


def scheme_of(asked: Scheme, format: str, source: Path) -> OpSpec:
    """How the weights are quantized: the options of the call, completed by the defaults of the format."""
    habit = _HABITS[format]
    if asked.recipe is not None:
        spec = named(asked.recipe)
        if spec.weight is None:
            raise quant_error(_F, "the recipe leaves weights in float", todo="Use another", recipe=asked.recipe)
        if spec.grad is not None or spec.outliers is not None or spec.weight.two_level:
            todo = "Use a recipe of weights, or of weights and activations, such as w4a16:g64 or w8a8"
            rule = "no file says how gradients, outliers or two levels of scales are quantized"
            raise quant_error(_F, rule, todo=todo, recipe=asked.recipe)
    else:
        spec = OpSpec(_weight(asked, habit, format))
    if asked.scale_dtype is not None and not _free_scales(spec):
        rule = "this number type has scales of its own form"
        raise quant_error(_F, rule, todo="Leave it out", scale_dtype=asked.scale_dtype, weight=repr(spec.weight))
    stored = HFCheckpoint(source, function=_F).dtype
    own = stored.name if stored is not None and stored.itemsize == 2 else None
    found = _scaled(spec, asked.scale_dtype or habit.scale_dtype or own)
    reason = _refusal(found, format)
    if reason is not None:
        fits = [to for to in TARGETS if _refusal(_scaled(spec, _HABITS[to].scale_dtype or own), to) is None]
        others = [f"--to {to}" for to in fits]
        todo = f"Use {' or '.join(others)}" if others else _NO_PLACE
        todo += ", or leave --asymmetric out" if asked.asymmetric else ""
        rule, scheme = f"the format has no place for this scheme: {reason}", asked.recipe or repr(spec.weight)
        raise quant_error(_F, rule, todo=todo, format=format, scheme=scheme)
    return found


_NO_PLACE = (
    "No format has one. Of activations a file can say int8 or fp8 per token: --recipe w8a8, fp8. All others run from "
    "Python: jaxquant.quantize_model and jaxquant.io.save"
)


def _free_scales(spec: OpSpec) -> bool:
    """Whether the dtype of the scales can be chosen."""
    return spec.weight is not None and spec.weight.type.kind == "int" and spec.weight.scale_dtype is None


def _scaled(spec: OpSpec, dtype: str | None) -> OpSpec:
    if not _free_scales(spec):
        return spec
    assert spec.weight is not None
    return dataclasses.replace(spec, weight=dataclasses.replace(spec.weight, scale_dtype=dtype))


def _refusal(spec: OpSpec, format: str) -> str | None:
    """Why a format has no place for the scheme, by a weight that the group size divides; None: it has."""
    weight = spec.weight
    assert weight is not None
    group = weight.granularity.size if isinstance(weight.granularity, PerGroup) else 1
    # Numbers whose scales and zero points are exact.
    matrix = np.float32(np.arange(64 * math.lcm(256, group)) % 16 - 8).reshape(64, -1)
    quantize_one = functools.partial(quantize_array, spec=weight, reduce_axes=(-1,))
    try:
        if format in FORMATS:
            export_piece(layout_of(format, spec.act), "one.weight", jax.eval_shape(quantize_one, matrix), dict)
        elif format == "gguf":
            block_type(quantize_one(matrix), "one.weight")  # which looks at values
    except QuantError as error:
        return error.text.partition("; got")[0]
    return None if spec.act is None or format in FORMATS else "it does not describe activations"


def _weight(asked: Scheme, habit: _Habit, format: str) -> QuantSpec:
    if asked.qtype is not None and asked.bits is not None:
        raise quant_error(_F, "a type has a width", todo="Give one of the two", weights=asked.qtype, bits=asked.bits)
    bits = asked.bits or 4
    qtype = asked.qtype or (_UNSIGNED if asked.asymmetric else habit.qtype).get(bits)
    if qtype is None:
        todo = f"Use {' or '.join(map(str, habit.qtype))}, or say the type with --weights"
        raise quant_error(_F, f"{format} has no type of this width", todo=todo, bits=bits)
    symmetric = not asked.asymmetric and not qtype.startswith("uint")
    kind = QuantSpec(qtype, symmetric=symmetric).type
    group = asked.group_size
    if group is None and kind.group_size is None and kind.kind in ("int", "table"):
        group = habit.groups.get(kind.bits)
    return QuantSpec(qtype, symmetric=symmetric, granularity=grouped(None if group == -1 else group))


def rules_of(
    spec: OpSpec, source: Path, ignore: Sequence[str], misfit: Literal["per_channel", "float"] | None = None
) -> list[Rule]:
    """Rules for all weights but those to be ignored, the embeddings, the head, and the routers of experts.

    Of the weights that stay in float by themselves, a checkpoint need not have all; what the user names must be there.
    """
    names = Checkpoint(source, function=_F).tensors
    kept = [Rule(_KEEP, None), *([Rule(_ROUTERS, None)] if any(".experts." in name for name in names) else [])]
    kept = [rule for rule in kept if any(map(rule.matches, names))]
    ignored = [Rule(pattern, None) for pattern in ignore]
    return [*ignored, *kept, Rule(r"\.weight$", OpSpec(spec.weight), misfit=misfit)]


def quantize(
    source: Path,
    destination: Path,
    rules: Sequence[Rule],
    *,
    format: str,
    method: str = "rtn",
    grams: Path | None = None,
    calibrate: Path | None = None,
    act: QuantSpec | None = None,
    architecture: str | None = None,
    shard_bytes: int,
    dry_run: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> QuantizePlan:
    """Quantizes a float checkpoint to a directory of one of `FORMATS`, or to a GGUF or native file.

    With ``calibrate``, a text, the float model runs first, layer by layer, and the method learns about the inputs of
    its weights. Until all is written ``DESTINATION.calibration`` holds the layers that are done. For a file each weight
    is quantized twice: all are checked before anything is written, and one is in memory at a time.
    """
    chosen = _checked_method(method, calibrate, grams)
    _check_destination(destination, directory=format in FORMATS)
    options = {"format": format, "act": act, "architecture": architecture, "shard_bytes": shard_bytes}
    if calibrate is None:
        how: dict[str, Any] = {"method": chosen.quantizer, "grams": grams}
        return _written(source, destination, rules, how, **options, dry_run=dry_run, progress=progress)
    # Sizes do not depend on the method.
    planned = _written(source, destination, rules, {"method": "rtn"}, **options, dry_run=True, progress=None)
    if dry_run:
        return planned
    place = destination.with_name(f"{destination.name}.calibration")
    tokens = tokenizer_of(source).encode(read_text(calibrate, function=_F))
    told = None if progress is None else lambda done, total: progress(done, total, "calibrating, in layers")
    found = calibrated(source, tokens, planned.specs, place, method=chosen, progress=told)
    how = {"method": chosen.quantizer, "grams": found.grams, "moved": found.moved}
    made = _written(source, destination, rules, how, **options, dry_run=False, progress=progress)
    shutil.rmtree(place)
    return made


def _checked_method(method: str, calibrate: Path | None, grams: Path | None) -> Method:
    """The method; raises if it needs data that are missing, or has no use for the data that are given."""
    chosen = method_of(_F, method)
    if chosen.steps and calibrate is None:
        todo = "Give --calibrate TEXT"
        raise quant_error(_F, "the scales to move are found by running the model on a text", todo=todo, method=method)
    if chosen.looks and calibrate is None and grams is None:
        todo = "Give --calibrate TEXT, or --grams FILE"
        raise quant_error(_F, "the method looks at the inputs of weights", todo=todo, method=method)
    if not (chosen.looks or chosen.steps) and (calibrate is not None or grams is not None):
        todo = "Leave --calibrate and --grams out, or use a method such as gptq or awq"
        raise quant_error(_F, "the method does not look at inputs", todo=todo, method=method)
    return chosen


def _written(
    source: Path,
    destination: Path,
    rules: Sequence[Rule],
    how: Mapping[str, Any],
    *,
    format: str,
    act: QuantSpec | None,
    architecture: str | None,
    shard_bytes: int,
    dry_run: bool,
    progress: Callable[[int, int, str], object] | None,
) -> QuantizePlan:
    """Writes the checkpoint, or plans it; ``how`` are the method and its data, as for `quantize_hf`."""
    if format in FORMATS:
        options: dict[str, Any] = {**how, "format": format, "act": act, "shard_bytes": shard_bytes}
        if dry_run:
            return plan_quantize_hf(source, rules, **options)
        return quantize_hf(source, destination, rules, **options, progress=progress)
    if act is not None:
        todo = "Write compressed-tensors, or use a recipe of weights alone, such as w8a16"
        raise quant_error(_F, "the format does not describe activations", todo=todo, format=format, act=act)
    leaves, notes = QuantizedLeaves(source, rules, **how), {}
    if format == "gguf":
        found = described(leaves, leaves.checkpoint.config, source, architecture, function=_F)
        notes = found.notes
        if not dry_run:
            save_gguf(destination, Watched(found.leaves, 2, progress), metadata=found.metadata, names="hf")
    elif not dry_run:
        save_leaves(destination, Watched(leaves, 2, progress))
    return _plan(leaves, destination.name, notes)


def _check_destination(destination: Path, *, directory: bool) -> None:
    """Raises first for faults that the writer would find after hours."""
    path = os.fspath(destination)
    if not destination.absolute().parent.is_dir():
        raise quant_error(_F, "the directory of the destination does not exist", todo="Create it first", path=path)
    empty = directory and destination.is_dir() and not any(destination.iterdir())
    if os.path.lexists(destination) and not empty:
        raise quant_error(_F, "the destination exists", todo="Choose another, or remove it first", path=path)


def _plan(leaves: QuantizedLeaves, name: str, notes: Mapping[str, str]) -> QuantizePlan:
    """The plan of one file that was, or would be, written."""
    weights = {name: leaf for name, leaf in leaves.abstract.items() if isinstance(leaf, QTensor)}
    floats = tuple(name for name in leaves if name not in weights)
    sizes = {name: _nbytes(leaf) for name, leaf in leaves.abstract.items()}
    pieces = [Piece({name: TensorSpec(np.dtype(np.uint8), (size,))}, dict) for name, size in sizes.items()]
    before = sum(spec.nbytes for spec in leaves.checkpoint.tensors.values())
    after, layout = sum(sizes.values()), Layout({name: pieces}, {})
    told = leaves.skipped, {**leaves.notes, **notes}, (), {}
    return QuantizePlan(weights, leaves.specs, floats, *told, before, after, layout, {})


def _nbytes(leaf: PyTree) -> int:
    return sum(np.dtype(x.dtype).itemsize * int(np.prod(x.shape)) for x in jax.tree.leaves(leaf))

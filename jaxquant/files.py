"""Operations of the command line on checkpoints of any kind: summaries, rules from TOML, conversion, comparison."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import tomllib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.paths import folded
from jaxquant.core.qtensor import QTensor
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.io import save_gguf
from jaxquant.io.arrays import Values
from jaxquant.io.directory import identity
from jaxquant.io.export import describes
from jaxquant.io.gguf.names import has_names
from jaxquant.io.gguf.read import GGUFLeaves
from jaxquant.io.gguf.split import GGUFModel
from jaxquant.io.gguf.types import PLAIN
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.formats import detect
from jaxquant.io.hf.leaves import HFLeaves
from jaxquant.io.hf.load import open_hf
from jaxquant.io.hf.schemes import Activation
from jaxquant.io.native import NativeLeaves, save_leaves
from jaxquant.io.safetensors import SafetensorsFile
from jaxquant.io.save_hf import layout_of, write_hf
from jaxquant.io.sharded import located
from jaxquant.io.slices import rows, runs_of_rows, stored_by_rows
from jaxquant.models.config import ARCHITECTURES
from jaxquant.models.gguf import MODEL_TYPES
from jaxquant.models.load import place_of
from jaxquant.models.to_gguf import described
from jaxquant.recipes import recipe
from jaxquant.rules import Rule

__all__ = ["Comparison", "Summary", "Watched", "compare", "convert", "place", "read_rules", "summary"]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The result of `summary`.

    Attributes:
      path: of the directory or file that was read.
      format: of the checkpoint.
      schemes: how weights are quantized -> how many are.
      parameters: how many numbers the tensors stand for.
      floats: the matrices that are in float, repeated layers as one name.
      reader: the function that reads it.
      activations: how the checkpoint quantizes them, with the weights that they meet.
      generates: whether ``jaxquant generate`` runs it, by its architecture.
      nbytes: bytes of all tensors.
      tensors: every tensor.
      weights: with ``deep``, name of each quantized weight -> what it is.
      problems: what is wrong.
    """

    path: str
    format: str
    schemes: dict[str, int]
    parameters: int
    floats: list[str]
    reader: str
    activations: list[str]
    generates: bool
    nbytes: int
    tensors: list[Tensor]
    weights: dict[str, str]
    problems: list[str]


def place(path: Path, function: str) -> Path:
    """The directory or file of a checkpoint; of a directory without other weights, the GGUF file in it."""
    found = Path(located(os.fspath(path), function))
    if not found.exists():
        todo = "Give a directory with safetensors files, a safetensors file or a GGUF file"
        raise quant_error(function, "there is no such file or directory", todo=todo, path=os.fspath(path))
    only = found.is_dir() and not any(found.glob("*.safetensors")) and any(found.glob("*.gguf"))
    return place_of(found) if only else found


def _kind(path: Path) -> str:
    """``"gguf"``, ``"jaxquant"`` or ``"hf"``."""
    if path.is_dir():
        return "hf"
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return "gguf"
    return "jaxquant" if "jaxquant" in SafetensorsFile(path, function="inspect").metadata else "hf"


def summary(path: Path, *, deep: bool = False) -> Summary:
    """The contents of a checkpoint, from its headers and one weight of each kind; with ``deep``, from all weights.

    A jaxquant file is memory-mapped and not decoded, so all of its weights are read.
    """
    path = place(path, "inspect")
    kind = _kind(path)
    if kind == "gguf":
        file = GGUFModel(path, function="inspect")
        tensors = [Tensor(name, info.type.name, info.shape, info.nbytes) for name, info in file.tensors.items()]
        unread = sorted({i.type.name for i in file.tensors.values() if i.type.refused})
        problems = [f"tensors of type {name} cannot be read" for name in unread]
        what = file.metadata.get("general.type", "model")
        words = [f"GGUF {file.version}", str(file.metadata.get("general.architecture", "no architecture"))]
        words += ([] if what == "model" else [str(what)]) + ([f"{n} parts"] if (n := len(file.files)) > 1 else [])
        name = ", ".join(words)
        generates = file.metadata.get("general.architecture") in MODEL_TYPES and what == "model"
        plain = {t.name: len(t.shape) for t in tensors if t.type in _PLAIN}
        found = _Found(_counts(t.type for t in tensors if t.type not in _PLAIN), _numbers(tensors), _matrices(plain))
    else:
        checkpoint = HFCheckpoint(path, function="inspect")
        config = checkpoint.config if kind == "hf" else {}
        generates = config.get("model_type") in (*ARCHITECTURES, "gemma3")
        tensors = [Tensor(n, s.dtype.name, s.shape, s.nbytes) for n, s in checkpoint.tensors.items()]
        form = None if kind == "jaxquant" else detect(checkpoint)[0]
        name = "jaxquant" if kind == "jaxquant" else "float" if form is None else form.name
        problems = []
        found = _Found({}, _numbers(tensors), [])
    weights: dict[str, str] = {}
    if kind != "gguf":
        try:
            leaves = _leaves(path, "inspect")
            found = found if name == "float" else _one_of_each(leaves)
        except QuantError as error:
            name = "an unknown format" if name == "float" else name
            problems.append(str(error))
    if deep and not problems:
        leaves = _leaves(path, "inspect")
        try:
            weights = {n: repr(leaf) for n, leaf in leaves.items() if isinstance(leaf, QTensor)}
        except QuantError as error:
            problems.append(str(error))
        if isinstance(leaves, HFLeaves):
            weights, problems = leaves.described, [*problems, *leaves.problems]
    reader = {"gguf": "jq.io.load_gguf", "jaxquant": "jq.io.load_model", "hf": "jq.io.load_hf"}[kind]
    acts = _acts(_leaves(path, "inspect")) if kind != "gguf" and name != "float" and not problems else []
    reader = "jq.io.load_model" if acts else reader
    nbytes = sum(t.nbytes for t in tensors)
    return Summary(
        str(path), name, *found, reader, acts, generates and not problems, nbytes, tensors, weights, problems
    )


_PLAIN = {kind.name for kind in PLAIN.values()}


def _acts(leaves: HFLeaves | GGUFLeaves | NativeLeaves) -> list[str]:
    """How activations are quantized, a few words for each kind."""
    if isinstance(leaves, GGUFLeaves) or not leaves.runs_otherwise():
        return []
    if isinstance(leaves, NativeLeaves):
        return ["as its plan says"]
    try:
        specs = collections.Counter(one.spec.act_brief for one in leaves.acts().values() if one.spec is not None)
        cache = leaves.cache()
    except QuantError as error:
        return [f"in a way that does not run here: {error}"]
    found = [f"{brief} before {n} weight{'' if n == 1 else 's'}" for brief, n in specs.most_common()]
    return found + ([] if cache is None else [f"{cache.qtype} keys and values"])


class _Found(NamedTuple):
    schemes: dict[str, int]
    parameters: int
    floats: list[str]


def _matrices(axes: Mapping[str, int]) -> list[str]:
    """Of names and their numbers of axes, those with two and more, repeated layers as one."""
    return list(folded({name: 0 for name, n in axes.items() if n > 1}))


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) for t in tensors)


def _counts(words: Iterable[str]) -> dict[str, int]:
    return dict(collections.Counter(words).most_common())


def _one_of_each(leaves: HFLeaves | GGUFLeaves | NativeLeaves) -> _Found:
    """How the weights are quantized: reads one weight of each set with tensors alike."""
    alike: dict[Hashable, list[str]] = {}
    kinds = _tensors_of(leaves) if isinstance(leaves, HFLeaves) else {}
    for name in leaves:
        alike.setdefault(kinds.get(name, name), []).append(name)
    schemes: collections.Counter[str] = collections.Counter()
    parameters, floats = 0, dict[str, int]()
    for names in alike.values():
        leaf = leaves[names[0]]
        parameters += len(names) * math.prod(leaf.shape)
        if isinstance(leaf, QTensor):
            schemes[leaf.scheme] += len(names)
        else:
            floats |= dict.fromkeys(names, len(leaf.shape))
    return _Found(dict(schemes.most_common()), parameters, _matrices({n: floats[n] for n in leaves if n in floats}))


def _tensors_of(leaves: HFLeaves) -> dict[str, Hashable]:
    """Name of each leaf -> the last part of its name, and the types and shapes of its tensors."""
    owners = {module.prefix: name for name, module in leaves.modules.items()}
    parts: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {name: [] for name in leaves}
    for name, spec in leaves.checkpoint.tensors.items():
        head = name
        while head and head not in owners:
            head = head.rpartition(".")[0]
        owner = owners.get(head, name)
        if owner in parts:
            parts[owner].append((name.removeprefix(head), spec.dtype.name, spec.shape))
    return {name: (*name.split(".")[-2:], *found) for name, found in parts.items()}


# -- rules -------------------------------------------------------------------------------------------------------------


def read_rules(path: Path) -> list[Rule]:
    """Rules from a TOML file: ``[[rule]]`` tables with ``pattern`` and one of ``keep``, ``recipe`` and ``weight``.

    ``keep = true``, the name of a recipe, or the fields of a `QuantSpec`.
    """

    def error(rule: str, todo: str, **got: Any) -> Exception:
        return quant_error("rules", rule, todo=todo, path=os.fspath(path), **got)

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as reason:
        raise error(f"the file is not TOML ({reason})", "Correct it") from None
    tables = content.get("rule")
    if set(content) != {"rule"} or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise error(
            "the file must hold [[rule]] tables and nothing else", "Write [[rule]] above each", keys=tuple(content)
        )
    rules = []
    for table in tables:
        fields = set(table)
        if fields == {"pattern", "keep"} and table["keep"] is True:
            rules.append(Rule(table["pattern"], None))
        elif fields == {"pattern", "recipe"}:
            spec = recipe(table["recipe"])
            if spec.act is not None or spec.weight is None:
                todo = "Use a recipe of weights alone, or --recipe, which is for the whole checkpoint"
                raise error("a rule says how weights are quantized, and not activations", todo, recipe=table["recipe"])
            rules.append(Rule(table["pattern"], spec))
        elif fields == {"pattern", "weight"}:
            rules.append(Rule(table["pattern"], OpSpec(QuantSpec.from_dict(table["weight"]))))
        else:
            todo = 'Write pattern = "..." and keep = true, or recipe = "w4a16:g64", or weight = { qtype = "int8", ... }'
            raise error("a rule has a pattern, and one of keep, recipe and weight", todo, fields=tuple(sorted(fields)))
    return rules


# -- conversion --------------------------------------------------------------------------------------------------------


def _leaves(path: Path, function: str) -> HFLeaves | GGUFLeaves | NativeLeaves:
    """The leaves of a checkpoint, under Hugging Face's names where there are any; each is read when asked for."""
    path = place(path, function)
    kind = _kind(path)
    if kind == "gguf":
        known = has_names(GGUFModel(path, function=function).metadata)
        return GGUFLeaves(path, names="hf" if known else "gguf", function=function)
    return NativeLeaves(path, function=function) if kind == "jaxquant" else open_hf(path, function=function)


class Watched(Mapping[str, Values]):
    """Leaves without some of their names, and how many were asked for."""

    def __init__(
        self,
        leaves: Mapping[str, Values],
        passes: int,
        progress: Callable[[int, int, str], object] | None,
        without: Iterable[str] = (),
    ):
        self._leaves, self._progress = leaves, progress
        without = set(without)
        self._names = [name for name in leaves if name not in without]
        self._count, self._total = 0, passes * len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Values:
        if self._progress is not None:
            self._progress(self._count, self._total, name)
        self._count += 1
        return self._leaves[name]


def convert(
    source: Path,
    destination: Path,
    format: str,
    *,
    architecture: str | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> list[str]:
    """Writes a checkpoint in another layout, with the same codes.

    How activations are quantized is kept where the layout can say it: one dynamic int8 or fp8 range per token, for all
    weights, in compressed-tensors. Tensors of static ranges are left out, since no scheme of the result uses them.

    One leaf at a time is in memory. Each is read twice: all are checked before anything is written. A directory that an
    interruption left is continued.

    Args:
      source: a directory, a safetensors file or a GGUF file.
      destination: must not exist, or be empty.
      format: of `save_hf`, or ``"gguf"`` or ``"native"``.
      architecture: with gguf, llama.cpp's name of the model's.
      progress: called with the leaves that are done, how many there are to do, and the name of the one that comes next.

    Returns:
      Sentences on missing parts of the result: the quantization of activations; in GGUF windows, or a tokenizer.
    """
    if format in ("gguf", "native") and os.path.lexists(destination):
        raise quant_error(
            "convert", "the destination exists", todo="Choose another, or remove it first", path=os.fspath(destination)
        )
    leaves = _leaves(source, "convert")
    act, lost = _activations(leaves, format)
    notes = [] if lost is None else [lost]
    of_directory = isinstance(leaves, HFLeaves)
    if of_directory and not leaves.modules and format not in ("gguf", "native"):
        todo = "Use jaxquant quantize, which rounds the weights and writes every layout"
        raise quant_error("convert", "nothing in the source is quantized", todo=todo, path=os.fspath(source))
    ranges = [name for name in leaves.activations if name in leaves] if of_directory else []
    watched = Watched(leaves, 2, progress, without=ranges)
    config = leaves.checkpoint.config if of_directory else {}
    if format == "gguf" and isinstance(leaves, GGUFLeaves):
        found = leaves.file.metadata
        save_gguf(destination, watched, metadata=found, names="hf" if has_names(found) else "gguf")
    elif format == "gguf":
        form = described(watched, config, place(source, "convert"), architecture, function="convert")
        save_gguf(destination, form.leaves, metadata=form.metadata, names="hf")
        notes += [f"{name}: {text}" for name, text in form.notes.items()]
    elif format == "native":
        save_leaves(destination, watched)
    else:
        origin = {"files": identity(leaves.paths), "format": format}
        write_hf(destination, watched, layout_of(format, act, function="convert"), config, source=origin)
    if lost is None and ranges:
        notes.append(f"tensors that describe activations are left out, since no scheme uses them ({_some(ranges)})")
    return notes


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *([f"and {len(names) - 3} more"] if len(names) > 3 else [])])


def _activations(leaves: HFLeaves | GGUFLeaves | NativeLeaves, format: str) -> tuple[QuantSpec | None, str | None]:
    """How the result quantizes activations, and a sentence on how it does not, of a source that does."""
    if isinstance(leaves, GGUFLeaves) or not leaves.runs_otherwise():
        return None, None
    acts: dict[str, Activation] = {}
    cached = isinstance(leaves, HFLeaves)
    if isinstance(leaves, HFLeaves):
        with contextlib.suppress(QuantError):  # a scheme that does not run
            acts = leaves.acts()
            cached = leaves.cache() is not None
    specs = {one.spec.act for one in acts.values() if one.spec is not None and one.spec.act is not None}
    outliers = any(one.spec is not None and one.spec.outliers is not None for one in acts.values())
    if (
        format == "compressed-tensors"
        and isinstance(leaves, HFLeaves)
        and len(specs) == 1
        and not cached
        and not outliers
    ):
        spec = specs.pop()
        if len(acts) == len(leaves.modules) and all(describes(spec, leaves[name]) for name in leaves.modules):
            return spec, None
        specs.add(spec)
    what = "activations, or keys and values," if cached else "activations"
    said = f" ({', '.join(sorted({spec.brief for spec in specs}))})" if specs else ""
    if format == "native":
        todo = "To keep the scheme, load the source with load_model, and save it with the plan of your function"
    else:
        todo = "The layout can say at most int8 or fp8 per token, alike for all weights"
        todo = (
            todo
            if format == "compressed-tensors"
            else "Of the layouts, compressed-tensors can say int8 or fp8 per token"
        )
    return None, f"the source quantizes {what}{said} and the result holds its weights alone. {todo}"


# -- comparison --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far the values of a tensor are apart: the largest, and the norm relative to that of the first."""

    name: str
    first: str
    second: str
    largest: float
    relative: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    tensors: list[Difference]
    only_first: list[str]
    only_second: list[str]
    equal: bool


def _values(leaf: Values) -> np.ndarray:
    # Not under jit, where a product and a sum could become one operation with one rounding.
    return np.asarray(leaf.dequantize(jnp.float32) if isinstance(leaf, QTensor) else leaf, np.float32)


def _slices(first: Values, second: Values) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values of two leaves of one shape, some rows at a time; of codes that are not stored by rows, all at once."""
    leaves = [leaf if stored_by_rows(leaf) else _values(leaf) for leaf in (first, second)]
    for begin, end in runs_of_rows(*leaves):
        x, y = (_values(rows(leaf, begin, end)) for leaf in leaves)
        yield x, y


def _difference(name: str, first: Values, second: Values) -> Difference:
    largest = squares = size = 0.0
    for x, y in _slices(first, second):
        with np.errstate(invalid="ignore"):
            apart = np.where((x == y) | (np.isnan(x) & np.isnan(y)), np.float32(0), np.abs(y - x)).astype(np.float64)
        largest = float(np.maximum(largest, apart.max(initial=0)))
        squares += float(np.square(apart).sum())
        size += float(np.square(x, dtype=np.float64).sum())
    return Difference(name, _type(first), _type(second), largest, math.sqrt(squares) / (math.sqrt(size) or 1.0))


def _type(leaf: Values) -> str:
    return leaf.qtype if isinstance(leaf, QTensor) else np.dtype(leaf.dtype).name


def compare(first: Path, second: Path, *, progress: Callable[[int, int, str], object] | None = None) -> Comparison:
    """The values of two checkpoints in float32; names must be the same, formats need not.

    One tensor of each is in memory at a time. ``progress`` is as for `convert`.
    """
    a, b = _leaves(first, "compare"), _leaves(second, "compare")
    watched = Watched(a, 1, progress)
    found = []
    for name in watched:
        if name not in b:
            continue
        x, y = watched[name], b[name]
        if x.shape != y.shape:
            rule, todo = "a tensor has two shapes", "Compare checkpoints of one model"
            raise quant_error("compare", rule, todo=todo, path=name, first=x.shape, second=y.shape)
        found.append(_difference(name, x, y))
    only_first, only_second = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    equal = not only_first and not only_second and all(d.largest == 0 for d in found)
    return Comparison(found, only_first, only_second, equal)

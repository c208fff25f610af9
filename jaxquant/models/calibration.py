"""`calibrated`: what a method of quantization learns from a text about a decoder, a layer at a time.

The float model is never whole in memory: each layer is read, run on the whole text, and released. A directory keeps the
results, so that an interrupted run continues with the next layer:

    run.json              the arguments of the run: a run with the same ones continues it
    states-00003.npy      float32 [window, token, feature]: the inputs of layer 3; only the latest file is kept
    grams/                a checkpoint: the Gram matrices of the inputs of weights, under the names of the weights
    moved/                a checkpoint: weights, norms and biases of the model between which scales have moved

Each checkpoint has a file for each layer, and at the end an index.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import Params
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.core.types import PyTree
from jaxquant.io.atomic import replacing
from jaxquant.io.directory import identity, json_bytes
from jaxquant.io.heap import give_back
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_safetensors
from jaxquant.io.strict_json import Json
from jaxquant.models.config import Config, config_of
from jaxquant.models.decoder import block, embedded, head, normed
from jaxquant.models.load import IMAGES, fitted, place_of, renamed, stacked
from jaxquant.rules import Rule
from jaxquant.transform.analysis.scales import ScalePair, scale_pairs
from jaxquant.transform.calibrate import Calibration
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.methods import STEPS, Method
from jaxquant.transform.plan import Plan
from jaxquant.transform.statistics import Gram

__all__ = ["Calibrated", "calibrated"]

_F = "calibrate"
_INDEX = "model.safetensors.index.json"


class Calibrated(NamedTuple):
    """The directories that `calibrated` has written; None where a method has nothing to keep.

    Attributes:
      grams: the Gram matrices of the inputs of weights.
      moved: tensors that take the place of the model's.
    """

    grams: Path | None
    moved: Path | None


def calibrated(
    source: str | os.PathLike[str],
    tokens: Sequence[int] | np.ndarray,
    specs: Mapping[str, QuantSpec],
    place: str | os.PathLike[str],
    *,
    method: Method,
    window: int = 512,
    progress: Callable[[int, int], object] | None = None,
) -> Calibrated:
    """Writes what a method needs to know of the inputs of weights, over a text, to a directory.

    Steps such as AWQ move scales within one layer. The output of a layer stays the same, so each layer sees the inputs
    that it has in the float model. Memory holds one layer in float32, its statistics, and the activations of one window
    of tokens. An expert of a mixture counts only the tokens that are routed to it.

    Args:
      source: the directory of a float decoder that `jaxquant.models.load` supports.
      tokens: of the text, which is cut into windows; an incomplete last window is not used.
      specs: how each weight is quantized, under its name in the files.
      place: a directory that is made, or one that an interrupted run has left.
      method: its steps are taken; Gram matrices are kept if its quantizer looks at inputs.
      window: tokens in one sequence; fewer if the text is shorter.
      progress: called before each layer with how many are done, and of how many.

    Raises:
      QuantError: if the source is quantized or no such decoder, a name is none of its weights or has no inputs, experts
        of a layer have different specs, a step finds no scales to move, the text has fewer than two tokens, or the
        directory holds a run of something else.
    """
    files = _Files(source)
    if len(tokens) < 2:
        todo = "Use a text of a few thousand tokens, similar to the texts that the model is for"
        raise quant_error(_F, "the text is too short", todo=todo, tokens=len(tokens))
    stages, wanted = _stages(files.config), {name: renamed(name)[0] for name in specs}
    of_stage = [{n: whole for n, whole in wanted.items() if whole.startswith(prefix)} for prefix in stages]
    unknown = [n for n in specs if n not in files.checkpoint.tensors or not any(n in of for of in of_stage)]
    if unknown:
        todo = "Leave them out with --ignore"
        raise quant_error(_F, "these are no weights with inputs", todo=todo, names=tuple(unknown[:5]))
    wholes = _specs_of_wholes(specs, wanted)
    window = min(window, len(tokens))
    count = len(tokens) // window
    windows = np.asarray(tokens[: count * window], np.int32).reshape(count, 1, window)
    place = Path(place)
    _begin(
        place,
        {
            "files": identity(file.path for file in files.checkpoint.files.values()),
            "specs": {name: spec.to_dict() for name, spec in sorted(specs.items())},
            "steps": method.steps,
            "grams": method.looks is not False,
            "tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
            "window": window,
        },
    )
    for i in range(len(stages)):
        if progress is not None:
            progress(i, len(stages))
        if not (place / "grams" / _layer(i)).exists():
            whole_specs = {whole: wholes[whole] for whole in of_stage[i].values()}
            _run(files, i, of_stage[i], whole_specs, windows, place, method)
            give_back()
        (place / _states(i)).unlink(missing_ok=True)
    return Calibrated(*(_indexed(place / kind) for kind in Calibrated._fields))


def _specs_of_wholes(specs: Mapping[str, QuantSpec], wanted: Mapping[str, str]) -> dict[str, QuantSpec]:
    """The specs under the names of parameters, in which the experts of a layer are one."""
    found: dict[str, QuantSpec] = {}
    for name, spec in specs.items():
        if found.setdefault(wanted[name], spec) != spec:
            todo = "Use one rule for all experts of a layer"
            raise quant_error(_F, "the experts of a layer are quantized in different ways", todo=todo, path=name)
    return found


def _layer(i: int) -> str:
    return f"layer-{i:05}.safetensors"


def _states(i: int) -> str:
    return f"states-{i:05}.npy"


def _stages(config: Config) -> list[str]:
    """The prefix of the parameters' names in each stage: the layers, then the head."""
    return [*(f"model.layers.{i}." for i in range(len(config.layers))), "lm_head."]


def _begin(place: Path, stated: Mapping[str, Json]) -> None:
    """Makes the directory, or checks that an interrupted run with the same arguments left it."""
    for kind in Calibrated._fields:
        (place / kind).mkdir(parents=True, exist_ok=True)
    run = place / "run.json"
    if not run.exists():
        with replacing(run, function=_F) as file:
            file.write(json_bytes(stated))
    elif run.read_bytes() != json_bytes(stated):
        todo = "Remove it, or repeat the command that it is of"
        raise quant_error(_F, "there is an interrupted run of something else", todo=todo, path=os.fspath(place))


def _indexed(place: Path) -> Path | None:
    """The checkpoint of all layers' files, with its index; None if no layer has a tensor."""
    placed = {
        name: path.name
        for path in sorted(place.glob("layer-*.safetensors"))
        for name in SafetensorsFile(path, function=_F).tensors
    }
    if not placed:
        return None
    with replacing(place / _INDEX, function=_F) as file:
        file.write(json_bytes({"weight_map": placed}))
    return place


class _Files:
    """A decoder on disk: its parameters by the names of `Config.shapes`, each read when it is asked for."""

    def __init__(self, source: str | os.PathLike[str]):
        place = place_of(source)
        if not place.is_dir():
            todo = "Give the directory of a float model"
            raise quant_error(_F, "a GGUF file cannot be calibrated", todo=todo, path=os.fspath(place))
        self.checkpoint = HFCheckpoint(place, function=_F)
        self.dtype = self.checkpoint.dtype or np.dtype(np.float32)
        self._path = os.fspath(place)
        self._members: dict[str, dict[int, str]] = {}
        for name in self.checkpoint.tensors:
            whole, expert = renamed(name)
            if not IMAGES.match(whole) and not whole.endswith("rotary_emb.inv_freq"):
                self._members.setdefault(whole, {})[-1 if expert is None else expert] = name
        shapes = {whole: self._shape(whole) for whole in self._members}
        shapes |= {whole: self[whole] for whole in shapes if whole.endswith(".bias")}  # those of zeros do not count
        config = config_of(self.checkpoint.config, path=self._path)
        self.config, self._names = fitted(config, shapes, self._path)

    def _shape(self, whole: str) -> jax.ShapeDtypeStruct:
        members = self._members[whole]
        one = [jax.ShapeDtypeStruct(self.checkpoint.tensors[n].shape, self.dtype) for n in members.values()]
        return one[0] if -1 in members else jax.ShapeDtypeStruct((len(one), *one[0].shape), self.dtype)

    def __getitem__(self, whole: str) -> jax.Array:
        return self.read(whole, self.dtype)

    def read(self, whole: str, dtype: np.dtype) -> jax.Array:
        """A parameter in a dtype; by itself, it is in the model's."""
        leaves = {i: jnp.asarray(self.checkpoint.array(name), dtype) for i, name in self._members[whole].items()}
        self.checkpoint.forget()
        return leaves[-1] if -1 in leaves else stacked(whole, leaves, self._path)

    def names(self, *prefixes: str) -> list[str]:
        """The names of parameters that begin with one of the prefixes."""
        return [name for name in self._names if name.startswith(prefixes)]

    def tensors(self, params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """Parameters as the files have them: by their names there, in their dtypes, experts one by one."""
        found: dict[str, np.ndarray] = {}
        for whole, leaf in params.items():
            for i, name in self._members[whole].items():
                found[name] = np.asarray(leaf if i < 0 else leaf[i]).astype(self.checkpoint.tensors[name].dtype)
        return found


_FIRST = "model.layers.0."


def _run(
    files: _Files, i: int, wanted: Mapping[str, str], specs: Mapping[str, QuantSpec], tokens: np.ndarray, place: Path,
    method: Method,
) -> None:  # fmt: skip
    """Runs one layer on the whole text, and writes what it has found and the inputs of the next layer."""
    config, last = files.config, i == len(files.config.layers)
    if i == 0:
        params = {n: files[n] for n in files.names("model.embed_tokens.")}
        first = jax.jit(functools.partial(embedded, config))
        _write(place / _states(0), (first(params, jnp.asarray(window)) for window in tokens), len(tokens))
    found: dict[str, dict[str, np.ndarray]] = {"moved": {}, "grams": {}}
    if wanted or not last:
        states = np.load(place / _states(i), mmap_mode="r")
        inputs = functools.partial(jnp.asarray, dtype=files.dtype)
        # Layers of one kind have one program: that of a model which has this layer alone.
        alone = config if last else dataclasses.replace(config, layers=(config.layers[i],))
        prefix = _stages(config)[i]
        local = {n: n if last else n.replace(prefix, _FIRST, 1) for n in files.names(*_used(config, last, prefix))}
        x = jax.ShapeDtypeStruct(states.shape[1:], files.dtype)
        stage = _stage(alone, last, tuple(sorted((local[n], spec) for n, spec in specs.items())), x, method)
        params = {local[n]: files[n] for n in local}
        if not last:
            _write(place / _states(i + 1), (stage.run(params, inputs(x)) for x in states), len(states))
        if wanted:
            found = _learned(files, params, local, stage, wanted, lambda: ((inputs(x),) for x in states), method)
    for kind, arrays in found.items():  # the Gram matrices, last, are the mark of a layer that is done
        forms = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        write_safetensors(place / kind / _layer(i), forms, arrays.__getitem__, {})


def _learned(
    files: _Files, params: dict[str, jax.Array], local: Mapping[str, str], stage: _Stage, wanted: Mapping[str, str],
    batches: Callable[[], Iterator[tuple[jax.Array]]], method: Method,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """The tensors between which the method moves scales in a layer, and then the Gram matrices."""
    before = {m: files.read(n, np.dtype(np.float32)) for n, m in local.items()} if method.steps else {}
    after = before
    for name in method.steps:
        after = STEPS[name].move(after, stage.plan, stage.pairs, stage.statistics[name](params, batches(), None))
        params = {n: leaf.astype(files.dtype) for n, leaf in after.items()}
    changed = {n: after[m] for n, m in local.items() if m in after and after[m] is not before[m]}
    grams = {}
    if method.looks is not False:
        stats = stage.statistics["gram"](params, batches(), None)
        grams = {name: _gram(name, stats[local[whole]]) for name, whole in wanted.items()}
    return {"moved": files.tensors(changed), "grams": grams}


def _used(config: Config, last: bool, prefix: str) -> list[str]:
    """The prefixes of the names of a stage's parameters."""
    return ["model.norm.", "model.embed_tokens." if config.tied else "lm_head."] if last else [prefix]


class _Stage(NamedTuple):
    """The programs for all layers of one kind.

    Attributes:
      run: the function of (parameters, inputs).
      plan: of the weights that are wanted.
      pairs: between which of its parameters scales can move.
      statistics: name of a step, or ``"gram"`` -> the pass that collects what it reads.
    """

    run: Callable[..., jax.Array]
    plan: Plan
    pairs: tuple[ScalePair, ...]
    statistics: dict[str, Calibration]


@functools.lru_cache(maxsize=8)
def _stage(
    config: Config, last: bool, specs: tuple[tuple[str, QuantSpec], ...], x: jax.ShapeDtypeStruct, method: Method
) -> _Stage:
    """The programs of a stage that quantizes these weights by this method."""

    def fn(params: Params, x: jax.Array) -> jax.Array:
        return head(config, params, normed(config, params, x)) if last else block(config, 0, params, x)[0]

    used = tuple(_used(config, last, _FIRST))
    params = {n: jax.ShapeDtypeStruct(s, x.dtype) for n, s in config.shapes().items() if n.startswith(used)}
    rules = [Rule(f"^{re.escape(name)}$", OpSpec(spec)) for name, spec in specs]
    plan = make_plan(fn, params, x, rules=[*rules, Rule(".*", None)])
    pairs = scale_pairs(fn, plan, params, x) if specs and method.steps else ()
    if specs and method.steps and not pairs:
        rule, todo = "no scales can move between the parameters of a layer", "Use another method"
        raise quant_error(_F, rule, todo=todo, weights=tuple(name for name, _ in specs), method=method.steps[0])
    collect = {name: STEPS[name].collect for name in method.steps}
    if method.looks is not False:
        collect["gram"] = {"gram": Gram()}
    return _Stage(jax.jit(fn), plan, pairs, {name: Calibration(_F, fn, plan, of) for name, of in collect.items()})


def _gram(name: str, stats: Mapping[str, PyTree]) -> np.ndarray:
    """The matrix of a tensor of the files: of a weight, of one expert, or of all that are one tensor."""
    gram, (_, expert) = np.asarray(stats["gram"]["gram"], np.float32)[..., 0, :, :], renamed(name)
    return gram if expert is None else gram[expert]


def _write(path: Path, arrays: Iterable[jax.Array], count: int) -> None:
    """[count, ..] float32, one entry after the other; the file appears when it is complete."""
    partial, file = path.with_suffix(".partial"), None
    for i, array in enumerate(arrays):
        if file is None:
            file = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(count, *array.shape))
        file[i] = np.asarray(array, np.float32)
    assert file is not None
    file.flush()
    del file
    os.replace(partial, path)

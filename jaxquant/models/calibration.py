"""`grams`: the Gram matrices of the inputs of a decoder's weights, from a text, a layer at a time.

The float model is never whole in memory: each layer is read, run on the whole text, and released. A directory keeps the
results, so that an interrupted run continues with the next layer:

    run.json              the arguments of the run: a run with the same ones continues it
    states-00003.npy      float32 [window, token, feature]: the inputs of layer 3; only the latest file is kept
    layer-00002.safetensors   the Gram matrices of layer 2, under the names of the weights
    model.safetensors.index.json   at the end: which name is in which file
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import quant_error
from jaxquant.io.atomic import replacing
from jaxquant.io.directory import identity, json_bytes
from jaxquant.io.heap import give_back
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.safetensors import TensorSpec, write_safetensors
from jaxquant.models.config import Config, config_of
from jaxquant.models.decoder import block, embedded, head, normed
from jaxquant.models.load import IMAGES, fitted, place_of, renamed, stacked
from jaxquant.rules import Rule
from jaxquant.transform.calibrate import Calibration
from jaxquant.transform.make_plan import make_plan
from jaxquant.transform.statistics import Gram

__all__ = ["grams"]

_F = "calibrate"
_INDEX = "model.safetensors.index.json"


def grams(
    source: str | os.PathLike[str],
    tokens: Sequence[int],
    names: Sequence[str],
    place: str | os.PathLike[str],
    *,
    window: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the Gram matrices of the inputs of weights, over a text, to a directory.

    Memory holds one layer, its Gram matrices, and the activations of one window of tokens. An expert of a mixture
    counts only the tokens that are routed to it.

    Args:
      source: the directory of a float decoder that `jaxquant.models.load` supports.
      tokens: of the text, which is cut into windows; an incomplete last window is not used.
      names: the weights, as the files call them.
      place: a directory that is made, or one that an interrupted run has left.
      window: tokens in one sequence; fewer if the text is shorter.
      progress: called before each layer with how many are done, and of how many.

    Raises:
      QuantError: if the source is quantized or no such decoder, a name is none of its weights or has no inputs, the
        text has fewer than two tokens, or the directory holds a run of something else.
    """
    files = _Files(source)
    if len(tokens) < 2:
        todo = "Use a text of a few thousand tokens, similar to the texts that the model is for"
        raise quant_error(_F, "the text is too short", todo=todo, tokens=len(tokens))
    stages, wanted = _stages(files.config), {name: renamed(name)[0] for name in names}
    of_stage = [{n: whole for n, whole in wanted.items() if whole.startswith(prefix)} for prefix in stages]
    unknown = [n for n in names if n not in files.checkpoint.tensors or not any(n in of for of in of_stage)]
    if unknown:
        todo = "Leave them out with --ignore"
        raise quant_error(_F, "these are no weights with inputs", todo=todo, names=tuple(unknown[:5]))
    window = min(window, len(tokens))
    count = len(tokens) // window
    windows = np.asarray(tokens[: count * window], np.int32).reshape(count, 1, window)
    place = Path(place)
    stated = {
        "files": identity(file.path for file in files.checkpoint.files.values()),
        "names": sorted(names),
        "tokens": hashlib.sha256(windows.tobytes()).hexdigest(),
        "window": window,
    }
    _begin(place, stated)
    for i, prefix in enumerate(stages):
        if progress is not None:
            progress(i, len(stages))
        if not (place / _layer(i)).exists():
            _run(files, i, prefix, of_stage[i], windows, place)
            give_back()
        (place / _states(i)).unlink(missing_ok=True)
    placed = {name: _layer(i) for i, of in enumerate(of_stage) for name in of}
    with replacing(place / _INDEX, function=_F) as file:
        file.write(json_bytes({"weight_map": placed}))


def _layer(i: int) -> str:
    return f"layer-{i:05}.safetensors"


def _states(i: int) -> str:
    return f"states-{i:05}.npy"


def _stages(config: Config) -> list[str]:
    """The prefix of the parameters' names in each stage: the layers, then the head."""
    return [*(f"model.layers.{i}." for i in range(len(config.layers))), "lm_head."]


def _begin(place: Path, stated: Mapping[str, Any]) -> None:
    """Makes the directory, or checks that an interrupted run with the same arguments left it."""
    place.mkdir(exist_ok=True)
    run = place / "run.json"
    if not run.exists():
        with replacing(run, function=_F) as file:
            file.write(json_bytes(stated))
    elif run.read_bytes() != json_bytes(stated):
        todo = "Remove it, or repeat the command that it is of"
        raise quant_error(_F, "there is an interrupted run of something else", todo=todo, path=os.fspath(place))


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

    def _shape(self, whole: str) -> Any:
        members = self._members[whole]
        one = [jax.ShapeDtypeStruct(self.checkpoint.tensors[n].shape, self.dtype) for n in members.values()]
        return one[0] if -1 in members else jax.ShapeDtypeStruct((len(one), *one[0].shape), self.dtype)

    def __getitem__(self, whole: str) -> jax.Array:
        members = self._members[whole]
        leaves = {i: jnp.asarray(self.checkpoint.array(name), self.dtype) for i, name in members.items()}
        self.checkpoint.forget()
        return leaves[-1] if -1 in leaves else stacked(whole, leaves, self._path)

    def below(self, *prefixes: str) -> dict[str, jax.Array]:
        """The parameters whose names begin with one of the prefixes."""
        return {whole: self[whole] for whole in self._names if whole.startswith(prefixes)}


_FIRST = "model.layers.0."


def _run(files: _Files, i: int, prefix: str, wanted: Mapping[str, str], windows: np.ndarray, place: Path) -> None:
    """Runs one layer on the whole text, and writes its Gram matrices and the inputs of the next layer."""
    config, last = files.config, i == len(files.config.layers)
    if i == 0:
        params = files.below("model.embed_tokens.")
        first = jax.jit(functools.partial(embedded, config))
        _write(place / _states(0), (first(params, jnp.asarray(tokens)) for tokens in windows), len(windows))
    found: dict[str, np.ndarray] = {}
    if wanted or not last:
        states = np.load(place / _states(i), mmap_mode="r")
        # Layers of one kind have one program: that of a model which has this layer alone.
        alone = config if last else dataclasses.replace(config, layers=(config.layers[i],))
        wanted = {name: whole.replace(prefix, _FIRST) for name, whole in wanted.items()}
        x = jax.ShapeDtypeStruct(states.shape[1:], files.dtype)
        step, calibration = _programs(alone, last, tuple(sorted(set(wanted.values()))), x)
        params = {n.replace(prefix, _FIRST): leaf for n, leaf in files.below(*_used(config, last, prefix)).items()}
        inputs = functools.partial(jnp.asarray, dtype=files.dtype)
        if calibration is not None:
            stats = calibration(params, ((inputs(x),) for x in states), None)
            found = {name: _gram(name, stats[whole]) for name, whole in wanted.items()}
        if not last:
            _write(place / _states(i + 1), (step(params, inputs(x)) for x in states), len(states))
    specs = {name: TensorSpec(gram.dtype, gram.shape) for name, gram in found.items()}
    write_safetensors(place / _layer(i), specs, found.__getitem__, {})


def _used(config: Config, last: bool, prefix: str) -> list[str]:
    """The prefixes of the names of a stage's parameters."""
    return ["model.norm.", "model.embed_tokens." if config.tied else "lm_head."] if last else [prefix]


@functools.lru_cache(maxsize=8)
def _programs(config: Config, last: bool, wanted: tuple[str, ...], x: Any) -> tuple[Any, Calibration | None]:
    """The function of a stage, compiled, and the calibration that collects the Gram matrices of its weights."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return head(config, params, normed(config, params, x)) if last else block(config, 0, params, x)[0]

    used = tuple(_used(config, last, _FIRST))
    params = {n: jax.ShapeDtypeStruct(s, x.dtype) for n, s in config.shapes().items() if n.startswith(used)}
    if not wanted:
        return jax.jit(fn), None
    plan = make_plan(fn, params, x, rules=[Rule(f"^({'|'.join(map(re.escape, wanted))})$", "w8a16")])
    return jax.jit(fn), Calibration("calibrate", fn, plan, {"gram": Gram()})


def _gram(name: str, stats: Any) -> np.ndarray:
    """The matrix of a tensor of the files: of a weight, of one expert, or of all that are one tensor."""
    gram, (_, expert) = np.asarray(stats["gram"]["gram"], np.float32)[..., 0, :, :], renamed(name)
    return gram if expert is None else gram[expert]


def _write(path: Path, arrays: Any, count: int) -> None:
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

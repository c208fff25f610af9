"""`load`: a model, its parameters and its tokenizer, from a directory or a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.core.units import in_bytes, in_millions
from jaxquant.io import load_gguf
from jaxquant.io.arrays import Values
from jaxquant.io.gguf.container import Value
from jaxquant.io.hf.model import Activations, Floating, HFModel, load_hf_model
from jaxquant.io.hf.schemes import CacheScales
from jaxquant.io.sharded import located, read_json
from jaxquant.models import gguf
from jaxquant.models.config import Config, Layer, config_of
from jaxquant.models.tokenizer import Tokenizer, ends_of, tokenizer_of, tokenizer_of_gguf
from jaxquant.transform.quantized import quantized
from jaxquant.transform.stated import StatedPlan

__all__ = ["IMAGES", "Model", "fitted", "load", "place_of", "renamed", "stacked"]


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder that is ready to run.

    Attributes:
      path: where it comes from.
      config: what it computes.
      params: by name, as `Config.shapes` lists them: arrays, and QTensors where the checkpoint is quantized.
      dtype: of activations.
      format: of the checkpoint, such as ``"GPTQ"``; ``"float"`` where nothing is quantized.
      ends: ids of the tokens that end a text.
      notes: what was left out or put right, a sentence each.
      plan: how activations are quantized, as the checkpoint says; None: they are in ``dtype``.
      state: their static ranges, or None.
      metadata: of a GGUF file, or empty.
      vocabulary: a directory with another ``tokenizer.json`` than the checkpoint has, or None.
    """

    path: str
    config: Config
    params: dict[str, PyTree]
    dtype: np.dtype
    format: str
    ends: frozenset[int]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, Value] = dataclasses.field(default_factory=dict, repr=False)
    vocabulary: str | None = None
    plan: StatedPlan | None = None
    state: PyTree = dataclasses.field(default=None, repr=False)

    def run(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """``fn(params, state, ...)`` in low precision, as the checkpoint says, for ``fn`` of params and arguments."""
        plan = self.plan
        return lambda params, state, *args: quantized(fn, plan, state)(params, *args)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """From ``tokenizer.json`` of a directory, or from the metadata of the GGUF file."""
        if self.vocabulary is None and self.metadata:
            return tokenizer_of_gguf(self.metadata, self.path)
        return tokenizer_of(self.path if self.vocabulary is None else self.vocabulary)

    @functools.cached_property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind of parameter, such as ``"int4, groups of 64"`` -> tensors and bytes; the largest part first."""
        found: dict[str, list[Values]] = {}
        for leaf in self.params.values():
            found.setdefault(_kind(leaf), []).append(leaf)
        sizes = {kind: (len(leaves), sum(leaf.nbytes for leaf in leaves)) for kind, leaves in found.items()}
        return dict(sorted(sizes.items(), key=lambda item: -item[1][1]))

    def __str__(self) -> str:
        """A line for the model, one for each kind of parameter, and one for each quantized activation."""
        config, numbers = self.config, sum(math.prod(leaf.shape) for leaf in self.params.values())
        what = f"{config.architecture}, {len(config.layers)} layers, {in_millions(numbers)} parameters, {self.format}"
        some = lambda n: "1 tensor" if n == 1 else f"{n} tensors"  # noqa: E731
        kinds = [(kind, f"{some(n)}, {in_bytes(size)}") for kind, (n, size) in self.kinds.items()]
        width = max(len(kind) for kind, _ in kinds)
        lines = [f"{self.path}: {what}", *(f"  {kind.ljust(width)}  {size}" for kind, size in kinds)]
        lines += [f"  activations: {what}" for what in self.activations]
        return "\n".join(map(printable, [*lines, *(f"  note: {text}" for text in self.notes)]))

    @property
    def activations(self) -> tuple[str, ...]:
        """Quantized values other than weights, a line for each kind."""
        kinds = Counter(() if self.plan is None else self.plan.specs.values())
        found = [f"{spec.act_brief} before {n} weight{'s' if n > 1 else ''}" for spec, n in kinds.items()]
        cache = self.config.cache
        return (*found, *([f"{cache} keys and values, by the scales of the checkpoint"] if cache else []))


def _kind(leaf: Values) -> str:
    """The number type and what shares a scale, without the shape."""
    return leaf.scheme if isinstance(leaf, QTensor) else np.dtype(leaf.dtype).name


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = np.float32,
    tokenizer: str | os.PathLike[str] | None = None,
    ignore: Collection[str] = (),
    activations: Activations = "saved",
    cache: Floating = "saved",
) -> Model:
    """Loads a decoder, quantized by whatever library or in float.

    Args:
      path: a directory with ``config.json`` and safetensors files, or a GGUF file (or a directory with one),
        or a model's directory in the cache of huggingface_hub.
      dtype: of activations, and of the weights that are in float.
      tokenizer: a directory with ``tokenizer.json``, if the checkpoint has none that can be used.
      ignore: fields of the configuration that this package does not know and that leave the logits as they are.
      activations: ``"float"`` leaves activations in ``dtype`` where the checkpoint says how they are quantized;
        ``"inputs"`` only the outputs of weights.
      cache: ``"float"`` leaves keys and values so.

    Raises:
      QuantError: for an architecture, a field of the configuration or a tensor that is not supported, each by its name;
        and in the cases in which `jaxquant.io.load_model` and `jaxquant.io.load_gguf` raise.

    Example:
      >>> import jaxquant as jq
      >>> model = jq.models.load("TheModel-GPTQ-Int4")
      Traceback (most recent call last):
      ...
      jaxquant.core.errors.QuantError: models at TheModel-GPTQ-Int4: there is no such file or directory. Give the...
    """
    place = place_of(path)
    if place.is_dir():
        model = _from_directory(place, np.dtype(dtype), ignore, activations, cache)
    else:
        model = _from_gguf(place, np.dtype(dtype), ignore)
    model = dataclasses.replace(model, config=model.config.with_mixtures(sorted=_have_kernels(model)))
    return model if tokenizer is None else dataclasses.replace(model, vocabulary=os.fspath(tokenizer))


def _have_kernels(model: Model) -> bool:
    """Whether kernels multiply all experts in a ragged product.

    They take stored codes without a permutation and without offsets, and one range of the activation for all experts.
    """
    experts = {name: leaf for name, leaf in model.params.items() if ".mlp.experts." in name}
    stored = [leaf for leaf in experts.values() if isinstance(leaf, QTensor)]
    one_range = all(v.size == 1 for v in jax.tree.leaves([(model.state or {}).get(name) for name in experts]))
    return one_range and len(stored) == len(experts) and all(q.permutation is q.offset is None for q in stored)


def place_of(path: str | os.PathLike[str]) -> Path:
    """The directory with ``config.json``, or the GGUF file; of a directory without other weights, the one in it."""
    place = Path(located(os.fspath(path), "models"))
    if not place.exists():
        todo = "Give the directory of a model, or a GGUF file"
        raise quant_error("models", "there is no such file or directory", todo=todo, path=str(place))
    files = sorted(place.glob("*.gguf")) if place.is_dir() else []
    has_config = (place / "config.json").exists()
    if place.is_dir() and not (has_config and (not files or any(place.glob("*.safetensors")))):
        if not files:
            todo = "Give the directory of a model, or a GGUF file"
            raise quant_error("models", "there is neither config.json nor a .gguf file", todo=todo, path=str(place))
        if len(files) > 1 and not all(re.search(r"-\d{5}-of-\d{5}\.gguf$", file.name) for file in files):
            names = tuple(file.name for file in files)
            raise quant_error("models", "there are several GGUF files", todo="Name one", path=str(place), files=names)
        return files[0]
    return place


def _from_directory(
    place: Path, dtype: np.dtype, ignore: Collection[str], activations: Activations, cache: Floating
) -> Model:
    path = str(place)
    stated = read_json(place / "config.json", function="models")
    config = config_of(stated, ignore=ignore, path=path)
    found = load_hf_model("models", place, dtype=dtype, activations=activations, cache=cache)
    info, notes = found.info, list(found.info.problems)
    if info.runs_otherwise:
        left = [what for what, how in (("activations", activations), ("keys and values", cache)) if how == "float"]
        notes += [f"the checkpoint is made for quantized {what}, which stay in {dtype.name} here" for what in left]
    params = _named(found.params, path)
    if found.cache is not None:
        config = dataclasses.replace(config, cache=found.cache.qtype)
        params |= _of_cache(found.cache)
    plan, state = _named_plan(found, path)
    images = [name for name in params if IMAGES.match(name)]
    if images:
        notes.append(f"{len(images)} tensors of the encoder of images are left out")
    for name in images:
        del params[name]
    config, params = fitted(config, params, path)
    ends = ends_of(place, stated)
    return Model(path, config, params, dtype, info.format, ends, tuple(notes), plan=plan, state=state)


def _from_gguf(place: Path, dtype: np.dtype, ignore: Collection[str]) -> Model:
    path = str(place)
    with open(place, "rb") as file:
        if file.read(4) != b"GGUF":
            todo = "Give a directory with config.json, or a GGUF file"
            raise quant_error("models", "the file is not a GGUF file", todo=todo, path=path)
    params, info = load_gguf(place, names="hf", dtype=dtype)
    params = gguf.renamed(params)
    factors = params.pop("rope_freqs.weight", None)
    stated = gguf.configuration(info.metadata, params, ignore=ignore, path=path)
    config = config_of(stated, path=path)
    biases = (re.fullmatch(r"model\.layers\.0\.(.+)\.bias", name) for name in params)  # no key says which there are
    config = dataclasses.replace(config, biases=config.biases | {found[1] for found in biases if found})
    if factors is not None:  # what Llama 3 scales its frequencies by
        config = _with_factors(config, np.asarray(factors, np.float32), path)
    is_quantized = any(isinstance(leaf, QTensor) for leaf in params.values())
    float_dtype = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and not isinstance(x, QTensor)  # noqa: E731
    params = {name: jnp.asarray(leaf, dtype) if float_dtype(leaf) else leaf for name, leaf in params.items()}
    config, params = fitted(config, params, path)
    ids = [info.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    ends = frozenset(int(i) for i in ids if i is not None)
    return Model(path, config, params, dtype, "GGUF" if is_quantized else "GGUF, float", ends, (), info.metadata)


def _with_factors(config: Config, factors: np.ndarray, path: str) -> Config:
    def scaled(layer: Layer) -> Layer:
        frequencies = np.asarray(layer.rope.frequencies, np.float32)
        if frequencies.shape != factors.shape:
            rule = "rope_freqs must have one number per pair of features"
            raise quant_error("models", rule, todo="The file is damaged", path=path, shape=factors.shape)
        rope = dataclasses.replace(layer.rope, frequencies=tuple(map(float, frequencies / factors)))
        return dataclasses.replace(layer, rope=rope)

    return dataclasses.replace(config, layers=tuple(map(scaled, config.layers)))


# -- names -------------------------------------------------------------------------------------------------------------

#: Of a decoder that is part of a larger model.
IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def renamed(name: str) -> tuple[str, int | None]:
    """The name of a parameter in this package, from any of its names in files, and the index of its expert."""
    name = re.sub(r"^language_model\.(?=(model|lm_head)\.)", "", name)
    name = re.sub(r"^model\.language_model\.", "model.", name)
    name = name.replace(".block_sparse_moe.", ".mlp.").replace(".switch_mlp.", ".experts.")
    found = _EXPERT.fullmatch(name)
    if found:
        return f"{found[1]}.{_PARTS.get(found[3], found[3])}.weight", int(found[2])
    return (f"{name}.weight" if re.search(r"\.mlp\.experts\.\w+_proj$", name) else name), None


def _named(params: Mapping[str, Values], path: str) -> dict[str, Values]:
    """One name for each parameter; the experts of a layer as one leaf."""
    result: dict[str, Values] = {}
    experts: dict[str, dict[int, Values]] = {}
    for name, leaf in params.items():
        whole, expert = renamed(name)
        if expert is not None:
            experts.setdefault(whole, {})[expert] = leaf
        elif not whole.endswith("rotary_emb.inv_freq"):
            result[whole] = leaf
    return result | {name: stacked(name, leaves, path) for name, leaves in experts.items()}


def _named_plan(found: HFModel, path: str) -> tuple[StatedPlan | None, dict[str, PyTree] | None]:
    """The plan and the state under the names of the parameters; those of experts as one."""
    if found.plan is None:
        return None, None
    groups: dict[str, dict[int | None, str]] = {}
    for name in found.params:
        whole, expert = renamed(name)
        groups.setdefault(whole, {})[expert] = name
    acts, state = {}, {}
    for whole, members in groups.items():
        ordered = [members[i] for i in sorted(members, key=lambda i: -1 if i is None else i)]
        specs = {found.plan.specs.get(name) for name in ordered}
        if len(specs) > 1:
            rule, todo = "the activations of all experts must be quantized in one way", "Use activations='float'"
            raise quant_error("models", rule, todo=todo, path=f"{path}, {whole}", ways=len(specs))
        spec = specs.pop()
        if spec is None:
            continue
        acts[whole] = spec
        entries = [(found.state or {}).get(name) for name in ordered]
        if entries[0] is not None:
            whole_entry = entries[0] if None in members else jax.tree.map(lambda *x: np.stack(x), *entries)
            state[whole] = jax.tree.map(jnp.asarray, whole_entry)
    return StatedPlan(acts), state or None


def _of_cache(cache: CacheScales) -> dict[str, jax.Array]:
    """The scales of keys and values as parameters."""
    scales = {f"{place}.{x}_scale": value for place, sides in cache.scales.items() for x, value in sides.items()}
    return {renamed(name)[0]: jnp.asarray(value) for name, value in scales.items()}


def stacked(name: str, leaves: Mapping[int, PyTree], path: str) -> PyTree:
    """[out, in] of each expert as [expert, out, in]."""
    ordered = [leaves[i] for i in sorted(leaves)]
    forms = Counter((jax.tree.structure(leaf), tuple(x.shape for x in jax.tree.leaves(leaf))) for leaf in ordered)
    if sorted(leaves) != list(range(len(leaves))) or len(forms) > 1:
        rule = "the experts of a layer must all be there, quantized in one way"
        todo = "Quantize them again, with one rule for all"
        raise quant_error("models", rule, todo=todo, path=f"{path}, {name}", experts=len(leaves), ways=len(forms))
    return jax.tree.map(lambda *x: jnp.stack(x), *ordered)


def fitted(config: Config, params: dict[str, PyTree], path: str) -> tuple[Config, dict[str, PyTree]]:
    """The configuration and the parameters of one model; `QuantError` with all names that do not fit."""
    if config.tied and "lm_head.weight" in params:  # what is in the file counts
        config = dataclasses.replace(config, tied=False)
    if any(name.endswith(".mlp.experts.gate_up_proj.weight") for name in params):
        config = config.with_mixtures(fused=True)
    shapes, found = config.shapes(), {}
    wrong = [f"{name} is missing" for name in shapes if name not in params]
    for name, leaf in params.items():
        shape = shapes.get(name)
        if shape is None:
            beside, _, last = name.rpartition(".")
            if last == "bias" and f"{beside}.weight" in shapes and not np.any(np.asarray(leaf)):
                continue  # some writers give every layer a bias of zeros
            wrong.append(f"{name} is not a parameter of {config.architecture} (nearest: {nearest(name, shapes)})")
        elif tuple(leaf.shape) != shape:
            wrong.append(f"{name} has shape {tuple(leaf.shape)}, and {shape} by the configuration")
        else:
            found[name] = leaf
    if wrong:
        lines = "".join(f"\n  {text}" for text in wrong[:20])
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        todo = "The configuration is of another model, or the files are not complete"
        raise quant_error(
            "models", f"the tensors are not those of the model{lines}{more}\n", todo=todo, path=path, misfits=len(wrong)
        )
    return config, {name: found[name] for name in shapes}

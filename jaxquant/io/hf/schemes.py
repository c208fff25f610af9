"""Translates a checkpoint's description of quantized activations to specs.

Each format has a function that returns the `Activation` of a module. Schemes that a `QuantSpec` cannot express are
refused, naming the key, since leaving them out would change the results. Scales of the cache of keys and values belong
to a layer instead of a weight: see `cache_scales`.

A range that comes from the array (dynamic) is the one that the library of the format computes: ``absmax / 448`` for
fp8; for int8 ``absmax / 127`` (BitNet, LLM.int8()) or ``absmax / 127.5`` (`whole`: compressed-tensors, torchao). A
range in the file (static) is used unchanged, with all codes of the type.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxquant.core import observers
from jaxquant.core.errors import QuantError
from jaxquant.core.granularity import PerTensor
from jaxquant.core.specs import OpSpec, QuantSpec
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import Module
from jaxquant.io.strict_json import Json

__all__ = [
    "NARROW",
    "Activation",
    "CacheScales",
    "cache_scales",
    "dynamic",
    "given",
    "in_unit",
    "is_scale_of_cache",
    "refused",
    "static",
    "whole",
    "with_outputs",
]

_FP8 = "float8_e4m3fn"
#: Beside ``observer_kwargs`` of a dynamic int8 scheme of compressed-tensors, which no reader looks at: the step is
#: absmax / 127, with codes of -127 to 127. Files of jaxquant have it.
NARROW = "narrow_range"
_TODO = "Run the weights alone: activations='float', or ask for a checkpoint without this scheme"


@dataclasses.dataclass(frozen=True)
class Activation:
    """The quantization of the activation of one weight.

    Attributes:
      spec: the scheme, whose ``act`` is set; None if the tensors exist but state no scheme.
      state: its static range from the file: ``scale``, and ``zero_point`` if there is one.
      used: names of the tensors of the range.
      outputs: why the outputs of the weight, which are rounded as well, cannot be; None if they are not.
    """

    spec: OpSpec | None
    state: Mapping[str, np.ndarray] | None = None
    used: tuple[str, ...] = ()
    outputs: QuantError | None = None


def refused(
    m: Module, key: str, value: Json, why: str = "no scheme of jaxquant computes this", todo: str = _TODO
) -> QuantError:
    """The error for a scheme that cannot be expressed."""
    rule = f"the activations of this weight are quantized in a way that cannot be run: {why}"
    return m.error(rule, todo=todo, **{re.sub(r"\W", "_", key): value})


def with_outputs(m: Module, found: Activation, key: str, value: Json) -> Activation:
    """An activation beside which outputs are rounded, as a key says."""
    todo = "Round the inputs alone: activations='inputs'; or run the weights alone: activations='float'"
    idle = (f"{m.prefix}.output_{part}" for part in ("scale", "zero_point"))
    used = (*found.used, *(name for name in idle if name in m.checkpoint.tensors))
    outputs = refused(m, key, value, "outputs are rounded, too", todo)
    return dataclasses.replace(found, used=used, outputs=outputs)


def dynamic(qtype: str = "int8", *, outliers: float | None = None, **more: Any) -> Activation:
    """A range for each token from the array itself; ``more`` are fields of its `QuantSpec`."""
    return Activation(OpSpec(act=QuantSpec(qtype, **more), outliers=outliers))


def whole(qtype: str = "int8", **more: Any) -> Activation:
    """A dynamic symmetric range over all codes: the scale is ``absmax / (qmax + 1/2)``, 127.5 for int8."""
    return dynamic(qtype, narrow_range=False, calibration=observers.AbsMax(), **more)


def in_unit(m: Module, key: str, name: str, *, inverse: bool) -> Activation:
    """nvfp4: blocks of 16 with scales from the array, beside one float32 from the file.

    Args:
      m: the module.
      key: the configuration key that requires the tensor.
      name: of the tensor, after the module's name.
      inverse: whether scales of blocks are divided by the tensor, and not multiplied.
    """
    tensor = m.prefix + ("_" if m.is_parameter else ".") + name
    if tensor not in m.checkpoint.tensors:
        rule = "the configuration says that activations have a global scale, and the file has none"
        raise m.error(rule, todo=f"Fetch all files again: the tensor is {tensor}", key=key)
    value = m.checkpoint.array(tensor).astype(np.float32)
    if not (value > 0).all():
        raise refused(m, name, value.reshape(-1)[:4].tolist(), "a global scale must be positive")
    unit = np.float32(1) / value if inverse else value
    return Activation(OpSpec(act=QuantSpec("nvfp4", static=True)), {"scale": _squeezed(unit)}, (tensor,))


def static(m: Module, key: str, qtype: str, *, symmetric: bool = True) -> Activation:
    """One range, from the tensors of the file; ``key`` is the configuration key that requires it."""
    found = _names(m, "scale", _WORDS)
    if not found:
        wanted = m.prefix + (f"_{_SCALE}" if m.is_parameter else f".{_SCALE}")
        rule = "the configuration says that the range of activations is static, and the file has none"
        raise m.error(rule, todo=f"Fetch all files again, or calibrate: the tensor is {wanted}", key=key)
    zeros = _names(m, "zero_point", _WORDS)
    tensors = {"scale": m.checkpoint.array(found[0]), "zero_point": m.checkpoint.array(zeros[0]) if zeros else None}
    return given(m, key, qtype, tensors, tuple(found + zeros), symmetric=symmetric)


def given(
    m: Module,
    key: str,
    qtype: str,
    tensors: Mapping[str, np.ndarray | None],
    names: tuple[str, ...],
    *,
    symmetric: bool,
) -> Activation:
    """One range: ``scale`` and ``zero_point`` (or None) as the file has them, under these names."""
    assert tensors["scale"] is not None
    scale, values = tensors["scale"].astype(np.float32), tensors["zero_point"]
    if not (scale > 0).all():  # in some formats 0 means that the activation is not quantized
        raise refused(m, "input_scale", scale.reshape(-1)[:4].tolist(), "a static scale must be positive")
    if values is not None and not values.astype(np.float32).any() and symmetric:
        values = None
    if (values is None) != symmetric:
        got = "no zero point" if values is None else "zero points"
        raise m.error(f"a range with {got} does not fit symmetric={symmetric}", todo="Check the configuration", key=key)
    narrow = None if qtype.startswith("float") or not symmetric else False
    spec = QuantSpec(qtype, granularity=PerTensor(), symmetric=symmetric, static=True, narrow_range=narrow)
    entry = {"scale": _squeezed(scale)}
    if values is not None:
        if values.min() < spec.type.qmin or values.max() > spec.type.qmax:
            raise m.error("a zero point is not a code of the type", todo="Check the configuration", key=key)
        entry["zero_point"] = _squeezed(values.astype(spec.type.code_dtype))
    return Activation(OpSpec(act=spec), entry, names)


_SCALE = "input_scale"
_WORDS = ("input", "input_activation", "activation", "act")


def _names(m: Module, what: str, words: Iterable[str]) -> list[str]:
    joint = "_" if m.is_parameter else "."
    names = [f"{m.prefix}{joint}{word}_{what}" for word in words]
    return [name for name in names if name in m.checkpoint.tensors]


def _squeezed(value: np.ndarray) -> np.ndarray:
    """A scalar, or one scalar per expert."""
    return value.reshape(()) if value.size == 1 else value.reshape(-1)


# -- the cache ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheScales:
    """How keys and values are stored.

    Attributes:
      qtype: of their codes.
      scales: name of the attention (``"model.layers.0.self_attn"``) -> ``{"k": .., "v": ..}``, scalars.
      used: names of the tensors of the scales.
    """

    qtype: str
    scales: Mapping[str, Mapping[str, np.ndarray]]
    used: tuple[str, ...]


_OF_CACHE = re.compile(
    r"^(?:(?P<place>.*?)\.)?(?:attn\.)?(?:(?P<proj>[kv])_proj\.)?"
    r"(?:(?P<a>[kv])_(?:cache_|output_)?scale|(?P<b>[kv])_cache\.scale|(?P<c>output_scale|kv_scale|kv_cache_scale)"
    r"|(?P<d>kv_cache_scaling_factor))$"
)
_BESIDE = re.compile(r"(?:^|\.)(?:q|p|prob)(?:_output)?(?:_|\.)scale$")


def is_scale_of_cache(name: str) -> bool:
    """Whether a tensor that describes activations belongs to the cache, or to queries or probabilities."""
    if _BESIDE.search(name):
        return True
    found = _OF_CACHE.fullmatch(name)
    return found is not None and not (found["c"] == "output_scale" and found["proj"] is None)


def cache_scales(checkpoint: HFCheckpoint, config: Mapping[str, Json], names: Iterable[str]) -> CacheScales | None:
    """The scales of keys and values of each layer; None if the checkpoint does not mention a cache.

    Raises:
      QuantError: if the configuration names a scheme that is not one static scale for keys and one for values.
    """
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    key, stated = next(((k, v) for k in keys if (v := _stated(config, k))), ("", None))
    groups = config.get("config_groups")
    groups = [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []
    outputs = stated or config.get("quant_method") == "fp8" or any(g.get("output_activations") for g in groups)
    used = [name for name in names if is_scale_of_cache(name) and (outputs or not name.endswith("output_scale"))]
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in used:
        match = _OF_CACHE.fullmatch(name)
        if match is None:
            value = checkpoint.array(name).astype(np.float32)
            if not (value == 1).all():
                raise _no_cache(checkpoint, name, "queries and probabilities are not quantized here", value.tolist())
            continue
        value = checkpoint.array(name).astype(np.float32)
        if value.size != 1:
            raise _no_cache(checkpoint, name, "there is one scale for the keys and one for the values", value.shape)
        side = match["a"] or match["b"] or (match["proj"] if match["c"] == "output_scale" else None)
        for one in "kv" if side is None else side:
            found.setdefault(match["place"] or "", {})[one] = value.reshape(())
    if stated is None and not found:
        return None
    if not found:
        raise _no_cache(checkpoint, key, "the file has no scales for it", stated)
    lacking = [place for place, sides in found.items() if set(sides) != {"k", "v"}]
    if lacking:
        raise _no_cache(checkpoint, lacking[0], "it needs a scale for the keys and one for the values", key)
    return CacheScales(_cache_type(checkpoint, key, stated), found, tuple(used))


def _stated(config: Mapping[str, Json], key: str) -> Json:
    inner = config.get("quantization")
    return config.get(key) or (inner.get(key) if isinstance(inner, Mapping) else None)


def _cache_type(checkpoint: HFCheckpoint, key: str, stated: Json) -> str:
    if stated is None or stated in ("static", "FP8", "fp8", "fp8_e4m3"):
        return _FP8
    if isinstance(stated, Mapping):
        rest = (stated.get("symmetric", True), stated.get("strategy", "tensor"), stated.get("dynamic", False))
        qtype = {"float 8": _FP8, "int 8": "int8"}.get(f"{stated.get('type')} {stated.get('num_bits')}")
        if qtype is not None and rest == (True, "tensor", False):
            return qtype
    raise _no_cache(checkpoint, key, "it is not one static scale for fp8 or int8 keys, and one for values", stated)


def _no_cache(checkpoint: HFCheckpoint, key: str, why: str, found: Json) -> QuantError:
    rule = f"the cache of keys and values is quantized in a way that cannot be run: {why}"
    return checkpoint.error(rule, key or None, todo="Leave keys and values in float: cache='float'", found=found)

"""Rotary embeddings: the frequencies that a configuration states, with their scaling for longer contexts.

Angles are ``position * frequency``. A frequency ``theta ** (-2 i / d)`` of pair i is scaled so:

    linear   f / factor
    dynamic  f, up to the length that the model is made for; longer sequences have others, and are refused
    llama3   f where its wavelength is short, f / factor where it is long, between the two interpolated
    yarn     the same with other bounds, given in rotations; cosine and sine are multiplied by a magnitude

Source: transformers' rotary embeddings; Peng et al., YaRN (arXiv:2309.00071), equations 17 to 22.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.io.strict_json import Json

__all__ = ["Rope", "magnitude_of", "rope_of", "rotated"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding.

    Attributes:
      frequencies: radians per position of each pair of features.
      magnitude: what cosine and sine are multiplied by.
      longest: the longest sequence that has these frequencies; None: any.
      stated: the parameters that it is made from, as `rope_of` takes them.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    longest: int | None = None
    stated: Mapping[str, Json] = dataclasses.field(default_factory=dict, compare=False, repr=False)


def rotated(rope: Rope, x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + half) of [batch, token, head, feature] by the angles of [batch, token]."""
    if rope.longest is not None and x.shape[1] > rope.longest:
        todo = f"Give at most {rope.longest} tokens: its frequencies are others for more"
        raise quant_error("logits", "the rotary embedding is dynamic", todo=todo, tokens=x.shape[:2])
    frequencies = jnp.asarray(rope.frequencies, jnp.float32).reshape(1, 1, 1, -1)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = ((f(angle) * rope.magnitude).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


_BASE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    },
}  # fmt: skip
_NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}


def rope_of(parameters: Mapping[str, Json], size: int, context: int, error: Callable[..., QuantError]) -> Rope:
    """The embedding of heads of ``size`` features that ``rope_parameters`` describe, or older ``rope_scaling``.

    Args:
      parameters: with ``rope_theta``; what is None counts as not there.
      size: features of a head, all of which are rotated.
      context: where the length that the model was trained at is not stated.
      error: makes the error from a rule and what to do.
    """
    p = {key: value for key, value in parameters.items() if value is not None}
    kind = p["rope_type"] = p.get("rope_type", p.pop("type", "default"))
    _check(p, kind, error)
    p.setdefault("original_max_position_embeddings", context)
    longest = context if kind == "dynamic" else None
    return dataclasses.replace(_scaled(p, size), longest=longest, stated=p)


def _check(p: Mapping[str, Json], kind: str, error: Callable[..., QuantError]) -> None:
    if kind not in _KEYS:
        todo = f"Supported are {', '.join(_KEYS)}"
        raise error("this scaling of rotary embeddings is not supported", todo=todo, rope_type=kind)
    unknown = sorted(p.keys() - _BASE - _KEYS[kind])
    if unknown:
        todo = "Remove what does not change the result from the configuration"
        raise error("unknown fields of the rotary embedding", todo=todo, rope_type=kind, fields=tuple(unknown))
    if p.get("partial_rotary_factor", 1.0) != 1.0:
        todo = "Run it with another program"
        raise error(
            "heads that are rotated in part are not supported",
            todo=todo,
            partial_rotary_factor=p["partial_rotary_factor"],
        )
    missing = _NEEDED.get(kind, set()) - p.keys()
    if missing:
        todo = "Add them to the configuration"
        raise error("the rotary embedding lacks fields", todo=todo, rope_type=kind, fields=tuple(sorted(missing)))


def _scaled(p: Mapping[str, Json], size: int) -> Rope:
    frequencies = (1.0 / p["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float32) / size)).astype(np.float32)
    if p["rope_type"] in ("default", "dynamic"):
        return _rope(frequencies)
    factor, trained = float(p["factor"]), p["original_max_position_embeddings"]
    if p["rope_type"] == "linear":
        return _rope(frequencies / factor)
    if p["rope_type"] == "llama3":
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        turns = trained * frequencies / (2 * math.pi)  # in the length of training
        share = np.clip((turns - low) / (high - low), 0, 1)
        return _rope(frequencies * share + frequencies / factor * (1 - share))
    return _yarn(p, frequencies, factor, trained)


def _yarn(p: Mapping[str, Json], frequencies: np.ndarray, factor: float, trained: int) -> Rope:
    size, theta = 2 * frequencies.size, p["rope_theta"]

    def pair(turns: float) -> float:
        """Which pair rotates so often in the length of training."""
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(p.get("beta_fast") or 32), pair(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    share = 1 - np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low or 0.001), 0, 1)
    magnitude = p.get("attention_factor")
    if magnitude is None:
        a, b = p.get("mscale"), p.get("mscale_all_dim")
        magnitude = magnitude_of(factor, a) / magnitude_of(factor, b) if a and b else magnitude_of(factor)
    return _rope(frequencies * share + frequencies / factor * (1 - share), float(magnitude))


def magnitude_of(factor: float, scale: float = 1.0) -> float:
    """The number that cosine and sine are multiplied by in yarn."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _rope(frequencies: np.ndarray, magnitude: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), magnitude)

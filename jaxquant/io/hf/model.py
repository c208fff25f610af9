"""A Hugging Face directory with the quantization of its activations, for `load_model`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
from jax.typing import DTypeLike

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.types import PyTree
from jaxquant.io.hf.leaves import HFLeaves
from jaxquant.io.hf.load import CheckpointInfo, read_hf
from jaxquant.io.hf.names import NameMap
from jaxquant.io.hf.schemes import CacheScales, is_scale_of_cache
from jaxquant.ops.targets import Platform
from jaxquant.transform.stated import StatedPlan

__all__ = ["Activations", "Floating", "HFModel", "load_hf_model"]

#: Whether a scheme of the checkpoint runs, or is left out.
Floating = Literal["saved", "float"]
#: Of activations it may also be that of the inputs of weights alone, without that of their outputs.
Activations = Literal["saved", "inputs", "float"]


@dataclasses.dataclass(frozen=True)
class HFModel:
    """A directory with its plan and state: run it by ``jq.quantized(fn, model)(model.params, ...)``.

    Attributes:
      params: the parameters, without tensors that describe activations.
      plan: how the activations of each weight are quantized, which becomes a plan of ``fn`` when it is traced (see
        `StatedPlan.plan_for`); None: activations are float.
      state: path -> ``{"scale": .., "zero_point": ..}``, the static ranges in the file; None if there are none.
      info: the contents of the directory.
      cache: how keys and values are stored, for a model that has a cache; None: in float.
    """

    params: dict[str, PyTree]
    plan: StatedPlan | None
    state: dict[str, dict[str, jax.Array]] | None
    info: CheckpointInfo
    cache: CacheScales | None = None

    def __str__(self) -> str:
        acts = "activations in float" if self.plan is None else str(self.plan)
        return f"{self.info}\n{printable(acts)}" if "\n" not in acts else f"{self.info}\n{acts}"


def load_hf_model(
    function: str,
    directory: str | os.PathLike[str],
    *,
    names: NameMap | None = None,
    dtype: DTypeLike | None = None,
    target: Platform | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    activations: Activations = "saved",
    cache: Floating = "saved",
) -> HFModel:
    """Reads a directory with its plan and state.

    Raises:
      QuantError: as `load_hf`; for a scheme that cannot be run, or for tensors that describe activations but that no
        scheme uses, naming them.
    """
    for key, value, allowed in (("activations", activations, Activations), ("cache", cache, Floating)):
        if value not in get_args(allowed):
            words = " or ".join(map(repr, get_args(allowed)))
            raise quant_error(function, f"{key} must be {words}", todo="Use one of them", got=value)

    def drop(leaves: HFLeaves) -> list[str]:
        stored.append(leaves.cache() if cache == "saved" else None)
        acts.update(leaves.acts(inputs=activations == "inputs") if activations != "float" else {})
        used = {name for one in acts.values() for name in one.used}
        rest = [n for n in leaves.activations if n not in used and not is_scale_of_cache(n)]
        if rest and activations != "float":
            rule = "the file describes activations that no scheme of its configuration uses"
            todo = "Correct the configuration, or run the weights alone: activations='float'"
            raise leaves.checkpoint.error(rule, rest[0], todo=todo, tensors=tuple(rest[:10]), count=len(rest))
        return list(leaves.activations)

    acts: dict[str, Any] = {}
    stored: list[CacheScales | None] = []
    found = read_hf(function, directory, None, names, dtype, None, target, shapes, drop)
    acts = {found.paths[name]: one for name, one in acts.items() if name in found.paths and one.spec}
    state = {path: dict(one.state) for path, one in acts.items() if one.state is not None}
    plan = StatedPlan({path: one.spec for path, one in acts.items()}) if acts else None
    return HFModel(found.params, plan, state or None, found.info, stored[0])

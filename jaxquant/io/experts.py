"""The layout of experts in a checkpoint: the contracted axis, by the family of the model.

    [experts, out, in]       most families, as transformers fuses them; granite and jetmoe; MLX's switch_mlp
    [experts, in, out]       llama4, gpt_oss, aria, and the files of qwen3_vl_moe
    [experts * hidden, in]   dbrx: w1 and v1 are rows of [out, in] of one expert after another, w2 rows of [in, out]

Shapes alone do not determine the axis, since hidden sizes may be equal. Where ``hidden_size`` determines it, the two
must agree.

Source: the modules of transformers 5.24 and its table of conversions between files and modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxquant.io.strict_json import Json

__all__ = ["Experts", "experts_of", "is_experts"]

_IN_LAST = frozenset(
    [
        "afmoe",
        "axk1",
        "axk2",
        "bailing_hybrid",
        "beam",
        "cohere2_moe",
        "deepseek_ocr2",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "deepseek_v4",
        "diffusion_gemma",
        "dots1",
        "ernie4_5_moe",
        "ernie4_5_vl_moe",
        "exaone_moe",
        "flex_olmo",
        "gemma4",
        "glm4_moe",
        "glm4_moe_lite",
        "glm4v_moe",
        "glm_moe_dsa",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "jetmoe",
        "kimi_linear",
        "lfm2_moe",
        "longcat_flash",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_omni_moe",
        "solar_open",
    ]
)
_OUT_LAST = frozenset(["aria", "gpt_oss", "llama4", "qwen3_vl_moe"])
_STACKED = re.compile(r"(^|[._])(experts?|block_sparse_moe|moe|mlp\.moe|switch_mlp|switch_glu)[._]")
_SWITCH = re.compile(r"(^|[._])(switch_mlp|switch_glu)[._]")
_DBRX = re.compile(r"(^|\.)experts\.mlp\.(w1|v1|w2)$")
_NO_WEIGHT = re.compile(r"bias|norm|scale|correction", re.IGNORECASE)
_INTO = re.compile(r"gate|up|w1|w3|v1|fc1|input_linear")
_OUT_OF = re.compile(r"down|w2|fc2|output_linear")


class Experts(NamedTuple):
    """The layout of experts' weights in one tensor.

    Attributes:
      axis: the contracted axis, -1 or -2.
      stack: the number of matrices along the first axis of a tensor with two axes; 1 for a single matrix.
    """

    axis: int
    stack: int = 1


def is_experts(name: str, shape: tuple[int, ...], config: Mapping[str, Json]) -> bool:
    """Whether a tensor holds weights of several experts."""
    if len(shape) == 2:
        return "dbrx" in _families(config) and _DBRX.search(name) is not None
    last = name.removesuffix(".weight").rpartition(".")[2]
    return len(shape) == 3 and _STACKED.search(name) is not None and not _NO_WEIGHT.search(last)


def experts_of(name: str, shape: tuple[int, ...], config: Mapping[str, Json]) -> Experts | str:
    """The layout of a tensor of experts (`is_experts`), or a text that says why it is unknown."""
    if len(shape) == 2:
        count = next(_numbers(config, "moe_num_experts"), 0)
        if count < 1 or shape[0] % count:
            return f"moe_num_experts of config.json does not divide the rows (it is {count or 'missing'})"
        return Experts(-2, count) if name.endswith("w2") else Experts(-1)
    known = {axis for axis, names in ((-1, _IN_LAST), (-2, _OUT_LAST)) if names & _families(config)}
    if _SWITCH.search(name):
        known = {-1}
    if len(known) != 1:
        found = ", ".join(sorted(_families(config))) or "none"
        return f"which axis is contracted is not known of this family of models (model_type: {found})"
    axis = known.pop()
    told = _axis_by_size(name, shape, config)
    if told not in (None, axis):
        return "hidden_size of config.json says that another axis is contracted than in the family's own checkpoints"
    return Experts(axis)


def _axis_by_size(name: str, shape: tuple[int, ...], config: Mapping[str, Json]) -> int | None:
    """The contracted axis, if the size of the residual stream determines it."""
    sizes = set(_numbers(config, "hidden_size"))
    last = name.removesuffix(".weight").rpartition(".")[2]
    into, out_of = _INTO.search(last) is not None, _OUT_OF.search(last) is not None
    hidden = [axis for axis in (-1, -2) if shape[axis] in sizes]
    if into == out_of or len(hidden) != 1:
        return None
    return hidden[0] if into else -3 - hidden[0]


def _places(config: Mapping[str, Json]) -> Iterator[Mapping[str, Json]]:
    """The configuration, and the nested configurations of the decoder and of its experts."""
    yield config
    for key in ("text_config", "llm_config", "language_config", "thinker_config", "ffn_config"):
        inner = config.get(key)
        if isinstance(inner, Mapping):
            yield from _places(inner)


def _families(config: Mapping[str, Json]) -> set[str]:
    found = [place.get("model_type") for place in _places(config)]
    return {name.removesuffix("_text") for name in found if isinstance(name, str)}


def _numbers(config: Mapping[str, Json], key: str) -> Iterator[int]:
    for place in _places(config):
        value = place.get(key)
        if type(value) is int:
            yield value

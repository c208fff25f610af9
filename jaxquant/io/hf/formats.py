"""The table of formats, and the detection of a directory's format."""

from __future__ import annotations

import numpy as np

from jaxquant.core.errors import QuantError
from jaxquant.io.hf.aqlm import AQLM
from jaxquant.io.hf.awq import AWQ
from jaxquant.io.hf.bitnet import BITNET
from jaxquant.io.hf.bitsandbytes import BITSANDBYTES
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.compressed_tensors import COMPRESSED_TENSORS
from jaxquant.io.hf.fp8 import FP8
from jaxquant.io.hf.gemma import GEMMA
from jaxquant.io.hf.gptq import GPTQ
from jaxquant.io.hf.hqq import HQQ
from jaxquant.io.hf.metal import METAL
from jaxquant.io.hf.modelopt import MODELOPT
from jaxquant.io.hf.module import Format
from jaxquant.io.hf.mxfp4 import MXFP4
from jaxquant.io.hf.quanto import QUANTO
from jaxquant.io.hf.torchao import TORCHAO
from jaxquant.io.hf.vptq import VPTQ
from jaxquant.io.strict_json import Json

__all__ = ["FORMATS", "UNSUPPORTED", "detect", "support_table"]

FORMATS: tuple[Format, ...] = (
    GPTQ, AWQ, BITSANDBYTES, COMPRESSED_TENSORS, FP8, MXFP4, HQQ, QUANTO, TORCHAO, METAL, GEMMA, BITNET, MODELOPT, AQLM,
    VPTQ,
)  # fmt: skip
_BY_METHOD = {method: form for form in FORMATS for method in form.methods}

#: Formats that are not read -> why.
UNSUPPORTED = {
    "eetq": "its weights are interleaved for one kernel of CUTLASS",
    "higgs": "its inputs are rotated and its weights tiled for one kernel (FLUTE)",
    "spqr": "its outliers are a sparse matrix beside the weight",
    "quark": "it has many layouts of its own; export it as fp8 or AWQ",
    "sinq": "its weights have scales for rows and for columns",
    "fp_quant": "its inputs are rotated",
    "fouroversix": "its layout is not documented enough to be read exactly",
    "nvfp4": "transformers' own nvfp4 is made at load time and has no files",
}


def detect(checkpoint: HFCheckpoint) -> tuple[Format | None, dict[str, Json]]:
    """The format of a directory and its quantization configuration; None if no weight is quantized."""
    if "jaxquant" in checkpoint.metadata() and any(name.endswith(".codes") for name in checkpoint.tensors):
        todo = "Read it with jq.io.load"
        raise checkpoint.error("the file is one of jaxquant's own, with quantized weights", todo=todo)
    config, method = _configuration(checkpoint)
    if config is None:
        return None, {}
    if not isinstance(method, str) or not method:
        raise _unnamed(checkpoint, config, method)
    method = method.lower().replace("_", "-")
    if method == "auto-round":
        method = "awq" if "awq" in str(config.get("packing_format")) else "gptq"
    form = _BY_METHOD.get(method) or _BY_METHOD.get(method.replace("-", "_"))
    if form is None:
        reason = UNSUPPORTED.get(method.replace("-", "_"), "it is not known")
        known = f"Use one of {', '.join(_BY_METHOD)}, or the float checkpoint with rules="
        raise checkpoint.error(f"the format {method!r} is not read: {reason}", todo=known)
    if form.refuse is not None:
        form.refuse(config, checkpoint.error)
    return form, config


def _configuration(checkpoint: HFCheckpoint) -> tuple[dict[str, Json] | None, Json]:
    """The quantization configuration, and its ``quant_method``."""
    places = [p for p in (checkpoint.config, checkpoint.config.get("text_config")) if isinstance(p, dict)]
    for place in places:
        if (found := _of_mlx(checkpoint, place)) is not None:
            return found, "mlx"
    for place in places:
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if not isinstance(found, dict | None):
                rule = f"{key} must be a JSON object"
                raise checkpoint.error(rule, "config.json", todo="Correct the configuration", found=found)
            if found:
                if found.get("load_in_4bit") is True or found.get("load_in_8bit") is True:
                    return found, "bitsandbytes"
                return found, found.get("quant_method")
    files = (
        ("quantize_config.json", "gptq"),
        ("quantization_config.json", None),
        ("quant_config.json", "awq"),
        ("quanto_qmap.json", "quanto"),
        ("hf_quant_config.json", "modelopt"),
    )
    for name, method in files:
        if (found := checkpoint.json(name)) is not None:
            return found, found.get("quant_method") or method
    return None, None


def _of_mlx(checkpoint: HFCheckpoint, place: dict[str, Json]) -> dict[str, Json] | None:
    """MLX's configuration, which has no ``quant_method``; a copy or an older one may exist beside "quantization"."""
    own, other = place.get("quantization"), place.get("quantization_config")
    words = (np.uint32, np.int32)
    there = any(
        name.endswith(".scales") and weight is not None and weight.dtype in words
        for name in checkpoint.tensors
        for weight in [checkpoint.tensors.get(f"{name.removesuffix('.scales')}.weight")]
    )
    for found in (own, other):
        alone = found is own and other in (None, own)
        if isinstance(found, dict) and found and "quant_method" not in found and (there or alone):
            return found
    return None


def _unnamed(checkpoint: HFCheckpoint, config: dict[str, Json], method: Json) -> QuantError:
    """The error for a configuration that does not name its format, with the formats that are possible."""

    able = [form for form in FORMATS if form.modules(checkpoint)] or FORMATS
    meant = ", ".join(f"{form.methods[0]!r} ({form.name})" for form in able)
    rule = "the quantization configuration has no quant_method, the key that names its format"
    if method:
        rule = "quant_method, the key that names the format, must be text"
    by = "By the names of its tensors it" if able is not FORMATS else "It"
    todo = f"Add it to the configuration. {by} could be {meant}"
    return checkpoint.error(rule, todo=todo, quant_method=method, keys=tuple(config)[:20])


def support_table() -> str:
    """The formats that are read, as a Markdown table."""
    rows = [
        "| Format | `quant_method` | Tensors that mark a module | What is read |",
        "| --- | --- | --- | --- |",
    ]
    for form in FORMATS:
        marks = ", ".join(f"`{mark}`" for naming in form.names for mark in naming.marks + naming.words) or "metadata"
        rows.append(f"| {form.name} | {', '.join(f'`{m}`' for m in form.methods)} | {marks} | {form.layouts} |")
    return "\n".join(rows)

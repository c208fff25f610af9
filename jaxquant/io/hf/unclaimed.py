"""Checks the tensors of a directory that belong to no quantized weight: they must not be codes.

Models hold other integers than codes: positions, counts, tables of experts, masks, the bytes of a tokenizer. Dtype,
rank and values tell them from codes:

    fp8 and narrower     codes
    int8, uint8          codes, if they have two axes or more, unless they are all 0 and 1 (a mask)
    16 and 32 bits       codes, if they have two axes or more, unless they count: from -1 (none) to below 2**24
    bool, 64 bits        no format packs codes in them

A tensor of these dtypes also holds codes if it is named "weight" or has scales beside it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import numpy as np

from jaxquant.io.hf.activations import describes_activations
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import Format

__all__ = ["check_unclaimed", "weights_of"]

_PART = re.compile(
    r"[._](\w+_)?(scales?|scales?_(inv|\d|ub)|zeros?|zero_points?|zeros_points?|g_idx|absmax|quant_map|packed|blocks|shape)"
)
#: Scales that are named after a matrix: "down_proj_scale", "w1.scale"; not "logit_scale", "attn.k_scale".
_OF_MATRIX = re.compile(r"(.*?(?:(?:^|[._])(?:weight|kernel|w\d+|fc\d*|linear|experts)|proj))[._]scales?(?:_inv)?")
_LARGEST_COUNT = 1 << 24  # bound on entries of tables that count; packed words soon exceed it


def weights_of(name: str) -> Iterator[str]:
    """The names of parameters whose scales (or other parts) a tensor may hold, by its name; the longest name first."""
    for i in reversed(range(name.rfind(".", 0, name.rfind(".")) + 1, len(name))):
        if name[i] in "._" and _PART.fullmatch(name, i):
            yield name[:i]


def check_unclaimed(checkpoint: HFCheckpoint, form: Format | None, names: Iterable[str]) -> None:
    """Raises if tensors that belong to no quantized weight hold codes or scales."""
    parts = [name for name in checkpoint.tensors if not describes_activations(name)]
    scales = {weight: name for name in parts for weight in weights_of(name)}
    for name in names:
        spec = checkpoint.tensors[name]
        if not _may_be_codes(spec.dtype):
            _check_scales(checkpoint, form, name, spec.shape)
            continue
        sibling = scales.get(name) or scales.get(name.removesuffix(".weight"))
        got = {"dtype": spec.dtype.name, "shape": spec.shape}
        unknown = "codes, and no configuration that says of which format"
        if sibling is not None:
            rule = "codes without scales under a name of the format" if form else unknown
            raise checkpoint.error(rule, name, todo=_todo(form), scales=sibling, **got)
        if name.endswith("weight") or _are_codes(checkpoint, name):
            rule = "codes without scales" if form else unknown
            raise checkpoint.error(rule, name, todo=_todo(form), **got)


def _todo(form: Format | None) -> str:
    if form is None:
        return "Fetch all files of the checkpoint again, config.json too"
    return (
        f"Fetch all files of the checkpoint again; if it is whole, convert it: no name that {form.name} has for the "
        "parts of a weight fits"
    )


def _check_scales(checkpoint: HFCheckpoint, form: Format | None, name: str, shape: tuple[int, ...]) -> None:
    """Raises for scales without a weight: named after a matrix, or with more than one row of numbers."""
    if form is None:
        return
    endings = tuple(word for naming in form.names for word in naming.words)
    matrix = _OF_MATRIX.fullmatch(name)
    orphan = matrix is not None and not {matrix[1], f"{matrix[1]}.weight"} & checkpoint.tensors.keys()
    if orphan or (sum(n > 1 for n in shape) > 1 and endings and name.endswith(endings)):
        raise checkpoint.error("scales without codes", name, todo=_todo(form), shape=shape)


def _may_be_codes(dtype: np.dtype) -> bool:
    floats = (np.float16, np.float32, np.float64, np.complex64)
    return dtype not in [np.dtype(d) for d in (*floats, np.bool_, np.int64, np.uint64)] and dtype.name != "bfloat16"


def _are_codes(checkpoint: HFCheckpoint, name: str) -> bool:
    spec = checkpoint.tensors[name]
    if spec.dtype.kind not in "iu":
        return True
    if len(spec.shape) < 2 or 0 in spec.shape:
        return False
    values = checkpoint.array(name)
    least, greatest = int(values.min()), int(values.max())
    checkpoint.forget()
    low, high = (0, 1) if spec.dtype.itemsize == 1 else (-1, _LARGEST_COUNT - 1)
    return least < low or greatest > high

"""The quantization of MLX, and of transformers' "metal", which has MLX's affine mode.

    mode     weight: uint32 [..., out, in * bits / 32]   scales [..., out, in / group_size]     W
    affine   2, 3, 4, 5, 6, 8 bits                       float, and biases (metal: qbiases)     q * scale + bias
    mxfp4    e2m1, 4 bits, groups of 32                  uint8: exponent + 127                  e2m1 * 2 ** exponent
    mxfp8    e4m3, 8 bits, groups of 32                  uint8: exponent + 127                  e4m3 * 2 ** exponent
    nvfp4    e2m1, 4 bits, groups of 16                  uint8: the bits of an e4m3             e2m1 * e4m3

Codes are one little-endian bit stream per row. Experts (``switch_mlp``) have an axis more, in front.

``{"group_size": 64, "bits": 4, "mode": "affine", PATH: {...}, ...}`` under ``quantization`` of ``config.json``
describes the weights; mlx-lm writes a copy as ``quantization_config``. An entry under the path of a module replaces the
general settings, as in MLX: it inherits no setting, and its mode is affine if it names none. ``false`` means that the
module is not quantized, ``true`` that it has the general settings.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of
from jaxquant.io.hf.checkpoint import HFCheckpoint
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.to_qtensor import qtensor
from jaxquant.io.strict_json import Json

__all__ = ["METAL"]

_FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32)


class _Mode(NamedTuple):
    """The default group size of a mode, whether it is the only one, and all widths of codes."""

    size: int
    fixed: bool
    bits: tuple[int, ...]


_MODES = {
    "affine": _Mode(64, False, (4, 2, 3, 5, 6, 8)),
    "mxfp4": _Mode(32, True, (4,)),
    "mxfp8": _Mode(32, True, (8,)),
    "nvfp4": _Mode(16, True, (4,)),
}


def _stated(checkpoint: HFCheckpoint, config: dict[str, Json], prefix: str) -> dict[str, Json]:
    """The configuration of one module."""
    own, name = config.get(prefix, True), f"{prefix}.weight"
    if own is False:
        todo = "Correct config.json, or fetch the checkpoint again"
        raise checkpoint.error("the configuration says that it is not quantized, but it has scales", name, todo=todo)
    if own is not True and not isinstance(own, dict):
        todo = "Correct config.json: a module has false, true or an object"
        rule = "the configuration of a module must be a boolean or an object"
        raise checkpoint.error(rule, name, todo=todo, configuration=own)
    if prefix in config:
        return config if own is True else own
    for path, other in config.items():  # an entry may be meant for this module; shapes do not always show it
        if isinstance(other, dict) and (f".{prefix}".endswith(f".{path}") or f".{path}".endswith(f".{prefix}")):
            todo = "Correct config.json: the path of a module is the beginning of its tensors' names"
            raise checkpoint.error("the configuration is of a module of another path", name, todo=todo, configured=path)
    return config


def _number(m: Module, key: str, known: tuple[int, ...] | None) -> int | None:
    value = m.config.get(key)
    if value is not None and (type(value) is not int or value < 1 or (known is not None and value not in known)):
        wanted = "a positive integer" if known is None else f"one of {', '.join(map(str, sorted(known)))}"
        raise m.error(f"{key} must be {wanted}", todo="Correct config.json", **{key: value})
    return value


def _bits_and_length(m: Module, mode: _Mode, row: int, groups: int) -> tuple[int, int]:
    """Bits of a code and codes in a row of ``row`` bits; shapes determine group size or bits if one is not stated."""

    bits = _number(m, "bits", mode.bits)
    size = _number(m, "group_size", (mode.size,) if mode.fixed else None)
    if size is None and (bits is None or mode.fixed):
        size = mode.size
    width = row // (groups * size) if bits is None and size is not None else bits
    length = row // width if width else 0
    if not width or width not in mode.bits or length * width != row or length != groups * (size or length // groups):
        got = {"row_bits": row, "groups": groups, "group_size": size, "bits": bits}
        raise m.error("the group size and bits do not fit the shapes", ".weight", todo="Check the configuration", **got)
    return width, length


def _mode(m: Module) -> str:
    mode = m.config.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        todo = f"Known are {', '.join(_MODES)}"
        raise m.error("the mode of the quantization is not known", todo=todo, mode=mode)
    return mode


def read(m: Module) -> QTensor:
    """The weight of one module."""
    mode = _mode(m)
    words = m.array(".weight", np.uint32, np.int32, ndim=RANKS).view(np.uint32)
    name = ".qbiases" if m.has(".qbiases") else ".biases"
    if mode != "affine" and m.has(name):
        todo = "Check the mode in config.json"
        raise m.error(f"{mode} has no biases", name, todo=todo, mode=mode)
    types = _FLOATS if mode == "affine" else (np.uint8,)
    scales = m.array(".scales", *types, ndim=RANKS)
    m.check(".scales", scales.shape, (*words.shape[:-1], scales.shape[-1]))
    bits, length = _bits_and_length(m, _MODES[mode], 32 * words.shape[-1], scales.shape[-1])
    stream = bytes_of(words)
    if mode == "affine":
        scales, biases = m.scales(".scales"), m.scales(name)
        m.check(name, biases.shape, scales.shape)
        offset = biases.astype(np.float32)
        return qtensor(stream, scales, offset=offset, bits=bits, length=length, dtype=scales.dtype)
    if mode == "nvfp4":
        local = scales.view(ml_dtypes.float8_e4m3fn)
        unit = np.ones((1,) * local.ndim, np.float32)  # the mode has no scale of the whole weight
        scale = QTensor(local, unit, None, qtype="float8_e4m3fn", dtype=np.float32)
        return QTensor(stream, scale, None, qtype="nvfp4", dtype=m.dtype, length=length)
    scale = m.exponents(".scales")
    if mode == "mxfp8":
        return QTensor(stream.view(ml_dtypes.float8_e4m3fn), scale, None, qtype="mxfp8", dtype=m.dtype)
    return QTensor(stream, scale, None, qtype="mxfp4", dtype=m.dtype, length=length)


METAL = Format(
    "MLX / metal",
    methods=("metal", "mlx"),
    names=(Naming(marks=(".scales",)),),
    read=read,
    layouts="affine of 2, 3, 4, 5, 6, 8 bits, mxfp4, mxfp8, nvfp4; experts; settings of each module",
    stated=_stated,
)

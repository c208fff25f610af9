"""The affine quantization of MLX, and of transformers' "metal".

weight   uint32 [out, in * bits / 32]          a little-endian bit stream along the row
scales   float [out, in / group_size]
qbiases  (biases in mlx-lm)                    W = q * scale + bias
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.bits import bytes_of
from jaxquant.io.hf.layout import qtensor
from jaxquant.io.hf.module import Format, Module, Naming

__all__ = ["METAL"]


def _parameters(m: Module) -> dict[str, Any]:
    own = m.config.get(m.prefix)
    return m.config | own if isinstance(own, dict) else m.config


def read(m: Module) -> QTensor:
    """The weight of one module."""
    words = m.array(".weight", np.uint32, np.int32, ndim=2).view(np.uint32)
    scales = m.scales(".scales", ndim=2)
    name = ".qbiases" if m.has(".qbiases") else ".biases"
    biases = m.scales(name, ndim=2)
    m.check(name, biases.shape, scales.shape)
    size = _parameters(m).get("group_size", 64)
    out, groups = scales.shape
    length = groups * size if type(size) is int else 0
    bits = words.shape[1] * 32 // length if length > 0 else 0
    if not 2 <= bits <= 8 or bits * length != 32 * words.shape[1]:
        got = {"words": words.shape[1], "groups": groups, "group_size": size}
        raise m.error("the group size does not fit the shapes", ".weight", todo="Check the configuration", **got)
    m.check(".weight", words.shape, (out, words.shape[1]))
    offset = biases.astype(np.float32)
    return qtensor(bytes_of(words), scales, offset=offset, bits=bits, length=length, dtype=scales.dtype)


METAL = Format(
    "MLX / metal",
    methods=("metal", "mlx"),
    names=(Naming(marks=(".scales",)),),
    read=read,
    layouts="affine, 2 to 8 bits",
)

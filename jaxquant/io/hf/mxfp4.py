"""mxfp4 experts of gpt-oss.

    NAME_blocks  uint8 [experts, out, in / 32, 16]   element 2b in the low nibble of byte b
    NAME_scales  uint8 [experts, out, in / 32]       exponent + 127

The weight NAME is [experts, in, out] in the model; a QTensor of that shape keeps the codes where they are.
"""

from __future__ import annotations

import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.module import Format, Module, Naming

__all__ = ["MXFP4"]


def read(m: Module) -> QTensor:
    """The experts of one projection."""
    blocks = m.array("_blocks", np.uint8, ndim=4)
    scales = m.exponents("_scales", ndim=3)
    if blocks.shape[3] != 16:
        raise m.error("a block has 16 bytes", "_blocks", todo="Check the format", shape=blocks.shape)
    m.check("_scales", scales.shape, blocks.shape[:3])
    experts, out, groups, _ = blocks.shape
    return QTensor(
        blocks.reshape(experts, out, groups * 16),
        np.swapaxes(scales, 1, 2),
        None,
        qtype="mxfp4",
        dtype=m.dtype,
        minor=(-2,),
        length=groups * 32,
    )


MXFP4 = Format(
    "mxfp4",
    methods=("mxfp4",),
    names=(Naming("", ("_blocks", "_scales"), keeps=("_bias",)),),
    read=read,
    layouts="experts of gpt-oss, [experts, in, out]",
)

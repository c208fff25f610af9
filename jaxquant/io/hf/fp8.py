"""fp8 with one scale per block (DeepSeek, transformers' fine-grained fp8), per row (FBGEMM) or per tensor.

    weight            fp8 [out, in], also of stacked experts or a convolution
    weight_scale_inv  float32, or a byte with the exponent: [ceil(out / rows), ceil(in / columns)], a row or a scalar
      or weight_scale, or scale (DeepSeek's own files)

    W = weight * weight_scale_inv, in spite of the name.

``weight_block_size`` gives rows and columns of a block; the last blocks may be short. Without it, the shapes determine
the block, or the checkpoint is refused: blocks are mostly 128 x 128, or 32 columns if scales are exponents. Experts may
be packed e2m1 codes with exponents per 32 under the same names. Fused experts are parameters: NAME and NAME_scale_inv
or NAME_scale; in FBGEMM (Llama 4) they are [experts, in, out] with one scale per output.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxquant.core import observers
from jaxquant.core.errors import QuantError
from jaxquant.core.granularity import PerGroup
from jaxquant.core.qtensor import QTensor
from jaxquant.io.hf.module import RANKS, Format, Module, Naming
from jaxquant.io.hf.schemes import Activation, dynamic, refused, static
from jaxquant.io.hf.to_qtensor import aligned, in_blocks, in_unstated_blocks
from jaxquant.io.strict_json import Json

__all__ = ["FP8"]

_SCALE = ".weight_scale_inv"


def _refuse(config: dict[str, Json], error: Callable[..., QuantError]) -> None:
    if "fnuz" in str(config.get("fmt", "")):
        todo = "Convert it to e4m3fn (half the values, twice the scales)"
        raise error("the fp8 variant of AMD's older GPUs is not read", todo=todo, fmt=config["fmt"])
    blocks = config.get("weight_block_size")
    pair = isinstance(blocks, list) and len(blocks) == 2 and all(type(n) is int and n > 0 for n in blocks)
    if blocks is not None and not pair:
        rule = "weight_block_size must be the rows and the columns of a block, two positive integers"
        raise error(rule, todo="Correct the configuration", weight_block_size=blocks)


def read(m: Module) -> QTensor:
    """One weight."""
    weight = m.array(".weight", ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint8, np.int8, ndim=RANKS)
    powers = m.array(_SCALE).dtype in (np.uint8, ml_dtypes.float8_e8m0fnu)
    scale = m.exponents(_SCALE) if powers else m.magnitudes(_SCALE)
    if weight.dtype in (np.uint8, np.int8):
        shape = (*weight.shape[:-1], 2 * weight.shape[-1])
        if not powers:
            raise m.error(
                "fp4 codes need scales that are exponents", _SCALE, todo="Check the format", scale=scale.dtype
            )
        m.check(_SCALE, scale.shape, (*shape[:-1], shape[-1] // 32))
        return QTensor(weight.view(np.uint8), scale, None, qtype="mxfp4", dtype=m.dtype, length=shape[-1])
    if m.is_parameter and m.config.get("quant_method") == "fbgemm_fp8":
        scale = _of_outputs(m, scale, weight.shape)
    blocks = m.config.get("weight_block_size")
    values = aligned(scale, weight.shape, out_first=not m.is_parameter)
    found = None
    if isinstance(blocks, list) and values is not None:
        found = in_blocks(values, weight.shape, [(blocks[0], blocks[1])])
    if found is None and values is not None:
        found = in_unstated_blocks(values, weight.shape, (128, 32) if powers else (128,))
        if found is not None and blocks is not None:
            m.by_shapes(f"scales {list(scale.shape)} of equal blocks", f"weight_block_size={blocks}")
    if found is None:
        got = {"shape": scale.shape, "weight": weight.shape, "weight_block_size": blocks}
        raise m.error("the scales fit no blocks of the weight", _SCALE, todo="Check the configuration", **got)
    return QTensor(weight, found, None, qtype=weight.dtype.name, dtype=m.dtype)


def _of_outputs(m: Module, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of FBGEMM's experts [experts, in, out]: one per output, as [experts, 1, out] or [experts, out, 1]."""
    rows = (*shape[:-2], shape[-1])
    if len(shape) != 3 or scale.shape not in ((*rows, 1), (rows[0], 1, rows[1])):
        rule = "there must be one scale for each output of each expert"
        raise m.error(rule, _SCALE, todo="Check the format", shape=scale.shape, weight=shape)
    return scale.reshape(rows[0], 1, rows[1])


def activation(m: Module) -> Activation | None:
    """By ``activation_scheme``: one static range; or one for each token, in groups as wide as a block.

    With ``scale_fmt: ue8m0`` (DeepSeek V3.1) the scales of activations are rounded up to powers of two.
    """
    method, scheme = m.config.get("quant_method"), m.config.get("activation_scheme")
    if method == "fbgemm_fp8":
        bound = m.config.get("activation_scale_ub")
        if bound is not None and not (isinstance(bound, int | float) and bound > _LEAST):
            raise refused(m, "activation_scale_ub", bound, "an upper bound of ranges must be a positive number")
        return dynamic(_FP8, calibration=observers.Bounded(_LEAST, None if bound is None else float(bound)))
    if scheme is None:
        given = any(m.prefix + end in m.checkpoint.tensors for end in (".input_scale", "_input_scale"))
        return static(m, "input_scale", _FP8) if given else None
    if scheme == "static":
        return static(m, "activation_scheme=static", _FP8)
    if scheme != "dynamic":
        raise refused(m, "activation_scheme", scheme)
    form = m.config.get("scale_fmt")
    if form not in (None, "float", "ue8m0"):
        raise refused(m, "scale_fmt", form)
    calibration = observers.RoundedUp(448.0) if form == "ue8m0" else None
    if method == "mxfp8":
        return dynamic("mxfp8")
    blocks = m.config.get("weight_block_size")
    if blocks is None:
        return dynamic(_FP8, calibration=calibration)
    if not isinstance(blocks, list) or len(blocks) != 2 or type(blocks[1]) is not int or blocks[1] < 1:
        raise refused(m, "weight_block_size", blocks, "the groups of activations are as wide as a block")
    return dynamic(_FP8, granularity=PerGroup(blocks[1]), calibration=calibration)


_FP8 = "float8_e4m3fn"
_LEAST = 1 / 512  # FBGEMM's scale of a token is at least 1 / (448 * 512)

FP8 = Format(
    "fp8",
    methods=("fp8", "fbgemm_fp8", "mxfp8", "finegrained_fp8"),
    names=(
        Naming(marks=(".weight_scale_inv",)),
        Naming(marks=(".weight_scale",), tensors={_SCALE: ".weight_scale"}),
        Naming(words=(".scale",), tensors={_SCALE: ".scale"}),
        Naming("", ("_scale_inv",), tensors={".weight": "", _SCALE: "_scale_inv"}, keeps=("_bias",)),
        Naming("", words=("_scale",), tensors={".weight": "", _SCALE: "_scale"}, keeps=("_bias",)),
    ),
    read=read,
    layouts="blocks (ragged too), rows, tensors; float32 or exponents; fp4 experts",
    activation=activation,
    refuse=_refuse,
)

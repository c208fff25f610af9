"""Named `OpSpec`s. The names say bits of weight (w) and activation (a); a16 means the activation stays in float.

Wherever an `OpSpec` is asked for, its name as text does as well: ``"w8a8"``, ``"w4a16:g128"``; see `recipe`.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal, TypeAlias

from jaxquant.core.errors import quant_error
from jaxquant.core.granularity import PerChannel, PerTensor, grouped
from jaxquant.core.observers import MSE, AbsMean
from jaxquant.core.paths import nearest
from jaxquant.core.qtypes import QTYPES
from jaxquant.core.specs import OpSpec, QuantSpec

__all__ = [
    "binary",
    "fp4",
    "fp8",
    "fp8_train",
    "llm_int8",
    "mxfp4",
    "mxfp8",
    "nf4",
    "nvfp4",
    "recipe",
    "ternary",
    "w2a16",
    "w4a4",
    "w4a8",
    "w4a16",
    "w8a8",
    "w8a8g8",
    "w8a16",
]


_Whole: TypeAlias = PerTensor | PerChannel | Literal["per_tensor", "per_channel"]


def _grouped(qtype: str, group_size: int | None, **kwargs: Any) -> QuantSpec:
    return QuantSpec(qtype, granularity=grouped(group_size), **kwargs)


def w8a16(group_size: int | None = None) -> OpSpec:
    """Weight-only int8: per output channel, or per group."""
    return OpSpec(_grouped("int8", group_size))


def w4a16(group_size: int | None = 64, *, symmetric: bool = True, two_level: bool = False) -> OpSpec:
    """Weight-only int4, per group of 64 by default; ``two_level``: scales are integers times one float per channel.

    Example:
      >>> from jaxquant import recipes
      >>> recipes.w4a16(group_size=128).weight.group_size
      128
    """
    return OpSpec(_grouped("int4", group_size, symmetric=symmetric, two_level=two_level))


def nf4(group_size: int = 64) -> OpSpec:
    """Weight-only nf4, per group of 64 (Dettmers et al. 2023, QLoRA).

    Double quantization, which is a method and not a number type: ``method=jq.ptq.double_quantized``. The compute dtype
    is the dtype of the params that are quantized.
    """
    return OpSpec(_grouped("nf4", group_size))


def fp4(group_size: int = 64) -> OpSpec:
    """Weight-only fp4 as in bitsandbytes, per group of 64."""
    return OpSpec(_grouped("fp4", group_size))


def llm_int8(threshold: float = 6.0) -> OpSpec:
    """int8 weights per output channel; int8 activations per token, but for features with a magnitude of ``threshold``.

    Those are multiplied in the activation's own dtype (Dettmers et al. 2022, arXiv:2208.07339).

    Example:
      >>> from jaxquant import recipes
      >>> recipes.llm_int8()
      OpSpec(weight=QuantSpec('int8'), act=QuantSpec('int8'), outliers=6.0)
    """
    return OpSpec(QuantSpec("int8"), QuantSpec("int8"), outliers=threshold)


def w8a8(*, static: bool = False, act_symmetric: bool = True) -> OpSpec:
    """int8 weights per output channel; int8 activations per token, or one calibrated range per tensor (``static``)."""
    granularity = PerTensor() if static else PerChannel()
    return OpSpec(QuantSpec("int8"), QuantSpec("int8", granularity=granularity, symmetric=act_symmetric, static=static))


def w8a8g8(*, rounding: Literal["nearest", "stochastic"] = "nearest") -> OpSpec:
    """`w8a8`, and int8 gradients in the backward pass: all three products of a training step are int8 dots.

    Rounding to nearest biases gradients that are small in their row; compare with ``w8a8`` first. With
    ``rounding="stochastic"`` their expectation is right, and `quantized` takes a key.
    """
    int8 = QuantSpec("int8")
    return OpSpec(int8, int8, QuantSpec("int8", rounding=rounding))


def fp8_train(*, rounding: Literal["nearest", "stochastic"] = "nearest") -> OpSpec:
    """`fp8`, and float8_e5m2 gradients in the backward pass: all three products of a training step are of fp8.

    Scales are computed from the arrays themselves ("current scaling"): per output channel, per token, and for gradients
    over the axes that each product sums.

    Example:
      >>> from jaxquant import recipes
      >>> recipes.fp8_train().grad
      QuantSpec('float8_e5m2')

    Source: Micikevicius et al. 2022 (arXiv:2209.05433).
    """
    e4m3 = QuantSpec("float8_e4m3fn")
    return OpSpec(e4m3, e4m3, QuantSpec("float8_e5m2", rounding=rounding))


def w4a8(group_size: int | None = 64, *, two_level: bool = False) -> OpSpec:
    """int4 weights per group, int8 activations per token; ``two_level`` as for `w4a16`."""
    return OpSpec(_grouped("int4", group_size, two_level=two_level), QuantSpec("int8"))


def w4a4(group_size: int | None = None) -> OpSpec:
    """int4 weights and int4 activations; per group of ``group_size``, or per channel and token."""
    return OpSpec(_grouped("int4", group_size), _grouped("int4", group_size))


def fp8() -> OpSpec:
    """float8_e4m3fn weights per output channel and activations per token."""
    return OpSpec(QuantSpec("float8_e4m3fn"), QuantSpec("float8_e4m3fn"))


def mxfp8() -> OpSpec:
    """OCP MX fp8, weights and activations: blocks of 32 with a power-of-two scale."""
    return OpSpec(QuantSpec("mxfp8"), QuantSpec("mxfp8"))


def mxfp4(*, act: bool = False) -> OpSpec:
    """OCP MX fp4 weights; activations too if ``act``."""
    return OpSpec(QuantSpec("mxfp4"), QuantSpec("mxfp4") if act else None)


def nvfp4(*, act: bool = False) -> OpSpec:
    """NVIDIA fp4 weights: blocks of 16 with an fp8 scale and one float32 per tensor; activations too if ``act``."""
    return OpSpec(QuantSpec("nvfp4"), QuantSpec("nvfp4") if act else None)


def ternary(granularity: _Whole = "per_tensor") -> OpSpec:
    """BitNet b1.58: weights -1, 0 and 1 times their mean magnitude, activations in int8 per token; for training.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> w = jnp.array([[0.3, -0.1], [-1.0, 0.6]])
      >>> jq.quantize(w, recipes.ternary().weight, reduce_axes=(-2,)).dequantize()  # mean|w| = 0.5
      Array([[ 0.5,  0. ],
             [-0.5,  0.5]], dtype=float32)

    Source: Ma et al. 2024 (arXiv:2402.17764), section 2.
    """
    weight = QuantSpec("int2", granularity=granularity, narrow_range=True, calibration=AbsMean())
    return OpSpec(weight, QuantSpec("int8"))


def w2a16(group_size: int | None = 64) -> OpSpec:
    """2-bit weights, symmetric about 0 without a code for it: -3, -1, 1 and 3 times a scale for each group.

    For training: the range is that of the least squared error, from which `jaxquant.qat.learned_steps` starts. After
    training with learned steps a small language model lost less by these codes than by int2, whose four codes are
    -2 to 1 (``benchmarks/qat_language_model.py``).

    Args:
      group_size: weights of an output that share a scale; None: all of them.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> w = jnp.array([[0.5, -0.25], [-1.5, 0.75]])
      >>> jq.quantize(w, recipes.w2a16(None).weight, reduce_axes=(-2,)).dequantize()
      Array([[ 0.5 , -0.25],
             [-1.5 ,  0.75]], dtype=float32)

    Source: Liu et al. 2025, ParetoQ (arXiv:2502.02631), section 3.2: the levels of its stretched elastic quantization.
      The paper learns one step for each row; here each group may have its own.
    """
    return OpSpec(_grouped("quaternary", group_size, calibration=MSE()))


def binary(granularity: _Whole = "per_channel", *, act: bool = False) -> OpSpec:
    """XNOR-Net's weights, -1 and 1 times the mean magnitude of their output; ``act``: int8 activations per token.

    The mean is the scale of least squared error for these codes. BitNet's one-bit weights have it over the whole
    tensor (``PerTensor()``) with ``act``, after the mean of the weights is subtracted. Its mean is not added back, so
    subtract it from the float weights after each update, ``w - jnp.mean(w)``: then this recipe is BitNet's.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import recipes
      >>> w = jnp.array([[0.3, -0.1], [-1.0, 0.7]])
      >>> jq.quantize(w, recipes.binary().weight, reduce_axes=(-2,)).dequantize()
      Array([[ 0.65, -0.4 ],
             [-0.65,  0.4 ]], dtype=float32)

    Source: Rastegari et al. 2016, XNOR-Net (arXiv:1603.05279), equations 5 and 6; Wang et al. 2023, BitNet
      (arXiv:2310.11453), section 2.1.
    """
    weight = QuantSpec("binary", granularity=granularity, calibration=AbsMean())
    return OpSpec(weight, QuantSpec("int8") if act else None)


# Options after the colon of a recipe name: the parameters an option may set. A recipe has at most one of them.
_OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "channel": (("group_size",), None),
    "asym": (("symmetric", "act_symmetric"), False),
    "two_level": (("two_level",), True),
    "static": (("static",), True),
    "act": (("act",), True),
}


def recipe(named: str | OpSpec) -> OpSpec:
    """The `OpSpec` of a recipe that is named in text; an `OpSpec` is returned as it is.

    The text is the name of a function of this module, and options after colons:

        gN         group_size=N: N weights of an output share a scale
        channel    group_size=None: one scale for each output
        asym       with zero points: of the weight; of the activation for w8a8
        two_level  the scales of groups are integers times one float per output
        static     the range of the activation comes from calibration
        act        the activation is quantized too (mxfp4, nvfp4)

    Args:
      named: such as ``"w8a8"``, ``"w4a16:g128"``, ``"w4a16:g64:asym"``, ``"w8a8:static"``; or an `OpSpec`.

    Returns:
      The `OpSpec`.

    Raises:
      QuantError: if there is no such recipe, or it has no such option; the message lists the valid ones.

    Example:
      >>> from jaxquant import recipes
      >>> recipes.recipe("w4a16:g128") == recipes.w4a16(group_size=128)
      True
      >>> recipes.recipe("w8a8:static:asym") == recipes.w8a8(static=True, act_symmetric=False)
      True
    """
    if isinstance(named, OpSpec):
        return named
    known = [name for name in __all__ if name != "recipe"]
    if not isinstance(named, str):
        todo = f"Use an OpSpec, or one of the names {', '.join(known)}"
        raise quant_error("recipe", "a recipe is an OpSpec, or the name of one", todo=todo, got=named)
    name, *options = named.split(":")
    if name not in known:
        raise quant_error("recipe", "unknown recipe", todo=_instead(name, known), recipe=named)
    make = globals()[name]
    has = inspect.signature(make).parameters
    given: dict[str, Any] = {}
    for option in options:
        group = re.fullmatch(r"g([1-9]\d*)", option)
        names, value = (("group_size",), int(group[1])) if group else _OPTIONS.get(option, ((), None))
        parameter = next((n for n in names if n in has), None)
        if parameter is None or parameter in given:
            can = [o for o, (names, _) in _OPTIONS.items() if set(names) & set(has)]
            can = ["gN", *can] if "group_size" in has else can
            todo = f"Use each of these at most once: {', '.join(can)}" if can else "Leave it out: it has none"
            raise quant_error("recipe", f"{name} has no such option", todo=todo, option=option, recipe=named)
        given[parameter] = value
    return make(**given)


def _instead(name: str, known: list[str]) -> str:
    """Which recipe was meant: one of that number type, if it is the name of one."""
    if name in QTYPES:
        same = [n for n in known if (weight := globals()[n]().weight) is not None and weight.qtype == name]
        if same:
            return f"{name} is a number type; recipes with such weights: {', '.join(same)}"
        return f"{name} is a number type, and no recipe has it: write OpSpec(QuantSpec({name!r}))"
    return f"Nearest: {nearest(name, known)}. All: {', '.join(known)}"

"""Quantizers by name: `quantizer`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxquant.core.errors import quant_error
from jaxquant.core.paths import nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.ptq.autoround import autoround
from jaxquant.ptq.clipped import clipped
from jaxquant.ptq.descend import descend
from jaxquant.ptq.double import double_quantized
from jaxquant.ptq.gptq import gptq
from jaxquant.ptq.hqq import hqq
from jaxquant.ptq.rtn import rtn

__all__ = ["QUANTIZERS", "looks_at_inputs", "quantizer"]

QUANTIZERS = {f.__name__: f for f in (rtn, clipped, gptq, hqq, autoround, descend, double_quantized)}
_DATA_FREE = (rtn, hqq)


def quantizer(function: str, method: str | Callable[..., QTensor]) -> Callable[..., QTensor]:
    """The quantizer of this name; a function is returned unchanged.

    Args:
      function: the public function that errors name.
      method: ``"rtn"``, ``"clipped"``, ``"gptq"``, ``"hqq"``, ``"autoround"``, ``"descend"``, ``"double_quantized"``,
        or a quantizer.

    Raises:
      QuantError: if the name is unknown, or ``method`` is neither a name nor a function.
    """
    if isinstance(method, str):
        if method in QUANTIZERS:
            return QUANTIZERS[method]
        todo = f"Nearest: {nearest(method, QUANTIZERS)}. All: {', '.join(QUANTIZERS)}"
        if method in ("awq", "smoothquant"):
            todo = "It changes float params before they are quantized: jq.quantize_model(..., method="
            todo += f"{method!r}), or jaxquant quantize --method {method}, does both. "
            todo += f"Quantizers: {', '.join(QUANTIZERS)}"
        raise quant_error(function, "no quantizer has this name", todo=todo, method=method)
    if not callable(method):
        todo = f"Pass a function, such as jq.ptq.gptq, or a name: {', '.join(QUANTIZERS)}"
        raise quant_error(function, "method must be a quantizer", todo=todo, method=method)
    return method


def looks_at_inputs(method: Callable[..., QTensor]) -> bool | None:
    """Whether a quantizer needs the Gram matrix of a weight's inputs; None for a user's function, which may need it."""
    given: dict[str, Any] = {}
    while isinstance(method, functools.partial):
        given = {**method.keywords, **given}
        method = method.func
    if method is double_quantized:
        return looks_at_inputs(given.get("method", rtn))
    if method not in QUANTIZERS.values():
        return None
    return method not in _DATA_FREE and not (method is clipped and given.get("weighting") == "none")

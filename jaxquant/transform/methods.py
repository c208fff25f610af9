"""`method_of`: how codes are chosen, by name: steps that change float parameters first, then a quantizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxquant import recipes
from jaxquant.core.errors import quant_error
from jaxquant.core.paths import nearest
from jaxquant.core.qtensor import QTensor
from jaxquant.ptq.named import QUANTIZERS, looks_at_inputs, quantizer
from jaxquant.transform.smoothing import awq, smoothquant
from jaxquant.transform.statistics import ChannelAbsMax, ChannelMean, Gram, Statistic

__all__ = ["STEPS", "Method", "method_of"]


class Step(NamedTuple):
    """A change of float parameters that preserves the function.

    Attributes:
      move: a function of (params, plan, pairs of `scale_pairs`, statistics) that returns the new params.
      collect: the statistics that it reads, as for `calibrate`.
    """

    move: Callable[..., Any]
    collect: dict[str, Statistic]


STEPS = {
    "awq": Step(awq, {"gram": Gram(), "mean": ChannelMean()}),
    "smoothquant": Step(smoothquant, {"absmax": ChannelAbsMax()}),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """How codes are chosen.

    Attributes:
      steps: names of `STEPS`, in their order.
      quantizer: what rounds the parameters that the steps have changed.
    """

    steps: tuple[str, ...]
    quantizer: Callable[..., QTensor]

    @property
    def looks(self) -> bool | None:
        """Whether the quantizer needs Gram matrices; see `looks_at_inputs`."""
        return looks_at_inputs(self.quantizer)


def method_of(function: str, method: str | Callable[..., QTensor] | None) -> Method:
    """The method of a name, such as ``"gptq"``, ``"awq"`` or ``"awq+gptq"``; None rounds to nearest.

    Args:
      function: the public function that errors name.
      method: steps and at most one quantizer, joined by ``+``; or a quantizer.

    Raises:
      QuantError: if a name is unknown or a recipe's, or ``method`` is neither a name nor a function.
    """
    if not isinstance(method, str):
        return Method((), QUANTIZERS["rtn"] if method is None else quantizer(function, method))
    if method.partition(":")[0] in recipes.__all__:
        todo = f"Pass recipe={method!r}, and leave method out or use one of {', '.join((*QUANTIZERS, *STEPS))}"
        raise quant_error(function, "this is a recipe, which says the types", todo=todo, method=method)
    *first, last = method.split("+")
    if last in STEPS:
        first, last = [*first, last], "rtn"
    unknown = [name for name in first if name not in STEPS]
    if unknown:
        todo = f"Nearest: {nearest(unknown[0], STEPS)}. Before a '+' come {' and '.join(STEPS)}"
        raise quant_error(function, "no such step before a quantizer", todo=todo, method=method)
    if last not in QUANTIZERS:
        todo = f"Nearest: {nearest(last, (*QUANTIZERS, *STEPS))}. All: {', '.join((*QUANTIZERS, *STEPS))}; "
        todo += f"{' and '.join(STEPS)} may come before another and a '+'"
        raise quant_error(function, "no method has this name", todo=todo, method=method)
    return Method(tuple(first), QUANTIZERS[last])

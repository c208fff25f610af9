"""The schemes that the demonstration compares."""

from __future__ import annotations

import dataclasses

from jaxquant import recipes
from jaxquant.core.observers import MSE
from jaxquant.core.specs import OpSpec, QuantSpec

__all__ = ["SCHEMES", "Scheme"]

_INT4, _INT3, _INT2 = (QuantSpec(qtype, calibration=MSE()) for qtype in ("int4", "int3", "int2"))
# Pixels and the outputs of a ReLU are never negative: all four codes of uint2 go to [0, max].
_W2A2 = OpSpec(_INT2, QuantSpec("uint2"))


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A row of the table: how all layers are quantized, and whether they are trained for it."""

    name: str
    spec: OpSpec | None = None
    qat: bool = False

    @property
    def weights(self) -> str:
        """The weights' number type, and the group that shares a scale if it is not the output channel."""
        w = self.spec.weight if self.spec else None
        if w is None:
            return "float32"
        return w.qtype if w.group_size is None else f"{w.qtype} g{w.group_size}"

    @property
    def activations(self) -> str:
        """The activations' number type."""
        return self.spec.act.qtype if self.spec and self.spec.act else "float32"


SCHEMES = (
    Scheme("float32"),
    Scheme("int8", recipes.w8a16()),
    Scheme("w8a8", recipes.w8a8()),
    Scheme("nf4", recipes.nf4(group_size=64)),
    Scheme("int4", OpSpec(_INT4)),
    Scheme("int3", OpSpec(_INT3)),
    Scheme("int2", OpSpec(_INT2)),
    Scheme("w2a2", _W2A2),
    Scheme("int2-qat", OpSpec(_INT2), qat=True),
    Scheme("w2a2-qat", _W2A2, qat=True),
)

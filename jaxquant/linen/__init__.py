"""Flax Linen layers that quantize: Flax's own, with one more field, ``spec``.

    QuantDense, QuantDenseGeneral, QuantConv, QuantEmbed, QuantEinsum
    wrap(model, rules)        any model, in low precision: its own code, transformed

Each layer is a subclass of Flax's, with Flax's constructor arguments, parameter names, initial values and dtypes: the
variables of a model do not change when `nn.Dense` becomes `QuantDense`. The weight decides:

- a float weight and a ``spec``: quantization-aware training. The forward pass computes what the quantized model
  computes, gradients go straight through.
- a `QTensor`: the quantized model. Without a ``spec``, weight-only.
- a float weight and no ``spec``: Flax's own layer.

**Static activation ranges** (``spec.act.static``) live in the variable collection ``"quant"``, at
``quant/<module>/act``: the range ``lo`` and ``hi``, and what the spec's observer has ``seen``. Where the collection is
mutable the observer sees the input, and the forward pass uses the range so far; elsewhere the range is read.

    variables = model.init(key, x)                               # creates the collection, observes nothing
    _, seen = model.apply(variables, batch, mutable=["quant"])   # calibration; repeat for more batches
    y = model.apply({**variables, **seen}, x)
"""

from jaxquant.linen import serialization as serialization  # registers QTensor with flax.serialization
from jaxquant.linen.models import Wrapped, wrap
from jaxquant.linen.modules import QuantConv, QuantDense, QuantDenseGeneral, QuantEinsum, QuantEmbed

__all__ = ["QuantConv", "QuantDense", "QuantDenseGeneral", "QuantEinsum", "QuantEmbed", "Wrapped", "wrap"]

"""Flax NNX layers that quantize, and models made of them.

    QuantLinear, QuantLinearGeneral, QuantConv, QuantEmbed, QuantEinsum     Flax's layers with one more argument, spec
    wrap(model, rules)        any model, in low precision: its own code, transformed
    quantize(model)           a model of these layers, with QTensors as weights
    functional(model)         the model as a pure function of its parameters

Each layer is a subclass of Flax's own and runs Flax's own forward pass, with an operation of `jaxquant.ops` in the
place of the one from `jax`. Constructor arguments, parameter names and shapes, values at initialization, padding,
biases and dtypes are therefore Flax's, and a float checkpoint loads unchanged.

**The weight says what happens.** A float weight with a spec trains: the forward pass computes what the quantized model
computes, gradients go straight through. A `QTensor` in the same `nnx.Param` runs frozen; without a spec, weight-only. A
float weight without a spec is Flax's layer. There is no Variable type for quantized weights, since it would say the
same thing twice: graph definition, state structure and checkpoints are those of the float model, ``nnx.update(model,
loaded)`` is all it takes to load quantized weights, and ``nnx.state(model, nnx.Param)`` leaves nothing out.

**Training next to quantized weights.** `nnx.grad` refuses integers with a TypeError, but an optimizer makes moments for
them without a word. Name the weights that train, and let the optimizer check:

    wrt = jq.nnx.trainable                                                    # the Params that are float
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model)
    optimizer = nnx.Optimizer(model, qat.refuse_quantized(tx), wrt=wrt)       # raises for any other wrt

**Static activation ranges** (``spec.act.static``) are `QuantStat` variables of a submodule ``act_range``, which exists
only then. As with batch statistics, an attribute says when they follow the data:

    model.set_attributes(calibrating=True)
    for x in batches:
        model(x)              # also under nnx.jit; each layer sees what the layers before it give when quantized
    model.set_attributes(calibrating=False)
"""

from jaxquant.nnx.models import Wrapped, functional, quantize, trainable, wrap
from jaxquant.nnx.modules import QuantConv, QuantEinsum, QuantEmbed, QuantLinear, QuantLinearGeneral
from jaxquant.nnx.ranges import ActRange, QuantStat

__all__ = [
    "ActRange",
    "QuantConv",
    "QuantEinsum",
    "QuantEmbed",
    "QuantLinear",
    "QuantLinearGeneral",
    "QuantStat",
    "Wrapped",
    "functional",
    "quantize",
    "trainable",
    "wrap",
]

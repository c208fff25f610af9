"""NNX layers next to Flax's own: small, with unequal magnitudes per channel and group."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxquant as jq
from jaxquant import observers, recipes

F32 = np.float32
dequantize_params = jax.jit(jq.dequantize_params)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: how to make it, an input, and its weight's name and contracted axes."""

    float_class: type
    quant_class: type
    args: tuple
    inputs: tuple
    reduce_axes: tuple
    weight: str = "kernel"
    kwargs: dict = dataclasses.field(default_factory=dict)

    def flax(self, **kwargs: Any) -> Any:
        return self.float_class(*self.args, **self.kwargs, **inits(self.quant_class), **kwargs, rngs=nnx.Rngs(0))

    def ours(self, **kwargs: Any) -> Any:
        return self.quant_class(*self.args, **self.kwargs, **inits(self.quant_class), **kwargs, rngs=nnx.Rngs(0))

    def dequantized(self, layer: Any, **kwargs: Any) -> Any:
        """Flax's layer with the float values of a quantized one."""
        out = self.flax(**kwargs)
        nnx.update(out, dequantize_params(pure(layer, nnx.Param)))
        return out

    def x(self, dtype: Any = F32) -> jax.Array:
        return wavy(self.inputs, dtype)


LAYERS = {
    "linear": Layer(nnx.Linear, jq.nnx.QuantLinear, (32, 6), (3, 32), (-2,)),
    "general": Layer(
        nnx.LinearGeneral, jq.nnx.QuantLinearGeneral, ((2, 16), (3, 2)), (3, 2, 16), (-4, -3), kwargs={"axis": (-2, -1)}
    ),
    "conv": Layer(nnx.Conv, jq.nnx.QuantConv, (16, 5, (3, 3)), (2, 5, 6, 16), (-4, -3, -2)),
    "einsum": Layer(nnx.Einsum, jq.nnx.QuantEinsum, ("btd,dhk->bthk", (32, 2, 3), (2, 3)), (2, 3, 32), (-3,)),
    "embed": Layer(nnx.Embed, jq.nnx.QuantEmbed, (7, 32), (3, 32), (-1,), weight="embedding"),
}

SPECS = {
    "w8a16": recipes.w8a16(),
    "w8a8": recipes.w8a8(),
    "w8a8 asymmetric": recipes.w8a8(act_symmetric=False),
    "w8a8 static": recipes.w8a8(static=True),
    "w4a16 grouped": recipes.w4a16(group_size=16),
    "w4a16 asymmetric": recipes.w4a16(group_size=16, symmetric=False),
    "w4a8": recipes.w4a8(group_size=16),
    "fp8": recipes.fp8(),
    "nf4": recipes.nf4(group_size=16),
    "nvfp4": recipes.nvfp4(),
    "int2": jq.OpSpec(jq.QuantSpec("int2", calibration=observers.MSE())),
}


def wavy(shape: tuple[int, ...], dtype: Any = F32) -> jax.Array:
    """Fixed values whose magnitude differs from row to row and along the last axis."""
    x = np.sin(1 + np.arange(np.prod(shape), dtype=np.float64) * 1.7).reshape(shape)
    for axis, n in enumerate(shape):
        x = x * np.geomspace(0.6, 1.6, n).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jax.device_put(np.asarray(x, dtype))


def value(variable: Any) -> Any:
    return variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value


def assign(variable: Any, new: Any) -> None:
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(new)
    else:
        variable.value = new


def inits(layer_class: type) -> dict[str, Any]:
    """Initializers for weights of unequal magnitudes and biases that are not 0."""

    def init(key, shape, dtype):
        return wavy(shape, dtype) / 4

    if issubclass(layer_class, nnx.Embed):
        return {"embedding_init": init}
    return {"kernel_init": init, "bias_init": init}


def close(got: Any, want: Any, tolerance: float) -> None:
    """Asserts that errors are below ``tolerance`` times the largest magnitude."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(np.abs(want).max(initial=0), 1e-30))


def pure(model: Any, *filters: Any) -> Any:
    state: Any = nnx.state(model, *filters)
    return nnx.to_pure_dict(state)


def calibrated(model: Any, *batches: Any, call: Callable[..., Any] = lambda model, x: model(x)) -> Any:
    """Shows the batches to whatever has a static range."""
    if nnx.state(model, jq.nnx.QuantStat):
        model.set_attributes(calibrating=True)
        for x in batches:
            call(model, x)
        model.set_attributes(calibrating=False)
    return model


class MLP(nnx.Module):
    """Two layers, a normalization between them."""

    def __init__(self, rngs: nnx.Rngs, spec: Any = None, *, flax: bool = False):
        make: Any = nnx.Linear if flax else (lambda *a, **k: jq.nnx.QuantLinear(*a, spec=spec, **k))
        self.first = make(16, 32, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)
        self.second = make(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.norm(self.first(x))))


class Block(nnx.Module):
    """A layer from 16 features to 16, to be stacked."""

    def __init__(self, rngs: nnx.Rngs, spec: Any = None):
        self.dense = jq.nnx.QuantLinear(16, 16, spec=spec, rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.dense(x))


def stack(n: int, spec: Any = None) -> Block:
    """n blocks with a leading axis on every array."""

    @nnx.split_rngs(splits=n)
    @nnx.vmap
    def make(rngs):
        return Block(rngs, spec)

    return make(nnx.Rngs(0))


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def run_stack(block, x):
    return block(x)

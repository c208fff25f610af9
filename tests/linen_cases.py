"""One case per layer: the layer, Flax's own, an input, and which axes of the weight share a scale."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import recipes


@dataclasses.dataclass(frozen=True)
class Case:
    """``quant(spec=..., **fields)`` and ``flax(**fields)`` make the two layers; ``method`` is what is called."""

    quant: Callable[..., nn.Module]
    flax: Callable[..., nn.Module]
    shape: tuple[int, ...]
    reduce_axes: tuple[int, ...]
    act_axes: tuple[int, ...] = (-1,)
    weight: str = "kernel"
    indices: int = 0  # inputs are indices below this
    method: str = "__call__"

    def inputs(self, seed=0):
        if self.indices:
            return jnp.asarray(np.random.default_rng(seed).integers(0, self.indices, self.shape))
        return unequal(self.shape, seed)

    def init(self, layer, seed=1):
        """Variables with a non-zero bias and unequal channels; other collections are empty (zeros)."""
        shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), self.inputs(), method=self.method))
        variables = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        params = {k: unequal(v.shape, seed + i, 0.3) for i, (k, v) in enumerate(variables["params"].items())}
        return {**variables, "params": params}

    def with_weight(self, variables, function):
        """The variables with ``function`` of the weight in its place."""
        return {**variables, "params": {**variables["params"], self.weight: function(variables["params"][self.weight])}}

    def freeze(self, variables, spec):
        """The weight quantized, everything else as it was."""
        return self.with_weight(variables, lambda w: jq.quantize(w, spec, reduce_axes=self.reduce_axes))

    def reference(self, spec, variables, x):
        """Flax's own layer on fake-quantized values: straight through by construction."""
        if spec.weight is not None:
            fake = functools.partial(jq.fake_quant, spec=spec.weight, reduce_axes=self.reduce_axes)
            variables = self.with_weight(variables, fake)
        if spec.act is not None and not self.indices:
            scale = zero_point = None
            if spec.act.static:  # calibrated on this very x
                lo, hi = jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)
                scale, zero_point = jax.lax.stop_gradient(jq.scale_zero_point(lo, hi, spec.act))
            x = jq.fake_quant(x, spec.act, reduce_axes=self.act_axes, scale=scale, zero_point=zero_point)
        return self.flax().apply({"params": variables["params"]}, x, method=self.method)


def unequal(shape, seed=0, size=1.0):
    """Normal values whose magnitudes differ along every axis, so that a wrong axis shows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * size
    for axis, n in enumerate(shape):
        x = x * rng.uniform(0.3, 2, n).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return jax.device_put(np.asarray(x, np.float32))


def _case(name, args, shape, *axes, fields=None, **case):
    def make(cls):
        return lambda **extra: cls(*args, **(fields or {}), **extra)

    return Case(make(getattr(jq.linen, f"Quant{name}")), make(getattr(nn, name)), shape, *axes, **case)


CASES = {
    "dense": _case("Dense", (6,), (3, 64), (-2,)),
    "dense-3d": _case("Dense", (6,), (2, 3, 64), (-2,), fields={"use_bias": False}),
    "dense_general": _case("DenseGeneral", ((3, 2),), (5, 16, 4), (-4, -3), (-2, -1), fields={"axis": (-2, -1)}),
    "dense_general-batch": _case("DenseGeneral", (6,), (2, 5, 64), (-2,), fields={"batch_dims": (0,)}),
    "conv": _case("Conv", (4, (3, 3)), (2, 5, 6, 32), (-4, -3, -2), (-3, -2, -1)),
    "conv-1d": _case(
        "Conv", (4, 3), (2, 7, 32), (-3, -2), (-2, -1), fields={"padding": "CAUSAL", "kernel_dilation": 2}
    ),
    "conv-groups": _case(
        "Conv", (4, (2, 2)), (2, 5, 6, 64), (-4, -3, -2), (-3, -2, -1), fields={"feature_group_count": 2}
    ),
    "embed": _case("Embed", (9, 64), (3, 2), (-1,), weight="embedding", indices=9),
    "attend": _case("Embed", (9, 64), (3, 64), (-1,), weight="embedding", method="attend"),
    "einsum": _case("Einsum", ((64, 3, 2), "btd,dhk->bthk"), (2, 3, 64), (-3,)),
}

SPECS = {
    "w8a16": recipes.w8a16(),
    "w8a16-tensor": jq.OpSpec(jq.QuantSpec("int8", granularity="per_tensor")),
    "w4a16": recipes.w4a16(group_size=32),
    "w4a16-asymmetric": recipes.w4a16(group_size=32, symmetric=False),
    "w8a8": recipes.w8a8(),
    "w8a8-asymmetric": recipes.w8a8(act_symmetric=False),
    "w8a8-static": recipes.w8a8(static=True),
    "w8a8-static-asymmetric": recipes.w8a8(static=True, act_symmetric=False),
    "w4a8": recipes.w4a8(group_size=32),
    "w4a4": recipes.w4a4(group_size=32),
    "fp8": recipes.fp8(),
    "nf4": recipes.nf4(group_size=32),
    "mxfp8": recipes.mxfp8(),
    "mxfp4": recipes.mxfp4(),
    "nvfp4": recipes.nvfp4(act=True),
    "int2": jq.OpSpec(jq.QuantSpec("int2", granularity="per_group", group_size=32, calibration=jq.observers.MSE())),
}


def init(*layers, x, method="__call__", seed=7):
    """Initial values of each layer; in one jit, so that nothing else is compiled."""
    return jax.jit(lambda key, x: [layer.init(key, x, method=method) for layer in layers])(jax.random.key(seed), x)


def assert_close(got: Any, want: Any, tolerance=1e-5):
    """Relative to the largest magnitude: logits are compared on the scale of logits."""
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert got.shape == want.shape
    assert np.all(np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(float(np.abs(want).max()), 1e-9))


def assert_same(got: Any, want: Any):
    """Two pytrees: the same structure, and the same bits in every leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

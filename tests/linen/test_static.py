"""Static activation ranges: created at init, observed where "quant" is mutable, read elsewhere."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax_settings import needs_jit
from linen_cases import assert_close, assert_same, unequal
from narrowed import present

import jaxquant as jq
from jaxquant import recipes

W = unequal((16, 4), 1)
X = unequal((8, 16))


def static(**act):
    return jq.OpSpec(jq.QuantSpec("int8"), jq.QuantSpec("int8", granularity="per_tensor", static=True, **act))


def expected(x, lo, hi, spec):
    scale, zero_point = jq.scale_zero_point(lo, hi, spec.act)
    x = jq.fake_quant(x, spec.act, reduce_axes=(-1,), scale=scale, zero_point=zero_point)
    return x @ jq.fake_quant(W, spec.weight, reduce_axes=(-2,))


def test_init_creates_the_collection_and_observes_nothing():
    layer = jq.linen.QuantDense(4, use_bias=False, spec=static())
    y, variables = layer.init_with_output(jax.random.key(0), X)
    empty = {"lo": jnp.float32(1), "hi": jnp.float32(-1)}
    assert_same(variables["quant"], {"act": {**empty, "seen": {"absmax": jnp.zeros(1, jnp.float32)}}})
    assert_close(y, layer.apply({"params": variables["params"]}, X, mutable=["quant"])[0], 1e-6)
    # Without a static spec there is no such collection.
    assert jq.linen.QuantDense(4, spec=recipes.w8a8()).init(jax.random.key(0), X).keys() == {"params"}


def test_calibration_uses_the_range_seen_so_far_in_one_pass():
    spec = static(symmetric=False)
    layer = jq.linen.QuantDense(4, use_bias=False, spec=spec)
    variables = layer.init(jax.random.key(0), X)
    variables = {"params": {"kernel": W}, "quant": variables["quant"]}
    lo = hi = 0.0
    for k in range(3):
        x = X * (1 + k) + k
        lo, hi = min(lo, float(x.min())), max(hi, float(x.max()))
        y, seen = layer.apply(variables, x, mutable=["quant"])
        variables = {**variables, **seen}
        assert_close(y, expected(x, lo, hi, spec), 1e-5)
    np.testing.assert_allclose((variables["quant"]["act"]["lo"], variables["quant"]["act"]["hi"]), (lo, hi))
    # Read only: the same range for any input; what lies outside saturates.
    assert_close(layer.apply(variables, 10 * X), expected(10 * X, lo, hi, spec))
    frozen = {**variables, "params": {"kernel": jq.quantize(W, present(spec.weight), reduce_axes=(-2,))}}
    for apply in (layer.apply, jax.jit(layer.apply)):
        assert_close(apply(frozen, 10 * X), layer.apply(variables, 10 * X), 1e-6)


@pytest.mark.parametrize(
    "calibration",
    [
        jq.observers.AbsMax(),
        jq.observers.EMA(0.9),
        jq.observers.Percentile(99.0),
        jq.observers.MSE(),
        jq.observers.Entropy(),
    ],
    ids=repr,
)
def test_every_observer_gives_a_useful_range(calibration):
    spec = static(calibration=calibration)
    layer = jq.linen.QuantDense(4, use_bias=False, spec=spec)

    @jax.jit
    def calibrate_then_run(x):
        y, seen = layer.apply({"params": {"kernel": W}}, x, mutable=["quant"])
        return y, layer.apply({"params": {"kernel": W}, **seen}, x)

    y, again = calibrate_then_run(X)
    assert_close(y, again, 1e-6)
    assert_close(y, X @ W, 0.15)


def test_shapes_of_the_input_may_change_between_batches():
    layer = jq.linen.QuantDense(4, use_bias=False, spec=static())
    params = {"kernel": W}
    _, seen = layer.apply({"params": params}, X, mutable=["quant"])
    _, seen = layer.apply(freeze({"params": params, **seen}), X.reshape(2, 4, 16), mutable=["quant"])
    assert_close(layer.apply({"params": params, **seen}, X[0]), layer.apply({"params": params, **seen}, X)[0], 1e-6)


@pytest.mark.parametrize("quant", [None, "empty", "fresh"])
@pytest.mark.parametrize("frozen", [False, True], ids=["float", "frozen"])
@needs_jit
def test_an_unobserved_range_raises(quant, frozen):
    spec = static()
    layer = jq.linen.QuantDense(4, use_bias=False, spec=spec)
    kernel = jq.quantize(W, present(spec.weight), reduce_axes=(-2,)) if frozen else W
    variables: dict[str, Any] = {"params": {"kernel": kernel}}
    if quant == "empty":
        variables["quant"] = {}
    if quant == "fresh":
        variables["quant"] = layer.init(jax.random.key(0), X)["quant"]
    with pytest.raises(jq.QuantError, match=r"QuantDense at params/kernel: .* is not known.*mutable=\['quant'\]"):
        layer.apply(variables, X)
    if quant == "fresh":  # under jit only the values know, and they say NaN rather than something wrong
        assert bool(jnp.all(jnp.isnan(jax.jit(layer.apply)(variables, X))))
    else:
        with pytest.raises(jq.QuantError, match="is not known"):
            jax.jit(layer.apply)(variables, X)


def test_all_zero_batches_are_observed_too():
    layer = jq.linen.QuantDense(4, spec=static())
    params = {"kernel": W, "bias": jnp.arange(4.0)}
    _, seen = layer.apply({"params": params}, jnp.zeros_like(X), mutable=["quant"])
    np.testing.assert_array_equal(layer.apply({"params": params, **seen}, jnp.zeros((1, 16))), [np.arange(4.0)])


def test_a_forgotten_variable_axis_raises():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jq.linen.QuantDense(16, spec=static())(x), None

    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    with pytest.raises(jq.QuantError, match="variable_axes"):
        scan().init(jax.random.key(0), X, None)


def test_gradients_take_the_range_as_a_constant():
    spec = static()
    layer = jq.linen.QuantDense(4, use_bias=False, spec=spec)

    def loss(w, x):
        return jnp.sum(jnp.sin(layer.apply({"params": {"kernel": w}}, x, mutable=["quant"])[0]))

    def reference(w, x):
        hi = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
        scale, _ = jq.scale_zero_point(-hi, hi, present(spec.act))
        x = jq.fake_quant(x, present(spec.act), reduce_axes=(-1,), scale=scale)
        return jnp.sum(jnp.sin(x @ jq.fake_quant(w, present(spec.weight), reduce_axes=(-2,))))

    for got, want in zip(jax.grad(loss, (0, 1))(W, X), jax.grad(reference, (0, 1))(W, X), strict=True):
        assert_close(got, want)


def test_convolutions_einsums_and_attend_observe_too():
    conv: Any = jq.linen.QuantConv(3, (2, 2), spec=static())
    images = unequal((2, 4, 4, 3))
    y, variables = conv.init_with_output(jax.random.key(0), images)
    y, seen = conv.apply(variables, images, mutable=["quant"])
    np.testing.assert_allclose(seen["quant"]["act"]["hi"], jnp.abs(images).max())
    assert_close(conv.apply({**variables, **seen}, images), y, 1e-6)

    einsum: Any = jq.linen.QuantEinsum((16, 4), "bi,io->bo", spec=static())
    _, seen = einsum.apply({"params": {"kernel": W, "bias": jnp.zeros(4)}}, X, mutable=["quant"])
    np.testing.assert_allclose(seen["quant"]["act"]["hi"], jnp.abs(X).max())

    embed: Any = jq.linen.QuantEmbed(4, 16, spec=static())
    table = {"params": {"embedding": W.T}}
    assert "quant" not in embed.apply(table, jnp.array([1, 2]), mutable=["quant"])[1]  # a lookup has no activation
    _, seen = embed.apply(table, X, method="attend", mutable=["quant"])
    np.testing.assert_allclose(seen["quant"]["act"]["hi"], jnp.abs(X).max())

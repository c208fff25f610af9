"""Quantization-aware training is ordinary training: Optax as it is, one trace, the float model's checkpoints."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax_settings import needs_jit, optax_promotes
from linen_cases import assert_close, assert_same
from narrowed import present

import jaxquant as jq
from jaxquant import qat, recipes

CLASSES = 4


class Classifier(nn.Module):
    spec: jq.OpSpec | None = None
    quantized: bool = True

    @nn.compact
    def __call__(self, x):
        conv, dense = (jq.linen.QuantConv, jq.linen.QuantDense) if self.quantized else (nn.Conv, nn.Dense)
        field: dict[str, Any] = {"spec": self.spec} if self.quantized else {}
        x = nn.relu(conv(8, (3, 3), strides=2, **field)(x))
        x = nn.LayerNorm()(x.reshape(x.shape[0], -1))
        return dense(CLASSES, **field)(nn.relu(dense(16, **field)(x)))


def data(n=64, seed=0):
    """Images with a bright row that says the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    images = rng.normal(size=(n, 6, 6, 1)) * 0.5
    images[np.arange(n), labels] += 1.5
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels)


def optimizer(params):
    """Schedule, clipping, weight decay with a mask: everything a training script has."""
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-2, 4, 40)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3, mask=mask))


def train(model, steps):
    traces = []
    images, labels = data()
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    tx = optimizer(params)

    def loss(params):
        logits = model.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        traces.append(None)
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses, len(traces)


SPEC = recipes.w4a8(group_size=None)


@pytest.fixture(scope="module")
def trained():
    return train(Classifier(SPEC), 30)


@needs_jit
@optax_promotes
def test_the_loss_falls_in_one_trace(trained):
    _, _, losses, traces = trained
    assert traces == 1
    assert losses[-1] < 0.3 * losses[0]


@optax_promotes
def test_params_and_optimizer_state_keep_the_structure_of_the_float_model(trained):
    params, state, *_ = trained
    images, _ = data()
    float_params, float_state = jax.eval_shape(
        lambda: (p := Classifier(quantized=False).init(jax.random.key(0), images)["params"], optimizer(p).init(p))
    )
    for got, want in ((params, float_params), (state, float_state)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), got) == jax.tree.map(lambda a: (a.shape, a.dtype), want)


@optax_promotes
def test_trained_params_freeze_without_a_change_of_logits(trained):
    params, *_ = trained
    images, labels = data(seed=1)
    frozen = jq.quantize_params(params, [jq.Rule(".*", SPEC)])
    run = jax.jit(lambda *trees: [Classifier(SPEC).apply({"params": p}, images) for p in trees])
    got, want = run(frozen, params)
    assert_close(got, want)
    np.testing.assert_array_equal(jnp.argmax(got, -1), jnp.argmax(want, -1))
    assert float(jnp.mean(jnp.argmax(got, -1) == labels)) > 0.9


@optax_promotes
def test_checkpoints_are_those_of_the_float_model(trained, tmp_path):
    params, state, *_ = trained
    images, _ = data()
    abstract = jax.eval_shape(lambda: Classifier(quantized=False).init(jax.random.key(0), images)["params"])
    abstract_state = jax.eval_shape(lambda: optimizer(abstract).init(jax.tree.map(jnp.zeros_like, abstract)))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), {"params": abstract, "state": abstract_state}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", {"params": params, "state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", target)
    assert_same(restored, {"params": params, "state": state})
    # The float model runs on them.
    y: Any = Classifier(quantized=False).apply({"params": restored["params"]}, images[:1])
    assert y.shape == (1, CLASSES)


@optax_promotes
@needs_jit
def test_static_ranges_are_observed_while_training():
    """The collection is carried as batch statistics are; gradients flow past it."""
    spec = jq.OpSpec(
        jq.QuantSpec("int8"),
        jq.QuantSpec("int8", granularity="per_tensor", static=True, calibration=jq.observers.EMA(0.9)),
    )
    model: Any = jq.linen.QuantDense(CLASSES, spec=spec)
    images, labels = data()
    images = images.reshape(len(images), -1)
    variables = model.init(jax.random.key(0), images)
    params, quant, tx, traces = variables["params"], variables["quant"], optax.adam(1e-1), []

    @jax.jit
    def step(params, quant, state):
        traces.append(None)

        def loss(params):
            logits, seen = model.apply({"params": params, "quant": quant}, images, mutable=["quant"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), seen["quant"]

        (value, quant), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), quant, state, value

    state, losses = tx.init(params), []
    for _ in range(15):
        params, quant, state, value = step(params, quant, state)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < 0.3 * losses[0]
    np.testing.assert_allclose(quant["act"]["hi"], images.max(), rtol=1e-5)
    frozen = {"bias": params["bias"], "kernel": jq.quantize(params["kernel"], present(spec.weight), reduce_axes=(-2,))}
    logits = model.apply({"params": frozen, "quant": quant}, images)
    assert_close(logits, model.apply({"params": params, "quant": quant}, images))


@optax_promotes
def test_training_around_a_frozen_layer():
    """A frozen kernel and a trained bias: the optimizer sees only the bias."""
    (images, labels), spec = data(), recipes.w8a16()
    images = images.reshape(len(images), -1)
    model: Any = jq.linen.QuantDense(CLASSES, spec=spec)
    params = model.init(jax.random.key(0), images)["params"]
    params = {**params, "kernel": jq.quantize(params["kernel"], present(spec.weight), reduce_axes=(-2,))}
    tx = qat.freeze_quantized(optax.adam(1e-1))

    @jax.jit
    def step(params, state):
        def loss(params):
            logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradient = jax.value_and_grad(loss, allow_int=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, before = tx.init(params), params
    losses = []
    for _ in range(5):
        params, state, value = step(params, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    assert_same(params["kernel"], before["kernel"])
    assert bool(jnp.all(params["bias"] != before["bias"]))

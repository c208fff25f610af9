"""Training: Optax drives the layers as it drives Flax's, and nothing else trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax_settings import needs_jit, optax_promotes
from nnx_cases import MLP, SPECS, calibrated, close, pure, value, wavy

import jaxquant as jq
from jaxquant import qat, recipes

X = wavy((32, 16))
Y = jnp.argmax(X @ wavy((16, 4)), axis=-1)


def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(model(X), Y).mean()


def train(model, optimizer, wrt, steps):
    """(losses, number of traces)."""
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(0)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)], len(traces)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "spec", ["w8a8", "int2", *(pytest.param(s, marks=SLOW) for s in ("w4a16 grouped", "w8a8 static"))]
)
@optax_promotes
@needs_jit
def test_quantization_aware_training(spec):
    model = calibrated(MLP(nnx.Rngs(0), SPECS[spec]), X)
    tx = optax.adamw(optax.schedules.cosine_decay_schedule(3e-2, 100))
    optimizer = nnx.Optimizer(model, qat.refuse_quantized(tx), wrt=nnx.Param)
    losses, traces = train(model, optimizer, nnx.Param, 30)
    assert traces == 1
    assert losses[-1] < 0.5 * losses[0]
    q = jq.nnx.quantize(model)
    close(q(X), model(X), 1e-5)
    assert float(loss(q)) == pytest.approx(float(loss(model)), rel=1e-4)


def test_optimizer_state_is_the_float_model_s():
    tx = optax.adamw(1e-2)
    ours = nnx.Optimizer(MLP(nnx.Rngs(0), recipes.w8a8(static=True)), tx, wrt=nnx.Param)
    theirs = nnx.Optimizer(MLP(nnx.Rngs(0), flax=True), tx, wrt=nnx.Param)
    a, b = nnx.state(ours), nnx.state(theirs)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [x.shape for x in jax.tree.leaves(a)] == [x.shape for x in jax.tree.leaves(b)]


@optax_promotes
@needs_jit
def test_a_range_that_moves_during_training():
    act = jq.QuantSpec("int8", granularity="per_tensor", static=True, calibration=jq.observers.EMA(0.9))
    model = MLP(nnx.Rngs(0), jq.OpSpec(jq.QuantSpec("int8"), act))
    model.set_attributes(calibrating=True)
    losses, traces = train(model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), nnx.Param, 10)
    model.set_attributes(calibrating=False)
    assert traces == 1
    assert losses[-1] < losses[0]
    assert bool(jnp.isfinite(value(model.second.act_range.hi)))
    close(jq.nnx.quantize(model)(X), model(X), 1e-5)


# -- next to quantized weights ----------------------------------------------------------------------------------------


@pytest.fixture
def frozen():
    return jq.nnx.quantize(MLP(nnx.Rngs(0), recipes.w4a8(group_size=16)))


@optax_promotes
@needs_jit
def test_what_is_float_trains_and_codes_stay(frozen):
    before = pure(frozen)
    optimizer = nnx.Optimizer(frozen, qat.refuse_quantized(optax.adamw(3e-2)), wrt=jq.nnx.trainable)
    losses, traces = train(frozen, optimizer, jq.nnx.trainable, 20)
    after = pure(frozen)
    assert traces == 1
    assert losses[-1] < losses[0]
    for name in ("first", "second"):
        jax.tree.map(np.testing.assert_array_equal, before[name]["kernel"], after[name]["kernel"])
        assert bool((before[name]["bias"] != after[name]["bias"]).any())
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(nnx.state(frozen, jq.nnx.trainable)))


def test_gradients_with_respect_to_codes_are_refused(frozen):
    with pytest.raises(TypeError, match="real- or complex-valued"):
        nnx.grad(loss)(frozen)


def test_an_optimizer_refuses_quantized_weights(frozen):
    with pytest.raises(jq.QuantError, match=r"first/kernel.*cannot be trained"):
        nnx.Optimizer(frozen, qat.refuse_quantized(optax.adam(1e-3)), wrt=nnx.Param)


def test_trainable_leaves_out_integers():
    class Counter(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jnp.ones(2))
            self.pair = nnx.Param({"a": jnp.ones(2), "b": jnp.ones(1)})
            self.steps = nnx.Param(jnp.zeros(2, jnp.int32))
            self.mean = nnx.BatchStat(jnp.ones(2))

    assert set(nnx.state(Counter(), jq.nnx.trainable)) == {"weight", "pair"}

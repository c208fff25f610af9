"""Steps of optimizers as the TPU compiler makes them: 8-bit moments are read and written once, by one kernel."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxquant import optim
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

pytestmark = [
    pytest.mark.every,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jaxquant[aot-tpu]"),
]


def step(tx):
    grads = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.float32)}
    return compiled_for("test", "tpu v5e", tx.update, (grads, jax.eval_shape(tx.init, grads)))


@pytest.mark.slow
@pytest.mark.usefixtures("scheduled")
def test_the_step_of_adam_takes_no_longer_than_in_float():
    ours, float_one = (estimate(step(tx)) for tx in (optim.scale_by_adam8bit(), optax.scale_by_adam()))
    assert ours.temporaries < 1 << 16
    assert ours.seconds is not None
    assert float_one.seconds is not None
    assert ours.seconds <= float_one.seconds
    assert ours.seconds <= 1.8 * ours.floor


@pytest.mark.parametrize(("make", "shape"), [(optim.adamw8bit, (3, 256, 1280)), (optim.lion8bit, (2, 32768))])
def test_one_kernel_takes_rows_of_blocks_and_blocks_in_order(make, shape):
    tx = optax.inject_hyperparams(make, static_args="storage")(learning_rate=0.1, weight_decay=0.0)
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    args = params, jax.eval_shape(tx.init, params), params
    assert "optimizer_step" in compiled_for("test", "tpu v5e", tx.update, args).executable.as_text()

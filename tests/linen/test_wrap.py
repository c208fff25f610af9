"""`jq.linen.wrap`: a model of Flax's own layers, untouched."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrowed import untyped

import jaxquant as jq
from jaxquant import recipes


class Net(nn.Module):
    """Dense layers, a raw product, batch statistics."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x)))
        x = x @ self.param("w", nn.initializers.lecun_normal(), (16, 8))
        return nn.Dense(4, name="head")(x)


X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)) * np.arange(1, 7)[:, None], jnp.float32)


def test_wrap_keeps_the_models_tree_and_values():
    qmodel = jq.linen.wrap(Net(), [jq.Rule("head", None), jq.Rule(".*", recipes.w8a8())])
    ours, own = qmodel.init(jax.random.key(0), X), Net().init(jax.random.key(0), X)
    assert jax.tree.structure(ours) == jax.tree.structure(own)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, own))


def test_wrap_finds_every_product_and_its_float_and_frozen_forms_agree():
    qmodel = jq.linen.wrap(Net(), [jq.Rule("head", None), jq.Rule(".*", recipes.w8a8())])
    variables = qmodel.init(jax.random.key(0), X)
    plan = qmodel.plan(variables, X)
    assert set(plan) == {"params/Dense_0/kernel", "params/w"}
    frozen = jq.quantize_params(variables, plan)
    trained, run = jax.jit(qmodel.apply)(variables, X), jax.jit(qmodel.apply)(frozen, X)
    np.testing.assert_allclose(trained, run, rtol=1e-5, atol=1e-5)
    own: Any = Net().apply(variables, X)
    error = np.linalg.norm(trained - own) / np.linalg.norm(own)
    assert 1e-4 < error < 0.05  # quantized, and well


def test_wrap_passes_flags_and_returns_updated_collections():
    qmodel = jq.linen.wrap(Net(), [jq.Rule("Dense_0", recipes.w8a16())])
    variables = qmodel.init(jax.random.key(0), X)
    y, updates = qmodel.apply(variables, X, train=True, mutable=["batch_stats"])
    want, own = Net().apply(variables, X, train=True, mutable=["batch_stats"])
    collections: list[Any] = [updates, own]
    mean, own_mean = (u["batch_stats"]["BatchNorm_0"]["mean"] for u in collections)
    np.testing.assert_allclose(mean, own_mean, atol=0.02)
    assert bool(jnp.any(own_mean != 0))
    assert y.shape == want.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: untyped.linen.wrap(Net(), jq.Rule(".*", None)), "wrap: rules must be a sequence of Rule"),
        (lambda: untyped.linen.wrap(Net().apply, []), "wrap: the model must be a Linen module"),
    ],
)
def test_wrap_refuses(call, message):
    with pytest.raises(jq.QuantError, match=message):
        call()

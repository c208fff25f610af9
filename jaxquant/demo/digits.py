"""Real data at a size that trains in seconds: scikit-learn's digits, a small perceptron, one loop for float and QAT."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxquant.core.paths import Params
from jaxquant.core.specs import OpSpec
from jaxquant.linen import wrap
from jaxquant.rules import Rule

__all__ = [
    "FLOAT",
    "MLP",
    "QAT",
    "Digits",
    "Model",
    "Recipe",
    "Trained",
    "init",
    "load",
    "logits",
    "quantized",
    "seconds",
    "train",
]


class Digits(NamedTuple):
    """Images [n, 64] in [0, 1], float32, and labels [n]; a quarter of each class is held out for testing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def accuracy(self, logits: jax.Array) -> float:
        """The fraction of the test images that these logits [n, 10] classify correctly."""
        return float(np.mean(np.argmax(logits, axis=-1) == self.test_labels))


def load() -> Digits:
    """The 1797 images, 1347 for training and 450 for testing, always the same ones."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    x, x_test, y, y_test = (np.asarray(part) for part in parts)
    return Digits(x, y, x_test, y_test)


class MLP(nn.Module):
    """64-128-128-10 with ReLU: a plain Flax model, which knows nothing of quantization."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Dense(128)(x))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


class Model(Protocol):
    """A model that is trained and run: a Linen module, or a wrapped one."""

    @property
    def init(self) -> Callable[..., Any]: ...
    @property
    def apply(self) -> Callable[..., Any]: ...


def quantized(model: nn.Module, spec: OpSpec | None) -> Model:
    """The model with every kernel quantized, those of the first and last layer included; None: as it is."""
    return model if spec is None else wrap(model, [Rule("kernel", spec)])


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a learning rate that falls to 0 along a cosine, on cross entropy with smoothed labels."""

    epochs: int
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    smoothing: float = 0.1
    batch: int = 64


FLOAT = Recipe(epochs=40, weight_decay=0.1)
"""From scratch."""
QAT = Recipe(epochs=15)
"""From trained float parameters."""


class Trained(NamedTuple):
    """Parameters, and the time of the fastest training step: what others do on the machine only adds to it."""

    params: Params
    step_seconds: float


def init(model: Model, data: Digits, seed: int) -> Any:
    """Fresh float parameters."""
    return model.init(jax.random.key(seed), data.train_images[:1])["params"]


def train(
    model: Model,
    params: Params,
    data: Digits,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: Callable[[], Any] = lambda: None,
) -> Trained:
    """Trains float parameters; of a quantized model, that is quantization-aware training.

    Args:
      model: maps images to logits.
      params: where to start.
      data: what to train on.
      recipe: for how long, and how.
      seed: of the order of the images.
      on_epoch: called after every epoch.
    """
    size = len(data.train_images)
    batches = size // recipe.batch
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * batches)
    tx = optax.adamw(schedule, weight_decay=recipe.weight_decay)

    def loss(params, images, labels):
        targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), recipe.smoothing)
        return optax.softmax_cross_entropy(model.apply({"params": params}, images), targets).mean()  # type: ignore[arg-type]

    @jax.jit
    def step(params, state, images, labels):
        updates, state = tx.update(jax.grad(loss)(params, images, labels), state, params)
        return optax.apply_updates(params, updates), state

    state, times, rng = tx.init(params), [], np.random.default_rng(seed)
    for _ in range(recipe.epochs):
        for batch in rng.permutation(size)[: batches * recipe.batch].reshape(batches, recipe.batch):
            start = time.perf_counter()
            params, state = step(params, state, data.train_images[batch], data.train_labels[batch])
            jax.block_until_ready(params)
            times.append(time.perf_counter() - start)
        on_epoch()
    return Trained(params, min(times))


def logits(model: Model) -> Callable[[Any, Any], jax.Array]:
    """The jitted model: parameters, float or quantized, and images to logits."""
    return jax.jit(lambda params, images: model.apply({"params": params}, images))


def seconds(fn: Callable[..., Any], *args: Any, repeat: int = 100) -> float:
    """The time of the fastest of many calls."""
    args = jax.tree.map(jnp.asarray, args)

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        return time.perf_counter() - start

    return min(once() for _ in range(repeat))

"""A Flax NNX model, quantized from outside: jq.nnx.wrap trains it, .quantize makes it run on QTensors.

The model is plain NNX and keeps NNX's own ways: nnx.jit, nnx.Optimizer, modules with state.

    python examples/wrap_nnx.py
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxquant as jq
from jaxquant import observers, qat

INT2 = jq.OpSpec(jq.QuantSpec("int2", calibration=observers.MSE()), jq.QuantSpec("int4"))


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.middle = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.hidden(x)))))


def train(model, x, y, steps, learning_rate):
    tx = qat.refuse_quantized(optax.adam(optax.cosine_decay_schedule(learning_rate, steps)))
    optimizer = nnx.Optimizer(model, tx, wrt=jq.nnx.trainable)

    @nnx.jit
    def step(model, optimizer, x, y):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, jq.nnx.trainable))(model)
        optimizer.update(model, grads)

    for batch in np.random.default_rng(1).choice(len(x), (steps, 128)):
        step(model, optimizer, x[batch], y[batch])


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps

    data, target = load_digits(return_X_y=True)
    arrays = train_test_split(data / 16, target, test_size=360, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, arrays)

    def report(name, model):
        accuracy = float((model(test_x).argmax(-1) == test_y).mean())
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        print(f"{name:<22}{accuracy:8.2%}{size:10,} bytes")

    rules = [jq.Rule("head", None), jq.Rule("kernel", INT2)]
    model = MLP(nnx.Rngs(0))
    train(model, train_x, train_y, steps, 3e-3)
    report("float", model)
    wrapped = jq.nnx.wrap(model, rules)  # the same model, whose float weights compute as 2-bit ones
    report("int2 at once", wrapped.quantize(test_x))

    train(wrapped, train_x, train_y, steps // 2, 1e-3)
    small = wrapped.quantize(test_x)
    report("int2 after training", small)
    print(small.plan(test_x))


if __name__ == "__main__":
    main()

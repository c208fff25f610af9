"""Quantized layers in a Flax Linen model: write QuantDense for nn.Dense and keep everything else.

A float model is trained, its variables go into the quantized model unchanged, some more steps make up for most of what
2-bit weights cost, and `quantize_params` replaces the float kernels by 2-bit ones.

    python examples/wrap_linen.py
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxquant as jq
from jaxquant import observers

# 2-bit weights, one scale per output channel, clipped where the squared error is least; 4-bit activations.
INT2 = jq.OpSpec(jq.QuantSpec("int2", calibration=observers.MSE()), jq.QuantSpec("int4"))


class MLP(nn.Module):
    spec: jq.OpSpec | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(jq.linen.QuantDense(128, spec=self.spec)(x))
        x = nn.relu(jq.linen.QuantDense(128, spec=self.spec)(x))
        return jq.linen.QuantDense(10)(x)  # no spec: Flax's own layer


def train(model, variables, x, y, steps, learning_rate):
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(variables, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, x), y).mean()

    @jax.jit
    def step(carry, key):
        variables, state = carry
        batch = jax.random.choice(key, len(x), (128,))
        grads = jax.grad(loss)(variables, x[batch], y[batch])
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(variables, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(step, (variables, tx.init(variables)), keys)[0][0]


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps

    data, target = load_digits(return_X_y=True)
    arrays = train_test_split(data / 16, target, test_size=360, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, arrays)

    def accuracy(model, variables):
        return float((model.apply(variables, test_x).argmax(-1) == test_y).mean())

    float_model, int2_model = MLP(), MLP(INT2)
    variables = train(float_model, float_model.init(jax.random.key(0), train_x[:1]), train_x, train_y, steps, 3e-3)
    print(f"float                          {accuracy(float_model, variables):7.2%}")
    print(f"int2, the same variables       {accuracy(int2_model, variables):7.2%}")
    variables = train(int2_model, variables, train_x, train_y, steps // 2, 1e-3)
    print(f"int2, trained a little more    {accuracy(int2_model, variables):7.2%}")

    frozen = jq.quantize_params(variables, [jq.Rule("Dense_2", None), jq.Rule("kernel", INT2)])
    print(f"int2, with QTensors for kernels{accuracy(int2_model, frozen):7.2%}")
    print(frozen["params"]["Dense_0"]["kernel"])


if __name__ == "__main__":
    main()

"""Quantization-aware training of an ordinary Flax model by an ordinary jitted Optax step.

The model does not know of jaxquant. `make_plan` traces it, `quantized` makes its `apply` compute with 2-bit weights and
2-bit activations, and the step is the one that would train it in float.

    python examples/qat.py
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

# Weights clipped where the squared error is least; activations unsigned, since after a ReLU nothing is negative.
INT2 = jq.OpSpec(jq.QuantSpec("int2", calibration=observers.MSE()), jq.QuantSpec("uint2", symmetric=False))


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3))(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def train(apply, variables, x, y, steps, learning_rate):
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss(variables):
            return optax.softmax_cross_entropy_with_integer_labels(apply(variables, x), y).mean()

        value, grads = jax.value_and_grad(loss)(variables)
        updates, opt_state = tx.update(grads, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, value

    opt_state = tx.init(variables)
    for i, batch in enumerate(jax.random.choice(jax.random.key(1), len(x), (steps, 64))):
        variables, opt_state, value = step(variables, opt_state, x[batch], y[batch])
        if (i + 1) % max(steps // 4, 1) == 0:
            print(f"  step {i + 1:4d}  loss {value:.4f}")
    return variables


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps

    data, target = load_digits(return_X_y=True)
    arrays = train_test_split(data.reshape(-1, 8, 8) / 16, target, test_size=360, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, arrays)
    model = CNN()
    variables = model.init(jax.random.key(0), train_x[:1])
    plan = jq.make_plan(model.apply, variables, train_x[:1], rules=[jq.Rule("kernel", INT2)])
    apply = jq.quantized(model.apply, plan)
    print(plan, "\n\nfloat:")
    variables = train(model.apply, variables, train_x, train_y, steps, 3e-3)
    print("int2:")
    tuned = train(apply, variables, train_x, train_y, steps, 1e-3)

    def accuracy(apply, variables):
        return float((jax.jit(apply)(variables, test_x).argmax(-1) == test_y).mean())

    print(f"\nfloat                           {accuracy(model.apply, variables):7.2%}")
    print(f"int2, quantized after training  {accuracy(apply, jq.quantize_params(variables, plan)):7.2%}")
    print(f"int2, quantized while training  {accuracy(apply, jq.quantize_params(tuned, plan)):7.2%}")


if __name__ == "__main__":
    main()

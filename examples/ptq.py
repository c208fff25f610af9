"""Post-training quantization of saved params: load, plan, quantize, run, save.

There is no training here but that of `saved_params`, which makes the file that stands for yours.

    python examples/ptq.py --output DIR
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxquant as jq
from jaxquant import observers, recipes

MODEL = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
SCHEMES = {
    "w8a8": recipes.w8a8(),
    "w4a16": recipes.w4a16(group_size=32),
    "nf4": recipes.nf4(group_size=32),
    "mxfp4": recipes.mxfp4(),
    "w3a16": jq.OpSpec(jq.QuantSpec("int3", calibration=observers.MSE())),
    "w2a16": jq.OpSpec(jq.QuantSpec("int2", calibration=observers.MSE())),
}


def saved_params(path, x, y, steps):
    """Trains the float model and saves it."""
    params, tx = MODEL.init(jax.random.key(0), x[:1]), optax.adam(3e-3)

    def step(carry, key):
        params, state = carry
        batch = jax.random.choice(key, len(x), (128,))
        loss = optax.softmax_cross_entropy_with_integer_labels
        grads = jax.grad(lambda p: loss(jnp.asarray(MODEL.apply(p, x[batch])), y[batch]).mean())(params)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), steps)
    jq.io.save(path, jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(params))


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo-output"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    data, target = load_digits(return_X_y=True)
    arrays = train_test_split(data / 16, target, test_size=360, random_state=0)
    train_x, test_x, train_y, test_y = map(jnp.asarray, arrays)
    saved_params(args.output / "model.safetensors", train_x, train_y, args.steps)

    params = jq.io.load(args.output / "model.safetensors")
    reference = jax.jit(MODEL.apply)(params, test_x)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"{'scheme':<8}{'bytes':>9}{'accuracy':>10}{'agrees with float':>19}")
    print(f"{'float':<8}{size:>9,}{float((reference.argmax(-1) == test_y).mean()):>10.2%}{1:>19.2%}")
    for name, spec in SCHEMES.items():
        plan = jq.make_plan(MODEL.apply, params, test_x, rules=[jq.Rule("kernel", spec)])
        jq.io.save(args.output / f"{name}.safetensors", jq.quantize_params(params, plan), plan=plan)

        saved = jq.io.load_model(args.output / f"{name}.safetensors", like=params)
        logits = jax.jit(jq.quantized(MODEL.apply, saved.plan))(saved.params, test_x)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(saved.params))
        accuracy, same = (float((logits.argmax(-1) == other).mean()) for other in (test_y, reference.argmax(-1)))
        print(f"{name:<8}{size:>9,}{accuracy:>10.2%}{same:>19.2%}")


if __name__ == "__main__":
    main()

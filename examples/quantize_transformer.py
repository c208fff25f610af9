"""A transformer that never heard of jaxquant (plain_transformer.py), quantized from outside.

It learns the text of its own source. Then one plan per scheme, made from a trace of `model.apply`, finds its weights:
those of the scanned stack, the fused qkv kernel that no layer owns, and the embedding that is looked up and multiplied
with.

    python examples/quantize_transformer.py
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import plain_transformer

import jaxquant as jq
from jaxquant import recipes

SCHEMES = {
    "w8a8": recipes.w8a8(),
    "w8a8 static": recipes.w8a8(static=True, act_symmetric=False),
    "w4a16, groups of 32": recipes.w4a16(group_size=32),
    "w4a4": recipes.w4a4(),
}


def rules(spec):
    """Norms and biases stay in float, as does the table of places, which is added and never multiplied."""
    return [jq.Rule("qkv|kernel", spec), jq.Rule("embedding", recipes.w8a16())]


def complete(apply, variables, model, prompt, length):
    """The most likely characters after a prompt."""
    step = jax.jit(lambda variables, tokens: apply(variables, tokens)[0, :, :].argmax(-1))
    text = prompt
    for _ in range(length):
        seen = text[-model.context :]
        tokens = jnp.asarray([[ord(c) for c in seen.ljust(model.context)]])
        text += chr(int(step(variables, tokens)[len(seen) - 1]))
    return text


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--characters", type=int, default=60, help="how much text to write")
    args = parser.parse_args()

    text = pathlib.Path(plain_transformer.__file__).read_text(encoding="utf-8")
    model = plain_transformer.Transformer()
    variables = plain_transformer.train(model, text, args.steps)
    tokens = plain_transformer.windows(text, jax.random.key(2), 32, model.context + 1)

    def report(name, apply, variables):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
        loss = jax.jit(lambda v: plain_transformer.loss(apply, v, tokens))(variables)
        print(f"{name:<22}{size:>9,}{float(loss):>8.4f}")

    for number, (name, spec) in enumerate(SCHEMES.items()):
        plan = jq.make_plan(model.apply, variables, tokens[:, :-1], rules=rules(spec))
        if number == 0:
            print(f"{plan}\n\n{'scheme':<22}{'bytes':>9}{'loss':>8}")
            report("float", model.apply, variables)
        state = None
        if spec.act is not None and spec.act.static:  # one pass over some data finds the ranges
            state = jq.act_state(plan, jq.calibrate(model.apply, plan, variables, [tokens[:8, :-1]], collect={}))
        report(name, jq.quantized(model.apply, plan, state), jq.quantize_params(variables, plan))

    plan = jq.make_plan(model.apply, variables, tokens[:, :-1], rules=rules(SCHEMES["w8a8"]))
    for name, apply, params in [
        ("float", model.apply, variables),
        ("w8a8", jq.quantized(model.apply, plan), jq.quantize_params(variables, plan)),
    ]:
        print(f"\n{name} writes:\n{complete(apply, params, model, 'class ', args.characters)}")


if __name__ == "__main__":
    main()

"""What learned rotations add to random ones, on a real model at 4 bits in weights and activations.

    python benchmarks/learned_rotations.py

The sentence encoder of ``accuracy.py``, its 36 linear weights at int4 per output channel and their inputs at int4 per
token, rounded to nearest: as it is, with a random Hadamard rotation of every input, and with those rotations learned by
`jq.invariances.learn_rotations` on calibration texts. All rotations are online: norms that subtract a mean let none
through. A figure is the mean cosine of quantized to float embeddings over 600 sentences, with its standard error.
Prints the table, and writes it to benchmarks/results as text and JSON.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import accuracy
import jax
import jax.numpy as jnp
import measure

import jaxquant as jq
from jaxquant import recipes
from jaxquant.ptq.bases import Orthogonal


def row(encoder: accuracy.Encoder, plan: jq.Plan, bases: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The figures of one set of bases."""
    fn = jq.invariances.precondition(encoder.apply, plan, bases) if bases else encoder.apply
    params = jq.invariances.precondition_params(encoder.params, plan, bases)
    found = encoder.measure(fn, plan, jq.quantize_params(params, plan), retrieval=False)
    return {"cosine": found["cosine"], "cosine_error": found["cosine_error"], "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="batches of 24 sentences to learn on")
    parser.add_argument("--rate", type=float, default=0.01, metavar="X", help="see learn_rotations")
    args = parser.parse_args()
    encoder = accuracy.Encoder(24, 8, args.steps)
    plan = encoder.plan(recipes.w4a4())
    random: dict[str, Any] = dict(jq.invariances.rotation_bases(plan, jax.random.key(0)))
    rows = {"as it is": row(encoder, plan, {}, 0.0), "random rotations": row(encoder, plan, random, 0.0)}
    print(rows, flush=True)
    start = {path: basis.inputs(jnp.eye(basis.channels)) for path, basis in random.items()}
    begun, last = time.perf_counter(), None
    for last in jq.invariances.learn_rotations(
        encoder.apply, plan, encoder.params, start, encoder.distillation, rate=args.rate
    ):
        if last.step % 8 == 0:
            left = last.seconds / last.step * (args.steps - last.step)
            print(f"  step {last.step} of {args.steps}: {float(last.loss):.4f}, {left:.0f} s left", flush=True)
    assert last is not None
    learned = {str(path): Orthogonal(matrix) for path, matrix in last.matrices.items()}
    rows["learned rotations"] = row(encoder, plan, learned, time.perf_counter() - begun)
    about = {**accuracy.machine(), "steps": str(args.steps), "rate": str(args.rate)}
    cells = [[n, f"{r['cosine']:.5f}", f"{r['cosine_error']:.5f}", f"{r['seconds']:.1f}"] for n, r in rows.items()]
    text = f"{measure.header(about)}\n\n{measure.table(('W4A4', 'cosine', '+-', 'seconds'), cells)}"
    print(text)
    measure.keep("learned_rotations", text, {"machine": about, "rows": rows}, measure.RESULTS)


if __name__ == "__main__":
    main()

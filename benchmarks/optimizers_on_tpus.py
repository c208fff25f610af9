"""How long the step of an 8-bit optimizer takes on TPUs, as their compiler estimates it: nothing is run.

    python benchmarks/optimizers_on_tpus.py [--chips "tpu v5e,tpu v6e"]

A step reads the gradient and the states of one parameter and writes its update and the new states. The floor is the
time in which the memory of the chip moves these. Needs jaxquant[aot-tpu].
"""

import argparse

import jax
import optax

from jaxquant import optim
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

SHAPE = (4096, 1024)
STEPS = {
    "optax.scale_by_adam": optax.scale_by_adam(),
    "scale_by_momentum8bit": optim.scale_by_momentum8bit(),
    "scale_by_lion8bit": optim.scale_by_lion8bit(),
    "scale_by_rms8bit": optim.scale_by_rms8bit(),
    "scale_by_adagrad8bit": optim.scale_by_adagrad8bit(),
    "scale_by_adam8bit": optim.scale_by_adam8bit(),
    "scale_by_ademamix8bit": optim.scale_by_ademamix8bit(),
    "scale_by_adam8bit, 4 bits": optim.scale_by_adam8bit(storage=optim.FOUR_BITS),
}


def cell(chip: str, tx: optax.GradientTransformation, dtype: str) -> str:
    """Estimated microseconds of a step, the floor, and their ratio."""
    gradients = {"w": jax.ShapeDtypeStruct(SHAPE, dtype)}
    state = jax.eval_shape(tx.init, gradients)
    found = estimate(compiled_for("benchmark", chip, lambda g, s: tx.update(g, s), (gradients, state)))
    if found.seconds is None:
        return "-"
    return f"{1e6 * found.seconds:.0f} ({1e6 * found.floor:.0f}), {found.seconds / found.floor:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", default="tpu v5e,tpu v6e", help="comma-separated")
    chips = parser.parse_args().chips.split(",")
    print("Estimated us of a step (floor), and their ratio; nothing was run.")
    for dtype in ("float32", "bfloat16"):
        print(f"\n{f'{list(SHAPE)} in {dtype}':28}" + "".join(f"{chip:>20}" for chip in chips))
        for name, tx in STEPS.items():
            print(f"{name:28}" + "".join(f"{cell(chip, tx, dtype):>20}" for chip in chips), flush=True)


if __name__ == "__main__":
    main()

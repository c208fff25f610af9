"""How many files and functions of jaxquant an operation passes while it is traced.

    python benchmarks/passes.py [--list]

Each operation runs once, in a process of its own: first it is traced, then lowered for the CPU, where its kernel is
chosen and traced. Counted are the Python functions of jaxquant that are entered, and the files they are in. Lambdas
count; a comprehension is a loop and does not, which versions of Python disagree on. ``--list`` prints the functions by
file.
"""

import argparse
import collections
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import recipes

PACKAGE = str(Path(jq.__file__).parent)


COLUMNS = f"{'files':>8}{'functions':>10}{'calls':>8}"
W8A8 = recipes.w8a8()
DENSE = (((1,), (0,)), ((), ()))
X, W = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((64, 32), jnp.float32)


def model(params, x):
    """A function of one weight."""
    return x @ params["w"]


def planned():
    """The plan of `model`."""
    return jq.make_plan(model, {"w": W}, X, rules=[jq.Rule(".*", W8A8)])


def product():
    """`ops.dot_general` in W8A8, with a stored weight."""
    weight = jq.QuantSpec("int8")
    assert weight == W8A8.weight
    w = jax.eval_shape(lambda w: jq.quantize(w, weight, reduce_axes=(0,)), W)
    return stages(lambda x, w: jq.ops.dot_general(x, w, DENSE, spec=W8A8), X, w)


def training():
    """`ops.dot_general` in W8A8, with a float weight."""
    return stages(lambda x, w: jq.ops.dot_general(x, w, DENSE, spec=W8A8), X, W)


def transformed():
    """The product of `model` where `quantized` transforms it, with a stored weight."""
    plan = planned()
    return stages(jq.quantized(model, plan), jax.eval_shape(lambda p: jq.quantize_params(p, plan), {"w": W}), X)


def plan():
    """`make_plan` of `model`."""
    return (planned,)


def stages(fn, *args):
    """To trace a function, and then to lower it for the CPU."""
    found = []
    return lambda: found.append(jax.jit(fn).trace(*args)), lambda: found[0].lower(lowering_platforms=("cpu",))


OPERATIONS = {
    "dot_general, W8A8": product,
    "dot_general, W8A8 in training": training,
    "a product of quantized(fn)": transformed,
    "make_plan": plan,
}


def entered(call: Callable[[], object]) -> collections.Counter:
    """The functions of the package that a call enters, as (file, name, line), and how often."""
    found: collections.Counter = collections.Counter()

    def enter(frame, event, _):
        code = frame.f_code
        loop = code.co_name.endswith(("comp>", "genexpr>"))
        if event == "call" and code.co_filename.startswith(PACKAGE) and not loop:
            found[code.co_filename[len(PACKAGE) + 1 :], code.co_qualname, code.co_firstlineno] += 1

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def run(name: str, *, listed: bool) -> None:
    """Prints the counts of one operation."""
    found = [entered(call) for call in OPERATIONS[name]()]
    cells = "".join(f"{len({file for file, *_ in f}):8d}{len(f):10d}{f.total():8d}" for f in found)
    print(f"{name:<32}{cells}")
    for stage, functions in zip(("traced", "lowered"), found if listed else (), strict=False):
        for file in sorted({file for file, *_ in functions}):
            print(f"    {stage}: {file}")
            for (where, function, _), calls in sorted(functions.items(), key=lambda entry: entry[0][2]):
                if where == file:
                    print(f"        {calls:4d}  {function}")


def main() -> None:
    """Prints a row for each operation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="list the functions, by file, with their calls")
    parser.add_argument("--only", choices=OPERATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run(args.only, listed=args.list)
        return
    print(f"{'':<32}{'traced':>26}{'lowered':>26}")
    print(f"{'':<32}{2 * COLUMNS}")
    for name in OPERATIONS:
        sys.stdout.flush()
        subprocess.run([sys.executable, __file__, "--only", name, *(["--list"] if args.list else [])], check=True)


if __name__ == "__main__":
    main()

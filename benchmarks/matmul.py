"""Speed of one matrix product, activation [M, K] times weight [K, N], for every scheme, beside the alternatives.

    python benchmarks/matmul.py            # K = N = 4096, M = 1, 8, 32, 256: two minutes
    python benchmarks/matmul.py --short    # K = N = 2048, M = 1, 32: a quarter of a minute
    python benchmarks/matmul.py --peers    # and qwix, AQT, PyTorch, torchao and ONNX Runtime, where installed
    python benchmarks/matmul.py --dtype bfloat16    # activation and weight are bfloat16, results float32
    python benchmarks/matmul.py --cores 2    # on two cores

One process on one core, processor time (on more, time of the wall), all contestants in turn (see measure.py). The table
holds the time of XLA's own float32 product over each contestant's, from the medians of one run; ``error`` is the
relative error (Frobenius norm) against the exact product of the dequantized operands, and ``temp`` the temporaries of
the compiled program at the largest M up to 32, in percent of the float weight's bytes. The peers' weights are prepared
outside of what is measured.

Prints the table and writes it to benchmarks/results as text and as JSON, and as a plot if matplotlib is there.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure

measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import OpSpec, QuantSpec, ops, recipes  # noqa: E402

MATMUL = (((1,), (0,)), ((), ()))
FLOAT = "XLA float32"
NARROW = "XLA bfloat16, float32 result"  # on the path of XLA's library; to a bfloat16 result it is not
PLAIN = "XLA bfloat16"
GROUP = QuantSpec("int4", granularity=jq.PerGroup(128))
SCHEMES: dict[str, tuple[OpSpec, lax.Precision | None]] = {
    "W8A8 dynamic": (recipes.w8a8(), None),
    "W8A16": (recipes.w8a16(), None),
    "W8A16 HIGHEST": (recipes.w8a16(), lax.Precision.HIGHEST),
    "W4A16 channel": (OpSpec(QuantSpec("int4")), None),
    "W4A16 two-level": (recipes.w4a16(128, two_level=True), None),
    "W4A8 two-level": (recipes.w4a8(128, two_level=True), None),
    "W4A16 f32 group 128": (OpSpec(GROUP), None),
    "W4A8 f32 group 128": (OpSpec(GROUP, QuantSpec("int8")), None),
    "nf4 block 64": (recipes.nf4(64), None),
    "mxfp4": (recipes.mxfp4(), None),
    "nvfp4": (recipes.nvfp4(), None),
    "fp8 weights": (OpSpec(QuantSpec("float8_e4m3fn")), None),
    "fp8": (recipes.fp8(), None),
    "mxfp8": (recipes.mxfp8(), None),
}


class Contestant:
    """One way to multiply: a compiled function of x, and what is known of it."""

    def __init__(self, run: Callable[[], Any], error: float | None = None, temporaries: int | None = None):
        self.run, self.error, self.temporaries = run, error, temporaries


def relative(y: Any, exact: np.ndarray) -> float:
    """Error in the Frobenius norm."""
    return float(np.linalg.norm(np.asarray(y, np.float64) - exact) / np.linalg.norm(exact))


def compiled(fn: Callable[..., jax.Array], *args: Any, exact: np.ndarray | None = None) -> Contestant:
    """A function compiled for its arguments."""
    program = jax.jit(fn).lower(*args).compile()
    error = None if exact is None else relative(program(*args), exact)
    return Contestant(lambda: jax.block_until_ready(program(*args)), error, measure.temporaries(program))


def bare(m: int, size: int) -> Iterator[tuple[str, Contestant]]:
    """XLA's dots of codes and nothing else, laid out as they are fastest: what there is to gain on this machine."""
    rng = np.random.default_rng(1)
    w, x = (jnp.asarray(rng.integers(-127, 128, (n, size)), jnp.int8) for n in (size, max(m, 2)))
    left, right = (w, x) if m <= 48 else (x, w)
    for dtype, result in ((jnp.int8, jnp.int32), (jnp.bfloat16, jnp.float32)):
        dot = functools.partial(
            lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=result
        )
        yield f"XLA {jnp.dtype(dtype).name} dot, bare", compiled(dot, left.astype(dtype), right.astype(dtype))


def ours(x: jax.Array, quantized: dict[str, Any]) -> Iterator[tuple[str, Contestant]]:
    """Every scheme, on weights that are quantized already."""
    for name, (spec, precision) in SCHEMES.items():
        q = quantized[name]

        def product(x: jax.Array, q: Any, spec: OpSpec = spec, precision: Any = precision) -> jax.Array:
            return ops.dot_general(x, q, MATMUL, precision, jnp.float32, spec=spec)

        act = x if spec.act is None else jq.quantize(x, spec.act, reduce_axes=(-1,)).dequantize(jnp.float32)
        exact = np.asarray(act, np.float64) @ np.asarray(q.dequantize(jnp.float32), np.float64)
        yield name, compiled(product, x, q, exact=exact)


def main() -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, parents=[measure.CORES])
    parser.add_argument("--short", action="store_true", help="a smaller weight, fewer rows, fewer rounds")
    parser.add_argument("--peers", action="store_true", help="measure other libraries too")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="rounds for each M (default: 15)")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, metavar="DIR")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activation and weight")
    args = parser.parse_args()
    if args.peers and args.dtype != "float32":
        parser.error("peers are measured in float32")
    size, rows, rounds = (2048, (1, 32), 7) if args.short else (4096, (1, 8, 32, 256), args.rounds)
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(0, 0.3, (1, size)))  # unequal channels
    w = jnp.asarray((rng.standard_normal((size, size)) * scales * 0.02).astype(np.float32))
    given = w.astype(args.dtype)
    quantized = {
        name: jq.quantize(given, spec.weight, reduce_axes=(-2,)) for name, (spec, _) in SCHEMES.items() if spec.weight
    }
    peers, packages = None, ()
    if args.peers:
        import matmul_peers

        peers, packages = matmul_peers.prepare(np.asarray(w)), matmul_peers.PACKAGES
    results: dict[str, Any] = {
        "size": size,
        "rounds": rounds,
        "dtype": args.dtype,
        "machine": measure.machine(packages),
        "rows": {},
    }
    for m in rows:
        x = jnp.asarray(rng.standard_normal((m, size)).astype(np.float32))
        contestants = {FLOAT: compiled(lambda x, w: x @ w, x, w)}
        if args.dtype != "float32":
            x = x.astype(args.dtype)
            wide = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
            contestants |= {NARROW: compiled(wide, x, given), PLAIN: compiled(lambda x, w: x @ w, x, given)}
        contestants |= dict(bare(m, size)) | dict(ours(x, quantized))
        if peers is not None:
            contestants |= {name: Contestant(run) for name, run in peers(np.asarray(x)).items()}
        times = measure.interleaved({name: c.run for name, c in contestants.items()}, rounds)
        for name, c in contestants.items():
            entry = dict(times[name], ratio=times[FLOAT]["median"] / times[name]["median"])
            entry["ratio_min"] = times[FLOAT]["min"] / times[name]["min"]
            if c.error is not None:
                entry["error"] = c.error
            if c.temporaries is not None:
                entry["temporaries"] = c.temporaries / (4 * size * size)
            results["rows"].setdefault(name, {})[str(m)] = entry
        print(f"M = {m} measured", flush=True)
    report = text(results)
    print(f"\n{report}")
    narrow = "_bfloat16" if args.dtype != "float32" else ""
    cores = f"_{args.cores}_cores" if args.cores > 1 else ""
    stem = f"matmul{narrow}{cores}" + ("_short" if args.short else "") + ("_peers" if args.peers else "")
    measure.keep(stem, report, results, args.output)
    plot(results, args.output / f"{stem}.png")


def text(results: dict[str, Any]) -> str:
    """The table as it is printed."""
    rows = list(next(iter(results["rows"].values())))
    few = max((m for m in rows if int(m) <= 32), key=int)
    columns = ["ratio to float32", *(f"M={m}" for m in rows), *(f"ms {m}" for m in rows), "error", f"temp M={few}"]
    lines = []
    for name, found in results["rows"].items():
        worst = max((e["error"] for e in found.values() if "error" in e), default=None)
        temp = found[few].get("temporaries")
        lines.append(
            [
                name,
                *(f"{found[m]['ratio']:.2f}" if m in found else "-" for m in rows),
                *(f"{found[m]['median']:.2f}" if m in found else "-" for m in rows),
                "" if worst is None else f"{worst:.1e}",
                "" if temp is None else f"{100 * temp:.1f}%",
            ]
        )
    size, dtype = results["size"], results["dtype"]
    product = f"[M, {size}] x [{size}, {size}] in {dtype}"
    about = f"{product}: time of XLA's float32 product / time; medians of {results['rounds']} rounds"
    return "\n".join([about, measure.header(results["machine"]), "", measure.table(columns, lines)])


def plot(results: dict[str, Any], path: Path) -> None:
    """Ratios as bars, one panel for each M."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    rows = list(next(iter(results["rows"].values())))
    names = [name for name in results["rows"] if name != FLOAT][::-1]
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 0.32 * len(names) + 1.6), sharey=True)
    for axis, m in zip(axes, rows, strict=True):
        values = [results["rows"][name].get(m, {}).get("ratio", 0.0) for name in names]
        axis.barh(names, values, color=["C0" if name in SCHEMES else "0.6" for name in names])
        axis.bar_label(axis.containers[0], fmt="%.1f", padding=2, fontsize=8)
        axis.axvline(1, color="k", linewidth=0.8)
        axis.set_title(f"M = {m}")
        axis.set_xlabel("times as fast as float32")
        axis.margins(x=0.15)
    about, size, dtype = results["machine"], results["size"], results["dtype"]
    figure.suptitle(f"{about['cpu']}, cores {about['cores']}, K = N = {size}, {dtype}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

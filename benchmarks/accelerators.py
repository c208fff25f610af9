"""What products cost on TPUs and GPUs, as their own compilers estimate it: nothing is run, and no device is needed.

    python benchmarks/accelerators.py [--short] [--packed] [--chips "tpu v5e,h100"] [--schemes w4a16,w8a8] [--rows 1,8]
                                      [--weights 4096x4096] [--by jaxquant] [--json FILE [--keep]] [--plot FILE]

For every scheme, chip and shape the product ``[M, K] x [K, N]`` of a bfloat16 activation is compiled three times: of a
bfloat16 weight, by jaxquant with the codes as `quantize_params(target=...)` lays them out, and by qwix from its own
arrays where it has the scheme. Times are estimates: of a TPU, the longer of the compiler's cycles and of moving
arguments, results and (twice) temporaries at the bandwidth of the memory; of a GPU, whose compiler estimates none, the
latter alone. Kernels that are written by hand count by the static schedules of their machine code. The floor is what
arguments and results, or the arithmetic at the peak of the scheme's number type, take.

Needs the compilers: ``pip install jaxquant[aot-tpu,aot-gpu] qwix``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import decoders
import jax
import jax.numpy as jnp
from measure import versions

import jaxquant as jq
from jaxquant import ops, recipes
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

MATMUL = (((1,), (0,)), ((), ()))
PACKED = "packed for a CPU"
ROWS = (1, 8, 64, 512, 4096)
WEIGHTS = ((4096, 4096), (4096, 14336), (14336, 4096), (2048, 151936))
TARGETS = ("tpu v5e", "tpu v6e", "h100")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A row of the tables.

    Attributes:
      spec: ours.
      multiplied: HLO's number type of the product, for the floor.
      qwix: number types of weight and activation there, and the group size; None where it has no such scheme.
    """

    spec: jq.OpSpec
    multiplied: str = "bf16"
    qwix: tuple[str, str | None, int | None] | None = None


def _uint4(group: int) -> jq.OpSpec:
    return recipes.w4a16(group, symmetric=False)


def _few(qtype: str, group: int) -> jq.OpSpec:
    return jq.OpSpec(jq.QuantSpec(qtype, granularity=jq.PerGroup(group)))


SCHEMES = {
    "w8a8": Scheme(recipes.w8a8(), "s8", ("int8", "int8", None)),
    "w8a16": Scheme(recipes.w8a16(), qwix=("int8", None, None)),
    "w4a16 channel": Scheme(recipes.w4a16(None), qwix=("int4", None, None)),
    "w4a16 g128": Scheme(recipes.w4a16(128), qwix=("int4", None, 128)),
    "w4a16 g64": Scheme(recipes.w4a16(64), qwix=("int4", None, 64)),
    "w4a16 g32": Scheme(recipes.w4a16(32), qwix=("int4", None, 32)),
    "w4a16 g128 zero": Scheme(_uint4(128)),
    "w4a16 two-level": Scheme(recipes.w4a16(128, two_level=True)),
    "w4a8 g128": Scheme(recipes.w4a8(128), "s8", ("int4", "int8", 128)),
    "nf4 g64": Scheme(recipes.nf4(64), qwix=("nf4", None, 64)),
    "fp4 g64": Scheme(recipes.fp4(64)),
    "mxfp4": Scheme(recipes.mxfp4(), qwix=("mxfp4", None, 32)),
    "nvfp4": Scheme(recipes.nvfp4(), qwix=("nvfp4", None, 16)),
    "mxfp8": Scheme(recipes.mxfp8(), qwix=("mxfp8", "mxfp8", 32)),
    "fp8": Scheme(recipes.fp8(), "f8e4m3fn", ("float8_e4m3fn", "float8_e4m3fn", None)),
    "int3 g64": Scheme(_few("int3", 64)),
    "int2 g64": Scheme(_few("int2", 64), qwix=("int2", None, 64)),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program: microseconds and bytes, or why there is none."""

    chip: str
    scheme: str
    by: str
    rows: int
    k: int
    n: int
    us: float | None = None
    floor_us: float | None = None
    cycles: float | None = None
    arguments: int | None = None
    temporaries: int | None = None
    missing: str = ""


def float_program(rows: int, k: int, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, k), (k, n)))
    return (lambda x, w: jnp.dot(x, w)), (x, w)


def our_program(
    scheme: Scheme, chip: str, rows: int, k: int, n: int, *, packed: bool = False
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)
    fn = lambda p, x: ops.dot_general(x, p["w"], MATMUL, spec=scheme.spec)  # noqa: E731
    plan = jq.make_plan(
        lambda p, x: jnp.dot(x, p["w"]),
        {"w": jax.ShapeDtypeStruct((k, n), jnp.bfloat16)},
        x,
        rules=[jq.Rule("w", scheme.spec)],
    )
    platform = "cpu" if packed else "gpu" if CHIPS[chip].platform == "cuda" else "tpu"
    params = jax.eval_shape(
        lambda w: jq.quantize_params({"w": w}, plan, target=platform), jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    )
    return fn, (params, x)


def qwix_program(scheme: Scheme, rows: int, k: int, n: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import qwix

    assert scheme.qwix is not None
    weight, act, group = scheme.qwix
    x = jax.ShapeDtypeStruct((rows, k), jnp.bfloat16)

    def quantized(array: jax.Array, qtype: str, channel: int, along: int) -> Any:
        tiles = {} if group is None else {along: group}
        return qwix.quantize(array, qtype, channelwise_axes=[channel], tiled_axes=tiles)

    # From a float32 weight: its scales are float32 then, with which it is several times faster on a v5e.
    w = jax.eval_shape(lambda w: quantized(w, weight, 1, 0), jax.ShapeDtypeStruct((k, n), jnp.float32))

    def fn(w: Any, x: jax.Array) -> jax.Array:
        return qwix.dot_general(x if act is None else quantized(x, act, 0, 1), w, MATMUL).astype(jnp.bfloat16)

    return fn, (w, x)


def measured(chip: str, scheme: str, by: str, shape: tuple[int, int, int]) -> Cell:
    """Compiles one program and reads it. What does not compile says why."""
    rows, k, n = shape
    cell = Cell(chip, scheme, by, rows, k, n)
    try:
        if by == "bfloat16":
            fn, args = float_program(*shape)
        elif by != "qwix":
            fn, args = our_program(SCHEMES[scheme], chip, *shape, packed=by == PACKED)
        else:
            fn, args = qwix_program(SCHEMES[scheme], *shape)
        found = estimate(compiled_for("accelerators", chip, fn, args))
    except Exception as e:
        if by != "qwix":
            raise
        return dataclasses.replace(cell, missing=(str(e).splitlines() or [type(e).__name__])[0][:200])
    peak = CHIPS[chip].peak("bf16" if by == "bfloat16" else SCHEMES[scheme].multiplied)
    floor = max((found.arguments + found.results) / CHIPS[chip].bandwidth, 2.0 * rows * k * n / peak)
    return dataclasses.replace(
        cell,
        us=None if found.seconds is None else found.seconds * 1e6,
        floor_us=floor * 1e6,
        cycles=found.cycles,
        arguments=found.arguments,
        temporaries=found.temporaries,
        missing=found.missing,
    )


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    peers = [by for by in (*_peers()[1:], *((PACKED,) if args.packed else ())) if by in (args.by or (by,))]
    for chip in args.chips:
        for k, n in args.weights:
            for rows in args.rows:
                shape = (rows, k, n)
                if not args.by or "bfloat16" in args.by:
                    yield measured(chip, "bfloat16", "bfloat16", shape)
                for name in args.schemes:
                    for by in peers:
                        if by != "qwix" or SCHEMES[name].qwix is not None:
                            yield measured(chip, name, by, shape)


def kept(file: Path, found: list[Cell]) -> list[Cell]:
    """The cells of an earlier run, with those of this one in their places or at the end, in the order of the tables."""
    place = lambda c: (c.chip, c.scheme, c.by, c.rows, c.k, c.n)  # noqa: E731
    cells = {place(c): c for c in (Cell(**cell) for cell in json.loads(file.read_text()))} if file.exists() else {}
    cells |= {place(c): c for c in found}
    orders = [
        list(order) for order in (TARGETS, WEIGHTS, ("bfloat16", *SCHEMES), ("bfloat16", "jaxquant", PACKED, "qwix"))
    ]
    rank = lambda value, order: order.index(value) if value in order else len(order)  # noqa: E731
    sort = lambda c: tuple(map(rank, (c.chip, (c.k, c.n), c.scheme, c.by), orders)) + (c.rows,)  # noqa: E731
    return sorted(cells.values(), key=sort)


def tables(found: list[Cell]) -> str:
    """One table for each chip and weight: estimates in microseconds, and what is written to memory between."""
    lines: list[str] = []
    for chip, k, n in dict.fromkeys((c.chip, c.k, c.n) for c in found):
        here = [c for c in found if (c.chip, c.k, c.n) == (chip, k, n)]
        rows = sorted({c.rows for c in here})
        at = {(c.scheme, c.by, c.rows): c for c in here}
        lines += ["", f"{chip}, [M, {k}] x [{k}, {n}], estimated us (floor; MB of temporaries where there are any)", ""]
        lines.append(f"{'':28}" + "".join(f"{f'M = {m}':>23}" for m in rows))
        for scheme, by in dict.fromkeys((c.scheme, c.by) for c in here):
            name = scheme if by == "bfloat16" else f"{scheme}, {by}"
            texts = []
            for m in rows:
                c = at.get((scheme, by, m))
                if c is None or c.us is None:
                    texts.append(f"{'-':>23}")
                    continue
                extra = f"; {c.temporaries / 1e6:.0f} MB" if c.temporaries and c.temporaries >= 5e5 else ""
                texts.append(f"{f'{c.us:.1f} ({c.floor_us:.1f}{extra})':>23}")
            lines.append(f"{name:28}" + "".join(texts))
    missing = dict.fromkeys((c.scheme, c.by, c.missing) for c in found if c.missing)
    return "\n".join([*lines, "", *(f"{scheme}, {by}: {why}" for scheme, by, why in missing)]).strip() + "\n"


def plot(found: list[Cell], file: Path) -> None:
    """Estimates relative to the bfloat16 program, by rows: one picture for each chip, of the first weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chips = list(dict.fromkeys(c.chip for c in found))
    figure, axes = pyplot.subplots(1, len(chips), figsize=(5.2 * len(chips), 4.4), squeeze=False, sharey=True)
    k, n = found[0].k, found[0].n
    schemes = list(dict.fromkeys(c.scheme for c in found if c.by == "jaxquant"))
    for chip, axis in zip(chips, axes[0], strict=True):
        here = [c for c in found if (c.chip, c.k, c.n) == (chip, k, n) and c.us]
        whole = {c.rows: c.us for c in here if c.by == "bfloat16" and c.us}
        for i, scheme in enumerate(schemes):  # a scheme has its line in all pictures, and in the list of the last one
            ours = [c for c in here if (c.scheme, c.by) == (scheme, "jaxquant")]
            mine = sorted((c.rows, c.us / whole[c.rows]) for c in ours if c.us)
            line, marker = ("-", "--", ":")[i // 7], "osv"[i // 7]
            axis.plot(
                *(zip(*mine, strict=True) if mine else ((), ())),
                line,
                color=f"C{i % 7}",
                marker=marker,
                markersize=4,
                linewidth=1,
                label=scheme,
            )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="rows M", title=f"{chip}, {k} x {n}")
    axes[0][0].set_ylabel("estimated time, bfloat16 = 1")
    axes[0][-1].legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def models(args: argparse.Namespace) -> None:
    """Whole decoders, on the chips that are asked for."""
    start, made = time.time(), 0
    wanted = lambda batches: tuple(n for n in batches if n in (args.batches or batches))  # noqa: E731
    cases = [(*case[:3], wanted(case[3])) for case in decoders.CASES if case[1] in args.chips]
    schemes = [s for s in decoders.RULES if s in (args.schemes or decoders.RULES)]
    place = lambda c: (c.model, c.target, c.devices, c.scheme, c.by, c.step)  # noqa: E731
    found: dict[Any, decoders.Cell] = {}
    if args.json and args.keep and args.json.exists():
        found = {place(c): c for c in (decoders.Cell(**cell) for cell in json.loads(args.json.read_text()))}
    for cell in decoders.cells(cases[:1] if args.short else cases, schemes, args.by or _peers()):
        made += 1
        found[place(cell)] = cell
        if args.json:
            args.json.write_text(json.dumps([dataclasses.asdict(c) for c in found.values()], indent=0) + "\n")
    print(f"Estimates of the compilers ({packages()}); nothing was run.\n")
    print(decoders.tables(list(found.values())))
    print(f"{made} programs in {time.time() - start:.0f} s.")
    if args.page:
        args.page.write_text(decoders.page(list(found.values()), packages()))


def _peers() -> tuple[str, ...]:
    return ("bfloat16", "jaxquant", *(("qwix",) if importlib.util.find_spec("qwix") is not None else ()))


def packages() -> str:
    found = versions(("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "qwix"))
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main() -> None:
    names = lambda text: tuple(part.strip() for part in text.split(","))  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chips", type=names, help="comma-separated; with --models slices too, tpu v5e:2x2")
    parser.add_argument("--schemes", type=names, help="comma-separated")
    parser.add_argument("--batches", type=lambda t: tuple(map(int, t.split(","))), help="of --models; 0 is the prefill")
    parser.add_argument("--rows", type=lambda t: tuple(map(int, t.split(","))), default=ROWS)
    parser.add_argument("--weights", type=lambda t: tuple(tuple(map(int, s.split("x"))) for s in t.split(",")))
    parser.add_argument("--short", action="store_true", help="one chip, one weight, few rows and schemes")
    parser.add_argument("--packed", action="store_true", help="ours with codes that are packed for a CPU, too")
    parser.add_argument("--json", type=Path, help="write every cell there, too")
    parser.add_argument("--keep", action="store_true", help="keep the cells there that this run does not make")
    parser.add_argument("--by", type=names, help="bfloat16, jaxquant, qwix: whose programs; by default all")
    parser.add_argument("--plot", type=Path, help="write a picture there")
    parser.add_argument("--page", type=Path, help="of --models: write the page of the documentation there")
    parser.add_argument("--models", action="store_true", help="whole decoders instead: see benchmarks/decoders.py")
    parser.add_argument("--training", action="store_true", help="a step of training: see benchmarks/training_step.py")
    args = parser.parse_args()
    if args.training:
        import training_step

        print(f"Estimates of the compilers ({packages()}); nothing was run.\n")
        chips = args.chips or ("tpu v5e",)
        print(training_step.table(list(training_step.cells(chips))))
        print(training_step.scanned(chips))
        return
    if args.models:
        args.chips = args.chips or tuple(case[1] for case in decoders.CASES)
        models(args)
        return
    args.chips, args.schemes = args.chips or TARGETS, args.schemes or tuple(SCHEMES)
    args.weights = args.weights or WEIGHTS
    if args.short:
        args.chips, args.rows, args.weights = args.chips[:1], (1, 8, 512), WEIGHTS[:1]
        args.schemes = ("w8a8", "w8a16", "w4a16 g128", "w4a8 g128", "nf4 g64")
    start, made = time.time(), 0
    found: list[Cell] = kept(args.json, []) if args.json and args.keep else []
    for cell in cells(args):
        made += 1
        found = kept(args.json, [cell]) if args.json and args.keep else [*found, cell]
        if args.json:
            args.json.write_text(json.dumps([dataclasses.asdict(c) for c in found], indent=0) + "\n")
    print(f"Estimates of the compilers ({packages()}); nothing was run.\n")
    print(tables(found))
    print(f"{made} programs compiled in {time.time() - start:.0f} s.")
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()

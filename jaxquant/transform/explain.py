"""`explain`: what the compiled program does with each quantized weight, read from the program itself."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import jax
import numpy as np

from jaxquant.core.errors import printable, quant_error
from jaxquant.core.paths import Params, is_qtensor, path_of
from jaxquant.core.qtensor import QTensor
from jaxquant.core.types import PyTree
from jaxquant.core.units import in_bytes
from jaxquant.ops.kernels.cpu.gemv import LOOP
from jaxquant.ops.kernels.cpu.machine import FAST
from jaxquant.programs.chips import Chip
from jaxquant.programs.compilers import compiled, compiled_for, version
from jaxquant.programs.costs import Collective
from jaxquant.programs.estimates import estimate
from jaxquant.programs.hlo import Program
from jaxquant.programs.schedules import scheduled
from jaxquant.programs.weights import Reached, reached

__all__ = ["Explanation", "Use", "explain"]

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Use:
    """How the program multiplies one weight.

    Attributes:
      path: the weight's path.
      kernels: the operations that it reaches. A product is named by its type, ``"int8"``, ``"float32"`` or
        ``"bfloat16"``; on a CPU with ``", plain"`` where XLA's library of fast kernels does not serve it.
        ``"float32 GEMV"``: a loop decodes and multiplies. ``"lookup"``: rows are gathered. ``"dequantized"``: a float
        array of the weight's size is written first. A kernel that is written by hand has its own name. Empty: none of
        these was found.
      nbytes: bytes of codes, scales and zero points: what one use has to read.
      float_nbytes: bytes of the float weight.
      written: bytes of decoded or copied weights that the program writes to memory before it multiplies.
      seconds: what the compiler estimates for the steps that the weight goes through, or None: the longer of their
        cycles, and of reading the weight once and moving what was written twice. Steps that several weights share count
        for each.
      floor: seconds below which no program for the target can be: reading the weight once at the bandwidth of its
        memory, or its products at the peak of their number type, whichever takes longer; None where there is no target.
    """

    path: str
    kernels: tuple[str, ...]
    nbytes: int
    float_nbytes: int
    written: int = 0
    seconds: float | None = None
    floor: float | None = None

    @property
    def limit(self) -> float:
        """The most that can be gained over the float weight where reading weights takes all the time."""
        return self.float_nbytes / self.nbytes


@dataclasses.dataclass(frozen=True)
class Target:
    """The chip that a program was compiled for, if it is not the machine at hand.

    Attributes:
      name: the chip.
      topology: the slice, as its compiler has it.
      devices: how many the program runs on.
      compiler: whose estimates these are, with the version of its package. ``of kernels their own schedules``: kernels
        that are written by hand were compiled once more, each alone, and count by the static schedule of their code.
      memory: bytes of one device.
    """

    name: str
    topology: str
    devices: int
    compiler: str
    memory: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The result of `explain`; prints as a table.

    Every time in it is an estimate, of the compiler that ``target`` names or of the chip's published figures. None was
    measured.

    Attributes:
      uses: one per quantized weight, in the order of the parameters.
      temporaries: bytes of the program's temporary arrays on one device, or None where XLA does not say.
      target: what it was compiled for; None for the machine at hand.
      arguments, results: bytes on one device.
      seconds: what the compiler estimates for the whole program: the longer of its cycles, and of reading arguments and
        writing results once and temporaries twice; None without a target, or where it cannot be told. Transfers between
        devices are not in it.
      floor: seconds below which no program for the target can be: arguments and results at the bandwidth of its memory,
        or all products at the peak of their number types; None without a target.
      collectives: transfers between devices.
      missing: why ``seconds`` is None although there is a target; else empty.
    """

    uses: tuple[Use, ...]
    temporaries: int | None
    target: Target | None = None
    arguments: int = 0
    results: int = 0
    seconds: float | None = None
    floor: float | None = None
    collectives: tuple[Collective, ...] = ()
    missing: str = ""

    def __getitem__(self, path: str) -> Use:
        for use in self.uses:
            if use.path == path:
                return use
        raise KeyError(path)

    @property
    def fits(self) -> bool | None:
        """Whether arguments, results and temporaries fit in the memory of one device; None without a target."""
        if self.target is None:
            return None
        return self.arguments + self.results + (self.temporaries or 0) <= self.target.memory

    def reading(self, bandwidth: float) -> float:
        """Seconds that reading every weight once takes, at so many bytes a second."""
        return sum(use.nbytes for use in self.uses) / bandwidth

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(dataclasses.asdict(self) | {"fits": self.fits})

    def __str__(self) -> str:
        timed = self.target is not None
        head = ("path", "kernel", "read", "written", *(("estimate", "floor") if timed else ("limit",)))
        rows: list[tuple[str, ...]] = [head]
        for use in self.uses:
            last = (_time(use.seconds), _time(use.floor)) if timed else (f"{use.limit:.2f}x",)
            kernel = ", ".join(use.kernels) or "not found"
            rows.append((use.path, kernel, in_bytes(use.nbytes), in_bytes(use.written), *last))
        rows = [tuple(map(printable, row)) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        spare = _WIDTH - sum(widths[1:]) - 2 * (len(head) - 1)
        widths[0] = min(widths[0], max(spare, 12))
        lines = [
            "  ".join(
                c.rjust(w) if i > 1 else _shortened(c, w).ljust(w)
                for i, (c, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self._totals()])

    def _totals(self) -> list[str]:
        lines = [] if self.temporaries is None else [f"temporaries: {self.temporaries:,} bytes"]
        target = self.target
        if target is None:
            return lines
        lines.append(f"arguments: {self.arguments:,} bytes; results: {self.results:,} bytes")
        for c in self.collectives:
            lines.append(f"{c.kind} of {c.dtype}: {c.nbytes:,.0f} bytes in {c.count:g} runs")
        lines.append(f"whole program: {_time(self.seconds)} estimated; floor {_time(self.floor)}")
        if self.missing:
            lines.append(f"no estimate: {self.missing}")
        if not self.fits:
            lines.append(f"does not fit in the memory of one device, {target.memory:,.0f} bytes")
        devices = "one device" if target.devices == 1 else f"each of {target.devices} devices"
        lines.append(f"for {devices} of {target.name} ({target.topology}), by {target.compiler}; nothing was run")
        return lines


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"...{text[len(text) - width + 3 :]}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    unit, factor = next((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("us", 1e6)) if seconds * f >= 1 or u == "us")
    return f"{seconds * factor:.1f} {unit}"


def explain(fn: Callable[..., PyTree], params: Params, *args: PyTree, target: str | None = None) -> Explanation:
    """Compiles ``fn(params, *args)`` and says, for each quantized weight, which kernel runs and what it reads.

    The answer is read from the optimized program: weights are followed from the parameter that holds their codes to the
    products that use them, through fusions, loops and branches. Nothing is run.

    Args:
      fn: a function of params and args, such as ``jq.quantized(model.apply, plan)``; jitted or not.
      params: a tree with QTensors; shapes (`jax.ShapeDtypeStruct`) will do.
      args: the other arguments, or their shapes.
      target: the accelerator to compile for: ``"tpu v5e"``, ``"tpu v5p"``, ``"tpu v6e"``, ``"tpu v7x"``, ``"h100"`` or
        ``"a100"``, or a slice of chips, ``"tpu v5e:4x4"``. No such device is needed, but its compiler is: ``pip
        install jaxquant[aot-tpu]`` or ``[aot-gpu]``. By default the devices at hand. Arguments with a `NamedSharding`
        are sharded likewise over the target. Its mesh may have any devices, or none: `jax.sharding.AbstractMesh`.

    Returns:
      An `Explanation`. With a target it has estimates of the time: the compiler's own for a TPU, where it gives one for
      every step; for a GPU, whose compiler gives none, what moving its arguments, results and temporaries takes.

    Raises:
      QuantError: if no leaf of params is a QTensor, if the target is not known, or if its compiler is not installed.

    Example:
      >>> import jax.numpy as jnp, jaxquant as jq
      >>> from jaxquant import ops, recipes
      >>> params = {"w": jq.quantize(jnp.ones((64, 32)), jq.QuantSpec("int8"), reduce_axes=(-2,))}
      >>> found = jq.explain(lambda p, x: ops.einsum("bk,kn->bn", x, p["w"]), params, jnp.ones((4, 64)))
      >>> found["w"].nbytes, round(found["w"].limit, 1)
      (2176, 3.8)
    """
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_qtensor)[0]
    weights = {tuple(path): leaf for path, leaf in leaves if is_qtensor(leaf)}
    if not weights:
        todo = "Pass what quantize_params returned"
        raise quant_error("explain", "no parameter is quantized", todo=todo, parameters=len(leaves))
    symbolic = [x for x in jax.tree.leaves((params, args)) if not all(isinstance(n, int) for n in np.shape(x))]
    if symbolic:
        todo = "Pass arrays of the size that will run: kernels depend on it"
        raise quant_error(
            "explain", "a program is compiled for sizes that are numbers", todo=todo, shape=symbolic[0].shape
        )

    def called(params: Params, *args: PyTree) -> PyTree:
        return fn(params, *args)

    found = None if target is None else compiled_for("explain", target, called, (params, *args))
    executable = compiled(called, (params, *args)) if found is None else found.executable
    program = Program(executable.as_text()) if found is None else scheduled(found)
    library = FAST if found is None and jax.default_backend() == "cpu" else ""
    numbers = _parameter_numbers(params)
    if found is not None:
        weights = dict(zip(weights, _local(found.args[0]), strict=True))
    chip = None if found is None else found.where.chip
    uses = tuple(
        _use(path, leaf, reached(program, numbers[path], leaf.size, loop=LOOP, library=library), chip)
        for path, leaf in weights.items()
    )
    if found is None or chip is None:
        return Explanation(uses, getattr(executable.memory_analysis(), "temp_size_in_bytes", None))
    costs = estimate(found, program)
    compiler = f"{chip.compiler} ({version(found.where)})"
    if program.has_schedules:
        compiler += ", of kernels their own schedules"
    return Explanation(
        uses,
        costs.temporaries,
        Target(chip.name, found.where.topology, found.devices, compiler, chip.memory),
        costs.arguments,
        costs.results,
        costs.seconds,
        costs.floor,
        costs.collectives,
        costs.missing,
    )


def _local(params: Params) -> list[QTensor]:
    """The QTensors of shapes with shardings, as one device has them."""
    local = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), params)
    return [leaf for leaf in jax.tree.leaves(local, is_leaf=is_qtensor) if is_qtensor(leaf)]


def _use(path: tuple[object, ...], leaf: QTensor, found: Reached, chip: Chip | None) -> Use:
    float_nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    use = Use(path_of(path), tuple(sorted(found.kernels)), leaf.nbytes, float_nbytes, int(found.written))
    if chip is None:
        return use
    moved = (leaf.nbytes + 2 * found.written) / chip.bandwidth
    seconds = max(found.cycles / chip.clock, moved) if chip.clock and found.cycles is not None else None
    floor = max(leaf.nbytes / chip.bandwidth, sum(p.operations * n / chip.peak(p.dtype) for p, n in found.products))
    return dataclasses.replace(use, seconds=_finite(seconds), floor=_finite(floor))


def _finite(seconds: float | None) -> float | None:
    """NaN, of loops of unknown length, as None."""
    return None if seconds is None or math.isnan(seconds) else seconds


def _parameter_numbers(params: Params) -> dict[tuple[object, ...], int]:
    """Which parameter of the program holds the codes of each QTensor."""
    found = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        if path and getattr(path[-1], "name", None) == "codes":
            found.setdefault(tuple(path[:-1]), i)
    return found

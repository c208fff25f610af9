"""Estimates of a compiled program on its target, by its compiler, and the lower bounds beside them."""

from __future__ import annotations

import dataclasses
import math

from jaxquant.programs.chips import Chip
from jaxquant.programs.compilers import Compiled
from jaxquant.programs.costs import Collective, collectives, cycles, products, relaid_bytes, unestimated
from jaxquant.programs.hlo import Program
from jaxquant.programs.schedules import scheduled

__all__ = ["Estimate", "estimate"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes and seconds on one device.

    Attributes:
      arguments, results, temporaries: bytes. Results that take the place of a donated argument are not counted again:
        a program may change a few of their elements, as those of a cache.
      cycles: what the TPU compiler estimates for all steps; None of another, or where it does not for one. Of a step
        that it never estimates, because it only brings an array to another layout, what reading and writing takes.
      seconds: the longer of these cycles, and of reading arguments and writing results once and temporaries twice.
        Transfers between devices are not in it: no compiler estimates them.
      floor: arguments and results at the bandwidth of the memory, or all products at the peak of their number types,
        whichever takes longer. Loops of unknown length count once.
      missing: why ``seconds`` is None; else empty.
      collectives: transfers between devices.
    """

    arguments: int
    results: int
    temporaries: int
    cycles: float | None
    seconds: float | None
    floor: float
    missing: str
    collectives: tuple[Collective, ...]


def estimate(compiled: Compiled, program: Program | None = None) -> Estimate:
    """Reads a program that was compiled for a target; ``program`` is what `scheduled` makes of it."""
    chip = compiled.where.chip
    program = scheduled(compiled) if program is None else program
    memory = compiled.executable.memory_analysis()
    arguments, results = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes
    total, missing = _cycles(program, chip)
    moved = (arguments + results + 2 * temporaries) / chip.bandwidth
    seconds = None if missing else max(moved, 0.0 if total is None or chip.clock is None else total / chip.clock)
    floor = max((arguments + results) / chip.bandwidth, _arithmetic(program, chip))
    return Estimate(arguments, results, temporaries, total, seconds, floor, missing, tuple(collectives(program)))


def _cycles(program: Program, chip: Chip) -> tuple[float | None, str]:
    """The compiler's cycles, and why there are none where there should be."""
    if chip.clock is None:
        return None, ""
    if steps := unestimated(program):
        names = ", ".join(step.name for step in steps[:3]) + (", ..." if len(steps) > 3 else "")
        reasons = dict.fromkeys(step.schedule for step in steps if isinstance(step.schedule, str))
        return None, "; ".join([f"{chip.compiler} gives none for {names}", *reasons])
    total = cycles(program)
    if total is not None and math.isnan(total):
        return None, "the program has a loop whose length depends on values"
    return None if total is None else total + relaid_bytes(program) / chip.bandwidth * chip.clock, ""


def _arithmetic(program: Program, chip: Chip) -> float:
    """Seconds of all products at the peaks of their number types."""
    found = ((product, program.times.get(name, 0.0)) for name, _, product in products(program))
    return sum(p.operations * (1.0 if math.isnan(n) else n) / chip.peak(p.dtype) for p, n in found)

"""The optimized program as XLA prints it: computations, instructions, who uses what, and how often loops run."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

__all__ = ["Array", "Instruction", "Program", "arrays_of"]

_HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)$", re.DOTALL)
# An instruction ends before the next one, not where its line does: the metadata of a kernel has several.
_NEXT = re.compile(r"\n(?=(?:ENTRY )?%[\w.-]+ \(|\s+(?:ROOT )?%[\w.-]+ = |\}?\s*(?:\n|\Z))")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.-]+)")
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu")
_MODELED = re.compile(r'"estimated_cycles":"(\d+)"')
_SCHEDULED = re.compile(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 1 << 62
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """The type of one array of a program.

    Attributes:
      dtype: HLO's name of the number type.
      shape: its sizes.
      in_memory: whether it lies in the device's main memory, and not in a smaller, nearer one.
    """

    dtype: str
    shape: tuple[int, ...]
    in_memory: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes, from the width of the type."""
        width = re.findall(r"\d+", self.dtype)
        return self.size * (int(width[0]) if width else 8) / 8


def arrays_of(text: str) -> list[Array]:
    """The arrays of a type, a tuple's one after the other."""
    return [
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), not re.search(r"S\([1-9]\d*\)", layout))
        for dtype, sizes, layout in _ARRAY.findall(text)
    ]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: unique in its computation.
      type: of its result, with its layout.
      opcode: what it does.
      operands: names of the values it uses; of a parameter its number, of a constant its value.
      rest: attributes.
      schedule: of a kernel, where its static schedule was asked for apart from the program: the cycles of one run, or
        why they are not known.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    schedule: int | str | None = None

    @property
    def arrays(self) -> list[Array]:
        """Of its result."""
        return arrays_of(self.type)

    @property
    def cycles(self) -> int | None:
        """The TPU compiler's estimate for one run, in cycles, or None; 2**62 or more means that it has none.

        The static schedule of its machine code, where the compiler was asked to keep it, has precedence over the model
        that chose how to compile it.
        """
        if isinstance(self.schedule, int):
            return self.schedule
        found = _SCHEDULED.search(self.rest) or _MODELED.search(self.rest)
        return int(found[1]) if found and int(found[1]) < _NO_ESTIMATE else None

    @property
    def config(self) -> str:
        """The configuration for the target's compiler, as JSON; "{}" if there is none."""
        _, _, text = self.rest.partition("backend_config=")
        return text[: json.JSONDecoder().raw_decode(text)[1]] if text.startswith("{") else "{}"

    @property
    def is_kernel(self) -> bool:
        """Whether it runs a kernel that is written by hand."""
        return self.opcode == "custom-call" and any(kernel in self.rest for kernel in _KERNELS)

    @property
    def kernel(self) -> str:
        """The name of that kernel, or else of the instruction."""
        found = re.search(r'\bname = "([^"]+)"', self.rest)  # Triton's
        return self.attribute("kernel_name").strip('"') or (found[1] if found else re.sub(r"\.\d+$", "", self.name))

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations it runs: of a conditional in the order of its branches."""
        found = _CALLED.findall(self.rest)
        for branches in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*,[^}]*)\}", self.rest):
            found = [name.strip(" %") for name in branches.split(",")]
        return tuple(found)

    def attribute(self, name: str) -> str:
        """The value of an attribute, without its braces; empty if it has none."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1].strip("{}") if found else ""


class Program:
    """A program, from its text: its computations by name, the last of which runs first.

    Args:
      text: what XLA prints.
      schedules: of kernels that the text has no estimate of, by the names of their instructions; see `Instruction`.

    Attributes:
      computations: name of each, and its instructions by name, in their order.
      roots: the instruction whose value a computation returns.
      entry: where it starts.
      users: of a value, by computation and name.
      callers: of a computation: the computation and the instruction that run it.
    """

    def __init__(self, text: str, schedules: Mapping[str, int | str] | None = None):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.callers: dict[str, list[tuple[str, Instruction]]] = collections.defaultdict(list)
        self.users: dict[tuple[str, str], list[Instruction]] = collections.defaultdict(list)
        self.entry = ""
        current: dict[str, Instruction] = {}
        name = ""
        for line in _NEXT.split(text):
            if head := _HEAD.match(line):
                name, current = head[2], {}
                self.computations[name] = current
                self.entry = name if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                root, own, kind, opcode, rest = found.groups()
                operands, _, attributes = rest.partition(")")
                values = tuple(re.findall(r"%([\w.-]+)", operands)) or (operands,)
                instruction = Instruction(own, kind, opcode, values, attributes, (schedules or {}).get(own))
                current[own] = instruction
                if root:
                    self.roots[name] = own
                for operand in set(values):
                    self.users[name, operand].append(instruction)
                for called in instruction.called:
                    self.callers[called].append((name, instruction))

    @property
    def has_schedules(self) -> bool:
        """Whether any kernel has a schedule that was found apart."""
        return any(isinstance(i.schedule, int) for body in self.computations.values() for i in body.values())

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """Computations whose instructions write nothing by themselves: bodies of fusions and of reductions."""
        inner = {"fusion", "reduce", "reduce-window", "scatter", "sort", "map", "all-reduce", "reduce-scatter"}
        found = {name for name, uses in self.callers.items() if any(user.opcode in inner for _, user in uses)}
        while more := {
            name for name, uses in self.callers.items() if name not in found and any(at in found for at, _ in uses)
        }:
            found |= more
        return frozenset(found)

    def parameter(self, computation: str, number: int) -> str:
        """The name of a parameter; empty where there is none of that number."""
        for instruction in self.computations.get(computation, {}).values():
            if instruction.opcode == "parameter" and instruction.operands[0] == str(number):
                return instruction.name
        return ""

    def operands_of(self, computation: str, instruction: Instruction) -> list[Array]:
        """The arrays that an instruction uses."""
        known = self.computations[computation]
        return [array for name in instruction.operands if name in known for array in known[name].arrays]

    @functools.cached_property
    def times(self) -> dict[str, float]:
        """How often each computation runs. NaN where that depends on values; branches count as if all ran."""
        found: dict[str, float] = collections.defaultdict(float)
        found[self.entry] = 1.0
        for name in self._callers_first():
            for instruction in self.computations[name].values():
                count = found[name] * (self._trips(name, instruction) if instruction.opcode == "while" else 1.0)
                for called in instruction.called:
                    found[called] += count
        return dict(found)

    def _callers_first(self) -> Iterator[str]:
        """Computations, each after all that call it."""
        left = {name: len(self.callers[name]) for name in self.computations}
        ready = [name for name, count in left.items() if count == 0]
        while ready:
            name = ready.pop()
            yield name
            for instruction in self.computations[name].values():
                for called in instruction.called:
                    if called in left:
                        left[called] -= 1
                        if left[called] == 0:
                            ready.append(called)

    def _trips(self, computation: str, loop: Instruction) -> float:
        """How often a loop runs: as XLA says, or as its condition does, ``i < n``."""
        if known := _TRIPS.search(loop.rest):
            return float(known[1])
        condition = loop.attribute("condition").strip("%")
        root = self.computations.get(condition, {}).get(self.roots.get(condition, ""))
        inner, at = condition, root
        outside: tuple[str, ...] = ()
        if at is not None and at.opcode == "fusion" and at.called:
            inner, outside = at.called[0], at.operands
            at = self.computations[inner].get(self.roots.get(inner, ""))
        if at is None or at.opcode != "compare" or "direction=LT" not in at.rest:
            return math.nan
        index, stop = (self._traced(condition, inner, outside, name) for name in at.operands)
        if not isinstance(stop, int) or not isinstance(index, str):
            return math.nan
        start = self._element(computation, loop.operands[0], int(index))
        return float(stop - start) if start is not None else math.nan

    def _traced(self, outer: str, inner: str, outside: tuple[str, ...], name: str) -> int | str | None:
        """Resolves a value of a loop's condition: to a constant, or to the index of an element of the loop's tuple."""
        instruction = self.computations[inner].get(name)
        while instruction is not None:
            if instruction.opcode == "constant":
                return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None
            if instruction.opcode == "get-tuple-element":
                return instruction.attribute("index")
            if instruction.opcode == "parameter" and outside:
                name = outside[int(instruction.operands[0])]
                return self._traced(outer, outer, (), name)
            if instruction.opcode not in ("copy", "bitcast", "convert", "reshape"):
                return None
            instruction = self.computations[inner].get(instruction.operands[0])
        return None

    def _element(self, computation: str, name: str, index: int) -> int | None:
        """The constant that a tuple has at a place."""
        known = self.computations[computation]
        instruction = known.get(name)
        if instruction is None or instruction.opcode != "tuple":
            return None
        instruction = known.get(instruction.operands[index])
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
            instruction = known.get(instruction.operands[0])
        if instruction is None or instruction.opcode != "constant":
            return None
        return int(instruction.operands[0]) if re.fullmatch(r"-?\d+", instruction.operands[0]) else None

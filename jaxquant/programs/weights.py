"""Where the codes of one weight go in a program, and what multiplies them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from jaxquant.programs.costs import Product, product_of
from jaxquant.programs.hlo import Instruction, Program

__all__ = ["Reached", "reached"]

_FLOATS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
_NAMES = _FLOATS | {"s8": "int8", "u8": "uint8", "s4": "int4", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}
_PASSED_ON = ("tuple", "get-tuple-element", "parameter", "bitcast", "while", "conditional", "call", "opt-barrier")
_NOT_FOLLOWED = ("reduce", "reduce-window", "scatter", "sort", "map")

Place = tuple[str, str, int | None]


@dataclasses.dataclass
class Reached:
    """The instructions that the values of a weight reach.

    Attributes:
      kernels: what multiplies them, in words.
      products: the products among these, and how often each runs.
      steps: instructions on the way that cost something, and how often each runs, by computation and name.
      written: bytes of the arrays of the weight's size that they write to memory, those of one run of each.
    """

    kernels: set[str] = dataclasses.field(default_factory=set)
    products: list[tuple[Product, float]] = dataclasses.field(default_factory=list)
    steps: dict[tuple[str, str], tuple[Instruction, float]] = dataclasses.field(default_factory=dict)
    written: float = 0

    @property
    def cycles(self) -> float | None:
        """The TPU compiler's estimate for all steps, in cycles; None if it has none for any of them."""
        known = [step.cycles * times for step, times in self.steps.values() if step.cycles is not None]
        return sum(known) if known else None


def reached(program: Program, number: int, size: int, *, loop: str, library: str) -> Reached:
    """Follows a parameter of a program, ``size`` weights in codes, to the products that use it.

    Args:
      program: the optimized program.
      number: of the parameter.
      size: elements of the weight.
      loop: the name of loops that decode and multiply.
      library: what the program says where a library of fast kernels serves an operation; where it does not,
        ``", plain"`` is added to the kernel's name. Empty: there is no such library.
    """
    walk = _Walk(program, size, loop, library)
    todo: list[Place] = [(program.entry, program.parameter(program.entry, number), None)]
    seen: set[Place] = set()
    while todo:
        place = todo.pop()
        if place not in seen and place[1]:
            seen.add(place)
            todo.extend(walk.onward(*place))
    return walk.found


class _Walk:
    def __init__(self, program: Program, size: int, loop: str, library: str):
        self.program, self.size, self.loop, self.library = program, size, loop, library
        self.found = Reached()

    def onward(self, computation: str, name: str, index: int | None) -> Iterator[Place]:
        """Where a value goes next; ``index`` is its place if it is an element of a tuple."""
        program, found = self.program, self.found
        if program.roots.get(computation) == name:
            for caller, instruction in program.callers[computation]:
                if computation not in re.findall(r"condition=%?([\w.-]+)", instruction.rest):
                    yield caller, instruction.name, index
        for user in program.users[computation, name]:
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            product = product_of(program, computation, user)
            if computation not in program.fused and user.opcode not in _PASSED_ON:
                self._stepped(computation, user, product)
            if user.is_kernel:
                found.kernels.add(user.kernel)
                found.products.extend([(product, program.times.get(computation, 0.0))] if product else [])
            elif product is not None:
                self._multiplied(computation, product)
            elif user.opcode == "multiply" and self.loop in user.rest:
                found.kernels.add("float32 GEMV")
            elif user.opcode == "tuple":
                yield from ((computation, user.name, i) for i in places)
            elif user.opcode == "get-tuple-element":
                if index is None or user.attribute("index") == str(index):
                    yield computation, user.name, None
            elif user.called and user.opcode not in _NOT_FOLLOWED:
                for k, body in enumerate(user.called):
                    for i in places:
                        if user.opcode == "conditional" and i != k + 1 and user.operands[0] != name:
                            continue
                        at = 0 if user.opcode in ("while", "conditional") else i
                        yield body, program.parameter(body, at), index
                if user.opcode == "while":
                    yield computation, user.name, index
            elif user.opcode == "gather":
                found.kernels.add("lookup")
            elif user.opcode != "reduce":
                yield computation, user.name, index if user.opcode in _PASSED_ON else None

    def _stepped(self, computation: str, user: Instruction, product: Product | None) -> None:
        """Counts an instruction that is on the way, and what it writes."""
        if (computation, user.name) in self.found.steps:
            return
        self.found.steps[computation, user.name] = user, self.program.times.get(computation, 0.0)
        if product is not None or user.is_kernel or self._multiplies(user) or user.opcode.endswith("-start"):
            return  # what a product writes is its result
        large = [array for array in user.arrays if array.size >= self.size]
        self.found.written += sum(array.nbytes for array in large if array.in_memory)
        if any(array.dtype in _FLOATS for array in large):
            self.found.kernels.add("dequantized")

    def _multiplies(self, fusion: Instruction) -> bool:
        bodies = ((name, self.program.computations.get(name, {})) for name in fusion.called)
        return any(product_of(self.program, name, i) is not None for name, body in bodies for i in body.values())

    def _multiplied(self, computation: str, product: Product) -> None:
        name = next((_NAMES[t] for t in product.dtypes if t in _FLOATS), None)
        name = name or _NAMES.get(product.dtype, product.dtype)
        served = not self.library or any(self.library in user.rest for _, user in self.program.callers[computation])
        self.found.kernels.add(name if served else f"{name}, plain")
        self.found.products.append((product, self.program.times.get(computation, 0.0)))

"""`explain`: what the compiled program does with each quantized weight, read from the program itself."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxquant.core.errors import printable, quant_error
from jaxquant.ops.lanes import LANES
from jaxquant.ops.machine import FAST
from jaxquant.transform.paths import is_qtensor, path_of

__all__ = ["Explanation", "Use", "explain"]


@dataclasses.dataclass(frozen=True)
class Use:
    """How the program multiplies one weight.

    Attributes:
      path: the weight's path.
      kernels: what it reaches: ``"int8"`` or ``"float32"`` or ``"bfloat16"``, where XLA's library of fast kernels
        serves the product; the same with ``", plain"`` where it does not; ``"float32 loop"`` where one loop decodes and
        multiplies; ``"lookup"`` where rows are gathered; ``"dequantized"`` where a float array of the weight's size is
        written first. Empty: none of these was found.
      nbytes: bytes of codes, scales and zero points: what one use has to read.
      float_nbytes: bytes of the float weight.
    """

    path: str
    kernels: tuple[str, ...]
    nbytes: int
    float_nbytes: int

    @property
    def limit(self) -> float:
        """The most that can be gained over the float weight where reading weights takes all the time."""
        return self.float_nbytes / self.nbytes


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table.

    Attributes:
      uses: one per quantized weight, in the order of the parameters.
      temporaries: bytes of the program's temporary arrays, or None where XLA does not say.
    """

    uses: tuple[Use, ...]
    temporaries: int | None

    def __getitem__(self, path: str) -> Use:
        for use in self.uses:
            if use.path == path:
                return use
        raise KeyError(path)

    def floor(self, bandwidth: float) -> float:
        """Seconds that reading every weight once takes, at so many bytes a second."""
        return sum(use.nbytes for use in self.uses) / bandwidth

    def __str__(self) -> str:
        rows = [("path", "kernel", "bytes read", "limit")]
        for use in self.uses:
            rows.append((use.path, ", ".join(use.kernels) or "not found", f"{use.nbytes:,}", f"{use.limit:.2f}x"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        end = [] if self.temporaries is None else [f"temporaries: {self.temporaries:,} bytes"]
        return "\n".join(map(printable, [lines[0], "-" * len(lines[0]), *lines[1:], *end]))


def explain(fn: Callable[..., Any], params: Any, *args: Any) -> Explanation:
    """Compiles ``fn(params, *args)`` and says, for each quantized weight, which kernel runs and what it reads.

    The answer is read from the optimized program: weights are followed from the parameter that holds their codes to the
    products that use them, through fusions, loops and branches. Nothing is run.

    Args:
      fn: a function of params and args, such as ``jq.quantized(model.apply, plan)``; jitted or not.
      params: a tree with QTensors; shapes (`jax.ShapeDtypeStruct`) will do.
      args: the other arguments, or their shapes.

    Returns:
      An `Explanation`.

    Raises:
      QuantError: if no leaf of params is a QTensor.

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

    def called(params: Any, *args: Any) -> Any:
        return fn(params, *args)

    compiled: Any = jax.jit(called, keep_unused=True).lower(params, *args).compile()
    program = _Program(compiled.as_text())
    numbers = _parameter_numbers(params)
    memory = compiled.memory_analysis()
    uses = tuple(
        Use(
            path_of(path),
            tuple(sorted(program.kernels(numbers[path], leaf.size))),
            leaf.nbytes,
            leaf.size * leaf.dtype.itemsize,
        )
        for path, leaf in weights.items()
    )
    return Explanation(uses, getattr(memory, "temp_size_in_bytes", None))


def _parameter_numbers(params: Any) -> dict[tuple[Any, ...], int]:
    """Which parameter of the program holds the codes of each QTensor."""
    found = {}
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(params)[0]):
        if path and getattr(path[-1], "name", None) == "codes":
            found.setdefault(tuple(path[:-1]), i)
    return found


# -- the optimized program as text ------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_FLOATS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
_PASSED_ON = ("tuple", "get-tuple-element", "parameter", "bitcast", "while", "conditional", "call", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def elements(self) -> int:
        """Of its largest array."""
        return max(math.prod(map(int, s.split(","))) if s else 1 for s in re.findall(r"\[([\d,]*)\]", self.type))

    def called(self) -> list[str]:
        """The computations it runs: of a conditional in the order of its branches."""
        found = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", self.rest)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", self.rest):
            found += [name.strip(" %") for name in branches.split(",")]
        return found


class _Program:
    """Computations and the instructions that use each value."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.roots: dict[str, str] = {}
        self.callers: dict[str, list[tuple[str, _Instruction]]] = collections.defaultdict(list)
        self.users: dict[tuple[str, str], list[_Instruction]] = collections.defaultdict(list)
        self.entry = ""
        current: dict[str, _Instruction] = {}
        name = ""
        for line in text.splitlines():
            if head := re.match(r"^(ENTRY )?%([\w.-]+) \(", line):
                name, current = head[2], {}
                self.computations[name] = current
                self.entry = name if head[1] else self.entry
            elif found := _INSTRUCTION.match(line):
                root, own, kind, opcode, rest = found.groups()
                operands, _, attributes = rest.partition(")")
                values = tuple(re.findall(r"%([\w.-]+)", operands)) or (operands,)
                instruction = _Instruction(own, kind, opcode, values, attributes)
                current[own] = instruction
                if root:
                    self.roots[name] = own
                for operand in set(values):
                    self.users[name, operand].append(instruction)
                for called in instruction.called():
                    self.callers[called].append((name, instruction))

    def kernels(self, number: int, size: int) -> set[str]:
        """What the values of a parameter of the program, ``size`` weights in codes, are multiplied by."""
        found: set[str] = set()
        seen: set[tuple[str, str, int | None]] = set()
        todo: list[tuple[str, str, int | None]] = [(self.entry, self._parameter(self.entry, number), None)]
        while todo:
            place = todo.pop()
            if place in seen or not place[1]:
                continue
            seen.add(place)
            for step in self._onward(*place, size, found):
                todo.append(step)
        return found

    def _parameter(self, computation: str, number: int) -> str:
        for instruction in self.computations[computation].values():
            if instruction.opcode == "parameter" and instruction.operands[0] == str(number):
                return instruction.name
        return ""

    def _onward(
        self, computation: str, name: str, index: int | None, size: int, found: set[str]
    ) -> Iterator[tuple[str, str, int | None]]:
        """Where a value goes next; ``index`` is its place if it is an element of a tuple."""
        if self.roots.get(computation) == name:
            for caller, instruction in self.callers[computation]:
                if computation not in re.findall(r"condition=%?([\w.-]+)", instruction.rest):
                    yield caller, instruction.name, index
        for user in self.users[computation, name]:
            places = [i for i, operand in enumerate(user.operands) if operand == name]
            if user.opcode in ("dot", "convolution", "ragged-dot"):
                found.add(self._product(computation, user))
            elif user.opcode == "multiply" and LANES in user.rest:
                found.add("float32 loop")
            elif user.opcode == "tuple":
                yield from ((computation, user.name, i) for i in places)
            elif user.opcode == "get-tuple-element":
                if index is None or f"index={index}" == (re.findall(r"index=\d+", user.rest) or [""])[0]:
                    yield computation, user.name, None
            elif user.called() and user.opcode not in ("reduce", "reduce-window", "scatter", "sort", "map"):
                for k, body in enumerate(user.called()):
                    for i in places:
                        if user.opcode == "conditional" and i != k + 1 and user.operands[0] != name:
                            continue
                        at = 0 if user.opcode in ("while", "conditional") else i
                        yield body, self._parameter(body, at), index
                if user.opcode == "while":
                    yield computation, user.name, index
            elif user.opcode == "gather":
                found.add("lookup")
            elif user.opcode != "reduce":
                yield computation, user.name, index if user.opcode in _PASSED_ON else None
            floats = re.match(r"(f32|bf16|f16|f64)\[", user.type)
            written = computation not in self._fused() and user.opcode not in _PASSED_ON
            product = user.opcode in ("dot", "convolution") or self._multiplies(user)
            if floats and written and not product and user.elements >= size:
                found.add("dequantized")

    def _fused(self) -> set[str]:
        """Computations whose instructions write nothing: bodies of fusions."""
        return {name for name, uses in self.callers.items() if any(user.opcode == "fusion" for _, user in uses)}

    def _multiplies(self, fusion: _Instruction) -> bool:
        bodies = (self.computations.get(name, {}) for name in fusion.called())
        return any(i.opcode in ("dot", "convolution") for body in bodies for i in body.values())

    def _product(self, computation: str, product: _Instruction) -> str:
        types = []
        for operand in product.operands:
            kind = self.computations[computation].get(operand)
            types.append(re.match(r"\w*", kind.type)[0] if kind else "")  # pyright: ignore[reportOptionalSubscript]
        name = next((_FLOATS[t] for t in types if t in _FLOATS), "int8" if "s8" in types else types[0])
        served = any(FAST in user.rest for _, user in self.callers[computation])
        return name if served else f"{name}, plain"

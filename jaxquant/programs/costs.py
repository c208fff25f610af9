"""The costs of a program, read from its text: estimated cycles, arithmetic by number type, collectives."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re

from jaxquant.programs.hlo import Array, Instruction, Program

__all__ = [
    "Collective",
    "Product",
    "collectives",
    "cycles",
    "product_of",
    "products",
    "relaid_bytes",
    "unestimated",
]

_ESTIMATED = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_METADATA = re.compile(r"\\22multiplied\\22: \\22(\w+)\\22, \\22operations\\22: \\22(\d+)\\22")
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution, or a kernel that is written by hand and says what it multiplies.

    Attributes:
      dtypes: of its two operands, as HLO has them.
      operations: multiplications and additions of one run.
    """

    dtypes: tuple[str, str]
    operations: float

    @property
    def dtype(self) -> str:
        """The type that units must have for it: the float one of two, or the wider."""
        floats = [t for t in self.dtypes if re.match(r"b?f\d", t)]
        return max(floats or self.dtypes, key=lambda t: int(re.findall(r"\d+", t)[0]))


@dataclasses.dataclass(frozen=True)
class Collective:
    """Transfers of one kind between devices.

    Attributes:
      kind: HLO's name.
      dtype: of the arrays that are sent.
      nbytes: of the arrays that the operation makes on one device, over all runs.
      count: runs.
    """

    kind: str
    dtype: str
    nbytes: float
    count: float


def cycles(program: Program) -> float | None:
    """The TPU compiler's estimates, summed over all that runs; None where it gives none. Of branches, all count."""
    found = [
        instruction.cycles * program.times.get(name, 0.0)
        for name, body in program.computations.items()
        if name not in program.fused
        for instruction in body.values()
        if instruction.cycles is not None
    ]
    return sum(found) if found else None


def unestimated(program: Program) -> list[Instruction]:
    """Steps that the TPU compiler gives no estimate for: kernels that are written by hand, and some others."""
    return [
        instruction
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.cycles is None and (instruction.is_kernel or '"estimated_cycles":"' in instruction.rest)
    ]


def relaid_bytes(program: Program) -> float:
    """Bytes that all runs read and write in the main memory to bring arrays to another layout, without an estimate.

    The TPU compiler estimates no such step that it does not fuse. It writes an array again whose last axes are joined
    or parted, for instance, since these two are stored in tiles.
    """
    total = 0.0
    for name, body in program.computations.items():
        times = 0.0 if name in program.fused else program.times.get(name, 0.0)
        for instruction in body.values():
            moves = instruction.opcode in ("reshape", "transpose") and instruction.cycles is None
            arrays = [*program.operands_of(name, instruction), *instruction.arrays] if moves and times else []
            total += times * sum(array.nbytes for array in arrays if array.in_memory)
    return total


def collectives(program: Program) -> list[Collective]:
    """All transfers between devices, by kind and type."""
    found: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, body in program.computations.items():
        times = program.times.get(name, 0.0)
        for instruction in body.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            arrays = instruction.arrays
            if instruction.opcode.endswith("-start") and kind != "all-reduce":  # (operands, results, ...)
                arrays = arrays[len(arrays) // 2 :] if len(arrays) % 2 == 0 else arrays[1:2]
            for array in arrays:
                if array.shape or len(arrays) == 1:
                    total = found[kind, array.dtype]
                    total[0] += array.nbytes * times
                    total[1] += times
    return [Collective(kind, dtype, nbytes, count) for (kind, dtype), (nbytes, count) in sorted(found.items())]


def products(program: Program) -> list[tuple[str, Instruction, Product]]:
    """Every product, and where it is."""
    return [
        (name, instruction, product)
        for name, body in program.computations.items()
        for instruction in body.values()
        if (product := product_of(program, name, instruction)) is not None
    ]


def product_of(program: Program, computation: str, instruction: Instruction) -> Product | None:
    """The number types and operations of a product; None if the instruction is no product."""
    operands = program.operands_of(computation, instruction)
    if instruction.is_kernel:
        return _kernel_product(instruction, operands)
    if len(operands) < 2:
        return None
    left, right = operands[:2]
    out = instruction.arrays[0]
    if instruction.opcode in ("dot", "ragged-dot"):
        contracted = _sizes(left, instruction.attribute("lhs_contracting_dims"))
        operations = 2.0 * out.size * math.prod(contracted)
    elif instruction.opcode == "convolution":
        operations = 2.0 * _taps(instruction, left, right, out)
    elif instruction.opcode == "custom-call" and (numbers := _library_product(instruction)) is not None:
        operations = 2.0 * out.size * math.prod(left.shape[i] for i in numbers)
    else:
        return None
    return Product((left.dtype, right.dtype), operations)


def _sizes(array: Array, axes: str) -> list[int]:
    return [array.shape[int(i)] for i in axes.split(",") if i]


def _kernel_product(kernel: Instruction, operands: list[Array]) -> Product | None:
    """The product that a kernel computes, as it was told to the compiler; None if it was told of none.

    A TPU's kernels have the operations in their cost estimate. The first two operands that are no scalars and lists,
    such as prefetched indices, are what they multiply. A GPU's kernels have both in their metadata.
    """
    if told := _METADATA.search(kernel.rest):
        dtype = _hlo_name(told[1])
        return Product((dtype, dtype), float(told[2]))
    estimated, arrays = _ESTIMATED.search(kernel.rest), [a for a in operands if len(a.shape) > 1]
    if estimated is None or not int(estimated[1]) or len(arrays) < 2:
        return None
    return Product((arrays[0].dtype, arrays[1].dtype), float(estimated[1]))


def _hlo_name(dtype: str) -> str:
    """HLO's name of a dtype."""
    for word, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "s"), ("_", "")):
        dtype = dtype.replace(word, short)
    return dtype


def _library_product(instruction: Instruction) -> list[int] | None:
    """The contracted axes of the left operand, where a library of the GPU is called."""
    if "__cublas$" not in instruction.rest:
        return None
    found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.rest)
    return [int(i) for i in json.loads(found[1])] if found else None


def _taps(instruction: Instruction, left: Array, right: Array, out: Array) -> float:
    """Multiplications of a convolution, without the zeros of padding and dilation.

    (The TPU compiler writes batched products as convolutions, with the batch along a dilated window.)
    """
    lhs, _, rest = instruction.attribute("dim_labels").partition("_")
    rhs, _, result = rest.partition("->")
    spatial = [label for label in lhs if label.isdigit()]
    count = float(out.shape[result.index("b")] * out.shape[result.index("f")] * right.shape[rhs.index("i")])
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", instruction.attribute("window")))
    for k, label in enumerate(spatial):
        names = ("size", "stride", "lhs_dilate", "rhs_dilate")
        size, stride, holes, steps = (int(window[n].split("x")[k]) if n in window else 1 for n in names)
        low = window["pad"].split("x")[k].partition("_")[0] if "pad" in window else "0"
        length = (left.shape[lhs.index(label)] - 1) * holes + 1
        places = range(out.shape[result.index(label)])
        count *= sum(
            1
            for place in places
            for tap in range(size)
            if 0 <= (at := place * stride + tap * steps - int(low)) < length and at % holes == 0
        )
    return count

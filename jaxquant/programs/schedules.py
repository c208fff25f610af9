"""How long kernels that are written by hand take on a TPU, by the static schedules of their machine code.

The TPU compiler estimates no such kernel unless a flag that it reads as it starts has it keep these schedules. With the
flag it compiles large programs slowly, and some programs end the process. So every kernel of a program is compiled once
more, alone and in another process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.programs.chips import Chip
from jaxquant.programs.compilers import Compiled, compiled_for
from jaxquant.programs.hlo import Array, Instruction, Program

__all__ = ["scheduled"]

_LONGEST = 300  # seconds that the schedules of a kernel may take
_DTYPES = {
    "pred": "bool",
    "bf16": "bfloat16",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
    "f8e8m0fnu": "float8_e8m0fnu",
    "f4e2m1fn": "float4_e2m1fn",
}


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel alone: what tells it from others.

    Attributes:
      operands, results: types of arrays, as HLO has them.
      code: its machine-independent code and the memory it takes, as the compiler is given them.
    """

    operands: tuple[tuple[str, tuple[int, ...]], ...]
    results: tuple[tuple[str, tuple[int, ...]], ...]
    code: str


_known: dict[tuple[str, _Kernel], int | str] = {}  # cycles, or why there are none


def scheduled(compiled: Compiled) -> Program:
    """The text of a program that was compiled for a target, with the schedules of its kernels where it is for a TPU."""
    text = compiled.executable.as_text()
    program, chip = Program(text), compiled.where.chip
    wanted = {
        instruction.name: _kernel(program, computation, instruction)
        for computation, body in program.computations.items()
        for instruction in body.values()
        if chip.platform == "tpu" and instruction.is_kernel and instruction.cycles is None
    }
    if not wanted:
        return program
    new = [kernel for kernel in dict.fromkeys(wanted.values()) if (chip.name, kernel) not in _known]
    _known.update(zip(((chip.name, kernel) for kernel in new), _compiled_apart(chip, new), strict=True))
    found = {name: _known[chip.name, kernel] for name, kernel in wanted.items()}
    return Program(text, {name: _no_less_than_read(chip, wanted[name], cycles) for name, cycles in found.items()})


def _no_less_than_read(chip: Chip, kernel: _Kernel, cycles: int | str) -> int | str:
    """The cycles of a schedule, or of the bytes that the kernel says it moves: schedules count these at up to 1.2 times
    the bandwidth of the memory."""
    moved = re.search(r'"bytes_accessed": "(\d+)"', kernel.code)
    if moved is None or chip.clock is None or not isinstance(cycles, int):
        return cycles
    return max(cycles, round(int(moved[1]) / chip.bandwidth * chip.clock))


def _kernel(program: Program, computation: str, instruction: Instruction) -> _Kernel:
    config = json.loads(instruction.config)
    kept = {name: config[name] for name in ("custom_call_config", "scoped_memory_configs") if name in config}

    def types(arrays: list[Array]) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return tuple((array.dtype, array.shape) for array in arrays)

    return _Kernel(types(program.operands_of(computation, instruction)), types(instruction.arrays), json.dumps(kept))


def _compiled_apart(chip: Chip, kernels: Sequence[_Kernel]) -> Iterator[int | str]:
    """Cycles of each kernel, or why there are none. If a kernel ends the process, a new process takes the rest."""
    left = list(kernels)
    while left:
        request = {"target": chip.name, "kernels": [dataclasses.asdict(kernel) for kernel in left]}
        lines, failed = _answers(json.dumps(request), _LONGEST * len(left))
        answers = [json.loads(line) for line in lines[: len(left)]]
        yield from answers
        left = left[len(answers) :]
        if left:
            yield failed
            left = left[1:]


def _answers(request: str, longest: float) -> tuple[list[str], str]:
    """The lines that this module prints as a process of its own, and why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_static_llo_profile_to={folder}".strip()
        own = {
            "LIBTPU_INIT_ARGS": flags,
            "JAX_PLATFORMS": "cpu",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "jaxquant.programs.schedules"]
        try:
            done = subprocess.run(
                command,
                input=request,
                env=os.environ | own,
                timeout=longest,
                capture_output=True,
                text=True,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            out = e.stdout.decode() if isinstance(e.stdout, bytes) else e.stdout or ""
            return out.splitlines(), f"its schedule took the compiler more than {longest:.0f} s"
    return done.stdout.splitlines(), "the compiler ended while it kept its schedule"


def _main() -> None:
    """Reads a request, and prints for each kernel its cycles, or why there are none."""
    request = json.loads(sys.stdin.read())
    for kernel in request["kernels"]:
        operands, results = ([_shape(*t) for t in kernel[name]] for name in ("operands", "results"))

        def call(*arrays: Any, results: Any = results, code: str = kernel["code"]) -> Any:
            run = jax.ffi.ffi_call("tpu_custom_call", results, custom_call_api_version=1, legacy_backend_config=code)
            return run(*arrays)

        try:
            # As kernels take them. The compiler would copy an operand of another order to the chip's own memory, and
            # ends where a kernel reads one from there.
            alone = compiled_for("schedules", request["target"], call, tuple(operands), last_minor=True)
            text = alone.executable.as_text()
            found = [i.cycles for body in Program(text).computations.values() for i in body.values() if i.is_kernel]
            answer = found[0] if found and found[0] is not None else "the compiler keeps no schedule of it"
        except Exception as e:
            answer = (str(e).splitlines() or [type(e).__name__])[0][:200]
        print(json.dumps(answer), flush=True)


def _shape(dtype: str, shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    named = _DTYPES.get(dtype) or {"s": "int", "u": "uint", "f": "float"}[dtype[0]] + dtype[1:]
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(named))


if __name__ == "__main__":
    _main()

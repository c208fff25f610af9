"""Accelerators that programs are compiled for: the compiler's name of each, and its peak rates.

The makers publish peaks, bandwidths and capacities. They are for one device as JAX counts them (a TPU7x chip has two).
Clocks turn the cycles that the TPU compiler estimates into time.

Source: cloud.google.com/tpu/docs (v5e, v5p, v6e, TPU7x), NVIDIA's data sheets of the H100 SXM and A100 SXM 80 GB, and
OpenXLA's device descriptions, which the GPU compiler needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from jaxquant.core.errors import quant_error

__all__ = ["CHIPS", "Chip", "Slice", "slice_of_chips"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as users write it.
      platform: what JAX lowers for.
      family: what its compiler calls it.
      bandwidth: of its memory, bytes a second.
      memory: bytes.
      peaks: operations a second (a multiplication and an addition are two) by HLO's name of the number type.
      clock: cycles a second, for compilers that estimate cycles.
      slices: shapes that chips are sold in, smallest first.
      per_chip: JAX devices on a chip.
      description: facts for a compiler that has no table of devices.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    family: str
    bandwidth: float
    memory: float
    peaks: Mapping[str, float] = dataclasses.field(hash=False)
    clock: float | None = None
    slices: tuple[tuple[int, ...], ...] = ((1, 1, 1),)
    per_chip: int = 1
    description: str | None = None

    def peak(self, dtype: str) -> float:
        """Operations per second on numbers of a type; those of bfloat16 if the chip has no units for the type."""
        return self.peaks.get(dtype, self.peaks["bf16"])

    @property
    def compiler(self) -> str:
        """Whose estimates these are."""
        return {"tpu": "the TPU compiler", "cuda": "the GPU compiler"}[self.platform]


_FLAT = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8))


def _gpu(name: str, **facts: float) -> str:
    """A device description (OpenXLA's `GpuTargetConfigProto`, as text)."""
    common = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "threads_per_core_limit": 2048,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    major = facts.pop("major")
    info = " ".join(f"{key}: {value}" for key, value in (common | facts).items())
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 } '
        f'device_description_str: "{name}"'
    )


_H100 = _gpu(
    "NVIDIA H100 80GB HBM3",
    core_count=132,
    fpus_per_core=128,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    memory_bandwidth=3352320000000,
    l2_cache_size=52428800,
    clock_rate_ghz=1.98,
    device_memory_size=84978434048,
    major=9,
)
_A100 = _gpu(
    "NVIDIA A100-SXM4-80GB",
    core_count=108,
    fpus_per_core=64,
    shared_memory_per_core=167936,
    shared_memory_per_block_optin=166912,
    memory_bandwidth=2039040000000,
    l2_cache_size=41943040,
    clock_rate_ghz=1.41,
    device_memory_size=85100068864,
    major=8,
)

_KNOWN = (
    Chip(
        name="tpu v5e",
        platform="tpu",
        family="v5e",
        bandwidth=819e9,
        memory=16 * 2**30,
        peaks={"bf16": 197e12, "s8": 394e12, "u8": 394e12, "s4": 788e12, "u4": 788e12},
        clock=1.5e9,
        slices=_FLAT,
    ),
    Chip(
        name="tpu v5p",
        platform="tpu",
        family="v5p",
        bandwidth=2765e9,
        memory=95 * 2**30,
        peaks={"bf16": 459e12, "s8": 918e12, "u8": 918e12},
        clock=1.75e9,
        slices=_CUBIC,
    ),
    Chip(
        name="tpu v6e",
        platform="tpu",
        family="v6e",
        bandwidth=1640e9,
        memory=32 * 2**30,
        peaks={"bf16": 918e12, "s8": 1836e12, "u8": 1836e12},
        clock=1.75e9,
        slices=_FLAT,
    ),
    Chip(
        name="tpu v7x",
        platform="tpu",
        family="tpu7x",
        bandwidth=7380e9 / 2,
        memory=96 * 2**30,
        peaks={"bf16": 2307e12 / 2, "f8e4m3fn": 4614e12 / 2, "f8e5m2": 4614e12 / 2},
        clock=2.2e9,  # not published: what four units of 256 x 256 need for the peak
        slices=_CUBIC,
        per_chip=2,
    ),
    Chip(
        name="h100",
        platform="cuda",
        family="h100",
        bandwidth=3350e9,
        memory=80e9,
        peaks={"bf16": 989e12, "f16": 989e12, "s8": 1979e12, "f8e4m3fn": 1979e12, "f8e5m2": 1979e12, "f32": 67e12},
        description=_H100,
    ),
    Chip(
        name="a100",
        platform="cuda",
        family="a100",
        bandwidth=2039e9,
        memory=80e9,
        peaks={"bf16": 312e12, "f16": 312e12, "s8": 624e12, "f32": 19.5e12},
        description=_A100,
    ),
)

CHIPS: Mapping[str, Chip] = {chip.name: chip for chip in _KNOWN}
"""All there are, by name."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, wired together; ``shape`` is how many along each direction."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def topology(self) -> str:
        """As the compiler has it."""
        shape = "x".join(map(str, self.shape))
        return f"{self.chip.family}:{shape}" if self.chip.platform == "tpu" else shape

    @property
    def devices(self) -> int:
        """How many JAX has of it."""
        return math.prod(self.shape) * self.chip.per_chip


def slice_of_chips(function: str, target: str, devices: int = 1) -> Slice:
    """The slice that a target names, or the smallest of its chips that has so many devices.

    Args:
      function: the public function, for errors.
      target: a chip, ``"tpu v5e"``, or a slice of them, ``"tpu v5e:4x4"``.
      devices: of the mesh that the program is sharded over.
    """
    name, _, shape = " ".join(str(target).lower().split()).partition(":")
    chip = CHIPS.get(name)
    if chip is None:
        raise quant_error(
            function, "target is no accelerator that is known", todo=f"Use one of {', '.join(CHIPS)}", target=target
        )
    if not shape:
        if chip.platform == "cuda":
            return Slice(chip, (1, 1, devices))
        fitting = [s for s in chip.slices if Slice(chip, s).devices >= devices]
        if not fitting:
            todo = f"Name a slice, such as '{name}:{'x'.join(map(str, chip.slices[-1]))}'"
            raise quant_error(function, "no slice is known that has so many devices", todo=todo, devices=devices)
        return Slice(chip, fitting[0])
    parts = shape.split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        todo = f"Write it as '{name}:{'x'.join(map(str, chip.slices[0]))}'"
        raise quant_error(function, "target names no shape of a slice", todo=todo, target=target)
    found = Slice(chip, tuple(map(int, parts)))
    if found.devices < devices:
        todo = "Name a larger slice, or a smaller mesh"
        raise quant_error(
            function, "the slice has fewer devices than the mesh", todo=todo, target=target, devices=devices
        )
    return found

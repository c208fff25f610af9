"""Weights, inputs and errors for the tests of quantizers."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

import jaxquant as jq
from jaxquant import observers

BITS = (2, 3, 4, 8)
GROUPS = (None, 16)
CELLS = [(bits, group, symmetric) for bits in BITS for group in GROUPS for symmetric in (True, False)]
FAST_CELLS = {(3, 16, False), (4, None, True), (2, 16, True)}


def golden(name: str) -> dict[str, np.ndarray]:
    """The tensors of one committed reference file, by name."""
    return load_file(Path(__file__).parent / "golden" / f"{name}.safetensors")


def inputs(rows: int, length: int, seed: int = 0, rank: int | None = None) -> jax.Array:
    """Correlated inputs [rows, length] whose channels differ by orders of magnitude."""
    rng = np.random.default_rng(seed)
    rank = rank or length
    mix = rng.normal(size=(rank, length)) * 0.9 ** np.arange(rank)[:, None]
    x = rng.normal(size=(rows, rank)) @ mix * np.exp(rng.normal(size=length))
    return jax.device_put(np.asarray(x, np.float32))


def weight(*shape: int, seed: int = 1) -> jax.Array:
    """Weights whose last axis has unequal magnitudes, with a few outliers."""
    rng = np.random.default_rng(seed)
    w = rng.standard_t(5, size=shape) * np.exp(rng.normal(size=shape[-1]))
    return jax.device_put(np.asarray(w, np.float32))


def gram(x: jax.Array) -> dict:
    """The statistics that `calibrate` would give for inputs [rows, channels] or [batch, rows, channels]."""
    x = x[None] if x.ndim == 2 else x
    return {"gram": jq.calibration.Gram().of(x)}


def error(x: jax.Array, w: jax.Array, q: jq.QTensor) -> float:
    """The relative error of the outputs ``x @ w``, in float64."""
    inputs, wanted, found = (np.asarray(a, np.float64) for a in (x, w, q.dequantize()))
    return float(np.linalg.norm(inputs @ (wanted - found)) / np.linalg.norm(inputs @ wanted))


def spec(bits: int, group: int | None, symmetric: bool, **kwargs) -> jq.QuantSpec:
    """A spec of one cell of the table {symmetric, asymmetric} x {channel, group} x bits."""
    how = dict(granularity="per_group", group_size=group) if group else {}
    return jq.QuantSpec(f"int{bits}", symmetric=symmetric, **how, **kwargs)


@dataclasses.dataclass(frozen=True)
class FullRange(observers.AbsMax):
    """AutoGPTQ's symmetric range: 2 ** bits codes, the zero point in their middle, scale ``2 absmax / (2**bits - 1)``.

    The ends are such that both the scale and the zero point come out without rounding.
    """

    bits: int = 4

    def range(self, x, axes, *, symmetric, roundtrip):
        _, absmax = super().range(x, axes, symmetric=True, roundtrip=roundtrip)
        lo = -absmax * (2**self.bits / (2**self.bits - 1))
        return lo, 2 * absmax + lo

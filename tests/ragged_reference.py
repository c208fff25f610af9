"""What tests of ragged products share: rows of experts, specs, and each row times its expert in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxquant as jq

__all__ = ["SIZES", "by_expert", "grouped"]

SIZES = {  # rows, and those of each expert: odd, none, one, and rows that no expert takes
    "few": (10, (3, 0, 4, 1)),
    "tiles": (300, (130, 0, 0, 150)),
    "one": (257, (0, 1, 256, 0)),
    "none": (5, (0, 0, 0, 0)),
}


def grouped(qtype: str, size: int, **more: Any) -> jq.QuantSpec:
    """A type with a scale for each group of so many codes."""
    return jq.QuantSpec(qtype, granularity="per_group", group_size=size, **more)


def by_expert(x: Any, w: Any, sizes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sums of magnitudes."""
    x, w = (np.asarray(v.dequantize(jnp.float32) if isinstance(v, jq.QTensor) else v, np.float64) for v in (x, w))
    out, terms, start = np.zeros((len(x), w.shape[2])), np.zeros((len(x), w.shape[2])), 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)
        out[rows], terms[rows] = x[rows] @ w[e], np.abs(x[rows]) @ np.abs(w[e])
        start += n
    return out, terms

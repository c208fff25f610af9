"""The Gram matrix of a layer's inputs, prepared for quantizers.

With ``H = sum x x^T`` over the calibration rows, the squared error of a layer's outputs is
``sum |x^T (W - Q)|^2 = tr((W - Q)^T H (W - Q))``. The quantizers need no other statistic of the data.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from jaxquant.core.errors import QuantError, quant_error
from jaxquant.core.finite import not_finite
from jaxquant.core.types import PyTree
from jaxquant.ptq.layer import Layer

__all__ = ["NeedsStatisticsError", "WeightStats", "damped", "gram_of", "lower_factor", "normal"]

WeightStats: TypeAlias = dict[str, PyTree]
"""Statistics of one weight's inputs, by name, as `calibrate` collects them."""


class NeedsStatisticsError(QuantError):
    """Raised by a quantizer that needs statistics of a layer's inputs, if none are given."""


def gram_of(function: str, stats: WeightStats | None, layer: Layer) -> tuple[Layer, jax.Array]:
    """The Gram matrix in `calibrate`'s statistics, [batch, channels, channels], and the layer with that batch.

    Raises:
      QuantError: if it is missing, of another size, or (unless traced) holds NaN or inf.
    """
    known = stats.get("gram") if isinstance(stats, dict) else None
    gram = known.get("gram") if isinstance(known, dict) else None
    if gram is None:
        error = quant_error(
            function,
            "needs the Gram matrix of the inputs",
            todo='Pass stats=calibrate(fn, plan, params, batches, collect={"gram": statistics.Gram()})',
            stats=tuple(stats) if isinstance(stats, dict) else stats,
        )
        raise NeedsStatisticsError(error.text, error.function)
    gram = jnp.asarray(gram)
    if gram.ndim != 3 or gram.shape[1] != gram.shape[2] or layer.length % gram.shape[1]:
        raise quant_error(
            function,
            f"the Gram matrix must be [batch, channels, channels] for {layer.length} contracted elements",
            todo="Take the statistics of this very weight",
            shape=gram.shape,
        )
    if not isinstance(gram, jax.core.Tracer) and not_finite(gram):
        todo = "Find the batch that holds NaN or inf, or inputs beyond 1e19, whose squares overflow"
        raise quant_error(function, "the Gram matrix must be finite", todo=todo, gram=gram)
    return layer.batched(function, gram.shape[0]), gram


def normal(gram: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """``(H, alive)``: a Gram matrix [channels, channels] with mean diagonal 1, for all contracted elements.

    The magnitude of H is divided out, so that inputs may have any magnitude. Dead inputs, which are 0 in all rows, get
    a diagonal of 1 and zeros elsewhere, so their weights are rounded to nearest. A convolution's inputs are known per
    channel: each tap gets the same block, and correlations between taps are left out.
    """
    gram = gram.astype(jnp.float32)
    diagonal = jnp.diagonal(gram)
    alive = ~(diagonal <= 0)  # NaN counts as alive, so that it spreads
    unit = jnp.sum(jnp.where(alive, diagonal, 0)) / jnp.maximum(jnp.sum(alive, dtype=jnp.float32), 1)
    h = gram / jnp.where(unit == 0, 1, unit)
    h = jnp.where(alive[:, None] & alive[None], h, 0) + jnp.diag(jnp.where(alive, 0.0, 1.0))
    taps = layer.length // gram.shape[0]
    if taps > 1:
        h, alive = jnp.kron(jnp.eye(taps, dtype=h.dtype), h), jnp.tile(alive, taps)
    return h, alive


def damped(h: jax.Array, damping: float | jax.Array) -> jax.Array:
    """``H + damping * I``, with damping in units of the mean diagonal, which is 1."""
    return h + damping * jnp.eye(h.shape[0], dtype=h.dtype)


def lower_factor(h: jax.Array, damping: float) -> jax.Array:
    """The lower triangular L with ``L^T L = H + damping I``; the damping grows tenfold until H can be factored.

    L is the Cholesky factor of H with rows and columns in reverse order, reversed and transposed. After 8 attempts
    (from a damping of 0.01, this reaches 1e5) L is NaN; only NaN in H causes this.
    """
    reverse, eye = h[::-1, ::-1], jnp.eye(h.shape[0], dtype=h.dtype)

    def attempt(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        count, _ = state
        return count + 1, jnp.linalg.cholesky(reverse + damping * 10.0**count * eye)

    def failed(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        count, lower = state
        return (count == 0) | (count < 8) & ~jnp.all(jnp.isfinite(lower))

    _, lower = lax.while_loop(failed, attempt, (jnp.float32(0), jnp.zeros_like(h)))
    return lower.T[::-1, ::-1]

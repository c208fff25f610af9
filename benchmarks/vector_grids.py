"""Whether a vector grid pays: the E8P codebook of QuIP# against integers at 2 bits, by output error.

    python benchmarks/vector_grids.py

E8P holds 65536 points of a shifted E8 lattice: 8 weights in 16 bits. They are rounded 8 at a time with the same error
feedback as GPTQ (LDLQ). Integers are `jq.ptq.gptq` and `jq.ptq.descend` with the range of least squared error. All have
one scale for each output, 2 bits for each weight, and come with and without a random rotation of the inputs, which
QuIP# requires. Two layers: the synthetic one of ``ptq_methods.py``, and ``layer_2/up`` of the sentence encoder. A
figure is ``|X (W - Q)| / |X W|`` in percent, on inputs that calibration has not seen. Prints the table, and writes it
to benchmarks/results as text and JSON.

What a product with it costs is not measured: each 8 weights are a lookup in a table of 256 rows, signs and a shift,
where integers are an int8 dot.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import accuracy
import jax
import jax.numpy as jnp
import measure
import numpy as np
import ptq_methods
from jax import lax

import jaxquant as jq
from jaxquant import observers, ptq
from jaxquant.ptq.gram import lower_factor, normal
from jaxquant.ptq.layer import Layer

SIZE = 8
SCALES = np.linspace(0.7, 1.3, 13)
"""Of the codebook, in units of a root mean square of 1; the best by the error on calibration inputs is taken."""


def magnitudes() -> np.ndarray:
    """The 256 vectors of magnitudes of E8P: half-integers of squared length up to 10, and 29 of squared length 12."""
    found = [v for v in itertools.product((0.5, 1.5, 2.5, 3.5), repeat=SIZE) if sum(x * x for x in v) <= 12]
    found.sort(key=lambda v: (sum(x * x for x in v), v))
    short = [v for v in found if sum(x * x for x in v) <= 10]
    return np.array(found[: max(256, len(short))][:256])


def nearest(t: jax.Array, table: jax.Array) -> jax.Array:
    """The nearest point of E8P to each row of ``t`` [rows, 8]: signs such that the sum is even, then +- 1/4."""

    def shifted(shift: float) -> tuple[jax.Array, jax.Array]:
        u = t - shift
        size = jnp.abs(u)
        odd = (jnp.sum(table, axis=1)[None] + jnp.sum(u < 0, axis=1, keepdims=True)) % 2 > 0.5
        flips = size[:, None, :] * table[None]  # what the other sign of an element costs, divided by 4
        cost = jnp.sum(table**2, axis=1)[None] - 2 * size @ table.T + jnp.where(odd, 4 * jnp.min(flips, axis=2), 0)
        best = jnp.argmin(cost, axis=1)
        at = jnp.arange(len(t))
        flipped = odd[at, best][:, None] & (jnp.arange(SIZE)[None] == jnp.argmin(flips[at, best], axis=1)[:, None])
        point = table[best] * jnp.where((u < 0) ^ flipped, -1, 1) + shift
        return point, jnp.sum((t - point) ** 2, axis=1)

    (a, lost_a), (b, lost_b) = shifted(0.25), shifted(-0.25)
    return jnp.where((lost_a < lost_b)[:, None], a, b)


@jax.jit
def ldlq(w: jax.Array, h: jax.Array, table: jax.Array, scale: jax.Array) -> jax.Array:
    """w [inputs, outputs] rounded 8 inputs at a time, errors made up for by those that are still to come."""
    layer = Layer(w.shape, (-2,), jq.QuantSpec("int2"))
    factor = lower_factor(normal(h, layer)[0], 0.01)

    def step(state: tuple[jax.Array, jax.Array], start: jax.Array) -> Any:
        errors, out = state
        own = lax.dynamic_slice_in_dim(w, start, SIZE)
        rows = lax.dynamic_slice_in_dim(factor, start, SIZE)
        square = lax.dynamic_slice_in_dim(rows, start, SIZE, 1)
        target = own + jnp.linalg.solve(square, rows @ errors)
        values = nearest((target / scale).T, table).T * scale
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return (put(errors, own - values), put(out, values)), None

    zero = jnp.zeros_like(w)
    return lax.scan(step, (zero, zero), jnp.arange(0, len(w), SIZE))[0][1]


def lost(w: jax.Array, q: Any, h: jax.Array) -> float:
    """Relative error of the outputs in percent."""
    exact, found, gram = (np.asarray(a, np.float64) for a in (w, q, h))
    off = exact - found
    return float(100 * np.sqrt(np.sum(off * (gram @ off)) / np.sum(exact * (gram @ exact))))


def row(w: jax.Array, seen: jax.Array, unseen: jax.Array) -> dict[str, float]:
    """Error of each method on one layer."""
    table, unit = jnp.asarray(magnitudes(), jnp.float32), jnp.sqrt(jnp.mean(w**2, axis=0, keepdims=True))
    stats = {"gram": {"gram": seen[None], "rows": jnp.float32(1)}}
    spec = jq.QuantSpec("int2", symmetric=False, calibration=observers.MSE())
    out = {}
    for name, method in (("int2 gptq", ptq.gptq), ("int2 descend", ptq.descend)):
        q = method(w, spec, reduce_axes=(-2,), stats=stats)
        out[name] = lost(w, q.dequantize(), unseen)
    tried = [ldlq(w, seen, table, unit * float(s)) for s in SCALES]
    out["E8P LDLQ"] = lost(w, min(tried, key=lambda q: lost(w, q, seen)), unseen)
    return out


def main() -> None:
    x, new, w = ptq_methods.layer()
    layers = {"synthetic": (w, x.T @ x, new.T @ new)}
    encoder = accuracy.Encoder(200, 8, 0)
    path = next(p for p in encoder.plan(jq.recipes.w8a16()) if "layer_2/up" in p)
    halves = [[(t[i::2], m[i::2]) for t, m in encoder.batches] for i in range(2)]
    plan, collect = encoder.plan(jq.recipes.w8a16()), {"gram": jq.calibration.Gram()}
    first, second = (
        jq.calibrate(encoder.apply, plan, encoder.params, b, collect=collect)[path]["gram"]["gram"][0] for b in halves
    )
    kernel = jq.core.paths.leaves_with_paths(encoder.params)[0][path]
    layers["layer_2/up"] = (np.asarray(kernel), np.asarray(first), np.asarray(second))
    rows: dict[str, dict[str, float]] = {}
    for name, (weight, *grams) in layers.items():
        weight, seen, unseen = (jnp.asarray(a, jnp.float32) for a in (weight, *grams))
        turn = ptq.bases.Rotation.random(jax.random.key(0), len(weight))
        rows[name] = row(weight, seen, unseen)
        rotated = [turn.inputs(turn.inputs(g).T) for g in (seen, unseen)]
        rows[f"{name}, rotated"] = row(turn.weights(weight), *rotated)
    names = list(next(iter(rows.values())))
    cells = [[name, *(f"{r[n]:.2f}" for n in names)] for name, r in rows.items()]
    about = measure.machine()
    text = f"{measure.header(about)}\n\n{measure.table(('output error, %, at 2 bits', *names), cells)}"
    print(text)
    measure.keep("vector_grids", text, {"machine": about, "rows": rows}, measure.RESULTS)


if __name__ == "__main__":
    main()

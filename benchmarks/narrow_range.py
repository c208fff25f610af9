"""What the lowest code of a symmetric integer is worth: the range of round to nearest, by width and group.

    python benchmarks/narrow_range.py

    narrow   -qmax .. qmax, scale absmax / qmax
    absmax   the whole range, scale absmax / (qmax + 1/2)
    whole    the whole range, each end half a step beyond its last code, or on it where the block is on codes
    signed   the whole range, the largest magnitude at the lowest code: what a scale of either sign would give

A figure is ``|W - Q| / |W|`` in percent, of normal and of Laplace weights, and of the kernels of the MLP of the demo
trained on handwritten digits; of that, the mean Kullback-Leibler divergence of its outputs on the test images too, in
1e-5 nats. Prints the table, and writes it to benchmarks/results as text and JSON. ``signed`` is computed here, since
scales that are computed are positive.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import measure

import jaxquant as jq
from jaxquant import observers
from jaxquant.demo import digits

WAYS: dict[str, dict[str, Any]] = {
    "narrow": {"narrow_range": True},
    "absmax": {"narrow_range": False, "calibration": observers.AbsMax()},
    "whole": {"narrow_range": False},
}
WIDTHS, GROUPS = (2, 3, 4, 5, 6, 7, 8), (32, 128, None)


def rounded(w: jax.Array, bits: int, group: int | None, way: str) -> jax.Array:
    """A weight [contracted, outputs], rounded to nearest."""
    group = None if group is None else math.gcd(group, len(w))
    if way == "signed":
        x = w.reshape(-1, group or len(w), w.shape[1])
        lo, hi = jnp.min(x, 1, keepdims=True), jnp.max(x, 1, keepdims=True)
        half = 1 << (bits - 1)
        scale = jnp.where(-lo > hi, -lo, -hi) / half
        scale = jnp.where(scale == 0, 1, scale)
        return (jnp.clip(jnp.rint(x / scale), -half, half - 1) * scale).reshape(w.shape)
    spec = jq.QuantSpec(f"int{bits}", granularity=jq.PerGroup(group) if group else jq.PerChannel(), **WAYS[way])
    return jq.quantize(w, spec, reduce_axes=(-2,)).dequantize()


def error(weights: list[jax.Array], *how: Any) -> float:
    """In percent."""
    lost = sum(float(jnp.sum((rounded(w, *how) - w) ** 2)) for w in weights)
    return 100 * math.sqrt(lost / sum(float(jnp.sum(w**2)) for w in weights))


def main() -> None:
    measure.pin()
    shape, key = (1024, 512), jax.random.key(0)
    data, model = digits.load(), digits.MLP()
    params = digits.train(digits.quantized(model, None), digits.init(model, data, 0), data, digits.FLOAT, seed=0).params
    leaves, treedef = jax.tree.flatten(params)
    logits = digits.logits(model)
    truth = jax.nn.log_softmax(logits(params, data.test_images))

    def divergence(*how: Any) -> float:
        new = [rounded(w, *how) if w.ndim == 2 else w for w in leaves]
        found = jax.nn.log_softmax(logits(jax.tree.unflatten(treedef, new), data.test_images))
        return 1e5 * float(jnp.mean(jnp.sum(jnp.exp(truth) * (truth - found), axis=-1)))

    sources = {
        "normal": [jax.random.normal(key, shape)],
        "Laplace": [jax.random.laplace(key, shape)],
        "digits": [w for w in leaves if w.ndim == 2],
    }
    rows = []
    for source, weights in sources.items():
        for bits in WIDTHS:
            for group in GROUPS:
                row: dict[str, Any] = {"weights": source, "bits": bits, "group": group}
                for way in (*WAYS, "signed"):
                    row[way] = round(error(weights, bits, group, way), 3)
                    if source == "digits":
                        row[f"{way} KL"] = round(divergence(bits, group, way), 2)
                rows.append(row)
    names = (*WAYS, "signed", *(f"{way} KL" for way in (*WAYS, "signed")))
    cells = [
        [f"{r['weights']}, {r['group'] or 'channel'}, int{r['bits']}", *(str(r.get(name, "")) for name in names)]
        for r in rows
    ]
    about = measure.machine()
    text = f"{measure.header(about)}\n\n{measure.table(('error, %; KL, 1e-5 nats', *names), cells)}"
    print(text)
    measure.keep("narrow_range", text, {"machine": about, "rows": rows}, measure.RESULTS)


if __name__ == "__main__":
    main()

"""A step of quantization-aware training from abstract weights: what it costs on a TPU, as its compiler estimates it.

`python benchmarks/accelerators.py --training` runs this. Two decoder layers of the shapes of Llama 3 8B, two sequences
of 2,048 tokens: the loss, the gradients of all weights in bfloat16, and a step of SGD. Attention is JAX's own kernel in
all programs, forward and backward (`attention.py`). Nothing is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import attention
import decoders
import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import recipes
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

RULES = {"bfloat16": None, "W8A8": recipes.w8a8(), "W8A8, int8 gradients": recipes.w8a8g8()}
LAYERS, BATCH, TOKENS = 2, 2, 2048


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step: milliseconds, and bytes of temporaries."""

    chip: str
    scheme: str
    by: str
    ms: float | None
    floor_ms: float
    temporaries: int
    missing: str = ""


def loss(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Of two layers: the mean square of what they make of x, [batch, tokens, width]."""
    m = decoders.LLAMA_8B
    for p in params:
        h = decoders.norm(x, p["norm_attention"])
        q, k, v = (attention.heads(h @ p[n], count) for n, count in (("q", m.heads), ("k", m.cached), ("v", m.cached)))
        x = x + attention.joined(attention.causal(q, k, v)) @ p["o"]
        h = decoders.norm(x, p["norm_mlp"])
        x = x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]
    return jnp.mean(x.astype(jnp.float32) ** 2)


def arguments() -> tuple[list[dict[str, Any]], Any]:
    """Abstract weights of each layer, and the activation."""
    m = decoders.LLAMA_8B
    layers = m.params()["layers"]
    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layers)
    return [one] * LAYERS, jax.ShapeDtypeStruct((BATCH, TOKENS, m.width), jnp.bfloat16)


def cells(chips: tuple[str, ...]) -> Iterator[Cell]:
    """Every scheme on every chip."""
    params, x = arguments()
    for chip in chips:
        for scheme, spec in RULES.items():
            fn = loss
            if spec is not None:
                plan = jq.make_plan(loss, params, x, rules=[jq.Rule("norm", None), jq.Rule(".*", spec)])
                fn = jq.quantized(loss, plan)

            def step(params: Any, x: Any, fn: Any = fn) -> Any:
                value, grads = jax.value_and_grad(fn)(params, x)
                return value, jax.tree.map(lambda p, g: p - jnp.asarray(1e-3, p.dtype) * g, params, grads)

            found = estimate(compiled_for("accelerators", chip, step, (params, x)))
            ms = None if found.seconds is None else found.seconds * 1e3
            by = "bfloat16" if spec is None else "jaxquant"
            yield Cell(chip, scheme, by, ms, found.floor * 1e3, found.temporaries, found.missing)


def table(found: list[Cell]) -> str:
    """Estimates, and what they are of the bfloat16 step's."""
    whole = {c.chip: c for c in found if c.by == "bfloat16"}
    lines = [f"{'':34}{'ms (floor)':>20}{'of bfloat16':>14}{'temporaries, GB':>18}"]
    for c in found:
        base = whole[c.chip]
        share = f"{c.ms / base.ms:.2f}" if c.ms is not None and base.ms is not None else "-"
        time = f"{c.ms:.1f} ({c.floor_ms:.1f})" if c.ms is not None else c.missing[:18]
        lines.append(f"{c.chip + ', ' + c.scheme:34}{time:>20}{share:>14}{c.temporaries / 1e9:>18.2f}")
    return "\n".join(lines)

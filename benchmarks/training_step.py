"""A step of quantization-aware training from abstract weights: what it costs on a TPU, as its compiler estimates it.

`python benchmarks/accelerators.py --training` runs this. Two decoder layers of the shapes of Llama 3 8B, two sequences
of 2,048 tokens: the loss, the gradients of all weights in bfloat16, and a step of SGD. Attention is JAX's kernels in
all programs, forwards and backwards (`attention.py`). Nothing is run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import attention
import decoders
import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant import recipes
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate
from jaxquant.programs.hlo import Program

RULES = {"W8A8": recipes.w8a8(), "W8A8, int8 gradients": recipes.w8a8g8()}
PEER = {"W8A8": None, "W8A8, int8 gradients": "int8"}  # number type of gradients
LAYERS, BATCH, TOKENS = 2, 2, 2048


@dataclasses.dataclass(frozen=True)
class Cell:
    """One step: milliseconds, bytes of temporaries, and bytes that the forward pass hands to the backward pass."""

    chip: str
    scheme: str
    by: str
    ms: float | None = None
    floor_ms: float | None = None
    temporaries: int | None = None
    handed: float = 0.0
    missing: str = ""


def loss(x: jax.Array, weight: Callable[[int, str], jax.Array], dot: Callable[..., jax.Array]) -> jax.Array:
    """The mean square of what the layers make of x, [batch, tokens, width].

    Args:
      x: the activation.
      weight: a weight by its layer and name.
      dot: an activation times a weight, by its layer and name.
    """
    m = decoders.LLAMA_8B
    for i in range(LAYERS):
        h = decoders.norm(x, weight(i, "norm_attention"))
        q, k, v = (attention.heads(dot(h, i, n), c) for n, c in (("q", m.heads), ("k", m.cached), ("v", m.cached)))
        x = x + dot(attention.joined(attention.causal(q, k, v)), i, "o")
        h = decoders.norm(x, weight(i, "norm_mlp"))
        x = x + dot(jax.nn.silu(dot(h, i, "gate")) * dot(h, i, "up"), i, "down")
    return jnp.mean(x.astype(jnp.float32) ** 2)


def plain_loss(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """`loss` of weights that are arrays."""
    return loss(x, lambda i, name: params[i][name], lambda x, i, name: x @ params[i][name])


def arguments() -> tuple[list[dict[str, Any]], Any]:
    """Abstract weights of each layer, and the activation."""
    m = decoders.LLAMA_8B
    layers = m.params()["layers"]
    one = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), layers)
    return [one] * LAYERS, jax.ShapeDtypeStruct((BATCH, TOKENS, m.width), jnp.bfloat16)


def our_program(spec: jq.OpSpec) -> tuple[Callable[..., jax.Array], Any]:
    params, x = arguments()
    plan = jq.make_plan(plain_loss, params, x, rules=[jq.Rule("norm", None), jq.Rule(".*", spec)])
    return jq.quantized(plain_loss, plan), params


def qwix_program(gradient: str | None) -> tuple[Callable[..., jax.Array], Any]:
    """By its provider for training, which intercepts the products of Flax's layers."""
    import flax.linen as nn
    import qwix

    (shapes, *_), x = arguments()

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            ones = nn.initializers.ones

            def dot(x: jax.Array, i: int, name: str) -> jax.Array:
                columns = shapes[name].shape[1]
                return nn.Dense(columns, use_bias=False, param_dtype=jnp.bfloat16, name=f"{name}_{i}")(x)

            def weight(i: int, name: str) -> jax.Array:
                return self.param(f"{name}_{i}", ones, shapes[name].shape, jnp.bfloat16)

            return loss(x, weight, dot)

    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype=gradient, op_names=("dot_general",))
    model: Any = qwix.quantize_model(Layers(), qwix.QtProvider([rule]))
    return model.apply, jax.eval_shape(model.init, jax.random.key(0), x)


def measured(chip: str, scheme: str, by: str) -> Cell:
    """Compiles one step and reads it."""
    _, x = arguments()
    if by == "bfloat16":
        fn, params = plain_loss, arguments()[0]
    else:
        fn, params = our_program(RULES[scheme]) if by == "jaxquant" else qwix_program(PEER[scheme])

    def step(params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(fn)(params, x)
        return value, jax.tree.map(lambda p, g: p - jnp.asarray(1e-3, p.dtype) * g, params, grads)

    found = estimate(compiled_for("accelerators", chip, step, (params, x)))
    ms = None if found.seconds is None else found.seconds * 1e3
    return Cell(chip, scheme, by, ms, found.floor * 1e3, found.temporaries, handed(chip, fn, params, x), found.missing)


def handed(chip: str, fn: Callable[..., jax.Array], params: Any, x: Any) -> float:
    """Bytes of the arrays that a forward pass makes and the compiled backward pass reads.

    The two are programs of their own, as they are where layers are scanned. Arguments of the function count nothing;
    codes that three products share count three times, though a scan keeps them once.
    """

    def forward(params: Any, x: Any) -> Any:
        return jax.vjp(fn, params, x)

    jaxpr, (value, back) = jax.make_jaxpr(forward, return_shape=True)(params, x)
    leaves, tree = jax.tree.flatten(back)
    made = jaxpr.jaxpr.outvars[len(jax.tree.leaves(value)) :]
    program = compiled_for("accelerators", chip, lambda leaves, g: jax.tree.unflatten(tree, leaves)(g), (leaves, value))
    hlo = Program(program.executable.as_text())
    read = [bool(hlo.users[hlo.entry, hlo.parameter(hlo.entry, i)]) for i in range(len(leaves))]
    kept = {v: leaf for v, leaf, is_read in zip(made, leaves, read, strict=True) if is_read}
    return float(sum(leaf.size * leaf.dtype.itemsize for v, leaf in kept.items() if v not in jaxpr.jaxpr.invars))


def cells(chips: tuple[str, ...]) -> Iterator[Cell]:
    """Every scheme on every chip."""
    peers = ("jaxquant", "qwix") if importlib.util.find_spec("qwix") is not None else ("jaxquant",)
    for chip in chips:
        yield measured(chip, "bfloat16", "bfloat16")
        for scheme in RULES:
            for by in peers:
                try:
                    yield measured(chip, scheme, by)
                except Exception as e:
                    if by != "qwix":
                        raise
                    yield Cell(chip, scheme, by, missing=(str(e).splitlines() or [type(e).__name__])[0][:200])


def table(found: list[Cell]) -> str:
    """Estimates, and what they are of the bfloat16 step's."""
    whole = {c.chip: c for c in found if c.by == "bfloat16"}
    lines = [f"{'':44}{'ms (floor)':>20}{'of bfloat16':>14}{'temporaries, GB':>18}{'handed on, GB':>16}"]
    for c in found:
        name = ", ".join(dict.fromkeys((c.chip, c.scheme, c.by)))
        if c.ms is None or c.floor_ms is None or c.temporaries is None:
            lines.append(f"{name:44}{'-':>20}   {c.missing}")
            continue
        base = whole[c.chip].ms
        share = f"{c.ms / base:.2f}" if base is not None else "-"
        lines.append(f"{name:44}{f'{c.ms:.1f} ({c.floor_ms:.1f})':>20}{share:>14}{c.temporaries / 1e9:>18.2f}{c.handed / 1e9:>16.2f}")
    return "\n".join(lines)

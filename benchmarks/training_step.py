"""A step of quantization-aware training from abstract weights: what it costs on a TPU, as its compiler estimates it.

`python benchmarks/accelerators.py --training` runs this. Two decoder layers of the shapes of Llama 3 8B, two sequences
of 2,048 tokens: the loss, the gradients of all weights in bfloat16, and a step of SGD. Attention is JAX's kernels in
all programs, forwards and backwards (`attention.py`). Also the memory of a step that scans its layers. Nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
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
STACK = 4  # layers of the scan


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


def one_layer(
    x: jax.Array, weight: Callable[[str], jax.Array], dot: Callable[[jax.Array, str], jax.Array]
) -> jax.Array:
    """A decoder layer of x, [batch, tokens, width].

    Args:
      x: the activation.
      weight: a weight by its name.
      dot: an activation times a weight, by its name.
    """
    m = decoders.LLAMA_8B
    h = decoders.norm(x, weight("norm_attention"))
    q, k, v = (attention.heads(dot(h, n), c) for n, c in (("q", m.heads), ("k", m.cached), ("v", m.cached)))
    x = x + dot(attention.joined(attention.causal(q, k, v)), "o")
    h = decoders.norm(x, weight("norm_mlp"))
    return x + dot(jax.nn.silu(dot(h, "gate")) * dot(h, "up"), "down")


def mean_square(x: jax.Array) -> jax.Array:
    """The loss of an activation."""
    return jnp.mean(x.astype(jnp.float32) ** 2)


def loss(x: jax.Array, weight: Callable[[int, str], jax.Array], dot: Callable[..., jax.Array]) -> jax.Array:
    """The mean square of what the layers make of x; ``weight`` and ``dot`` take the number of a layer first."""
    for i in range(LAYERS):
        x = one_layer(x, functools.partial(weight, i), lambda x, name, i=i: dot(x, i, name))
    return mean_square(x)


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


def stepped(fn: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A step of SGD on a loss: its value, and new parameters."""

    def step(params: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(fn)(params, x)
        return value, jax.tree.map(lambda p, g: p - jnp.asarray(1e-3, p.dtype) * g, params, grads)

    return step


def measured(chip: str, scheme: str, by: str) -> Cell:
    """Compiles one step and reads it."""
    _, x = arguments()
    if by == "bfloat16":
        fn, params = plain_loss, arguments()[0]
    else:
        fn, params = our_program(RULES[scheme]) if by == "jaxquant" else qwix_program(PEER[scheme])

    found = estimate(compiled_for("accelerators", chip, stepped(fn), (params, x)))
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


def scanned(chips: tuple[str, ...]) -> str:
    """Temporaries of steps whose layers are scanned."""
    lines = [f"\n{f'{STACK} layers in a scan':44}{'temporaries, GB':>18}"]
    for chip in chips:
        for name, spec in {"bfloat16": None, **RULES}.items():
            lines.append(f"{f'{chip}, {name}':44}{scanned_temporaries(chip, spec) / 1e9:>18.2f}")
    return "\n".join(lines)


def scanned_temporaries(chip: str, spec: jq.OpSpec | None) -> int:
    """Bytes of temporaries of the same step where a scan runs over four layers, gradients included."""
    params, x = arguments()
    stack = jax.tree.map(lambda w: jax.ShapeDtypeStruct((STACK, *w.shape), w.dtype), params[0])

    def whole(stack: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return one_layer(x, params.__getitem__, lambda x, name: x @ params[name]), None

        return mean_square(jax.lax.scan(layer, x, stack)[0])

    fn: Callable[..., jax.Array] = whole
    if spec is not None:
        fn = jq.quantized(whole, jq.make_plan(whole, stack, x, rules=[jq.Rule("norm", None), jq.Rule(".*", spec)]))
    return compiled_for("accelerators", chip, stepped(fn), (stack, x)).executable.memory_analysis().temp_size_in_bytes


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
        memory = f"{c.temporaries / 1e9:>18.2f}{c.handed / 1e9:>16.2f}"
        lines.append(f"{name:44}{f'{c.ms:.1f} ({c.floor_ms:.1f})':>20}{share:>14}{memory}")
    return "\n".join(lines)

"""Whole decoders from abstract weights: what a step costs on a chip, as its compiler estimates it.

`python benchmarks/accelerators.py --models` runs this. Shapes are those of Llama 3 (8B, 70B) and Mixtral 8x7B; there
are no values, and nothing is run. A step is the decoding of one token per sequence with 2,048 tokens cached, this one
too, or the prefill of 2,048 tokens. Layers are stacked, and a `jax.lax.scan` goes through them. A cache is donated:
decoding writes one key and value per head into it. Keys and values of a prefill are results. Attention is the same in
all programs (`attention.py`). Tokens of a mixture are sorted by their experts, which a ragged product multiplies; in
bfloat16 every expert multiplies every token instead.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import attention
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import recipes
from jaxquant.programs.chips import CHIPS
from jaxquant.programs.compilers import compiled_for
from jaxquant.programs.estimates import estimate

TOKENS = 2048
ALL = ("heads", "rest")  # the axes of a mesh
CACHE = P(None, None, "heads")
RULES = {
    "W8A8": recipes.w8a8(),
    "W8A16": recipes.w8a16(),
    "W4A16": recipes.w4a16(128),
    "W4A8": recipes.w4a8(128),
}
PEER = {"W8A8": ("int8", "int8", None), "W8A16": ("int8", None, None), "W4A16": ("int4", None, 128)}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder."""

    name: str
    layers: int
    width: int
    heads: int
    cached: int
    head: int
    hidden: int
    vocabulary: int
    experts: int = 0

    def params(self) -> dict[str, Any]:
        """Abstract bfloat16 weights, stacked by layers, inputs before outputs."""
        d, e = self.width, (self.experts,) if self.experts else ()
        stacked = {
            "q": (d, self.heads * self.head),
            "k": (d, self.cached * self.head),
            "v": (d, self.cached * self.head),
            "o": (self.heads * self.head, d),
            "gate": (*e, d, self.hidden),
            "up": (*e, d, self.hidden),
            "down": (*e, self.hidden, d),
            "norm_attention": (d,),
            "norm_mlp": (d,),
        }
        if self.experts:
            stacked["norm_router"] = (d, self.experts)  # small, and left in float
        one = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
        layers = {name: one(self.layers, *shape) for name, shape in stacked.items()}
        return {"embed": one(self.vocabulary, d), "head": one(d, self.vocabulary), "norm": one(d), "layers": layers}

    def specs(self) -> dict[str, Any]:
        """How the weights lie over `mesh`: outputs first, then inputs; experts by their hidden axis."""
        e = (None,) if self.experts else ()
        layers = {
            "q": P(None, None, ALL),
            **dict.fromkeys("kv", P(None, None, "heads")),
            "o": P(None, ALL, None),
            **dict.fromkeys(("gate", "up"), P(None, *e, None, ALL)),
            "down": P(None, *e, ALL, None),
            **dict.fromkeys(("norm_attention", "norm_mlp"), P()),
        }
        if self.experts:
            layers["norm_router"] = P()
        return {"embed": P(None, ALL), "head": P(None, ALL), "norm": P(), "layers": layers}

    def mesh(self, devices: int) -> AbstractMesh | None:
        """Devices that share the heads of keys and values; where there are more, several have the same of them."""
        heads = math.gcd(devices, self.cached)
        return AbstractMesh((heads, devices // heads), ALL) if devices > 1 else None

    def cache(self, batch: int) -> tuple[Any, Any]:
        """Abstract keys and values, [layers, batch, heads, tokens, width of a head] and with the last two swapped."""
        shape = self.layers, batch, self.cached
        keys = jax.ShapeDtypeStruct((*shape, TOKENS, self.head), jnp.bfloat16)
        return keys, jax.ShapeDtypeStruct((*shape, self.head, TOKENS), jnp.bfloat16)


LLAMA_8B = Decoder("Llama 3 8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B = Decoder("Llama 3 70B", 80, 8192, 64, 8, 128, 28672, 128256)
MIXTRAL = Decoder("Mixtral 8x7B", 32, 4096, 32, 8, 128, 14336, 32000, experts=8)

Dot = Callable[[jax.Array, Any], jax.Array]


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    return wide.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def mlp(x: jax.Array, p: dict[str, Any], dot: Dot) -> jax.Array:
    return dot(jax.nn.silu(dot(x, p["gate"])) * dot(x, p["up"]), p["down"])


def every_expert(x: jax.Array, p: dict[str, Any]) -> jax.Array:
    """A mixture in which all experts multiply all tokens, and the results are weighted."""
    flat = x.reshape(-1, x.shape[-1])
    scores = flat @ p["norm_router"]
    top, chosen = lax.top_k(scores.astype(jnp.float32), 2)
    shares = jax.nn.one_hot(chosen, scores.shape[-1]) * jax.nn.softmax(top, axis=-1)[..., None]
    dots = lambda x, w: jnp.einsum("emk,ekn->emn", x, w)  # noqa: E731
    every = jnp.broadcast_to(flat, (scores.shape[-1], *flat.shape))
    hidden = jax.nn.silu(dots(every, p["gate"])) * dots(every, p["up"])
    out = jnp.einsum("em,emd->md", shares.sum(axis=1).T.astype(x.dtype), dots(hidden, p["down"]))
    return out.reshape(x.shape)


def chosen_experts(x: jax.Array, p: dict[str, Any]) -> jax.Array:
    """The same mixture with tokens sorted by their experts, which a ragged product multiplies."""
    flat = x.reshape(-1, x.shape[-1])
    scores = (flat @ p["norm_router"]).astype(jnp.float32)
    top, chosen = lax.top_k(scores, 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=scores.shape[-1])
    rows = jnp.take(flat, order // 2, axis=0)
    hidden = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
    share = jnp.take(jax.nn.softmax(top, axis=-1).reshape(-1), order).astype(x.dtype)
    out = lax.ragged_dot(hidden, p["down"], sizes) * share[:, None]
    return jnp.zeros_like(flat).at[order // 2].add(out).reshape(x.shape)


def step(m: Decoder, dot: Dot, mesh: AbstractMesh | None = None, *, ragged: bool = True) -> Callable[..., Any]:
    """``(params, tokens, cache, place) -> logits of the last token, the cache``; a prefill has no cache, and makes it.

    Over a mesh each device computes its heads, its part of the hidden axis and its logits, in a `jax.shard_map`: XLA
    divides no kernel by itself. Partial sums of the two products that end a layer's halves are added in their dtype.
    """
    mixture = chosen_experts if ragged else every_expert
    summed = (lambda x: x) if mesh is None else functools.partial(lax.psum, axis_name=ALL)

    def layer(x: jax.Array, p: dict[str, Any], attend: Callable[..., Any]) -> tuple[jax.Array, Any]:
        h = norm(x, p["norm_attention"])
        q, k, v = (dot(h, p[name]) for name in "qkv")
        mixed, cache = attend(*(attention.heads(y, y.shape[-1] // m.head) for y in (q, k, v)))
        x = x + summed(dot(attention.joined(mixed), p["o"]))
        h = norm(x, p["norm_mlp"])
        return x + summed(mixture(h, p) if m.experts else mlp(h, p, dot)), cache

    def prefill(x: jax.Array, p: dict[str, Any]) -> Any:
        return layer(x, p, lambda q, k, v: (attention.causal(q, k, v), (k, v)))

    def decode(x: jax.Array, layers: dict[str, Any], cache: Any, place: jax.Array) -> Any:
        def body(carry: Any, at: Any) -> Any:
            (x, cache), (i, p) = carry, at
            return layer(x, p, lambda q, k, v: attention.cached(q, k, v, cache, place, i)), None

        return lax.scan(body, (x, cache), (jnp.arange(m.layers), layers))[0]

    def run(params: dict[str, Any], tokens: jax.Array, cache: Any = None, place: Any = None) -> Any:
        x = jnp.take(params["embed"], tokens, axis=0)
        x = x if mesh is None else lax.all_gather(x, ALL, axis=2, tiled=True)
        layers = params["layers"]
        x, cache = lax.scan(prefill, x, layers) if cache is None else decode(x, layers, cache, place)
        return dot(norm(x[:, -1:], params["norm"]), params["head"]), cache

    if mesh is None:
        return run

    def over_devices(params: dict[str, Any], tokens: jax.Array, *cached: Any) -> Any:
        specs = (m.specs(), P(), *((CACHE,) * 2, P())[: len(cached)])
        made = P(None, None, ALL), (CACHE,) * 2
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=made, check_vma=False)(params, tokens, *cached)

    return over_devices


def plain(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def our_program(spec: jq.OpSpec, target: str, fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Any:
    rules = [jq.Rule("norm|embed", None), jq.Rule(".*", spec)]
    plan = jq.make_plan(fn, params, *args, rules=rules)
    platform = "tpu" if target.startswith("tpu") else "gpu"
    quantized = jax.eval_shape(lambda p: jq.quantize_params(p, plan, target=platform), params)
    return jq.quantized(fn, plan), quantized


def qwix_program(m: Decoder, scheme: str, params: Any) -> Any:
    import qwix

    weight, act, group = PEER[scheme]

    def quantized(x: jax.Array, qtype: str, channels: list[int], along: int) -> Any:
        return qwix.quantize(x, qtype, channelwise_axes=channels, tiled_axes={} if group is None else {along: group})

    def dot(x: jax.Array, w: Any) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        left = flat if act is None else quantized(flat, act, [0], 1)
        out = qwix.dot_general(left, w, (((1,), (0,)), ((), ()))).astype(x.dtype)
        return out.reshape(*x.shape[:-1], -1)

    def of(path: Any, w: Any) -> Any:
        name = path[-1].key
        if "norm" in name or name == "embed":
            return w
        wide = jax.ShapeDtypeStruct(w.shape, jnp.float32)  # its scales are float32 then, and faster
        one = lambda w: quantized(w, weight, [1], 0)  # noqa: E731
        return jax.eval_shape(jax.vmap(one) if name != "head" else one, wide)

    return step(m, dot), jax.tree_util.tree_map_with_path(of, params)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program on one chip or slice."""

    model: str
    target: str
    devices: int
    scheme: str
    by: str
    step: str
    ms: float | None
    floor_ms: float | None
    gigabytes: float | None
    fits: bool | None
    missing: str = ""


def cells(cases: Any, schemes: Collection[str], by: Collection[str]) -> Iterator[Cell]:
    """Every program of the cases: (model, target, devices, batches; 0 for the prefill), by those who are asked for."""
    for m, target, devices, batches in cases:
        for batch in batches:
            for scheme, who in [("bfloat16", "bfloat16"), *((s, b) for s in schemes for b in ("jaxquant", "qwix"))]:
                if who == "qwix" and (scheme not in PEER or m.experts or devices > 1):
                    continue
                if who in by:
                    yield measured(m, target, devices, batch, scheme, who)


def measured(m: Decoder, target: str, devices: int, batch: int, scheme: str, by: str) -> Cell:
    prefill = batch == 0
    name = f"prefill {TOKENS}" if prefill else f"decode {batch}"
    params, mesh = m.params(), m.mesh(devices)
    fn = step(m, plain, mesh, ragged=by != "bfloat16")
    tokens = jax.ShapeDtypeStruct((1, TOKENS) if prefill else (batch, 1), jnp.int32)
    args: tuple[Any, ...] = (tokens,) if prefill else (tokens, m.cache(batch), jax.ShapeDtypeStruct((), jnp.int32))
    blank = Cell(m.name, target, devices, scheme, by, name, None, None, None, None)
    try:
        if mesh is not None:
            place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
            args = args if prefill else (args[0], tuple(place(x, CACHE) for x in args[1]), args[2])
        if by == "jaxquant":
            fn, params = our_program(RULES[scheme], target, fn, params, args)
        elif by == "qwix":
            fn, params = qwix_program(m, scheme, params)
        if mesh is not None:
            where = jax.tree.map(lambda s: NamedSharding(mesh, s), m.specs(), is_leaf=lambda s: isinstance(s, P))
            where = jq.ops.shardings(params, where)
            params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, where)
        found = estimate(compiled_for("accelerators", target, fn, (params, *args), donated=() if prefill else (2,)))
    except Exception as e:
        if "RESOURCE_EXHAUSTED" in str(e) and m.layers % 4 == 0:
            return _extrapolated(m, target, devices, batch, scheme, by)
        return dataclasses.replace(blank, missing=f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:200])
    needed = found.arguments + found.results + found.temporaries
    chip = CHIPS[target.split(":")[0]]
    return dataclasses.replace(
        blank,
        ms=None if found.seconds is None else found.seconds * 1e3,
        floor_ms=found.floor * 1e3,
        gigabytes=needed / 1e9,
        fits=needed <= chip.memory,
        missing=found.missing,
    )


def _extrapolated(m: Decoder, target: str, devices: int, batch: int, scheme: str, by: str) -> Cell:
    """The cell of a program that does not fit, extrapolated from a quarter and half of its layers."""
    few, some = (
        measured(dataclasses.replace(m, layers=m.layers // n), target, devices, batch, scheme, by) for n in (4, 2)
    )

    def whole(of: str) -> Any:
        a, b = getattr(few, of), getattr(some, of)
        return None if a is None or b is None else b + 2 * (b - a)

    figures = {name: whole(name) for name in ("ms", "floor_ms", "gigabytes")}
    missing = some.missing or "does not fit: from a quarter and half of the layers"
    return dataclasses.replace(some, **figures, fits=False, missing=missing)


def tables(found: list[Cell]) -> str:
    """One table for each model and slice."""
    lines: list[str] = []
    for model, target, devices in dict.fromkeys((c.model, c.target, c.devices) for c in found):
        here = [c for c in found if (c.model, c.target, c.devices) == (model, target, devices)]
        steps = list(dict.fromkeys(c.step for c in here))
        at = {(c.scheme, c.by, c.step): c for c in here}
        many = "" if devices == 1 else f", {devices} devices"
        lines += ["", f"{model}, {target}{many}: estimated ms of a step (floor), GB on a device; * does not fit", ""]
        lines.append(f"{'':20}" + "".join(f"{s:>26}" for s in steps))
        for scheme, by in dict.fromkeys((c.scheme, c.by) for c in here):
            texts = []
            for s in steps:
                c = at.get((scheme, by, s))
                if c is None or c.gigabytes is None:
                    texts.append(f"{'-':>26}")
                    continue
                ms = "-" if c.ms is None else f"{c.ms:.1f}"
                texts.append(f"{f'{ms} ({c.floor_ms:.1f}), {c.gigabytes:.1f}' + ('' if c.fits else '*'):>26}")
            lines.append(f"{scheme if by == 'bfloat16' else f'{scheme}, {by}':20}" + "".join(texts))
    missing = dict.fromkeys((c.model, c.scheme, c.by, c.step, c.missing) for c in found if c.missing)
    return "\n".join([*lines, "", *(", ".join(m[:4]) + f": {m[4]}" for m in missing)]).strip() + "\n"


PREFACE = """# Which scheme for which chip

Time and memory of one step of a decoder, as the compilers of the chips estimate them. No program was run, and
only the shapes of the weights are used. The command `python benchmarks/accelerators.py --models --json FILE --keep
--page docs/which-scheme.md` writes this page (PACKAGES); all figures are in `benchmarks/results/decoders.json`.

A step is the decoding of one token for each sequence of a batch, with TOKENS tokens cached in bfloat16, this one too,
or the prefill of TOKENS tokens. The cache is donated: a step writes one token into it. The estimate is the longer of
the compiler's cycles, and of moving arguments, results and (twice) temporaries at the bandwidth of the memory; kernels
that are written by hand count by the static schedules of their code. The compiler for GPUs gives no cycles: there the
estimate is what moving bytes takes, which is less than the floor where arithmetic is the bound, and how long a kernel
decodes is not in it. The floor is what reading arguments and writing results takes, or the multiplications at the peak
of their number type: those of a kernel are the ones of the float product that it stands for.

Attention is the same in all programs, in those of bfloat16 and of qwix too: over a cache `jq.ops.cached_attention`,
which is one kernel on a TPU and XLA's products on a GPU; in a prefill JAX's own kernel for TPUs (`flash_attention`), of
which estimate and floor count all blocks, also blocks that the mask makes zero. A GPU has no prefill here for that
reason.

`x` is the speed relative to the bfloat16 program; at batch 1 XLA's own program is far
from its floor, so there the comparison with that floor says more. Cells were compiled at several commits;
a dash was not compiled. GB are the arguments, results and
temporaries of one device.

On several chips a step is a `jax.shard_map` over heads, hidden axis and vocabulary: on TPUs kernels run there and on
meshes of explicit axes, and not under `jax.jit` with automatic axes. Estimates and floors leave out transfers between
chips, for which the compiler gives none. All programs have the same: two sums in each layer, of as many bfloat16
numbers as tokens times width. A mixture sorts its tokens by expert and multiplies them by ragged products. In bfloat16
every expert multiplies every token: on a TPU that is nearly four times as fast, because XLA copies a layer's experts
for its ragged product. All experts count as read.

- **W8A8**, **W8A16**: int8, one scale per output channel, with activations in int8 or left in bfloat16.
- **W4A16**, **W4A8**: int4 in groups of 128.
- The table of tokens, the norms and the cache stay in bfloat16.
"""


def page(found: list[Cell], packages: str) -> str:
    """The page of the documentation: for every model and slice, what to take, and all estimates."""
    lines = [PREFACE.replace("PACKAGES", packages).replace("TOKENS", f"{TOKENS:,}")]
    for model, target, devices in dict.fromkeys((c.model, c.target, c.devices) for c in found):
        here = [c for c in found if (c.model, c.target, c.devices) == (model, target, devices)]
        steps = list(dict.fromkeys(c.step for c in here))
        at = {(c.scheme, c.by, c.step): c for c in here}
        plain = {step: at.get(("bfloat16", "bfloat16", step)) for step in steps}
        chip = CHIPS[target.split(":")[0]]
        where = target.replace("tpu", "TPU").replace("h100", "H100") + ("" if devices == 1 else f", {devices} devices")
        lines += [f"## {model} on {where}, {chip.memory / 1e9:.0f} GB each", "", *_choices(here, steps, plain), ""]
        lines += [f"| estimated ms (floor) | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
        for scheme, by in dict.fromkeys((c.scheme, c.by) for c in here):
            cells = [_shown(at.get((scheme, by, step)), plain[step]) for step in steps]
            name = {"bfloat16": "*bfloat16*", "jaxquant": scheme, "qwix": f"{scheme}, qwix"}[by]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        missing = dict.fromkeys((c.scheme, c.by, c.step, c.missing) for c in here if c.missing and c.ms is None)
        lines += ["", *(f"No estimate of {s}, {b}, {t}: {why}.\n" for s, b, t, why in missing)]
        if any(c.missing and c.ms is not None for c in here):
            lines += ["Programs that do not fit are extrapolated from a quarter and half of their layers.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _choices(here: list[Cell], steps: list[str], plain: dict[str, Cell | None]) -> list[str]:
    """What is fastest of ours in each step, among what fits."""
    lines = []
    for step in steps:
        ours = [c for c in here if c.step == step and c.by == "jaxquant" and c.ms and c.fits]
        other = plain[step]
        if ours:
            best = min(ours, key=lambda c: round(c.ms or 0.0, 1))  # as printed: of equals the first
            against = ""
            if other and other.ms and other.floor_ms and best.ms:
                against = f", {other.ms / best.ms:.1f} times as fast as bfloat16"
                against += f", {other.floor_ms / best.ms:.1f} times as fast as bfloat16 at its floor"
            lines.append(f"- {step}: **{best.scheme}**, {best.ms:.1f} ms{against}")
    return lines


def _shown(cell: Cell | None, plain: Cell | None) -> str:
    if cell is None or cell.gigabytes is None:
        return "-"
    fits = "" if cell.fits else ", does not fit"
    if cell.ms is None:
        return f"- ({cell.floor_ms:.1f}), {cell.gigabytes:.1f} GB{fits}"
    ratio = f" {plain.ms / cell.ms:.1f}x" if plain is not None and plain.ms and cell.by != "bfloat16" else ""
    return f"{cell.ms:.1f} ({cell.floor_ms:.1f}){ratio}, {cell.gigabytes:.1f} GB{fits}"


CASES = (
    (LLAMA_8B, "tpu v5e", 1, (1, 8, 64, 0)),
    (LLAMA_8B, "tpu v6e", 1, (1, 8, 64, 0)),
    (LLAMA_8B, "tpu v5e:2x2", 4, (1, 8, 64, 0)),
    (LLAMA_8B, "tpu v6e:2x2", 4, (1, 8, 64, 0)),
    (LLAMA_70B, "tpu v5e:4x4", 16, (1, 8, 64, 0)),
    (MIXTRAL, "tpu v5e:2x2", 4, (1, 8)),
    (LLAMA_8B, "h100", 1, (1, 8, 64)),
    (MIXTRAL, "h100", 1, (1, 8)),
)

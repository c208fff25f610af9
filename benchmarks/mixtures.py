"""The mixture of experts of `jaxquant.models`: experts one by one, or tokens sorted by their experts.

    python benchmarks/mixtures.py                        # estimates for chips; some minutes of a core
    python benchmarks/mixtures.py --chips "tpu v6e"
    python benchmarks/mixtures.py --run                  # times of this CPU: one core, smaller sizes

Experts one by one are a scan, in which an expert that a token has chosen multiplies all tokens. Sorted tokens are rows
of a ragged product. An estimate counts every expert once, as for a batch that has chosen all; a run skips the others.
Float experts are estimated one by one, as `jaxquant.models.load` has them: the schedule of XLA's ragged product takes a
TPU's compiler minutes. Estimates need jaxquant[aot-tpu,aot-gpu].
"""

from __future__ import annotations

import argparse
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import measure

RUN = argparse.ArgumentParser(add_help=False)
RUN.add_argument("--run", action="store_true", help="measure this CPU")
if running := RUN.parse_known_args()[0].run:
    measure.pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import jaxquant as jq  # noqa: E402
from jaxquant import recipes  # noqa: E402
from jaxquant.models.config import Config  # noqa: E402
from jaxquant.models.decoder import block  # noqa: E402
from jaxquant.programs.compilers import compiled_for  # noqa: E402
from jaxquant.programs.estimates import estimate  # noqa: E402

SPECS = {"float": None, "W8A8": recipes.w8a8(), "W4A16": recipes.w4a16(128)}
CHIPS = {  # the sizes of Mixtral 8x7B, and of Qwen3 30B-A3B
    "8 experts, 2 chosen": ("mixtral", 4096, 14336, 8, 2),
    "128 experts, 8 chosen": ("qwen3_moe", 2048, 768, 128, 8),
}
CPU = {
    "8 experts, 2 chosen": ("mixtral", 1024, 2048, 8, 2),
    "64 experts, 8 chosen": ("qwen3_moe", 1024, 384, 64, 8),
}
TOKENS = {"chips": (1, 8, 512), "cpu": (1, 8, 256)}
WAYS = {"one by one": False, "sorted": True}


def config_of(family: str, width: int, hidden: int, experts: int, chosen: int) -> Config:
    """A layer of a decoder whose attention is narrow."""
    if family == "mixtral":
        own = {"num_local_experts": experts, "intermediate_size": hidden}
    else:
        own = {"num_experts": experts, "moe_intermediate_size": hidden, "norm_topk_prob": True}
    heads = {"head_dim": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes = {"vocab_size": 128, "hidden_size": width, "num_experts_per_tok": chosen}
    return jq.models.config_of({"model_type": family, **sizes, **heads, **own})


def layer(config: Config, params: dict[str, Any], x: jax.Array) -> jax.Array:
    return block(config, 0, params, x)[0]


class Program(NamedTuple):
    """A function, shapes of its float parameters and of the tokens of one sequence, and how parameters are stored."""

    fn: Callable[..., Any]
    params: Any
    x: jax.ShapeDtypeStruct
    stored: Callable[[Any], Any]


def program(config: Config, spec: jq.OpSpec | None, dtype: Any, tokens: int, target: Any) -> Program:
    """A layer whose experts have a spec."""
    fn = functools.partial(layer, config)
    params = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in config.shapes().items() if ".layers.0." in n}
    x = jax.ShapeDtypeStruct((1, tokens, config.hidden_size), dtype)
    if spec is None:
        return Program(fn, params, x, lambda p: p)
    plan = jq.make_plan(fn, params, x, rules=[jq.Rule(r"\.experts\.", spec), jq.Rule(".*", None)])
    return Program(jq.quantized(fn, plan), params, x, lambda p: jq.quantize_params(p, plan, target=target))


def estimated(chip: str, config: Config, spec: jq.OpSpec | None, tokens: int) -> str:
    """Microseconds, by the compiler's estimate."""
    of = program(config, spec, jnp.bfloat16, tokens, "tpu" if chip.startswith("tpu") else "gpu")
    arguments = jax.eval_shape(of.stored, of.params), of.x
    seconds = estimate(compiled_for("benchmark", chip, of.fn, arguments)).seconds
    return "no estimate" if seconds is None else f"{seconds * 1e6:.0f}"


def contestants(sizes: tuple[str, int, int, int, int], tokens: int) -> dict[str, Callable[[], Any]]:
    """The layer with random numbers, of every scheme and both ways."""
    runs, config = {}, config_of(*sizes)
    for name, spec in SPECS.items():
        for way, is_sorted in WAYS.items():
            of = program(config.with_mixtures(sorted=is_sorted), spec, jnp.float32, tokens, "cpu")
            params = of.stored({n: numbers(n, s.shape) for n, s in of.params.items()})
            runs[f"{name}, {way}"] = functools.partial(blocked, jax.jit(of.fn), params, numbers("x", of.x.shape))
    return runs


def blocked(fn: Callable[..., Any], *args: Any) -> Any:
    return jax.block_until_ready(fn(*args))


def numbers(name: str, shape: tuple[int, ...]) -> jax.Array:
    """Numbers by which tokens choose different experts."""
    return jax.random.normal(jax.random.key(zlib.crc32(name.encode())), shape) * shape[-1] ** -0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[RUN, measure.CORES]
    )
    parser.add_argument("--chips", default="tpu v5e,h100", help="names of targets, with commas between")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if running:
        print(measure.header(measure.machine()))
        for name, sizes in CPU.items():
            found = {t: measure.interleaved(contestants(sizes, t), args.rounds) for t in TOKENS["cpu"]}
            rows = [[run, *(f"{found[t][run]['median']:.1f}" for t in found)] for run in found[1]]
            columns = [f"{name}, [{sizes[1]}, {sizes[2]}], ms", *(f"{t} tokens" for t in found)]
            print(f"\n{measure.table(columns, rows)}")
        return
    print(measure.header(measure.versions(("jax", "jaxlib", "libtpu", "jax-cuda12-plugin"))))
    for chip in args.chips.split(","):
        for name, sizes in CHIPS.items():
            rows = []
            for scheme, spec in SPECS.items():
                for way, is_sorted in WAYS.items():
                    if spec is None and is_sorted:
                        continue
                    config = config_of(*sizes).with_mixtures(sorted=is_sorted)
                    cells = [estimated(chip, config, spec, t) for t in TOKENS["chips"]]
                    rows.append([f"{scheme}, {way}", *cells])
            columns = [f"{chip}: {name}, us (estimates)", *(f"{t} tokens" for t in TOKENS["chips"])]
            print(f"\n{measure.table(columns, rows)}", flush=True)


if __name__ == "__main__":
    main()

"""What quantizing in turns costs beside quantizing at once, and how much of that is compilation.

    python benchmarks/sequential_time.py

The sentence encoder of ``accuracy.py``, 36 weights, int4 in groups of 64, GPTQ, 24 sentences: all weights with one
calibration, in 6 stages of a layer each, and in 36 stages. Every stage compiles as much of the function as lies before
its weights; the quantizer itself is compiled once for each shape. Prints the table, and writes it to
benchmarks/results as text and JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import measure

measure.pin()

import accuracy  # noqa: E402
import jax  # noqa: E402
import minilm  # noqa: E402

import jaxquant as jq  # noqa: E402


def timed(run: Callable[[], Any]) -> tuple[float, float, int]:
    """(seconds, of which tracing and compiling, programs compiled) of a run with no program compiled before."""
    jax.clear_caches()
    spent = {"compile": 0.0, "programs": 0.0}

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent["compile"] += duration_secs
            spent["programs"] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    jax.monitoring.clear_event_listeners()
    return seconds, spent["compile"], int(spent["programs"])


def main() -> None:
    encoder = accuracy.Encoder(24, 8, 0)
    plan, params, batches = encoder.plan(accuracy.grouped("int4", symmetric=False)), encoder.params, encoder.batches

    def at_once() -> Any:
        stats = jq.calibrate(encoder.apply, plan, params, batches, collect={"gram": jq.calibration.Gram()})
        return jq.quantize_params(params, plan, method=jq.ptq.gptq, stats=stats)

    def in_turns(stages: list[str] | None) -> Any:
        return jq.calibration.quantize_sequentially(encoder.apply, plan, params, batches, stages=stages)

    layers = [f"layer_{i}/" for i in range(minilm.LAYERS)]
    runs = {"at once": at_once, "6 stages": lambda: in_turns(layers), "36 stages": lambda: in_turns(None)}
    rows = {name: timed(run) for name, run in runs.items()}
    about = measure.machine()
    cells = [[name, f"{s:.1f}", f"{c:.1f}", str(n)] for name, (s, c, n) in rows.items()]
    text = f"{measure.header(about)}\n\n{measure.table(('', 'seconds', 'compiling', 'programs'), cells)}"
    print(text)
    kept = {name: {"seconds": s, "compiling": c, "programs": n} for name, (s, c, n) in rows.items()}
    measure.keep("sequential_time", text, {"machine": about, "rows": kept}, measure.RESULTS)


if __name__ == "__main__":
    main()

"""How fast a checkpoint on disk is quantized, against the two things it cannot beat.

    python benchmarks/streaming.py DIRECTORY [--gigabytes 4] [--qtype int4]

Writes a checkpoint of that size (bfloat16 weights of 4096 x 4096) into DIRECTORY, then measures, once each: copying its
file, the jitted quantizer on weights that are in memory, and `jaxquant.io.quantize_hf`. Prints bytes of the source per
second. What is written is removed at the end.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxquant as jq
from jaxquant.io.safetensors import TensorSpec, write_safetensors

SHAPE = (4096, 4096)


def copy(source: Path, destination: Path) -> float:
    """Seconds to copy a file and have it on the disk."""
    begin = time.perf_counter()
    with open(source, "rb") as old, open(destination, "wb") as new:
        shutil.copyfileobj(old, new, 16 << 20)
        new.flush()
        os.fsync(new.fileno())
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--qtype", default="int4")
    options = parser.parse_args()
    spec = jq.QuantSpec(options.qtype, granularity=jq.PerGroup(64) if options.qtype == "int4" else jq.PerChannel())
    one = np.random.default_rng(0).normal(size=SHAPE).astype(ml_dtypes.bfloat16)
    count = max(1, round(options.gigabytes * 1e9 / one.nbytes))
    source, result = options.directory / "source", options.directory / "result"
    source.mkdir(parents=True)
    specs = {f"{i}.proj.weight": TensorSpec(one.dtype, SHAPE) for i in range(count)}
    file = source / "model.safetensors"
    write_safetensors(file, specs, lambda name: one, {})
    size = file.stat().st_size
    try:
        seconds = {"disk copy": copy(file, options.directory / "copy")}
        os.remove(options.directory / "copy")
        quantize = jax.jit(lambda w: jq.quantize(w, spec, reduce_axes=(-1,)))
        w = jnp.asarray(one)
        jax.block_until_ready(quantize(w))
        begin = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(quantize(w))
        seconds["jitted quantizer"] = time.perf_counter() - begin
        begin = time.perf_counter()
        jq.io.quantize_hf(source, result, [jq.Rule("proj", jq.OpSpec(spec))])
        seconds["quantize_hf"] = time.perf_counter() - begin
    finally:
        shutil.rmtree(options.directory)
    for name, value in seconds.items():
        print(f"{name:<20}{size / value / 1e6:10.0f} MB/s")
    slower = max(seconds["disk copy"], seconds["jitted quantizer"])
    print(f"{'of the slower':<20}{slower / seconds['quantize_hf']:10.2f}")


if __name__ == "__main__":
    main()

"""Feeds damaged files to the readers, guided by the coverage of their code.

    pip install atheris
    python tests/fuzz/fuzz_readers.py gguf -runs=1000000 corpus/

The first argument names the reader: gguf, safetensors, native (our manifest), index (of shards). The rest goes to
libFuzzer: the number of executions, a directory to keep the corpus in, ``-max_len``, ``-seed``. A run fails on any
exception but QuantError, on a crash, on a second for one file, and on a gigabyte of memory beyond the interpreter's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["jaxquant.io"]):
    from jaxquant.core.errors import QuantError
    from jaxquant.io.gguf.container import GGUFFile
    from jaxquant.io.manifest import decode
    from jaxquant.io.native import read_metadata
    from jaxquant.io.safetensors import SafetensorsFile
    from jaxquant.io.sharded import Checkpoint
    from jaxquant.io.strict_json import parse

_PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _gguf(path: Path) -> None:
    file = GGUFFile(path)
    for name, info in file.tensors.items():
        assert file.blocks(name).nbytes == info.nbytes <= path.stat().st_size


def _safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name, spec in file.tensors.items():
        assert file.array(name).nbytes == spec.nbytes <= path.stat().st_size


def _native(path: Path) -> None:
    read_metadata(path)
    file = SafetensorsFile(path)
    if "jaxquant" in file.metadata:
        decode(parse(file.metadata["jaxquant"])["tree"], file)


def _index(path: Path) -> None:
    checkpoint = Checkpoint(path.parent)
    assert set(checkpoint.place.values()) <= {"a.safetensors"}  # nothing outside of the directory


_TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "gguf": ("a.gguf", _gguf),
    "safetensors": ("a.safetensors", _safetensors),
    "native": ("a.safetensors", _native),
    "index": ("model.safetensors.index.json", _index),
}


def _seeds(target: str) -> list[bytes]:
    """Sound files to begin with."""
    import jax.numpy as jnp

    import jaxquant as jq

    spec = jq.QuantSpec("int4", granularity="per_group", group_size=32, scale_dtype="float16")
    q = jq.quantize(jnp.ones((2, 32)), spec, reduce_axes=(-1,))
    if target == "gguf":
        metadata = {"general.architecture": "llama", "tokens": ["a", "b"], "flag": True}
        jq.io.save_gguf(_PLACE / "seed", {"w": q, "b": jnp.ones(3)}, metadata=metadata)
    elif target == "index":
        jq.io.save(_PLACE / "a.safetensors", {"w": jnp.ones(3), "b": jnp.ones(3)})
        return [b'{"metadata": {}, "weight_map": {"w": "a.safetensors", "b": "a.safetensors"}}']
    else:
        jq.io.save(_PLACE / "seed", {"w": q, "b": [jnp.ones(3), None]})
    return [(_PLACE / "seed").read_bytes()]


def main() -> None:
    target, *arguments = sys.argv[1:]
    name, read = _TARGETS[target]
    seeds = _PLACE / "seeds"
    seeds.mkdir()
    for i, seed in enumerate(_seeds(target)):
        (seeds / str(i)).write_bytes(seed)
    path = _PLACE / name

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(QuantError):
            read(path)

    limits = ["-timeout=1", "-rss_limit_mb=2048", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *limits, *arguments, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

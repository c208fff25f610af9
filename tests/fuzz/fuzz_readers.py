"""Feeds damaged files to the readers, guided by the coverage of their code.

    pip install atheris
    python tests/fuzz/fuzz_readers.py gguf -runs=1000000 corpus/

The first argument names the reader: gguf, split (a GGUF model in parts), safetensors, native (our manifest), index (of
shards), hf (all formats that `load_hf` knows). The rest goes to libFuzzer: the number of executions, a directory to
keep the corpus in, ``-max_len``, ``-seed``. A run fails on any exception but QuantError, on a crash, on a second for
one file, and on a gigabyte of memory beyond the interpreter's.

The first byte of an input of ``split`` says which part of a sound model the rest takes the place of.

The inputs of ``hf`` are not files but edits of sound checkpoints (those of ``tests/hf_cases.py``): the first byte
chooses one, the others change dtypes, shapes and bytes of its tensors, drop or add some, and put other values into its
configuration. How many checkpoints of each were tried is printed now and then.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, os.fspath(Path(__file__).parents[1]))

atheris: Any = importlib.import_module("atheris")  # has no types

with atheris.instrument_imports(include=["jaxquant.io"]):
    from hf_cases import CASES

    from jaxquant.core.errors import QuantError
    from jaxquant.core.qtensor import QTensor
    from jaxquant.io.gguf.container import TensorInfo, write_gguf
    from jaxquant.io.gguf.read import GGUFLeaves
    from jaxquant.io.gguf.types import BY_NAME
    from jaxquant.io.hf.load import load_hf
    from jaxquant.io.manifest import decode
    from jaxquant.io.native import read_metadata
    from jaxquant.io.safetensors import DTYPES, SafetensorsFile
    from jaxquant.io.sharded import Checkpoint
    from jaxquant.io.strict_json import parse

_PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))


def _gguf(path: Path) -> None:
    leaves = GGUFLeaves(path, names="hf")
    for name in leaves:
        assert leaves[name].nbytes <= 4 * path.stat().st_size  # codes of 2 bits may take a byte, scales 4


_PARTS: list[bytes] = []  # of a sound model


def _split(path: Path) -> None:
    data = path.read_bytes() or b"\0"
    parts = [*_PARTS]
    parts[data[0] % len(parts)] = data[1:]
    names = [path.parent / f"m-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        name.write_bytes(part)
    leaves = GGUFLeaves(names[data[0] % len(parts)], names="hf")
    for name in leaves:
        assert leaves[name].nbytes <= 4 * sum(map(len, parts))


def _safetensors(path: Path) -> None:
    file = SafetensorsFile(path)
    for name, spec in file.tensors.items():
        assert file.array(name).nbytes == spec.nbytes <= path.stat().st_size


def _native(path: Path) -> None:
    read_metadata(path)
    file = SafetensorsFile(path)
    if "jaxquant" in file.metadata:
        decode(file, (parse(file.metadata["jaxquant"])["tree"], ()))


def _index(path: Path) -> None:
    checkpoint = Checkpoint(path.parent)
    assert set(checkpoint.place.values()) <= {"a.safetensors"}  # nothing outside of the directory


# -- edits of checkpoints ----------------------------------------------------------------------------------------------

_NAMES = list(CASES)
_DTYPES = list(DTYPES)
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Endings of tensors, and keys of configurations, of all formats.
_ENDINGS = sorted({"." + name.partition(".")[2] for tensors, *_ in CASES.values() for name in tensors})
_EXTRA = (
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "packing_format", "version", "w_bit", "q_group_size",
    "zero_point", "format", "num_bits", "strategy", "block_structure", "targets", "weights", "fmt", "weight_block_size",
    "scale_fmt", "linear_class", "load_in_8bit", "load_in_4bit", "quant_algo", "text_config", "dtype", "torch_dtype",
    "hidden_size", "num_attention_heads", "quantization", "quant_method", "transform_config", "sparsity_config",
    "in_features", "out_features", "vector_lens", "config_for_layers", "module_quant_configs", "quant_config", "m",
)  # fmt: skip
_JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 5, 8, 16, 32, 64, 128, 1 << 31, 1 << 40, 1 << 70, 2.5, 1e30, -0.0, "", "x",
    "re:(", "re:.*", "gptq_v2", "gptq_p", "awq", "16x16", "float16", "bfloat16", "torch.float32", "autobitlinear", [],
    [0, 0], [16, 16], [1, 32], [-1], ["Linear"], {}, {"a": 1}, {"bits": 2}, {"weights": {"num_bits": 4}}, "\udc80",
)  # fmt: skip
_tried: collections.Counter[str] = collections.Counter()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a configuration."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield value, key
        yield from _places(inner)


def _edited(data: Any) -> tuple[dict[str, np.ndarray], Any, Any]:
    """A checkpoint's tensors, configuration and metadata, after the edits that the input asks for."""
    case = _NAMES[data.ConsumeIntInRange(0, len(_NAMES) - 1)]
    _tried[case] += 1
    tensors, config, *rest = CASES[case]
    tensors, config = dict(tensors), copy.deepcopy(config)
    metadata = dict(rest[0]) if rest else {}
    while data.remaining_bytes() > 1 and tensors:
        name = sorted(tensors)[data.ConsumeIntInRange(0, len(tensors) - 1)]
        array, edit = tensors[name], data.ConsumeIntInRange(0, 9)
        if edit == 0:
            del tensors[name]
        elif edit == 1:  # the same numbers, in another dtype
            dtype = DTYPES[data.PickValueInList(_DTYPES)]
            with np.errstate(all="ignore"):
                tensors[name] = np.real(array).astype(np.float32).astype(dtype)
        elif edit == 2:  # the same bytes
            dtype = DTYPES[data.PickValueInList(_DTYPES)]
            if array.nbytes % dtype.itemsize == 0 and dtype != np.bool_:
                tensors[name] = np.frombuffer(array.tobytes(), dtype)
        elif edit in (3, 4) and array.nbytes:
            raw = bytearray(array.tobytes())
            for _ in range(data.ConsumeIntInRange(1, 8)):
                raw[data.ConsumeIntInRange(0, len(raw) - 1)] = data.ConsumeIntInRange(0, 255)
            if array.dtype != np.bool_:
                tensors[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
        elif edit == 5 and array.ndim:  # cut or repeated along an axis
            axis = data.ConsumeIntInRange(0, array.ndim - 1)
            tensors[name] = (
                np.take(array, np.arange(data.ConsumeIntInRange(0, 2 * array.shape[axis])), axis, mode="wrap")[...]
                if array.shape[axis]
                else array
            )
        elif edit == 6:  # another rank
            shape = ((-1,), (1, -1), (-1, 1), (2, -1), (-1, 2, 1), array.shape[::-1])[data.ConsumeIntInRange(0, 5)]
            with contextlib.suppress(ValueError):
                tensors[name] = array.reshape(shape)
        elif edit == 7:
            tensors["m" + data.PickValueInList(_ENDINGS)] = array
        elif edit == 8:
            text = data.ConsumeUnicodeNoSurrogates(16).encode()
            tensors[name] = np.frombuffer(array.tobytes()[:64] + text if data.ConsumeBool() else text, np.uint8)
        else:
            value = copy.deepcopy(data.PickValueInList(list(_JUNK)))
            places = list(_places(config))
            if metadata and data.ConsumeBool():
                metadata[sorted(metadata)[data.ConsumeIntInRange(0, len(metadata) - 1)]] = json.dumps(value)
            elif data.ConsumeBool() and places:
                place, key = places[data.ConsumeIntInRange(0, len(places) - 1)]
                place[key] = value
            else:
                inner = [config, *(p[k] for p, k in places if isinstance(p[k], dict))]
                inner[data.ConsumeIntInRange(0, len(inner) - 1)][data.PickValueInList(list(_EXTRA))] = value
    return tensors, config, metadata


def _written(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file, without the care that is taken elsewhere to have it on the disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts, end = [], 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]
        }  # fmt: skip
        parts.append(array.tobytes())
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _hf(path: Path) -> None:
    tensors, config, metadata = _edited(atheris.FuzzedDataProvider(path.read_bytes()))
    folder = path.parent
    (folder / "model.safetensors").write_bytes(_written(tensors, metadata))
    (folder / "config.json").write_text(json.dumps(config))
    if not sum(_tried.values()) % 50_000:
        print(f"tried: {dict(_tried)}", file=sys.stderr)
    params, _ = load_hf(folder)
    total = sum(array.nbytes for array in tensors.values())
    assert all(leaf.size for leaf in params.values() if isinstance(leaf, QTensor))
    assert sum(leaf.nbytes for leaf in params.values()) <= 2048 * total + 4096  # AQLM: a byte is 256 numbers at most


_TARGETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "gguf": ("a.gguf", _gguf),
    "split": ("part", _split),
    "safetensors": ("a.safetensors", _safetensors),
    "native": ("a.safetensors", _native),
    "index": ("model.safetensors.index.json", _index),
    "hf": ("edits", _hf),
}


def _seeds(target: str) -> list[bytes]:
    """Sound files to begin with."""
    if target == "hf":
        # Integers are taken from the end of the input, and range over as many bytes as they need: one byte is a case.
        return [bytes([i]) for i in range(len(_NAMES))]
    if target == "split":
        zeros = np.zeros(TensorInfo(BY_NAME["F32"], (2, 32)).stored_shape, np.uint8)
        for i, names in enumerate(([], ["token_embd.weight", "output.weight"], ["output_norm.weight"])):
            own = {"general.architecture": "llama", "tokens": ["a", "b"]} if i == 0 else {}
            numbers = {"split.no": np.uint16(i), "split.count": np.uint16(3), "split.tensors.count": np.int32(3)}
            infos = {name: TensorInfo(BY_NAME["F32"], (2, 32)) for name in names}
            write_gguf(_PLACE / "sound", own | numbers, infos, lambda _: zeros)
            _PARTS.append((_PLACE / "sound").read_bytes())
        return [bytes([i]) + part for i, part in enumerate(_PARTS)]
    import jax.numpy as jnp

    import jaxquant as jq

    spec = jq.QuantSpec("int4", granularity="per_group", group_size=32, scale_dtype="float16")
    q = jq.quantize(jnp.ones((2, 32)), spec, reduce_axes=(-1,))
    if target == "gguf":
        metadata = {"general.architecture": "llama", "tokens": ["a", "b"], "flag": True}
        jq.io.save_gguf(_PLACE / "seed", {"w": q, "b": jnp.ones(3)}, metadata=metadata)
        types = {name: TensorInfo(kind, (1, kind.elements)) for name, kind in BY_NAME.items() if kind.split}
        rng = np.random.default_rng(0)
        block = lambda name: rng.integers(0, 60, types[name].stored_shape).astype(np.uint8)  # noqa: E731
        write_gguf(_PLACE / "all", metadata, types, block)
        return [(_PLACE / name).read_bytes() for name in ("seed", "all")]
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

"""Checkpoint directories for the tests of `load_hf`, and what they must decode to."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.io.safetensors import SafetensorsFile, TensorSpec, write_safetensors

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(path.parent.name for path in (GOLDEN / "models").glob("*/model.safetensors"))

__all__ = ["GOLDEN", "MODELS", "checkpoint", "digest", "dtype_of", "of_model", "stream", "unit", "values"]


def dtype_of(name: str) -> np.dtype:
    """A dtype by torch's name."""
    name = name.removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))


def values(leaf, dtype) -> np.ndarray:
    """The float array of a leaf; -0, which some references have and some do not, as 0."""
    w = np.asarray(leaf.dequantize(dtype) if isinstance(leaf, QTensor) else leaf).astype(dtype)
    return np.where(w == 0, np.zeros((), w.dtype), w)


def digest(w: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(w).tobytes()).hexdigest()


def tensors_of(path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    return {name: file.array(name) for name in file.tensors}


def unit(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the parameters of a file of single tensors."""
    path = GOLDEN / f"{name}.safetensors"
    return tensors_of(path), json.loads(SafetensorsFile(path).metadata["meta"])


def of_model(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the configuration of a small whole checkpoint."""
    folder = GOLDEN / "models" / name
    return tensors_of(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def checkpoint(folder, tensors, config=None, *, metadata=None, shards=None, files=()):
    """Writes a directory: ``tensors`` by name, ``config`` as config.json; ``shards`` maps tensors to files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {}))
    for name, value in files:
        (folder / name).write_text(json.dumps(value))
    groups: dict[str, dict] = {}
    for name, array in tensors.items():
        groups.setdefault((shards or {}).get(name, "model.safetensors"), {})[name] = np.asarray(array)
    for file, arrays in groups.items():
        specs = {name: TensorSpec(a.dtype, a.shape) for name, a in arrays.items()}
        write_safetensors(folder / file, specs, arrays.__getitem__, metadata or {"format": "pt"})
    if shards is not None:
        index = {"weight_map": {name: file for file, arrays in groups.items() for name in arrays}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def stream(codes, bits):
    """A little-endian bit stream of 32-bit words along the last axis, bit by bit."""
    flat = (codes[..., None] >> np.arange(bits)) & 1
    flat = flat.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    flat = np.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, -flat.shape[-1] % 32)])
    return np.packbits(flat, axis=-1, bitorder="little").view("<u4")

"""Checkpoints: trees of arrays and QTensors, to files and back. One file per format.

gguf          files of llama.cpp (`load_gguf`, `save_gguf`)
native        jaxquant's own: one safetensors file with a manifest (`save`, `load`, `read_metadata`)
model         parameters with their plan and state, from a native file or a directory (`load_model`)
safetensors   the container: named arrays in one file
sharded       several safetensors files with an index
hf            reads Hugging Face checkpoints, quantized by any library (`load_hf`)
save_hf       writes them in the layouts of some libraries (`save_hf`); each layout is a file of export

orbax         Orbax checkpoints (`save_orbax`, `load_orbax`)
stream        checkpoints larger than memory, quantized on disk (`quantize_hf`)
"""

from jaxquant.io.gguf import load_gguf, save_gguf
from jaxquant.io.hf import NameMap, load_hf
from jaxquant.io.model import load_model
from jaxquant.io.native import load, read_metadata, save
from jaxquant.io.orbax import load_orbax, save_orbax
from jaxquant.io.save_hf import save_hf
from jaxquant.io.stream import plan_quantize_hf, quantize_hf

__all__ = [
    "NameMap",
    "load",
    "load_gguf",
    "load_hf",
    "load_model",
    "load_orbax",
    "plan_quantize_hf",
    "quantize_hf",
    "read_metadata",
    "save",
    "save_gguf",
    "save_hf",
    "save_orbax",
]

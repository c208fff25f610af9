"""GGUF, the files of ggml and llama.cpp.

container      metadata and tensors of blocks: the file itself
split          the parts of a model that is in several files
parts, types   what a block consists of, and the table of all types
legacy, k_quants, tables, ternary, microscaling   where the bits of each family of types are
names          names and row order, between llama.cpp and Hugging Face
read, write    `load_gguf`, `save_gguf`
"""

from jaxquant.io.gguf.names import ARCHITECTURES
from jaxquant.io.gguf.read import GGUFInfo, load_gguf
from jaxquant.io.gguf.types import support_table
from jaxquant.io.gguf.write import save_gguf

__all__ = ["ARCHITECTURES", "GGUFInfo", "load_gguf", "save_gguf", "support_table"]

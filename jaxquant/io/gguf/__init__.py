"""GGUF, the files of ggml and llama.cpp.

container      the file: metadata and tensors of blocks
split          models that are split into several files
block_types    the parts of a block
types          the table of all types
legacy, k_quants, tables, ternary, microscaling   the bit layouts of each family of types
names          names and row order, between llama.cpp and Hugging Face
read, write    `load_gguf`, `save_gguf`
"""

from jaxquant.io.gguf.names import ARCHITECTURES
from jaxquant.io.gguf.read import load_gguf
from jaxquant.io.gguf.types import support_table
from jaxquant.io.gguf.write import save_gguf

__all__ = ["ARCHITECTURES", "load_gguf", "save_gguf", "support_table"]

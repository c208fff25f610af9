"""Reads Hugging Face checkpoints that any supported library quantized: one file per format.

load          `load_hf`: finds the format, reads each module, puts the leaves where they belong
formats       which formats there are, and how a directory says which one it holds
names         name maps: what a tensor is called in the model
checkpoint    the directory; module, layout: what all readers use
"""

from jaxquant.io.hf.formats import FORMATS, UNSUPPORTED, support_table
from jaxquant.io.hf.load import load_hf
from jaxquant.io.hf.names import BERT, GPT2, LLAMA, OPT, VIT, NameMap

__all__ = [
    "BERT",
    "FORMATS",
    "GPT2",
    "LLAMA",
    "OPT",
    "UNSUPPORTED",
    "VIT",
    "NameMap",
    "load_hf",
    "support_table",
]

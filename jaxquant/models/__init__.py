"""Decoders that run from a checkpoint: a prompt to a text, a text to a number.

config      what a decoder computes, from ``config.json``; rope: its rotary embeddings
decoder     the decoder: pure functions of parameters by their names in the checkpoint
load        `load`: a directory or a GGUF file, in any format that `jaxquant.io` reads; gguf: its metadata
tokenizer   texts to tokens and back
generation  `generate` and `stream`: with a cache in float or int8
evaluation  `evaluate`: perplexity, and how far a model is from another
commands    the commands ``generate`` and ``eval``

Llama, Mistral, Mixtral, Qwen 2 and 3 and their mixtures, Gemma 1 to 3. It is there to try a checkpoint, not to serve
one.
"""

from jaxquant.models.config import config_of
from jaxquant.models.decoder import logits
from jaxquant.models.evaluation import evaluate
from jaxquant.models.generation import Sampling, Times, generate, stream
from jaxquant.models.load import Model, load

__all__ = [
    "Model",
    "Sampling",
    "Times",
    "config_of",
    "evaluate",
    "generate",
    "load",
    "logits",
    "stream",
]

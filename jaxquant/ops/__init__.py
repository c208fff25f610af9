"""Quantized primitives: each operand an array or a `QTensor`, otherwise the signatures of `jax.lax` and `jax.numpy`.

    dot_general, einsum, conv_general_dilated, ragged_dot, take; cached_attention, llm_int8
    lay_out: lays codes out for the platform that will read them; shardings: where their arrays lie on a mesh

`jaxquant.ops.select` chooses how a product is computed.
"""

from jaxquant.ops.attention import cached_attention
from jaxquant.ops.conv import conv_general_dilated
from jaxquant.ops.dot import dot_general
from jaxquant.ops.einsum import einsum
from jaxquant.ops.llm_int8 import llm_int8
from jaxquant.ops.ragged import ragged_dot
from jaxquant.ops.shardings import shardings
from jaxquant.ops.take import take
from jaxquant.ops.targets import lay_out

__all__ = [
    "cached_attention",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "lay_out",
    "llm_int8",
    "ragged_dot",
    "shardings",
    "take",
]

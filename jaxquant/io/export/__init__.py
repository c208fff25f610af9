"""Layouts of other libraries, written: what each makes of a `QTensor`, and the config that says so.

layout               what a layout is
integers             integer codes in the form that several layouts share
compressed_tensors, gptq, awq, bitsandbytes   one file per layout
"""

from jaxquant.io.export.awq import AWQ
from jaxquant.io.export.bitsandbytes import BITSANDBYTES
from jaxquant.io.export.compressed_tensors import compressed_tensors
from jaxquant.io.export.gptq import GPTQ
from jaxquant.io.export.layout import Layout

__all__ = ["AWQ", "BITSANDBYTES", "GPTQ", "Layout", "compressed_tensors"]

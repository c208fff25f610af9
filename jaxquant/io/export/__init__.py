"""Writers for layouts of other libraries: the tensors of a `QTensor`, and the quantization config.

interface            the type of a layout
integers             integer codes in a form common to several layouts
.._writer            one file per layout
"""

from jaxquant.io.export.awq_writer import AWQ
from jaxquant.io.export.bitsandbytes_writer import BITSANDBYTES
from jaxquant.io.export.compressed_tensors_writer import compressed_tensors, describes
from jaxquant.io.export.gptq_writer import GPTQ
from jaxquant.io.export.interface import Layout
from jaxquant.io.export.mlx_writer import MLX

__all__ = ["AWQ", "BITSANDBYTES", "GPTQ", "MLX", "Layout", "compressed_tensors", "describes"]

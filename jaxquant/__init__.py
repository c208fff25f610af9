"""jaxquant: quantization for JAX.

core        arrays in, arrays out: QuantSpec, QTensor, quantize, dequantize, fake_quant
ops         quantized primitives: dot_general, einsum, conv_general_dilated, take
"""

from jaxquant.core import observers
from jaxquant.core.affine import quantize, scale_zero_point
from jaxquant.core.errors import QuantError
from jaxquant.core.fake_quant import fake_quant
from jaxquant.core.qtensor import QTensor, dequantize
from jaxquant.core.qtypes import dtype_table
from jaxquant.core.specs import OpSpec, QuantSpec, Rule

__version__ = "0.1.0"

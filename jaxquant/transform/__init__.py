"""From float params to quantized ones, and back."""

from jaxquant.transform.params import dequantize_params, quantize_params

__all__ = ["dequantize_params", "quantize_params"]

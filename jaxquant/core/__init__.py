"""The numerics: number types, specs, `QTensor`, quantize, dequantize, fake_quant. Needs jax and numpy, nothing else."""

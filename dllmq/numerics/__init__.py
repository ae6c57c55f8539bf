"""Quantization grids and the linear algebra of GPTQ: pure functions of tensors, nothing above them."""

from dllmq.numerics.grid import Grid, Params, QuantizedTensor, dequantize, fake_quant, fit, quantize

__all__ = ["Grid", "Params", "QuantizedTensor", "dequantize", "fake_quant", "fit", "quantize"]

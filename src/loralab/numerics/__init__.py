"""Quantization as formulas, in plain torch: the reference that the tests hold kernels to."""

"""Quantization formulas in plain torch: the reference for the kernels."""

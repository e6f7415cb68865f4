"""Quantization measured; statistics."""

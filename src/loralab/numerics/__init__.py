"""Quantization as formulas: plain torch, no kernels, short enough to teach from. The reference the tests
hold kernels to.
"""

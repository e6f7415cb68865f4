"""Frozen linear layers with a quantized weight, and the quantization of a model while it loads."""

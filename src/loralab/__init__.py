"""LoRA and QLoRA experiments: many trials, one frozen base, records that can be rerun."""

__version__ = "0.1.0"

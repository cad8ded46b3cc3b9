"""Cross-tokenizer on-policy distillation on Megatron-Core."""

__version__ = "0.1.0"

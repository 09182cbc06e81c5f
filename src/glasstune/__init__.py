"""Glasstune: a glass-box LoRA fine-tuner."""

__version__ = "0.1.0"

"""Frozen linear layers that share one input, each with its LoRA pair, as one product."""

from glasstune.kernels.lora_group.layout import MAX_MEMBERS, Layout
from glasstune.kernels.lora_group.op import base_group, lora_group, write_adapters

__all__ = ["MAX_MEMBERS", "Layout", "base_group", "lora_group", "write_adapters"]

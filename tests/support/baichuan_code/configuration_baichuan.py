"""Stands for the code file that comes with a Baichuan2 checkpoint; see `modeling_baichuan.py`."""

from transformers import PretrainedConfig


class BaichuanConfig(PretrainedConfig):
    model_type = "baichuan"

    def __init__(self, hidden_size=64, num_attention_heads=4, **kwargs):
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        super().__init__(**kwargs)

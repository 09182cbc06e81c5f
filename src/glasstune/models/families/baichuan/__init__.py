"""Baichuan and Baichuan2 as a family of our own: no code of a checkpoint runs.

Importing it enters the classes in transformers' Auto registries, where a native class wins over
the `auto_map` of a checkpoint.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from glasstune.models.families.baichuan.config import BaichuanConfig
from glasstune.models.families.baichuan.modeling import BaichuanForCausalLM, BaichuanModel
from glasstune.models.families.baichuan.tokenizer import BaiChuanTokenizer, BaichuanTokenizer

__all__ = ["BaichuanConfig", "BaichuanForCausalLM", "BaichuanModel", "BaichuanTokenizer"]


class _ByName(PreTrainedConfig):
    """Registers tokenizers by their names only.

    Where a config's own class has a tokenizer, transformers asks whether code of the checkpoint is
    trusted; a tokenizer that is known by name alone always wins.
    """


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
AutoModel.register(BaichuanConfig, BaichuanModel, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
for _tokenizer in (BaichuanTokenizer, BaiChuanTokenizer):
    AutoTokenizer.register(_ByName, _tokenizer, exist_ok=True)

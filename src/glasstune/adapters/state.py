"""The adapter's tensors under PEFT's own names, and putting them back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor

from glasstune.core.errors import RunError


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Returns what `adapter_model.safetensors` holds: PEFT's names, the model's own memory.

    Rows of embeddings that were not trained are left out, also where LoRA sits on an embedding.
    """
    with warnings.catch_warnings():
        # PEFT takes the bias of `lora_bias`, which has one dimension, for a damaged matrix.
        warnings.filterwarnings("ignore", message=r"Adapter .* have invalid shape: \S*lora_B\.bias")
        state: dict[str, Tensor] = get_peft_model_state_dict(
            model, adapter_name=model.active_adapter, save_embedding_layers=False
        )
    return state


def restore_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into the model, bit for bit where the types are equal.

    Args:
        model: A PEFT model with the same adapter in place.
        state: PEFT's names to tensors.

    Raises:
        RunError: `adapter_differs`: names or shapes are not exactly the model's.
    """
    target = adapter_state(model)
    missing = sorted(target.keys() - state.keys())
    extra = sorted(state.keys() - target.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in target.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or extra or shapes:
        raise RunError(
            "adapter_differs",
            f"saved tensors do not fit the adapter: missing {missing[:4]}, unknown {extra[:4]}, "
            f"other shapes {shapes[:4]}",
            where="adapter",
            fix="use the adapter options that the tensors were trained with",
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])

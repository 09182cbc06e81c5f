"""Classes of transformers that the adapters room needs: that library has one owner, this room."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["Conv1D", "PreTrainedModel"]

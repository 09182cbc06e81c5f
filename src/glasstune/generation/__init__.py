"""Answers and evaluation: batched generation, loss and accuracy over rows."""

from glasstune.generation.evaluate import EvalSums, evaluate_rows
from glasstune.generation.generate import generate_ids, generate_texts, stop_ids

__all__ = ["EvalSums", "evaluate_rows", "generate_ids", "generate_texts", "stop_ids"]

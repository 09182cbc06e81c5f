"""Causal attention of one short document, many times a layer."""

from glasstune.kernels.document_attention.op import document_attention

__all__ = ["document_attention"]

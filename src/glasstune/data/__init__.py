"""Rows to packed token batches: formats, chat templates, labels, packing, loader.

`prepare.prepare_data` is the door; `encode.encode_prompt` gives generation the ids of training.
"""

"""A tiny Llama as a GGUF file, written with the gguf package."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """Writes a 1-layer float16 Llama (hidden 32, tied head) with a byte-level tokenizer."""
    import gguf
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = [
        " ".join(pair) if isinstance(pair, (list, tuple)) else pair
        for pair in _merges(tokenizer.backend_tokenizer.to_str())
    ]
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(np.float16)

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [3 if token.startswith("<|") else 1 for token in vocabulary]  # 3: control token
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", weight(len(vocabulary), 32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    block = "blk.0."
    for name, shape in {
        "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
        "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64),
    }.items():  # fmt: skip
        writer.add_tensor(f"{block}{name}.weight", weight(*shape))
    writer.add_tensor(f"{block}attn_norm.weight", np.ones(32, np.float32))
    writer.add_tensor(f"{block}ffn_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(text: str) -> list:
    import json

    return json.loads(text)["model"]["merges"]

"""Compares a GGUF file of ours with llama.cpp itself: token ids and logits.

Needs `pip install llama-cpp-python` (or its sources and LLAMA_CPP_LIB_PATH with a built libllama).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from gguf_tokenizer import mixed_strings

CHAT = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "What is 12 + 30? 你好!"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "Why?"},
]


class LlamaCpp:
    """A model in llama.cpp: all that is needed of its C interface."""

    def __init__(self, file: Path, context: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp.llama_cpp
        self.model = self.api.llama_model_load_from_file(
            str(file).encode(), self.api.llama_model_default_params()
        )
        options = self.api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = context
        options.type_k = options.type_v = 0  # keys and values in float32
        options.flash_attn_type = 0
        self.context = self.api.llama_init_from_model(self.model, options)
        self.vocabulary = self.api.llama_model_get_vocab(self.model)

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, control tokens read; `special` puts begin and end tokens around it."""
        raw = text.encode()
        ids = (self.api.llama_token * (len(raw) + 8))()
        count = self.api.llama_tokenize(
            self.vocabulary, raw, len(raw), ids, len(ids), special, True
        )
        return list(ids[:count])

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits behind every token, [L, V]."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        batch = self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, 1
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        assert self.api.llama_decode(self.context, batch) == 0
        size = self.api.llama_vocab_n_tokens(self.vocabulary)
        values = ctypes.cast(
            self.api.llama_get_logits(self.context),
            ctypes.POINTER(ctypes.c_float * (size * len(ids))),
        )
        found = np.array(values.contents, dtype=np.float32).reshape(len(ids), size)
        self.api.llama_batch_free(batch)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the exported folder with its GGUF files")
    folder = parser.parse_args().folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].double()
    for file in sorted(folder.glob("*.gguf")):
        theirs = LlamaCpp(file, max(256, len(ids)))
        texts = [t for t in mixed_strings() if unicodedata.is_normalized("NFC", t)]
        wrong = [t for t in texts if theirs.encode(t, True) != tokenizer(t)["input_ids"]]
        same = theirs.encode(chat, False) == ids
        got = torch.from_numpy(theirs.logits(ids)).double()[:, : want.shape[1]]
        p, q = want.log_softmax(-1), got.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        print(
            f"{file.name}: {len(texts) - len(wrong)} of {len(texts)} strings have the same ids, "
            f"chat {'too' if same else 'NOT'}; {len(ids)} positions: max |logit difference| "
            f"{float((want - got).abs().max()):.4f} of {float(want.abs().max()):.1f}, mean KL "
            f"{float(kl.mean()):.2e}, same top token "
            f"{float((want.argmax(-1) == got.argmax(-1)).double().mean()):.1%}"
        )
        if wrong:
            print("  not the same: " + ", ".join(map(repr, wrong[:5])))
        assert not math.isnan(float(kl.mean()))


if __name__ == "__main__":
    main()

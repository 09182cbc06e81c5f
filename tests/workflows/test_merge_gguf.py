"""`merge --gguf` from end to end: the GGUF file is the adapter on its base, as PEFT runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import bpe_tokenizer, half_exact_model
from merging import adapted, method_options, save_peft
from runs import QuietProgress

from glasstune.core.errors import InputError
from glasstune.workflows.merge import merge


def prepared(folder: Path, family: str, **overrides: Any) -> tuple[Any, Path]:
    """Returns (the tuned model as PEFT runs it, the adapter's folder)."""
    base = folder / "base"
    half_exact_model(base, family, **overrides)
    bpe_tokenizer("gpt-2").save_pretrained(base)
    tuned = adapted(base, method_options("llama", "lora"))
    return tuned, save_peft(tuned, folder / "adapter")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_file_is_the_tuned_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from glasstune.models.quiet import quiet_transformers

    tuned, adapter = prepared(tmp_path, family)
    out = tmp_path / "out"
    record = merge(str(adapter), str(out), dtype="float32", certificate=False, gguf=["f16"],
                   progress=QuietProgress())  # fmt: skip
    assert {"model-f16.gguf", "Modelfile"} <= set(record.files)
    with quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(
            out, gguf_file="model-f16.gguf", dtype=torch.float32
        ).eval()
    ids = torch.randint(0, 480, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, got = tuned(ids).logits.log_softmax(-1), read(ids).logits.log_softmax(-1)
        with tuned.disable_adapter():
            base = tuned(ids).logits.log_softmax(-1)

    def distance(other: Any) -> float:
        return float((want.exp() * (want - other)).sum(-1).mean())

    # float16 holds the merged weights to 2**-11 of their size; the adapter moves far more.
    assert distance(got) < 1e-5
    assert distance(base) > 1e-2


def test_a_model_without_a_gguf_form_is_refused_before_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the merge was begun")

    monkeypatch.setattr("glasstune.export.run.merge", never)
    _, adapter = prepared(tmp_path / "a", "llama", hidden_act="gelu")
    with pytest.raises(InputError, match="hidden_act"):
        merge(str(adapter), str(tmp_path / "out"), gguf=["f16"])
    _, adapter = prepared(tmp_path / "b", "llama")
    file = tmp_path / "b" / "base" / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(rules))
    with pytest.raises(InputError, match=r"llama\.cpp would tokenise"):
        merge(str(adapter), str(tmp_path / "out"), gguf=["f16"])
    assert not (tmp_path / "out").exists()

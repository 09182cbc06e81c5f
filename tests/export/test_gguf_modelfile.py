"""The Ollama Modelfile: its template against the model's own, by a reader of Go templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import LLAMA2
from gguf_models import bpe_tokenizer, half_exact_model
from runs import QuietProgress
from tiny import CHATML

from glasstune.export.gguf import write_gguf

# Qwen2.5's and SmolLM2's way: a system text of its own where the conversation has none.
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe \"brief\".<|im_end|>\\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4.\n\nTwo and two."},
    {"role": "user", "content": 'Say {{ .Content }} in "German", 你好'},
]
SYSTEM = {"role": "system", "content": "You are\na parrot."}


def go_render(template: str, messages: list[dict[str, str]]) -> str:
    """The part of Go's text/template that is used: range, end, .Role, .Content, left trim."""
    template = re.sub(r"\s*\{\{-", "{{", template)
    head, body, tail = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    turns = []
    for message in messages:
        parts = re.split(r"(\{\{ \.\w+ \}\})", body)
        turns.append("".join(
            message[part[4:-3].lower()] if part.startswith("{{ .") else part for part in parts
        ))  # fmt: skip
    return head + "".join(turns) + tail


def modelfile(folder: Path, template: str | None, bos: bool = False) -> tuple[str, Any, list[str]]:
    from transformers import AutoTokenizer

    half_exact_model(folder, vocab_size=640)
    tokenizer = bpe_tokenizer("gpt-2", bos=bos)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    said = QuietProgress()
    write_gguf(folder, ["q8_0", "f16"], said)
    text = (folder / "Modelfile").read_text(encoding="utf-8")
    return text, AutoTokenizer.from_pretrained(folder), said.lines


def quoted(text: str, name: str) -> str | None:
    found = re.search(rf'^{name} """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    return None if found is None else found.group(1)


@pytest.mark.parametrize(
    ("template", "bos"), [(CHATML, False), (WITH_DEFAULT, False), (LLAMA3, True)]
)
def test_a_known_template_renders_the_same_text(template: str, bos: bool, tmp_path: Path) -> None:
    text, tokenizer, said = modelfile(tmp_path, template, bos)
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    go, system = quoted(text, "TEMPLATE"), quoted(text, "SYSTEM")
    assert go is not None
    assert system == ('Be "brief".' if template == WITH_DEFAULT else None)
    assert not any("Modelfile" in line for line in said)
    for messages in (TALK, TALK[:1], [SYSTEM, *TALK], [*TALK, *TALK[1:]]):
        seen = messages  # Ollama puts the Modelfile's SYSTEM before a conversation without one
        if system and messages[0]["role"] != "system":
            seen = [{"role": "system", "content": system}, *messages]
        want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # llama.cpp puts the begin token there itself.
        assert go_render(go, seen) == want.removeprefix("<|begin|>" if bos else "")


# The same as ChatML for one question; only an answer in the history shows the difference.
THINKS = CHATML.replace(
    "message['content']",
    "('<think></think>' if message['role'] == 'assistant' else '') + message['content']",
)
SHORT = CHATML.replace("<|im_end|>\\n' }}{% endfor", "<|im_end|>' }}{% endfor")


@pytest.mark.parametrize("template", [LLAMA2, SHORT, THINKS])
def test_any_other_template_is_left_to_the_gguf_file(template: str, tmp_path: Path) -> None:
    text, _, said = modelfile(tmp_path, template)
    assert 'TEMPLATE "' not in text
    assert "# No TEMPLATE: Ollama reads the chat template in the GGUF file." in text
    assert any("no tested translation" in line for line in said)


def test_without_a_chat_template_text_passes_as_it_is(tmp_path: Path) -> None:
    text, _, _ = modelfile(tmp_path, None)
    assert quoted(text, "TEMPLATE") == "{{ .Prompt }}"


def test_stops_and_parameters(tmp_path: Path) -> None:
    text, _, _ = modelfile(tmp_path, CHATML)
    assert 'PARAMETER stop "<|im_end|>"' in text
    config = tmp_path / "generation_config.json"
    assert "temperature" not in text
    for settings, lines in (
        ({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8,
          "repetition_penalty": 1.05, "eos_token_id": 1},
         {"temperature 0.7", "top_k 20", "top_p 0.8", "repeat_penalty 1.05"}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature 0"}),
        ({"temperature": 0.7}, set()),
    ):  # fmt: skip
        config.write_text(json.dumps(settings))
        write_gguf(tmp_path, ["f16"])
        found = (tmp_path / "Modelfile").read_text().splitlines()
        named = {line.removeprefix("PARAMETER ") for line in found if line.startswith("PARAMETER")}
        assert {name for name in named if not name.startswith("stop")} == lines

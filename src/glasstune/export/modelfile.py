"""The Ollama Modelfile beside a GGUF file.

Ollama has templates in Go's language. Two chat formats are written in it here, and only where the
model's own template was seen to render the same text over a battery of conversations; otherwise
Ollama reads the Jinja template inside the GGUF file, and the Modelfile says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.core.files import write_text_atomic
from glasstune.generation.tokenizer_facts import TokenizerFacts

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Format:
    """A chat format: every turn between the same marks.

    Args:
        name: For comments.
        opening: Before a turn; `{role}` stands for its role.
        closing: Behind a turn.
    """

    name: str
    opening: str
    closing: str

    def render(self, messages: Messages) -> str:
        """Renders messages up to where the answer starts, as the Go template does."""
        turns = [self.opening.format(**message) + message["content"] + self.closing
                 for message in messages]  # fmt: skip
        return "".join(turns) + self.opening.format(role="assistant")

    def go(self) -> str:
        """Returns the format as a template of Ollama."""
        turn = self.opening.format(role="{{ .Role }}") + "{{ .Content }}" + self.closing
        return (
            f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.opening.format(role='assistant')}"
        )


FORMATS = (
    Format("ChatML", "<|im_start|>{role}\n", "<|im_end|>\n"),
    Format("Llama 3", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
)

_TURNS = ("Why is the sky blue?", "Because of\nRayleigh scattering: λ⁻⁴.", '{{ .Role }} 100% "ok"?')
_SYSTEM = "Answer in one line.\nBe kind."

_PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of a generation config to Ollama's parameters."""


def write_modelfile(folder: Path, gguf_name: str, facts: TokenizerFacts) -> list[str]:
    """Writes `Modelfile` into a folder, for `ollama create NAME -f Modelfile`.

    Args:
        folder: With the GGUF file and, where there is one, `generation_config.json`.
        gguf_name: The file's name.
        facts: The tokenizer.

    Returns:
        Notes: what Ollama is left to find out by itself.

    Raises:
        RunError: `disk_full`.
    """
    lines = [f"FROM ./{gguf_name}"]
    notes: list[str] = []
    found = known_format(facts)
    if found is not None:
        form, system = found
        lines += [f"# {form.name}", f'TEMPLATE """{form.go()}"""']
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif facts.render is not None:
        lines.append("# No TEMPLATE: Ollama reads the chat template in the GGUF file.")
        notes.append(
            "Modelfile: this chat template has no tested translation; Ollama reads the one in the "
            "GGUF file"
        )
    else:
        lines.append("# The model has no chat template: Ollama sends the text as it is.")
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    texts = {index: token.text for index, token in facts.added.items()}
    lines += [
        f"PARAMETER stop {json.dumps(texts[index], ensure_ascii=False)}"
        for index in facts.stops
        if index in texts
    ]
    lines += _parameters(folder)
    write_text_atomic(folder / "Modelfile", "\n".join(lines) + "\n")
    return notes


def known_format(facts: TokenizerFacts) -> tuple[Format, str] | None:
    """Finds the format that a template renders, and the system text it puts in by itself.

    Returns:
        None where no format renders the same text for every conversation tried.
    """
    if facts.render is None:
        return None
    for form in FORMATS:
        try:
            system = _default_system(facts, form)
            if system is not None and all(
                _own(facts, messages) == form.render(_with_system(messages, system))
                for messages in _battery()
            ):
                return form, system
        except InputError:  # the template refuses one of these conversations
            continue
    return None


def _battery() -> list[Messages]:
    user, answer, again = _TURNS
    talk = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": again},
    ]
    system = [{"role": "system", "content": _SYSTEM}]
    return [talk[:1], talk, talk + talk[1:], [*system, *talk[:1]], [*system, *talk]]


def _own(facts: TokenizerFacts, messages: Messages) -> str:
    """What the model's template renders, without the begin token that the reader adds itself."""
    assert facts.render is not None
    text = facts.render(messages)
    if facts.begin and facts.begin[0] in facts.added:
        text = text.removeprefix(facts.added[facts.begin[0]].text)
    return text


def _default_system(facts: TokenizerFacts, form: Format) -> str | None:
    """The system text of a conversation without one; None where it cannot be written down."""
    text = _own(facts, _battery()[0])
    opening = form.opening.format(role="system")
    if not text.startswith(opening):
        return ""
    system = text[len(opening) :].partition(form.closing)[0]
    return None if '"""' in system else system


def _with_system(messages: Messages, system: str) -> Messages:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _parameters(folder: Path) -> list[str]:
    """The sampling that the generation config asks for."""
    path = folder / "generation_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if config.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    if not config.get("do_sample"):
        return []
    return [
        f"PARAMETER {name} {config[key]}"
        for key, name in _PARAMETERS.items()
        if isinstance(config.get(key), (int, float))
    ]

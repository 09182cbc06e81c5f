"""`glasstune generate`: prompts in, answers out; from the command line, a file or Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.core.files import dump_json, write_text_atomic
from glasstune.core.protocols import Progress
from glasstune.workflows.open_model import OpenModel, open_model, say_warnings

Prompt = str | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A text, `{"prompt": text}`, `{"messages": [...], "tools": [...]}`, or the messages themselves."""

Messages = list[dict[str, Any]]


def generate(
    run_or_model: str,
    prompts: Sequence[Prompt],
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    checkpoint: str | None = None,
    no_adapter: bool = False,
    bits: int | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> list[str]:
    """Answers prompts with a run's, an adapter's or a plain model.

    Args:
        run_or_model: Run folder, adapter folder, model folder, GGUF file or hub id.
        prompts: What to answer.
        system: System message put before each conversation that has none.
        max_new_tokens: Longest answer in tokens.
        temperature: 0 takes the most likely token; else the softness of the draw.
        top_p: Draws among the most likely tokens that reach this probability together.
        seed: Of the draws.
        batch_size: Prompts in one forward; changes no answer beyond rounding.
        checkpoint: `best`, `last` or `step-N` of a run.
        no_adapter: Lets the base answer, with the run's template.
        bits: Precision of the base; None = the run's, or 16.
        progress: Bars and log.
        **overrides: `dtype`, `device`, `trust_remote_code`.

    Returns:
        One answer a prompt, without end token.

    Raises:
        InputError: A prompt, an option or the model is wrong.
    """
    conversations = [_conversation(prompt, system, index) for index, prompt in enumerate(prompts)]
    opened = open_model(
        run_or_model, checkpoint=checkpoint, no_adapter=no_adapter, packs=False, choices=Choices(),
        bits=bits, **overrides,
    )  # fmt: skip
    say_warnings(opened, progress)
    return generate_opened(
        opened, conversations, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip


def generate_opened(
    opened: OpenModel,
    conversations: Sequence[tuple[Messages, Any]],
    *,
    progress: Progress | None = None,
    **options: Any,
) -> list[str]:
    """Answers conversations with a model that is open already.

    Args:
        opened: The model.
        conversations: (messages, tools or None).
        progress: Bars and log.
        **options: Of `generation.generate_ids`.
    """
    from glasstune.generation import generate_texts, stop_ids

    ids = [
        encode(opened, messages, tools, f"prompt {index + 1}")
        for index, (messages, tools) in enumerate(conversations)
    ]
    stops = {*stop_ids(opened.tokenizer, opened.model), *opened.template.stop_ids}
    return generate_texts(
        opened.model, opened.tokenizer, ids, stops=sorted(stops), progress=progress,
        max_positions=opened.facts.max_positions, precision=opened.precision, **options,
    )  # fmt: skip


def encode(opened: OpenModel, messages: Messages, tools: Any, where: str) -> list[int]:
    """Ids of a prompt as training made them; a plain text where the model has no template.

    Raises:
        InputError: The template refuses the conversation, or there is none for it; a text holds
            what is no character.
    """
    from glasstune.data.encode import encode_prompt
    from glasstune.data.errors import RowError

    try:
        # Bytes that are not UTF-8 come as lone surrogates from a pipe and from the command line.
        json.dumps([messages, tools], ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise InputError(
            "bad_unicode",
            "the text is not UTF-8, or holds half of a surrogate pair, which is no character",
            where=where,
            fix="give the text as UTF-8",
        ) from None
    prompt: Any = messages
    system = None
    roles = [message["role"] for message in messages]
    if opened.template.kind == "none" and roles in (["user"], ["system", "user"]):
        opened.choices.record(
            "chat_template", "none", "the model has no template: the prompt is plain text"
        )
        prompt = messages[-1]["content"]
        system = messages[0]["content"] if len(messages) == 2 else None
    try:
        return encode_prompt(opened.tokenizer, opened.template, prompt, system=system, tools=tools)
    except RowError as error:
        raise InputError(error.code, error.message, where=where, fix=error.fix) from error


def generate_file(
    run_or_model: str,
    input: Path,
    output: Path,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answers every row of a file and writes the rows with their answers as JSON lines.

    Args:
        run_or_model: As in `generate`.
        input: Rows with `prompt` or `messages`.
        output: Each input row with `answer` added, in the same order.
        progress: Bars and log.
        **options: Of `generate`.

    Returns:
        `{"rows", "output"}`.

    Raises:
        InputError: A row has neither key, or the output cannot be written there.
    """
    check_output(output, input)
    rows = read_prompts(input)
    answers = generate(run_or_model, rows, progress=progress, **options)
    lines = [
        dump_json({**row, "answer": answer}) for row, answer in zip(rows, answers, strict=True)
    ]
    write_text_atomic(output, "".join(f"{line}\n" for line in lines))
    return {"rows": len(rows), "output": str(output)}


def check_output(output: Path, input: Path | None) -> None:
    """Refuses a place for answers before anything is loaded.

    Args:
        output: Where they go.
        input: Where the questions come from.

    Raises:
        InputError: Both are one file, its folder does not exist, or its name says another format.
    """
    if input is not None and output.resolve() == input.resolve():
        raise InputError(
            "same_file", "input and output are one file", where=str(output), fix="name another"
        )
    if not output.parent.is_dir():
        raise InputError(
            "no_folder", "its folder does not exist", where=str(output), fix="make it first"
        )
    if output.is_dir():
        raise InputError("is_folder", "it is a folder", where=str(output), fix="name a file")
    if output.suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise InputError(
            "output_format", "answers are written as JSON lines", where=str(output),
            fix=f"name it {output.with_suffix('.jsonl').name}",
        )  # fmt: skip


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a prompt file (JSON lines, JSON array, CSV, TSV, Parquet).

    Raises:
        InputError: A row has neither `prompt` nor `messages`; names file, line and its keys.
    """
    from glasstune.data.read import BadRow, read_rows

    rows = []
    for row in read_rows(path):
        if isinstance(row, BadRow):
            raise InputError(row.code, row.message, where=row.origin, fix="repair this line")
        if not isinstance(row.value.get("prompt"), str) and not row.value.get("messages"):
            raise InputError(
                "no_prompt",
                "the row has neither `prompt` (a text) nor `messages` (a list); its keys are "
                + (", ".join(row.value) or "none"),
                where=row.origin,
                fix='write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
            )
        rows.append(row.value)
    return rows


def _conversation(prompt: Prompt, system: str | None, index: int) -> tuple[Messages, Any]:
    """Returns (messages, tools) of any of the prompt's forms.

    Raises:
        InputError: It is none of them, or already has a system message and `system` is given.
    """
    where = f"prompt {index + 1}"
    tools = None
    if isinstance(prompt, Mapping):
        tools = prompt.get("tools")
        prompt = prompt.get("messages") or prompt.get("prompt") or ""
    if isinstance(prompt, str):
        messages: Messages = [{"role": "user", "content": prompt}]
    else:
        messages = [dict(message) for message in prompt]
    if not messages or not all({"role", "content"} <= set(message) for message in messages):
        raise InputError(
            "bad_messages",
            "it is no list of messages with role and content",
            where=where,
            fix='write [{"role": "user", "content": "..."}]',
        )
    if messages[-1]["role"] == "assistant":
        raise InputError(
            "already_answered",
            "its last turn is the assistant's: there is nothing to answer",
            where=where,
            fix="leave that turn out",
        )
    if not str(messages[-1]["content"] or "").strip():
        raise InputError("empty_prompt", "the prompt is empty", where=where, fix="write a prompt")
    if system is not None:
        if messages[0]["role"] == "system":
            raise InputError(
                "two_system_messages",
                "the prompt has a system message of its own, and --system is given",
                where=where,
                fix="leave one of them out",
            )
        messages.insert(0, {"role": "system", "content": system})
    return messages, tools

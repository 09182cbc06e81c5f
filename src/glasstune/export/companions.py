"""The small files of a merged model: config, tokenizer, template, generation config, own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from glasstune.core.choices import Choices
from glasstune.core.files import write_json_atomic
from glasstune.export.merge_plan import MergePlan

_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "glasstune_template.json",
)  # fmt: skip
_TEMPLATE = (
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "glasstune_template.json",
)  # fmt: skip
_PATTERNS = ("*.tiktoken", "additional_chat_templates/*.jinja")
_BESIDE = (
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_companions(
    plan: MergePlan, folder: Path, stops: Iterable[int], choices: Choices
) -> list[str]:
    """Writes everything beside the weights.

    Args:
        plan: The merge.
        folder: The output.
        stops: Ids that end an answer by the tokenizer that the adapter was trained with.
        choices: Where decisions are noted.

    Returns:
        The names of the files.
    """
    base = plan.job.folder
    write_json_atomic(folder / "config.json", output_config(plan))
    tokenizer = plan.job.adapter if _has_tokenizer(plan.job.adapter) else base
    said = "the one saved with the adapter" if tokenizer != base else "the base's own"
    if tokenizer != base and _has_tokenizer_code(base) and not _added_tokens(tokenizer):
        # A server that runs the checkpoint's code wants the files which that code reads.
        for pattern in _TEMPLATE:
            _copy(tokenizer, folder, pattern)
        tokenizer = base
        said = "the base's own, whose class comes with its code; training added no token"
    if _has_tokenizer(tokenizer):
        choices.record("tokenizer", str(tokenizer), said)
    for pattern in (*_TOKENIZER, *_PATTERNS):
        _copy(tokenizer, folder, pattern)
    for pattern in ("*.py", *_BESIDE):
        _copy(base, folder, pattern)
    _generation_config(base, folder, sorted(stops), choices)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def output_config(plan: MergePlan) -> dict[str, Any]:
    """Returns the output's `config.json`: the base's, with what the merge changed."""
    content: dict[str, Any] = json.loads(
        (plan.job.folder / "config.json").read_text(encoding="utf-8-sig")
    )
    content.pop("quantization_config", None)
    parts = [content]
    text = content.get("text_config")
    if isinstance(text, dict):
        parts.append(text)
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = plan.job.dtype
        if plan.tied == "untied" and (part is content or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if plan.rows is not None and "vocab_size" in part:
            part["vocab_size"] = plan.rows
    if "torch_dtype" not in content:
        content["dtype"] = plan.job.dtype
    return content


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()


def _has_tokenizer_code(folder: Path) -> bool:
    """Whether the tokenizer's class is Python code beside the weights."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return False
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    return "AutoTokenizer" in (content.get("auto_map") or {})


def _added_tokens(folder: Path) -> list[str]:
    """Returns the tokens of a saved tokenizer that stand behind its model's vocabulary."""
    file = folder / "tokenizer.json"
    if not file.is_file():  # the file of a tokenizer that was Python code when it was saved
        added = folder / "added_tokens.json"
        return list(json.loads(added.read_text(encoding="utf-8"))) if added.is_file() else []
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    known = set(vocabulary) if isinstance(vocabulary, dict) else {entry[0] for entry in vocabulary}
    return [token["content"] for token in content["added_tokens"] if token["content"] not in known]


def _copy(source: Path, target: Path, pattern: str) -> None:
    for file in source.glob(pattern):
        to = target / file.relative_to(source)
        if file.is_file() and not to.exists():
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)  # a snapshot's files are links: their content is copied


def _generation_config(base: Path, folder: Path, stops: list[int], choices: Choices) -> None:
    """Copies the base's, with the template's end tokens among those that end an answer.

    Other programs read the end of an answer there: a base whose end token is not the template's
    would go on after its answer.
    """
    file = base / "generation_config.json"
    content: dict[str, Any] = {}
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8-sig"))
    known = content.get("eos_token_id", config.get("eos_token_id"))
    known = [known] if isinstance(known, int) else list(known or [])
    missing = [token for token in stops if token not in known]
    if missing:
        ends = [*known, *missing]
        content["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        reason = f"the tokenizer's end tokens {missing} end an answer too"
        choices.record("generation_config.eos_token_id", content["eos_token_id"], reason)
    if content:
        write_json_atomic(folder / "generation_config.json", content)

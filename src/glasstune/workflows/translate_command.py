"""Reads a training script's command line as the shell and `HfArgumentParser` would.

A command may be pasted as it stood in a terminal or a `.sh` file: continued lines, quotes, shell
variables, a launcher before the script (`deepspeed`, `torchrun`, `accelerate launch`, `python`).
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.core.yaml_text import plain_value

_SWITCH_NAMES = (
    "activation_checkpointing adafactor auto_find_batch_size average_tokens_across_devices "
    "batch_eval_metrics bf16 bf16_full_eval dataloader_drop_last dataloader_in_order "
    "dataloader_persistent_workers dataloader_pin_memory ddp_broadcast_buffers "
    "ddp_find_unused_parameters ddp_static_graph "
    "disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_do_concat_batches "
    "eval_on_start eval_use_gather_object fp16 fp16_full_eval full_determinism greater_is_better "
    "gradient_checkpointing group_by_length hub_always_push hub_private_repo ignore_data_skip "
    "include_inputs_for_metrics include_tokens_per_second jit_mode_eval load_best_model_at_end "
    "log_on_each_node logging_first_step logging_nan_inf_filter no_cuda overwrite_output_dir "
    "prediction_loss_only push_to_hub remove_unused_columns "
    "restore_callback_states_from_checkpoint save_on_each_node save_only_model save_safetensors "
    "skip_memory_metrics split_batches tf32 torch_compile use_cache use_cpu use_ipex "
    "use_legacy_prediction_loop use_liger_kernel use_lora use_mps_device "
    "include_num_input_tokens_seen tpu_metrics_debug dispatch_batches"
)
_TEXT_NAMES = (
    "adapter_name_or_path cache_dir data_path dataset_name ddp_backend eval_data_path hub_model_id "
    "hub_revision hub_token logging_dir model_name_or_path output_dir project "
    "resume_from_checkpoint run_name train_file validation_file"
)
SWITCHES = frozenset(_SWITCH_NAMES.split())
"""Options that are true or false: `--x`, `--x True`, `--x 1` and `--x yes` are the same."""

TEXTS = frozenset(_TEXT_NAMES.split())
"""Options whose value stays text where it looks like a number."""

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_BEFORE = ("nohup", "env", "exec", "time", "sudo", "command", "export", "set", "$")
_LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "python")
_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--[A-Za-z]")
_YAML_KEY = re.compile(r"\s*(- )?[\w.-]+:(\s|$)")


@dataclass(slots=True)
class Command:
    """A command line, read.

    Args:
        script: Name of the script, without its folder; empty where only options were given.
        options: The script's own options.
        launcher: `deepspeed`, `torchrun`, `accelerate`, `python`, another word, or empty.
        launch: The launcher's options; a bare one is True.
        environment: What was set before the command, `CUDA_VISIBLE_DEVICES` for example.
        notes: How the text was read where that is no matter of course.
        lost: What of the text could not be used.
    """

    script: str
    options: dict[str, Any]
    launcher: str = ""
    launch: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a text that is no path at all is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than any path
        return False


def looks_like_command(text: str) -> bool:
    """Whether a text is a command line itself, not the path of a file that holds one."""
    return len(text.split()) > 1 and _OPTION.search(text) is not None


def read_command(text: str, name: str) -> Command | None:
    """Reads the training command out of a text.

    Args:
        text: A shell script or a pasted command.
        name: For messages.

    Returns:
        The command, or None where the text holds none (a YAML file).

    Raises:
        InputError: `bad_command`: a quote that never closes, an option without a value.
    """
    plain, notes = _plain_marks(text)
    variables: dict[str, str] = {}
    unset: list[str] = []
    found: list[tuple[list[str], dict[str, str]]] = []
    for words in _commands(plain, name, variables, unset):
        environment: dict[str, str] = {}
        while words and ((given := _ASSIGNED.fullmatch(words[0])) or words[0] in _BEFORE):
            if given:
                environment[given[1]] = given[2]
            words = words[1:]
        if not words:
            variables |= environment
        elif any(_OPTION.match(word) for word in words):
            found.append((words, {**variables, **environment}))
    scripts = [item for item in found if _script_at(item[0]) is not None]
    candidates = scripts or [item for item in found if item[0][0].startswith("--")]
    if not candidates:
        return None
    command = _command(*candidates[0], name)
    command.notes[:0] = notes
    if len(candidates) > 1:
        command.lost.append(f"{len(candidates)} commands are there: only the first is translated")
    used = [v for v in dict.fromkeys(unset) if _mentions(command, v)]
    command.lost += [f"${v} is not set in this text: write its value" for v in used]
    return command


def _mentions(command: Command, variable: str) -> bool:
    values = [*command.options.values(), *command.launch.values()]
    return any(f"${variable}" in str(v) or f"${{{variable}}}" in str(v) for v in values)


def _plain_marks(text: str) -> tuple[str, list[str]]:
    """Replaces what word processors and chats make of quotes, dashes and spaces."""
    plain = text.replace("\r\n", "\n").translate(str.maketrans("“”‘’\u00a0\u3000", "\"\"''  "))
    plain = re.sub(r"(^|\s)[–—][–—-]?(?=[A-Za-z])", r"\1--", plain)
    if plain == text.replace("\r\n", "\n"):
        return plain, []
    return plain, ["typographic quotes, dashes and spaces are read as the plain ones"]


def _commands(
    text: str, name: str, variables: dict[str, str], unset: list[str]
) -> Iterator[list[str]]:
    """Yields the words of each command; variables are put in as they stand by then."""
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    # A line goes on after a backslash (Windows: ^ or a backtick); one pasted into a single line
    # has the backslash before the next option.
    joined = re.sub(r"\\[ \t]*(\n|$)|(?<=\s)[\^`][ \t]*(\n|$)|\\[ \t]+(?=--)", " ", kept)
    for line in joined.splitlines():
        if _YAML_KEY.match(line) is None:
            yield from _split(_expanded(line, variables, unset), name)


def _split(line: str, name: str) -> list[list[str]]:
    """Splits a line into commands and these into words; redirections and comments are dropped."""
    reader = shlex.shlex(
        re.sub(r"(?<=\s)\d(?=[<>])", "", line), posix=True, punctuation_chars=";&|<>()"
    )
    reader.whitespace_split, reader.commenters = True, ""
    commands: list[list[str]] = [[]]
    redirected = False
    try:
        for word in reader:
            if word.startswith("#"):
                break
            if set(word) <= set(";&|<>()") and word:
                redirected = "<" in word or ">" in word
                if not redirected:
                    commands.append([])
            elif redirected:
                redirected = False
            else:
                commands[-1].append(word)
    except ValueError:
        if _OPTION.search(line) is None:
            return []
        raise InputError(
            "bad_command",
            f"a quote in this line never closes: {line.strip()[:80]}",
            where=name,
            fix="close it, or end continued lines with a backslash",
        ) from None
    return commands


def _expanded(line: str, variables: dict[str, str], unset: list[str]) -> str:
    """Puts the values of shell variables in; one that is not set stays and is remembered."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            unset.append(name)
            return match[0]
        return variables[name]

    return re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", value, line)


def _script_at(words: Sequence[str]) -> int | None:
    """Returns where the script's name stands, after `-m` or as a `.py` file."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    for i, word in enumerate(words[:-1]):
        if at is not None and i > at:
            break
        launches = words[i + 1].startswith(("torch.distributed.", "accelerate.", "deepspeed."))
        if word == "-m" and not launches:
            return i + 1
    return at


def _command(words: list[str], environment: dict[str, str], name: str) -> Command:
    at = _script_at(words)
    if at is None:
        return Command("", read_options(words, name), environment=environment)
    script, before = words[at], words[:at]
    first = Path(before[0]).name if before else ""
    launcher = next((kind for kind in _LAUNCHERS if first.startswith(kind)), first)
    if any(word.startswith("torch.distributed.") for word in before):
        launcher = "torchrun"
    command = Command(Path(script).name, {}, launcher, environment=environment)
    command.options = read_options(words[at + 1 :], name)
    option = ""
    for word in before[1:]:
        if re.match(r"--?[A-Za-z]", word):
            option, sign, value = word.lstrip("-").partition("=")
            option = option.replace("-", "_")
            command.launch[option] = plain_value(value) if sign else True
        elif option:
            command.launch[option] = plain_value(word)
            option = ""
    return command


def read_options(words: Sequence[str], name: str = "command") -> dict[str, Any]:
    """Reads a script's options as `HfArgumentParser` does.

    Args:
        words: What follows the script.
        name: For messages.

    Returns:
        Names and values: a bare option is True, several values are a list, JSON is a map. The
        last of two is used.

    Raises:
        InputError: `bad_command`: a switch has a value that is neither true nor false.
    """
    values: dict[str, list[str]] = {}
    last = ""
    for word in words:
        if _OPTION.match(word):
            last, sign, value = word[2:].partition("=")
            last = last.replace("-", "_")
            values[last] = [value] if sign else []
        elif last:
            values[last].append(word)
    found: dict[str, Any] = {}
    for option, given in values.items():
        if option.startswith("no_") and option[3:] in SWITCHES and not given:
            found[option[3:]] = False
        else:
            found[option] = _value(option, given, name)
    return found


def _value(option: str, given: list[str], name: str) -> Any:
    if option in SWITCHES and len(given) < 2:
        if not given or given[0].lower() in _TRUE:
            return True
        if given[0].lower() in _FALSE:
            return False
        if given[0] == "None":
            return None
        raise InputError(
            "bad_command",
            f"--{option} is a switch: expected True or False, found {given[0]!r}",
            where=name,
            fix=f"write --{option} True or --{option} False",
        )
    if not given:
        return True
    read = given if option in TEXTS else [_word(text) for text in given]
    return read[0] if len(read) == 1 else read


def _word(text: str) -> Any:
    if text[:1] == "{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    return {"True": True, "False": False, "None": None}.get(text, plain_value(text))

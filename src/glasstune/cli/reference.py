"""Writes `docs/REFERENCE.md` from the code: commands with their options, and every config key.

Run `python -m glasstune.cli.reference` after a change; a test fails while the page is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from glasstune.cli import main as _commands_registered  # noqa: F401
from glasstune.cli.app import ORDER, app
from glasstune.core.config_fields import REQUIRED, known_keys, show_default
from glasstune.core.config_names import FLAT, renamed

PAGE = Path("docs/REFERENCE.md")

_HEAD = """# Reference

Made from the code by `python -m glasstune.cli.reference`; a test compares it with `--help` and
the schema.

Every command takes `--json FILE` (`-` is stdout): its result record, and on failure
`{"ok": false, "error": {"code", "message", "where", "fix"}}`. Data goes to stdout, progress and
log to stderr; `NO_COLOR` is honoured.

Exit codes: 0 done · 1 the run failed or a gate refused · 2 the input is wrong · 3 stopped by a
signal, a checkpoint was saved and `--resume` goes on · 130 interrupted elsewhere.

Relative paths, also those inside a configuration, are relative to the folder in which the command
runs.
"""


def page() -> str:
    """Returns the whole page."""
    return "\n".join([_HEAD, *_commands(), *_keys(), *_foreign()])


def options_of(name: str) -> list[tuple[str, str, str]]:
    """Returns a command's arguments and options: (spelling, default, meaning)."""
    command: Any = get_command(app)
    rows = []
    for parameter in command.commands[name].params:
        if parameter.param_type_name == "argument":
            spelling = parameter.metavar or parameter.name.upper()
        else:
            spelling = ", ".join(parameter.opts)
            if not parameter.is_flag:
                spelling += f" {parameter.metavar or parameter.name.upper()}"
        plain = isinstance(parameter.default, (str, int, float, Path))
        shown = plain and not isinstance(parameter.default, bool)
        rows.append((spelling, str(parameter.default) if shown else "", parameter.help or ""))
    return rows


def _commands() -> Iterator[str]:
    command: Any = get_command(app)
    yield "## Commands\n"
    for name in ORDER:
        text = " ".join((command.commands[name].help or "").split())
        yield f"### `glasstune {name}`\n\n{text}\n"
        yield "| option | default | meaning |\n|---|---|---|"
        for spelling, default, meaning in options_of(name):
            yield f"| `{_cell(spelling)}` | {_code(default)} | {_cell(meaning)} |"
        yield ""


def _keys() -> Iterator[str]:
    yield "## Configuration\n"
    yield (
        "`adapter` takes every key of PEFT's `LoraConfig`, `model.quantization` every key of "
        "transformers' `BitsAndBytesConfig`. `N` is an index (`data.sources.0.path=rows.jsonl` on "
        "the command line). Numbers may be written `1e-5`.\n"
    )
    yield "| key | takes | default | meaning |\n|---|---|---|---|"
    for key in known_keys().values():
        if key.section and ".N" not in key.path and key.path not in ("data.sources", "losses"):
            continue
        default = "required" if key.default is REQUIRED else _code(show_default(key.default))
        yield f"| `{key.path}` | {_cell(key.expected)} | {default} | {_cell(key.meaning)} |"
    yield ""


def _foreign() -> Iterator[str]:
    yield "## Names of other tools\n"
    yield (
        "Understood at the top level and in every section, translated and said once. Two names "
        "with different values are an error. Names of `TrainingArguments` are understood at the "
        "top level as they are.\n"
    )
    yield "| key | other names |\n|---|---|"
    for key, names in renamed().items():
        yield f"| `{key}` | {', '.join(f'`{name}`' for name in names)} |"
    flat = ", ".join(f"`{name}`" for name in FLAT)
    yield f"\nAlso at the top level: {flat}."
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def main(path: Path = PAGE) -> None:
    """Writes the page."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()

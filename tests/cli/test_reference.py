import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from glasstune.cli.app import ORDER
from glasstune.cli.main import run
from glasstune.cli.reference import PAGE, options_of, page
from glasstune.core.config_fields import known_keys, schema

ROOT = Path(__file__).parents[2]


TEXT = page()


def test_the_page_is_not_stale():
    assert (ROOT / PAGE).read_text(encoding="utf-8") == TEXT, (
        "write it again: python -m glasstune.cli.reference"
    )


@pytest.mark.parametrize("name", ORDER)
def test_help_shows_every_option_of_the_page(name):
    text = io.StringIO()
    with redirect_stdout(text):
        assert run([name, "--help"]) == 0
    section = TEXT.split(f"### `glasstune {name}`\n")[1].split("###")[0]
    for spelling, _, _ in options_of(name):
        for option in re.findall(r"--[a-z-]+", spelling):
            assert option in text.getvalue()
            assert option in section


def test_the_page_has_every_key_of_the_schema():
    text = TEXT
    for path, key in known_keys().items():
        if not key.section:
            assert f"| `{path}` |" in text
    definitions = schema()["$defs"]
    for section, model in (("training", "TrainingConfig"), ("model", "ModelConfig")):
        for name in definitions[model]["properties"]:
            assert f"`{section}.{name}" in text or known_keys()[f"{section}.{name}"].section


def test_every_command_of_the_contract_is_on_the_page():
    for name in ORDER:
        assert f"### `glasstune {name}`" in TEXT

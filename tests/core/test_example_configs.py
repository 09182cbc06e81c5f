"""Every shipped configuration loads, without a translation or a warning."""

from pathlib import Path

import pytest

from glasstune.core.config_load import dump_config, load_config, load_text

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_examples():
    assert {"smollm2-cpu.yaml", "qlora-4bit.yaml", "baichuan2-lora.yaml"} <= {
        file.name for file in FILES
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_examples_are_bound_to_the_schema(file):
    loaded = load_config(file)
    assert loaded.notes == []
    assert load_text(dump_config(loaded.config)).config == loaded.config
    assert file.read_text(encoding="utf-8").startswith("# ")

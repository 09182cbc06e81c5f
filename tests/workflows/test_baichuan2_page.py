"""`docs/BAICHUAN2.md`: its command, its config, its table and its Python are run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from baichuan import save_baichuan
from baichuan2_command import PUBLISHED

from glasstune.cli.main import run
from glasstune.core.config_load import load_config, load_text
from glasstune.workflows.init import init

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "BAICHUAN2.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `(--[^`]+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
ZERO = {
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
    "zero_optimization": {"stage": 3},
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
}


def block(kind: str, number: int = 0) -> str:
    return [text for found, text in BLOCKS if found == kind][number]


def test_the_pages_command_becomes_the_pages_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert block("bash") == PUBLISHED
    (tmp_path / "old.sh").write_text(block("bash"))
    (tmp_path / "ds_config.json").write_text(json.dumps(ZERO))
    monkeypatch.chdir(tmp_path)
    assert run(["init", "--from", "old.sh", "-o", "config.yaml"]) == 0
    written = Path("config.yaml").read_text()
    comments = re.match(r"(#.*\n)+", written)
    assert comments is not None
    assert written.removeprefix(comments[0]) == block("yaml")
    assert comments[0].endswith(block("yaml", 1))
    words = " ".join(block("bash").replace("\\\n", " ").splitlines()[1:])
    result = init(None, None, from_file=words.replace("$hostfile", '""'))
    assert load_text(result.text).config == load_config("config.yaml").config


def test_the_example_config_is_the_same_run() -> None:
    theirs = load_text(block("yaml")).config
    ours = load_config(ROOT / "configs" / "baichuan2-lora.yaml").config
    assert ours.data.validation_split == 0.02
    for config in (theirs, ours):
        config.data.validation_split = 0.0
        config.data.sources[0].path = config.training.output_dir = "x"
    assert theirs.training.recompute == "full"
    assert theirs.training.per_device_train_batch_size == 16
    theirs.training.recompute = theirs.training.per_device_train_batch_size = "auto"
    assert ours == theirs


def at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def test_the_table_has_rows() -> None:
    assert len(ROWS) > 30


@pytest.mark.parametrize(("option", "setting"), ROWS, ids=[option for option, _ in ROWS])
def test_a_row_of_the_table(option: str, setting: str) -> None:
    more = "" if "--use_lora" in option else "--use_lora True"
    result = init(None, None, from_file=f"fine-tune.py --data_path d.json {more} {option}")
    ((key, value),) = yaml.safe_load(setting).items()
    loaded = load_text(result.text).config.model_dump(mode="json")
    assert at(loaded, key) == value
    assert not result.lost


def test_the_pages_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.sh").write_text(block("bash").replace(" \\\n    --use_lora True", ""))
    assert run(["init", "--from", "old.sh", "-o", "config.yaml"]) == 2
    assert block("", 0) == capsys.readouterr().err
    assert not Path("config.yaml").exists()


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_pages_python(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_baichuan(tmp_path / "m")
    text = block("python").replace("baichuan-inc/Baichuan2-7B-Base", str(base))
    capsys.readouterr()
    exec(text.replace("bits=4", f"bits={bits}"), {})
    # 2 layers, r=1 on 64 -> 192; the rest by hand: embedding, head, blocks, norms.
    rest = 2 * 640 * 64 + 2 * (192 * 64 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    line = f"trainable params: 512 || all params: {rest + 512:,} || trainable%: "
    assert capsys.readouterr().out.startswith(line)


def test_the_7b_line_of_the_page() -> None:
    trained = 32 * (4096 + 3 * 4096)
    block_size = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    total = 2 * 125_696 * 4096 + 32 * block_size + 4096 + trained
    line = (
        f"trainable params: {trained:,} || all params: {total:,} || "
        f"trainable%: {100 * trained / total:.4f}"
    )
    assert line in " ".join(PAGE.split())


def test_files_and_links_of_the_page_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    assert "docs/BAICHUAN2.md" in (ROOT / "README.md").read_text(encoding="utf-8")

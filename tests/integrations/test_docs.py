"""The example of docs/TRAINER.md runs, and the page names every option."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
from trainer_runs import need_trl

import glasstune as gt

need_trl()

PAGE = (Path(__file__).parents[2] / "docs" / "TRAINER.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.compute_loss_func. is deprecated:FutureWarning")
def test_the_example_runs(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert code.count("HuggingFaceTB/SmolLM2-135M-Instruct") == 1
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_llama))
    code = code.replace("max_steps=4,", "max_steps=4, use_cpu=True,")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "docs/TRAINER.md", "exec"), names)
    log = names["trainer"].state.log_history
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3, 4]
    promised = re.findall(r"`(glasstune/[a-z_/]+)`", PAGE)
    assert len(promised) == 4
    for key in (*promised, "loss/next_token", "loss/z_loss", "loss/small_logits"):
        assert key in log[0], key
    lines = Path("runs/sft/audit.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows if row["event"] == "audit"] == [1, 2, 4]


def test_every_option_is_named_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", PAGE, flags=re.MULTILINE))
    options = inspect.signature(gt.GlasstuneCallback).parameters.values()
    assert rows == {option.name: json_like(option.default) for option in options}


def json_like(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)

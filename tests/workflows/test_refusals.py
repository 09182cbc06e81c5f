"""What `train` refuses or says before it spends time."""

from __future__ import annotations

import json

import pytest
from runs import QuietProgress, tiny_run

from glasstune.core.errors import InputError
from glasstune.workflows.train import train


@pytest.mark.parametrize(
    ("section", "where"),
    [
        ({"training": {"learning_rate": 0}}, "training.learning_rate"),
        ({"losses": [{"name": "next_token", "weight": 0}]}, "losses"),
        ({"adapter": {"rank": 8}}, "adapter.rank"),
        ({"model": {"quantization": {"bnb_4bit_typ": "nf4"}}}, "model.quantization.bnb_4bit_typ"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    tiny_llama, qa_file, tmp_path, section, where
) -> None:
    with pytest.raises(InputError) as caught:
        train(
            tiny_run(tiny_llama, qa_file, tmp_path / "run", **section),
            dry_run=True,
            progress=QuietProgress(),
        )
    assert caught.value.where == where


def test_a_folder_that_cannot_be_made_is_the_users_error(tiny_llama, qa_file, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    config = tiny_run(tiny_llama, qa_file, tmp_path / "file" / "run")
    with pytest.raises(InputError) as caught:
        train(config, progress=QuietProgress())
    assert caught.value.code == "output_not_writable"


def test_what_the_data_check_found_is_said_before_the_training(tiny_llama, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "q", "completion": "a"}] * 3 + [{"prompt": "q", "completion": ""}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = QuietProgress()
    train(
        tiny_run(tiny_llama, rows, tmp_path / "run", training={"max_steps": 1}), progress=progress
    )
    said = [index for index, text in enumerate(progress.lines) if "empty answer" in text]
    evaluated = [index for index, text in enumerate(progress.lines) if text.startswith("step 0")]
    assert said[0] < evaluated[0]

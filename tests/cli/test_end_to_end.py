"""The commands as a user types them, on a tiny model: train, resume, evaluate, generate."""

import json

import pytest
import yaml

from glasstune.cli.main import run


@pytest.fixture(scope="module")
def trained(tiny_llama, qa_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    record = folder / "record.json"
    words = [
        "train", "--model", str(tiny_llama), "--data", str(qa_file), "model.dtype=float32",
        "data.max_length=128", "training.max_steps=4", "training.train_batch_size=2",
        f"training.output_dir={folder / 'run'}", "training.learning_rate=1e-3", "lora_rank=2",
        "training.report_to=[tensorboard]", "--json", str(record),
    ]  # fmt: skip
    assert run(words) == 0
    return folder / "run", json.loads(record.read_text()), words


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_train_writes_the_run_folder_and_the_record(trained):
    folder, record, _ = trained
    assert record["ok"] is True
    assert record["updates"] == 4
    for name in ("config.yaml", "run.json", "metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (folder / name).is_file(), name
    assert list((folder / "tensorboard").glob("events.*"))
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["adapter"]["r"] == 2
    notes = json.loads((folder / "run.json").read_text())["notes"]
    assert notes == ["lora_rank is adapter.r here"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_is_not_overwritten_and_goes_on_from_its_own_config(trained, capsys):
    folder, _, words = trained
    assert run(words) == 2
    assert "--resume" in capsys.readouterr().err
    again = ["train", str(folder / "config.yaml"), "training.max_steps=6", "--resume"]
    assert run([*again, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["updates"] == 6


def test_evaluate_and_generate_use_the_run(trained, qa_file, tmp_path, capsys):
    folder, _, _ = trained
    assert run(["evaluate", str(folder), "--data", str(qa_file), "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["eval_loss"] > 0
    words = ["generate", str(folder), "--max-new-tokens", "3"]
    assert run([*words, "--prompt", "What is 1 plus 1?", "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 1
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert run([*words, "--input", str(prompts), "--output", str(answers)]) == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    assert all(isinstance(row["answer"], str) for row in rows)


def test_dry_run_reads_no_weights_and_prints_the_resolved_config(trained, tmp_path, capsys):
    _, _, words = trained
    target = tmp_path / "never"
    changed = [w for w in words if not w.startswith("training.output_dir")][:-2]
    assert run([*changed, f"training.output_dir={target}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "learning_rate: 0.001" in out
    assert not target.exists()

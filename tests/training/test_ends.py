"""How a run ends: early, without a token to train, at a part of an epoch, with its best gone."""

from __future__ import annotations

import json
import shutil

import pytest
from runs import QuietProgress, StopAfter, events, last_weights, same_bits, tiny_run

from glasstune.core.errors import InputError, RunError, StoppedBySignal
from glasstune.training.batching import Schedule
from glasstune.workflows.train import train

EARLY = {
    "learning_rate": 0.03, "lr_scheduler_type": "constant", "eval_steps": 2,
    "early_stopping_patience": 2, "num_train_epochs": 60,
}  # fmt: skip


def test_a_run_that_stopped_early_stays_stopped_on_resume(tiny_llama, qa_file, tmp_path) -> None:
    """As a kill between its last save and the end would need it."""
    output = tmp_path / "run"
    first = train(tiny_run(tiny_llama, qa_file, output, training=EARLY), progress=QuietProgress())
    weights = last_weights(output)
    shutil.rmtree(output / "adapter")
    again = train(
        tiny_run(tiny_llama, qa_file, output, training=EARLY),
        resume=True, progress=QuietProgress(),
    )  # fmt: skip
    assert (again.stopped_by, again.updates) == ("early_stopping", first.updates)
    assert same_bits(last_weights(output), weights)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    more = tiny_run(
        tiny_llama, qa_file, output, training={**EARLY, "early_stopping_patience": 3}
    )  # fmt: skip
    assert train(more, resume=True, progress=QuietProgress()).updates > first.updates


def test_more_patience_than_held_out_rows_is_refused(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        data={"validation_split": 0.0}, training={"early_stopping_patience": 2},
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == "no_validation"


def write_loss(folder, body: str) -> str:
    path = folder / "mine.py"
    path.write_text(f"import torch\ndef mine(batch):\n    {body}\n")
    return f"{path}:mine"


def test_max_steps_over_data_without_a_trained_token_ends(
    tiny_llama, qa_file, tmp_path, quiet
) -> None:
    function = write_loss(tmp_path, "return batch.hidden.sum() * 0, 0")
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 5},
        losses=[{"name": "mine", "function": function}],
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == "nothing_trained"
    assert "whole epoch" in caught.value.message


@pytest.mark.parametrize("micro", [1, 4])
def test_a_count_of_zero_in_some_batches(tiny_llama, qa_file, tmp_path, quiet, micro) -> None:
    """A user's sum over nothing has no graph; updates in which all counts are 0 are none."""
    body = (
        "keep = torch.tensor([int(o) % 4 == 0 for o in batch.columns['score']])[batch.documents]\n"
        "    n = int(keep.sum())\n"
        "    return (batch.hidden[keep].square().mean(-1).sum(), n) if n else (torch.zeros(()), 0)"
    )
    rows = [{**row, "score": k} for k, row in enumerate(json.loads(qa_file.read_text()))]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    config = tiny_run(
        tiny_llama, data, tmp_path / "run",
        data={"packing": False}, audit={"first_step_gate": "warn"},
        training={"num_train_epochs": 1, "per_device_train_batch_size": micro, "logging_steps": 50},
        losses=[{"name": "mine", "function": write_loss(tmp_path, body)}],
    )  # fmt: skip
    record = train(config, progress=quiet)
    skipped = sum("update skipped" in line for line in quiet.lines)
    assert skipped > 0
    assert record.updates == 14 - skipped
    # The planned last update never came: metrics and held-out loss are still those of the end.
    assert events(tmp_path / "run", "train")[-1]["step"] == record.updates
    assert events(tmp_path / "run", "eval")[-1]["step"] == record.updates


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return batch.hidden.detach().sum(), 1", "loss_without_graph"),
        ("return batch.hidden.sum(), float('nan')", "loss_count"),
        ("return batch.hidden.sum(), -1", "loss_count"),
    ],
)
def test_a_user_loss_that_cannot_be_trained_is_named(
    tiny_llama, qa_file, tmp_path, quiet, body, code
) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        losses=[
            {"name": "next_token"},
            {"name": "mine", "function": write_loss(tmp_path, body)},
        ],
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == code
    assert "mine" in caught.value.message


def test_a_loss_file_may_hold_dataclasses(tiny_llama, qa_file, tmp_path, quiet) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Margin:\n    size: float = 1.0\n"
        "def mine(batch):\n    return batch.hidden.sum() * Margin().size, 1\n"
    )
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 1},
        losses=[{"name": "next_token"}, {"name": "mine", "function": f"{path}:mine"}],
    )  # fmt: skip
    assert train(config, progress=quiet).updates == 1


def test_the_rest_of_an_epoch_follows_where_a_fraction_ended(tiny_llama, qa_file, tmp_path) -> None:
    """Half an epoch, then the whole: every row once."""
    output = tmp_path / "run"
    half = {"num_train_epochs": 0.5, "save_strategy": "epoch", "train_batch_size": 9}
    assert Schedule(54, 9, 1, 0.5, -1).total == 3

    def config(**training):
        return tiny_run(
            tiny_llama, qa_file, output,
            data={"packing": False}, training={**half, **training},
        )  # fmt: skip

    assert train(config(), progress=QuietProgress()).updates == 3
    record = train(config(num_train_epochs=1), resume=True, progress=QuietProgress())
    assert record.updates == 6
    # Fewer than were made: nothing is left to do.
    record = train(config(num_train_epochs=0.2), resume=True, progress=QuietProgress())
    assert record.updates == 6
    assert Schedule(54, 9, 1, 0.2, -1).update_sizes(0, 27) == []


def test_a_best_checkpoint_that_is_gone_is_forgotten(tiny_llama, qa_file, tmp_path) -> None:
    """Back to step 4, whose best so far was deleted since, at a rate that never beats it."""
    output = tmp_path / "run"
    training = {"eval_steps": 2, "save_steps": 2, "save_total_limit": None, "max_steps": 6}
    with pytest.raises(StoppedBySignal):
        train(tiny_run(tiny_llama, qa_file, output, training=training), progress=StopAfter(5))
    state = output / "checkpoints" / "step-4" / "state.json"
    best = json.loads(state.read_text())["loop"]["best_step"]
    for name in {f"step-{best}", "step-2"} - {"step-4"}:
        shutil.rmtree(output / "checkpoints" / name)
    if best == 4:  # then pretend that it was the update before
        record = json.loads(state.read_text())
        record["loop"].update(best_step=2, best_loss=0.0)
        state.write_text(json.dumps(record))
        mark = state.with_name("complete.json")
        from glasstune.core.files import sha256_file

        listed = json.loads(mark.read_text())
        listed["files"]["state.json"] = [state.stat().st_size, sha256_file(state)]
        mark.write_text(json.dumps(listed))
    progress = QuietProgress()
    record = train(
        tiny_run(tiny_llama, qa_file, output, training=training),
        resume="step-4", progress=progress,
    )  # fmt: skip
    assert record.best_step in (4, 6)
    assert any(finding.code == "best_lost" for finding in record.findings)


def test_overwrite_costs_the_old_run_only_once_the_new_one_stands(
    tiny_llama, qa_file, tmp_path, quiet
) -> None:
    output = tmp_path / "run"
    train(tiny_run(tiny_llama, qa_file, output, training={"max_steps": 2}), progress=quiet)
    missing = tiny_run(tiny_llama, tmp_path / "no-such-file.json", output)
    with pytest.raises(InputError):
        train(missing, overwrite=True, progress=quiet)
    assert (output / "adapter" / "adapter_model.safetensors").is_file()
    onward = tiny_run(
        tiny_llama, qa_file, output,
        adapter={"path": str(output / "adapter")}, training={"max_steps": 1},
    )  # fmt: skip
    assert train(onward, overwrite=True, progress=quiet).updates == 1
    assert [row["step"] for row in events(output, "train")] == [1]


def test_a_loss_that_raises_names_its_line(tiny_llama, qa_file, tmp_path, quiet) -> None:
    term = {"name": "mine", "function": write_loss(tmp_path, "return batch.columns['nope'], 1")}
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=[term])
    with pytest.raises(RunError, match=r"KeyError: 'nope' \(.*\.py, line \d+\)"):
        train(config, progress=quiet)

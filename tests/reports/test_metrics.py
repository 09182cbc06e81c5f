import importlib.util
import sys
import types

import pytest

from glasstune.core.errors import InputError
from glasstune.reports.metrics import make_writers, named_values

TRAIN = {
    "event": "train", "step": 3, "epoch": 0.5, "loss": 2.5, "losses": {"next_token": 2.0, "z": 0.5},
    "learning_rate": 1e-4, "grad_norm": 1.5, "tokens_per_second": 100.0, "attempt": 1,
}  # fmt: skip
EVAL = {"event": "eval", "step": 3, "eval_loss": 2.25, "eval_tokens": 40, "attempt": 1}


def test_names_are_those_of_transformers():
    assert dict(named_values(TRAIN)) == {
        "train/loss": 2.5,
        "train/learning_rate": 1e-4,
        "train/grad_norm": 1.5,
        "train/epoch": 0.5,
        "train/tokens_per_second": 100.0,
        "train/losses/next_token": 2.0,
        "train/losses/z": 0.5,
    }
    assert dict(named_values(EVAL)) == {"eval/loss": 2.25, "eval/tokens": 40.0}
    assert dict(named_values({"event": "save", "step": 3})) == {}
    assert dict(named_values({**TRAIN, "losses": None, "loss": None}))["train/epoch"] == 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_files_read_back(tmp_path):
    (writer,) = make_writers(["tensorboard"], tmp_path)
    writer.write(TRAIN)
    writer.write(EVAL)
    writer.write({"event": "save", "step": 3})
    writer.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, 2.5)
    assert events.Scalars("eval/loss")[0].value == 2.25


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_that_is_not_installed_is_the_users_to_install(name, tmp_path):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(InputError) as caught:
        make_writers([name], tmp_path)
    assert caught.value.code == "not_installed"
    assert f"pip install {name}" in caught.value.fix


def test_wandb_and_mlflow_get_the_same_names(tmp_path, monkeypatch):
    seen: list[tuple[str, object]] = []

    def note(name):
        return lambda *args, **kwargs: seen.append((name, args or kwargs))

    run = types.SimpleNamespace(log=note("log"), finish=note("finish"))
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: run
    mlflow = types.ModuleType("mlflow")
    for name in ("start_run", "log_metrics", "end_run"):
        setattr(mlflow, name, note(name))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    writers = make_writers(["wandb", "mlflow", "wandb"], tmp_path, "mine")
    assert len(writers) == 2
    for writer in writers:
        writer.write(EVAL)
        writer.write({"event": "save", "step": 4})
        writer.close()
    assert [name for name, _ in seen] == ["start_run", "log", "finish", "log_metrics", "end_run"]
    logged = dict(seen)["log"][0]
    assert logged == {"eval/loss": 2.25, "eval/tokens": 40.0, "train/global_step": 3}

import json
import subprocess
import sys
import time

import pytest
from typer.main import get_command

from glasstune.cli import main as cli
from glasstune.cli.app import ORDER, app
from glasstune.cli.train import resume_value, split_arguments
from glasstune.core.errors import InputError, RunError, StoppedBySignal
from glasstune.core.records import TrainRecord

UNBUILT = ("report",)


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60
    )


def test_help_of_every_command_loads_no_torch_and_is_quick():
    heavy = "torch transformers peft datasets bitsandbytes numpy pyarrow"
    code = (
        "import sys\n"
        "from glasstune.cli.main import run\n"
        "for command in sys.argv[1:]:\n"
        "    assert run([command, '--help']) == 0, command\n"
        "assert run(['--help']) == 0\n"
        "assert run([]) == 0\n"
        f"found = sorted(set({heavy!r}.split()) & set(sys.modules))\n"
        "assert not found, found\n"
    )
    done = run_python(code, *ORDER)
    assert done.returncode == 0, done.stderr
    started = time.monotonic()
    assert run_python("from glasstune.cli.main import run; run(['train', '--help'])").stdout
    assert time.monotonic() - started < 2


def test_importing_the_package_loads_no_torch():
    done = run_python("import glasstune, sys; assert 'torch' not in sys.modules; dir(glasstune)")
    assert done.returncode == 0, done.stderr


def test_module_form_works():
    done = subprocess.run(
        [sys.executable, "-m", "glasstune", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.strip() == "0.1.0"


def test_every_command_of_the_contract_exists_in_order():
    command = get_command(app)
    assert tuple(command.list_commands(None)) == ORDER


def test_every_command_takes_json():
    for name, command in get_command(app).commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_not_built_says_so(name, capsys):
    assert cli.run([name, "config.yaml", "--measure", "--bits", "4", "--json", "-"]) == 2
    out, err = capsys.readouterr()
    assert "not built yet" in err
    assert json.loads(out)["error"]["code"] == "not_built"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["trian"], "train"),
        (["train", "--modl", "x"], "--model"),
        (["evaluate", "m"], "--data"),
        (["config"], "--defaults"),
        (["generate", "m"], "--prompt"),
        (["generate", "m", "--input", "a.jsonl"], "--output"),
        (["generate", "m", "--prompt", "x", "--seed", "abc"], "--seed"),
        (["train"], "--model"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "a.yaml", "b.yaml"], "b.yaml"),
        (["train", "--model", "m", "--data", "d", "--resume=soon"], "soon"),
    ],
)
def test_bad_usage_is_one_message_and_exit_2(words, found, capsys, tmp_path):
    record = tmp_path / "r.json"
    assert cli.run([*words, "--json", str(record)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert found in err
    failed = json.loads(record.read_text())
    assert failed["ok"] is False
    assert set(failed["error"]) == {"code", "message", "where", "fix"}


def test_a_wrong_config_is_named_with_file_and_line(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("model: {path: m}\ntraining:\n  learning_rat: 1\n")
    assert cli.run(["train", str(file), "--json", "-"]) == 2
    out, err = capsys.readouterr()
    assert f"error: {file}:3: unknown key 'training.learning_rat'" in err
    assert "hint: did you mean training.learning_rate?" in err
    assert json.loads(out)["error"]["where"] == f"{file}:3"


def test_json_that_cannot_be_written_is_refused_before_the_run(capsys):
    assert cli.run(["config", "--schema", "--json", "/nowhere/at/all.json"]) == 2
    assert "/nowhere/at" in capsys.readouterr().err


def test_config_prints_defaults_and_schema(capsys):
    assert cli.run(["config", "--defaults"]) == 0
    assert "learning_rate: 0.0002" in capsys.readouterr().out
    assert cli.run(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Config"
    assert cli.run(["config", "--defaults", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["training"]["seed"] == 0


RECORD = {
    "updates": 3, "eval_loss_before": 2.0, "eval_loss_after": 1.5, "best_step": 3, "seconds": 1.0,
    "trained_tokens": 10, "peak_memory_bytes": 5, "adapter": "runs/x/adapter", "resumable": True,
}  # fmt: skip


@pytest.fixture
def workflow(monkeypatch):
    """Puts a stand-in for the train workflow; returns the calls that it saw."""
    import types

    calls: list[dict[str, object]] = []
    outcome: dict[str, object] = {"value": TrainRecord(ok=True, stopped_by="done", **RECORD)}

    def train(config, **options):
        calls.append({"config": config, **options})
        value = outcome["value"]
        if isinstance(value, BaseException):
            raise value
        return value

    module = types.ModuleType("glasstune.workflows.train")
    module.train = train
    monkeypatch.setitem(sys.modules, "glasstune.workflows.train", module)
    return calls, outcome


TRAIN = ["train", "--model", "m", "--data", "d.json"]


def test_train_calls_the_workflow_and_writes_the_record(workflow, capsys, tmp_path):
    calls, _ = workflow
    file = tmp_path / "record.json"
    words = [*TRAIN, "training.seed=3", "load_in_4bit=true", "--json", str(file)]
    assert cli.run(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(file.read_text())["stopped_by"] == "done"
    assert "1.5000" in out
    assert err.count("load_in_4bit") == 1
    (call,) = calls
    assert call["config"].training.seed == 3
    assert call["config"].model.bits == 4
    assert call["resume"] is None
    assert call["overwrite"] is False
    assert call["notes"] == ["load_in_4bit: true is model.bits: 4 here"]


def test_stdout_holds_only_the_record_where_json_is_stdout(workflow, capsys):
    assert cli.run([*TRAIN, "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["updates"] == 3
    assert "1.5000" in err


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--resume"], True),
        (["--resume", "step-20"], "step-20"),
        (["--resume=step-20"], "step-20"),
        (["--resume", "training.seed=1"], True),
        (["--resume", "--json", "-"], True),
        ([], None),
    ],
)
def test_resume_takes_a_step_or_nothing(workflow, words, value, capsys):
    calls, _ = workflow
    assert cli.run([*TRAIN, *words]) == 0
    assert calls[0]["resume"] == value


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (TrainRecord(ok=False, stopped_by="gate", **RECORD), 1),
        (TrainRecord(ok=False, stopped_by="signal", **RECORD), 3),
        (TrainRecord(ok=True, stopped_by="early_stopping", **RECORD), 0),
        (RunError("gate", "tensor a learns nothing"), 1),
        (InputError("x", "bad row", where="d.json:4"), 2),
        (StoppedBySignal("stopped", "stopped at step 5", fix="--resume"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(workflow, value, code, capsys):
    workflow[1]["value"] = value
    assert cli.run([*TRAIN, "--json", "-"]) == code
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["ok"] is (code == 0)
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback_and_exits_1(workflow, capsys):
    workflow[1]["value"] = ZeroDivisionError("oh")
    assert cli.run([*TRAIN, "--json", "-"]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert "ZeroDivisionError: oh" in err
    assert json.loads(out)["error"]["code"] == "bug"


def test_no_color_and_no_terminal_print_no_escapes(workflow, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.run(TRAIN) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def test_words_split_into_config_and_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.yaml").write_text("x")
    path, overrides = split_arguments(["a=b.yaml", "x=1", "y.z=[2]"])
    assert str(path) == "a=b.yaml"
    assert overrides == ["x=1", "y.z=[2]"]
    assert split_arguments(["x=1"]) == (None, ["x=1"])


def test_resume_values():
    assert resume_value(None) is None
    assert resume_value("last") is True
    with pytest.raises(InputError):
        resume_value("step-")


def test_broken_pipe_is_silent():
    code = (
        "import sys\nfrom glasstune.cli.main import run\n"
        "class Gone:\n"
        "    def write(self, text): raise BrokenPipeError\n"
        "    def flush(self): pass\n"
        "    def isatty(self): return False\n"
        "sys.stdout = Gone()\n"
        "code = run(['config', '--defaults'])\n"
        "assert code == 1, code\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model", "m", "--data", "a.json", "--data", "b.json"],
        ["generate", "m", "--prompt=a", "--prompt=b"],
    ],
)
def test_an_option_given_twice_is_refused_and_not_half_taken(words, capsys):
    assert cli.run(words) == 2
    assert "is given twice" in capsys.readouterr().err
    assert cli.repeated(["generate", "m", "--prompt", "a", "--", "--prompt"]) is None

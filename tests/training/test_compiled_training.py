"""`training.compile: true`: the same training, stopped and resumed, audited, gated and explained.

The compiler's front end alone (`aot_eager`) runs here: plumbing is what can break. One slow test
has real code made.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from runs import (
    QuietProgress,
    StopAfter,
    adapter_weights,
    distance,
    events,
    last_weights,
    same_bits,
    tiny_run,
)
from tiny import save_tiny_model, tiny_tokenizer
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.models.llama.modeling_llama import LlamaMLP

from glasstune.core.errors import InputError, RunError, StoppedBySignal
from glasstune.workflows import trained_speed
from glasstune.workflows.audit import audit
from glasstune.workflows.train import train

pytestmark = QUIET_COMPILER
KL = [{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.3}]


@pytest.fixture(autouse=True)
def front_end(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(trained_speed, "COMPILE_OPTIONS", {"backend": "aot_eager"})
    yield
    torch._dynamo.reset()


def config(model: Path, data: Path, output: Path, /, **sections: Any) -> Any:
    training = {
        "max_steps": 6, "eval_steps": 3, "save_steps": 2, "compile": True, "learning_rate": 2e-3,
        **sections.pop("training", {}),
    }  # fmt: skip
    return tiny_run(model, data, output, training=training, **sections)


def run(model: Path, data: Path, output: Path, /, **sections: Any) -> QuietProgress:
    progress = QuietProgress()
    train(config(model, data, output, **sections), progress=progress)
    return progress


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "run.json").read_text())


SLOW = pytest.mark.slow(reason="the compiler takes 2 to 5 s a graph")


def opens_in_plain_peft(model: Path, adapter: Path) -> None:
    """Its logits are those of base weight + scale * B @ A."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.arange(20, 40)[None]
    got = tuned(input_ids=ids).logits
    truth = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = adapter_weights(adapter)
    with torch.no_grad():
        for key, down in weights.items():
            if ".lora_A." in key:
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                up = weights[key.replace("lora_A", "lora_B")]
                truth.get_submodule(path).weight += (8 / 4) * up @ down
    torch.testing.assert_close(got, truth(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, pytest.param(0.3, marks=SLOW)])
def test_it_ends_where_a_plain_run_does(tiny_llama, qa_file, tmp_path, share) -> None:
    from torch._dynamo import config as dynamo

    options = {"adapter": {"lora_dropout": share}}
    limit = dynamo.recompile_limit
    said = run(tiny_llama, qa_file, tmp_path / "fast", **options).lines
    assert dynamo.recompile_limit == limit
    run(tiny_llama, qa_file, tmp_path / "plain", training={"compile": False}, **options)
    assert distance(last_weights(tmp_path / "fast"), last_weights(tmp_path / "plain")) < 1e-4
    for kind, key in (("eval", "eval_loss"), ("train", "loss")):
        mine, theirs = (events(tmp_path / side, kind) for side in ("fast", "plain"))
        assert [row[key] for row in mine] == pytest.approx([row[key] for row in theirs], rel=1e-5)
    speed = record(tmp_path / "fast")["speed"]
    assert len(speed["modules"]) == 14
    assert all(module["reason"] and module["path"] for module in speed["modules"])
    ways = {module["way"] for module in speed["modules"]}
    assert ways == ({"grouped", "compiled only"} if share else {"wide"})
    assert len(speed["compiled"]) == 3  # two layers and the last norm
    lines = [line for line in said if line.startswith("speed:")]
    assert len(lines) == 1
    assert "of 14 adapted modules" in lines[0]
    assert "3 regions compiled" in lines[0]
    opens_in_plain_peft(tiny_llama, tmp_path / "fast" / "adapter")


def test_on_a_cpu_it_is_off_unless_asked_for(tiny_llama, qa_file, tmp_path) -> None:
    run(tiny_llama, qa_file, tmp_path / "run", training={"compile": "auto", "max_steps": 1})
    found = record(tmp_path / "run")
    (choice,) = [one for one in found["choices"] if one["name"] == "training.compile"]
    assert choice["value"] is False
    assert "on a cpu" in choice["reason"]
    assert {module["way"] for module in found["speed"]["modules"]} == {"plain"}
    assert {module["reason"] for module in found["speed"]["modules"]} == {choice["reason"]}
    assert found["speed"]["compiled"] == []


def test_without_a_compiler_it_is_refused_before_weights_are_read(
    tiny_llama, qa_file, tmp_path, monkeypatch
) -> None:
    from glasstune.fast import compile as compiling
    from glasstune.models import load

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(compiling, "compiler_found", lambda: None)
    monkeypatch.setattr(load, "load_base", never)
    with pytest.raises(InputError) as caught:
        run(tiny_llama, qa_file, tmp_path / "run")
    assert caught.value.code == "no_compiler"


@pytest.mark.parametrize("packing", [True, pytest.param(False, marks=SLOW)])
def test_stopped_and_resumed_it_has_the_same_bits(tiny_llama, qa_file, tmp_path, packing) -> None:
    """Stopped before, at and after the updates that are looked at; dropout, audits by term."""
    options = {
        "adapter": {"lora_dropout": 0.3}, "losses": KL, "audit": {"every_n_steps": 2},
        "data": {"packing": packing},
    }  # fmt: skip
    run(tiny_llama, qa_file, tmp_path / "whole", **options)
    stopped = config(tiny_llama, qa_file, tmp_path / "run", **options)
    with pytest.raises(StoppedBySignal):
        train(stopped, progress=StopAfter(1))
    for progress in (StopAfter(2), None):
        again = config(tiny_llama, qa_file, tmp_path / "run", **options)
        if progress is None:
            train(again, resume=True, progress=QuietProgress())
        else:
            with pytest.raises(StoppedBySignal):
                train(again, resume=True, progress=progress)
    assert same_bits(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))
    for kind, key in (("eval", "eval_loss"), ("train", "loss")):
        mine, theirs = (events(tmp_path / side, kind) for side in ("run", "whole"))
        assert [row[key] for row in mine] == [row[key] for row in theirs]


@SLOW
def test_terms_are_split_on_compiled_graphs(tiny_llama, qa_file, tmp_path) -> None:
    import torch._functorch.config as functorch

    before = functorch.donated_buffer
    options = {"losses": KL, "audit": {"every_n_steps": 2}}
    run(tiny_llama, qa_file, tmp_path / "fast", **options)
    assert functorch.donated_buffer is before
    run(tiny_llama, qa_file, tmp_path / "plain", training={"compile": False}, **options)
    found = []
    for side in ("fast", "plain"):
        lines = (tmp_path / side / "audit.jsonl").read_text().splitlines()
        found.append([row for row in map(json.loads, lines) if row["event"] == "audit"])
    assert [row["step"] for row in found[0]] == [1, 2, 4, 6]
    for mine, theirs in zip(*found, strict=True):
        assert mine["engine"] == "grad"
        assert mine["sum_check"] < 1e-5
        for one, other in zip(mine["terms"], theirs["terms"], strict=True):
            assert one["norm"] == pytest.approx(other["norm"], rel=1e-3, abs=1e-6)
    assert distance(last_weights(tmp_path / "fast"), last_weights(tmp_path / "plain")) < 1e-3


@SLOW
def test_no_graph_is_made_once_each_kind_of_forward_was(
    tiny_llama, qa_file, tmp_path, monkeypatch
) -> None:
    """Seeds, packs, short last batches and new epochs are inputs of the graphs that are there."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(trained_speed, "COMPILE_OPTIONS", {"backend": counter})
    seen: list[int] = []

    class Counting(QuietProgress):
        def advance(self, task: str, amount: int = 1, **fields: float | str) -> None:
            if task == "train" and fields:
                seen.append(counter.frame_count)

    # 14 packs: an epoch of four updates, the last of two rows; three rows a forward.
    options = {
        "training": {"max_steps": 14, "per_device_train_batch_size": 3, "eval_steps": 2},
        "adapter": {"lora_dropout": 0.3},
    }  # fmt: skip
    train(config(tiny_llama, qa_file, tmp_path / "run", **options), progress=Counting())
    assert len(seen) == 14
    assert seen[-1] == seen[0]
    assert seen[-1] <= 10


@SLOW
def test_recomputed_layers_have_the_same_bits(tiny_llama, qa_file, tmp_path) -> None:
    options = {"adapter": {"lora_dropout": 0.3}}
    run(tiny_llama, qa_file, tmp_path / "none", **options)
    run(tiny_llama, qa_file, tmp_path / "full", training={"recompute": "full"}, **options)
    assert same_bits(last_weights(tmp_path / "none"), last_weights(tmp_path / "full"))
    choices = {one["name"]: one["value"] for one in record(tmp_path / "full")["choices"]}
    assert choices["recompute_layers"] == 2


def cut_off(monkeypatch: Any, how: str) -> None:
    """Makes every MLP leave its up projection out of the graph, or of the forward."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = self.act_fn(self.gate_proj(x))
        up = self.up_proj(x).detach() if how == "detached" else torch.ones_like(gate)
        return self.down_proj(gate * up)

    monkeypatch.setattr(LlamaMLP, "forward", forward)


def test_the_gate_stops_a_dead_tensor_and_says_why(
    tiny_llama, qa_file, tmp_path, monkeypatch
) -> None:
    """The compiled block hides calls and reasons: the update is looked at once more without."""
    cut_off(monkeypatch, "detached")
    with pytest.raises(RunError) as caught:
        run(tiny_llama, qa_file, tmp_path / "run")
    assert caught.value.code == "first_step_gate"
    assert "layers.0.mlp.up_proj.lora_B" in caught.value.message
    assert "exactly zero" in caught.value.message  # a compiled graph gives zeros, not None
    assert "no loss comes from it" in caught.value.message
    assert Path(__file__).name in caught.value.message  # with its line
    lines = (tmp_path / "run" / "audit.jsonl").read_text().splitlines()
    (seen,) = [row for row in map(json.loads, lines) if row["event"] == "failure"]
    dead = [row for row in seen["parameters"] if "up_proj.lora_B" in row["name"]]
    assert len(dead) == 2
    assert "inside_compiled_region" not in {row["reason"]["code"] for row in dead}


@SLOW
def test_the_gate_waits_for_what_was_not_called(tiny_llama, qa_file, tmp_path, monkeypatch) -> None:
    cut_off(monkeypatch, "not called")
    progress = run(tiny_llama, qa_file, tmp_path / "run")
    assert not any("first_step_gate" in line for line in progress.lines)
    assert len(events(tmp_path / "run", "train")) == 6


def test_bad_rows_are_named_without_compiling_for_each(qa_file, tmp_path, monkeypatch) -> None:
    """One token's embedding is NaN; it stands in one row only."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(trained_speed, "COMPILE_OPTIONS", {"backend": counter})
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path / "bad")
    (token,) = tiny_tokenizer()("Z")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    rows = json.loads(qa_file.read_text())
    rows[7]["output"] = "Z"
    data = tmp_path / "qa.json"
    data.write_text(json.dumps(rows))
    with pytest.raises(RunError) as caught:
        run(
            folder, data, tmp_path / "run", data={"validation_split": 0.0},
            training={"max_steps": -1, "num_train_epochs": 1},
        )  # fmt: skip
    assert caught.value.code == "non_finite_loss"
    assert "rows: " in caught.value.message
    assert "qa.json[7]" in caught.value.message or "[7]" in caught.value.message
    assert "without compiled blocks" in caught.value.message
    assert "embed_tokens" in caught.value.message  # the first bad module, seen by its output
    assert counter.frame_count <= 6


def test_the_audit_command_looks_into_every_module(tiny_llama, qa_file, tmp_path) -> None:
    progress = QuietProgress()
    found = audit(config(tiny_llama, qa_file, tmp_path / "run"), progress=progress)
    assert found.ok
    codes = {item.code for item in found.findings}
    assert not codes & {"compiled_region", "inside_compiled_region"}
    assert any(
        line.startswith("training.compile: False") and "looks into every module" in line
        for line in progress.lines
    )


@pytest.mark.timeout(900)
@pytest.mark.slow(reason="real code for a CPU: two minutes")
def test_real_code_resumes_to_the_same_bits(tiny_llama, qa_file, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trained_speed, "COMPILE_OPTIONS", {})
    options = {"adapter": {"lora_dropout": 0.3}, "training": {"max_steps": 4}}
    run(tiny_llama, qa_file, tmp_path / "whole", **options)
    with pytest.raises(StoppedBySignal):
        train(config(tiny_llama, qa_file, tmp_path / "run", **options), progress=StopAfter(2))
    again = config(tiny_llama, qa_file, tmp_path / "run", **options)
    train(again, resume=True, progress=QuietProgress())
    assert same_bits(last_weights(tmp_path / "run"), last_weights(tmp_path / "whole"))
    plain = {**options, "training": {"max_steps": 4, "compile": False}}
    run(tiny_llama, qa_file, tmp_path / "plain", **plain)
    assert distance(last_weights(tmp_path / "plain"), last_weights(tmp_path / "whole")) < 1e-4

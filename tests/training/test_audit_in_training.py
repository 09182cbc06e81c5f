"""The audit inside `glasstune train`: changes nothing, tells the truth, names what is bad."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, StopAfter, events, last_weights, same_bits, tiny_run
from tiny import save_tiny_model
from torch import Tensor

from glasstune.core.choices import Choices
from glasstune.core.errors import RunError, StoppedBySignal
from glasstune.training.batching import updates
from glasstune.training.loop import Loop
from glasstune.training.nonfinite import NonFinite
from glasstune.training.step import compute_update
from glasstune.workflows.prepare_run import prepare
from glasstune.workflows.train import _Session, train

OFF = {"every_n_steps": 0, "first_step_gate": "off"}
THREE = [
    {"name": "next_token", "weight": 1.0},
    {"name": "z_loss", "weight": 0.2},
    {"name": "kl_to_base", "weight": 0.5},
]


def audits(output: Path, event: str | None = None) -> list[dict[str, Any]]:
    path = output / "audit.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in found if event in (None, row["event"])]


def write_loss(folder: Path, body: str) -> str:
    path = folder / "mine.py"
    path.write_text("import torch\n" + body)
    return f"{path}:mine"


def opened(config: Any, output: Path) -> Any:
    """(run, state) of a configuration, as `train` has them before its first update."""
    choices, progress = Choices(), QuietProgress()
    output.mkdir(parents=True)
    prepared = prepare(config, choices, progress)
    return _Session(config, output, choices, prepared, progress, []).open(None)


def shake(run: Any) -> None:
    """Moves every B away from zero, so that the tuned model is not the base."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in run.parameters.items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)


def audited_update(run: Any) -> tuple[Any, dict[str, Any]]:
    """The first update under the run's audit; returns it and its record."""
    run.adapted.model.train()
    seed = run.config.training.seed
    update = next(updates(run.schedule, run.train, seed, 0, 0, 0, run.pad_id))
    run.audit.before_update(1)
    compute_update(
        run.adapted, run.terms, update.micro_batches, 1, 0, (run.audit,), counting=run.audit
    )
    run.audit.after_backward(1, run.adapted.model, run.optimizer)
    grads = {name: value.grad.double() for name, value in run.parameters.items()}
    run.optimizer.zero_grad(set_to_none=True)
    run.audit.after_update(1, run.adapted.model, 1e-3)
    run.audit.close()
    return (update, grads), audits(run.folder, "audit")[0]


@pytest.mark.parametrize(
    ("bits", "recompute"), [(16, "none"), (16, "full"), (8, "none"), (4, "none"), (4, "full")]
)
def test_training_is_the_same_bit_for_bit_with_and_without(
    tiny_llama, qa_file, tmp_path, bits, recompute
) -> None:
    weights = []
    for name, audit in (("off", OFF), ("on", {"every_n_steps": 2, "first_step_gate": "stop"})):
        config = tiny_run(
            tiny_llama, qa_file, tmp_path / name, model={"bits": bits}, audit=audit, losses=THREE,
            adapter={"lora_dropout": 0.3},
            training={"max_steps": 5, "recompute": recompute, "per_device_train_batch_size": 2},
        )  # fmt: skip
        train(config, progress=QuietProgress())
        weights.append(last_weights(tmp_path / name))
    assert same_bits(*weights)
    assert not (tmp_path / "off" / "audit.jsonl").exists()
    assert [row["step"] for row in audits(tmp_path / "on", "audit")] == [1, 2, 4]
    assert [row["step"] for row in audits(tmp_path / "on", "norms")] == [1, 2, 3, 4, 5]
    for row in audits(tmp_path / "on", "audit"):
        assert row["engine"] == "grad"
        assert row["sum_check"] < 1e-5
    norms = {row["step"]: row["norm"] for row in audits(tmp_path / "on", "norms")}
    for row in events(tmp_path / "on", "train"):
        assert norms[row["step"]] == pytest.approx(row["grad_norm"], rel=1e-5)


def independent(run: Any, update: Any) -> dict[str, dict[str, Tensor]]:
    """Gradients of each term by plain autograd: one document a forward, all logits, no packing."""
    model = run.adapted.model
    sums = {"next_token": [], "z_loss": [], "kl_to_base": []}
    count = 0
    for batch in update.micro_batches:
        for document in batch.documents:
            ids = torch.tensor(document.ids, dtype=torch.long, device=model.device)[None]
            labels = torch.tensor(document.labels[1:], dtype=torch.long, device=model.device)
            keep = labels != -100
            with run.adapted.precision():
                logits = model(input_ids=ids).logits[0, :-1][keep].float()
                with torch.no_grad(), model.disable_adapter():
                    base = model(input_ids=ids).logits[0, :-1][keep].float()
            log_p, log_q = logits.log_softmax(-1), base.log_softmax(-1)
            sums["next_token"].append(-log_p.gather(1, labels[keep][:, None]).sum())
            sums["z_loss"].append(logits.logsumexp(-1).square().sum())
            sums["kl_to_base"].append((log_p.exp() * (log_p - log_q)).sum())
            count += int(keep.sum())
    values = list(run.parameters.values())
    return {
        name: dict(
            zip(
                run.parameters,
                (
                    g.double()
                    for g in torch.autograd.grad(sum(parts) / count, values, retain_graph=True)
                ),
                strict=True,
            )
        )
        for name, parts in sums.items()
    }


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize(
    ("bits", "dtype", "near"),
    [(16, "float32", 1e-5), (8, "float32", 1e-5), (4, "float32", 1e-5), (16, "bfloat16", 3e-2)],
)
def test_three_terms_equal_an_independent_autograd(
    tiny_llama, qa_file, tmp_path, bits, dtype, near, micro
) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", model={"bits": bits, "dtype": dtype}, losses=THREE,
        training={"per_device_train_batch_size": micro},
    )  # fmt: skip
    run, _ = opened(config, tmp_path / "run")
    shake(run)
    (update, total), record = audited_update(run)
    each = independent(run, update)
    names = [term["name"] for term in record["terms"]]
    weights = {term["name"]: term["weight"] for term in THREE}
    assert names == list(weights)

    def dot(a: str, b: str, mine: list[str]) -> float:
        return sum(float((each[a][n] * each[b][n]).sum()) for n in mine)

    every = list(run.parameters)
    for layer in record["layers"]:
        mine = [name for name in every if name.startswith(layer["layer"] + ".")]
        expected = torch.tensor([[dot(a, b, mine) for b in names] for a in names])
        scale = expected.diagonal().sqrt()
        got = torch.tensor(layer["gram"])
        assert ((got - expected).abs() / (scale[:, None] * scale[None])).max() < near
    w = torch.tensor([weights[name] for name in names])
    gram = torch.tensor([[dot(a, b, every) for b in names] for a in names])
    expected_shares = w * (gram @ w) / (w @ gram @ w)
    shares = torch.tensor([term["share"] for term in record["terms"]])
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-6)
    assert torch.allclose(shares, expected_shares, atol=near)
    assert float(shares.abs().min()) > 1e-3  # each has a part that could be wrong
    assert record["sum_check"] < (1e-5 if dtype == "float32" else 1e-2)
    for name, value in total.items():
        combined = sum(weights[term] * each[term][name] for term in names)
        assert float((combined - value).norm() / value.norm()) < 2 * near


def test_accumulation_gives_the_same_gram(tiny_llama, qa_file, tmp_path) -> None:
    grams = []
    for micro in (4, 2, 1):
        config = tiny_run(
            tiny_llama, qa_file, tmp_path / str(micro), losses=THREE,
            training={"per_device_train_batch_size": micro}, adapter={"lora_dropout": 0.2},
        )  # fmt: skip
        run, _ = opened(config, tmp_path / str(micro))
        shake(run)
        _, record = audited_update(run)
        grams.append(torch.tensor(record["gram"]))
    for other in grams[1:]:
        assert torch.allclose(grams[0], other, rtol=2e-4)


def test_terms_of_their_own_sources(tiny_llama, qa_file, tmp_path) -> None:
    """`mine` sees the second file alone: its part equals that of a run with that term only."""
    rows = json.loads(qa_file.read_text())
    for name, part in (("a", rows[:30]), ("b", rows[30:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    mine = {"name": "mine", "weight": 0.3, "sources": ["b"]} | {
        "function": write_loss(
            tmp_path, "def mine(batch):\n    return batch.hidden.tanh().sum(), len(batch)\n"
        )
    }
    both = [{"name": "next_token", "sources": ["a"]}, mine]
    records = {}
    for name, losses in (("both", both), ("mine", [mine]), ("other", both[:1])):
        config = tiny_run(
            tiny_llama, qa_file, tmp_path / name, losses=losses,
            data={
                "sources": [{"path": str(tmp_path / f"{s}.json"), "name": s} for s in "ab"],
                "packing": False,
            },
            training={"train_batch_size": 8, "per_device_train_batch_size": 2},
        )  # fmt: skip
        run, _ = opened(config, tmp_path / name)
        (update, _), records[name] = audited_update(run)
        seen = {d.source for batch in update.micro_batches for d in batch.documents}
        assert seen == {0, 1}
    terms = {term["name"]: term for term in records["both"]["terms"]}
    assert terms["mine"]["norm"] == pytest.approx(records["mine"]["terms"][0]["norm"], rel=1e-4)
    assert terms["mine"]["count"] == records["mine"]["terms"][0]["count"]
    other = records["other"]["terms"][0]
    assert terms["next_token"]["norm"] == pytest.approx(other["norm"], rel=1e-4)
    assert terms["next_token"]["share"] + terms["mine"]["share"] == pytest.approx(1.0, abs=1e-6)
    assert records["mine"]["engine"] == "single"


def test_recomputation_changes_no_record(tiny_llama, qa_file, tmp_path) -> None:
    found = []
    for recompute in ("none", "full"):
        config = tiny_run(
            tiny_llama, qa_file, tmp_path / recompute, losses=THREE,
            training={"recompute": recompute},
        )  # fmt: skip
        run, _ = opened(config, tmp_path / recompute)
        shake(run)
        found.append(audited_update(run)[1])
    assert found[0]["gram"] == found[1]["gram"]
    assert found[0]["terms"] == found[1]["terms"]


# What is not finite.


def spoiled(folder: Path, path: str, value: float = math.inf) -> Path:
    """A tiny Llama with one bad weight."""
    from safetensors.torch import load_file, save_file

    save_tiny_model(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[path][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("audit", [{}, OFF])
def test_an_infinite_weight_is_named_with_its_module(
    qa_file, tmp_path, quiet, audit, recompute
) -> None:
    model = spoiled(tmp_path / "model", "model.layers.1.mlp.down_proj.weight")
    config = tiny_run(
        model, qa_file, tmp_path / "run", audit=audit,
        training={"eval_on_start": False, "recompute": recompute},
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    error = caught.value
    assert error.code == "non_finite_loss"
    assert "loss term 'next_token' is nan at step 1" in error.message
    assert "qa.json" in error.message
    module = "base_model.model.model.layers.1.mlp.down_proj.base_layer"
    assert f"the first NaN or Inf of the forward is in the output of {module}" in error.message
    assert "layers.1.mlp.act_fn before it is finite" in error.message or (
        "layers.1.mlp.up_proj before it is finite" in error.message
    )
    assert f"{module}.weight" in error.message.split("the weights themselves")[1]
    (row,) = audits(tmp_path / "run", "failure")
    assert row["step"] == 1
    assert len(row["rows"]) > 1
    assert row["terms"][0]["value"] is None
    assert any(item["code"] == "first_nonfinite_output" for item in row["findings"])
    assert not audits(tmp_path / "run", "audit")


NAN_GRADIENT = """
def mine(batch):
    # The root of a square at zero: the value is 0, its gradient is 0 * inf.
    total = batch.hidden.float().square().sum()
    bad = bool((batch.labels == MARK).any())
    zero = (total - total).sqrt() if bad else 0.0
    return total * 1e-3 + zero, len(batch)
"""


def marked_rows(tiny_llama: Path, folder: Path) -> tuple[Path, int]:
    """Eight rows of which one has a token that no other has; its id."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(8)]
    rows[5]["output"] = "It is Z."
    (mark,) = set(tokenizer("It is Z.")["input_ids"]) - {
        i for row in rows if row is not rows[5] for i in tokenizer(row["output"])["input_ids"]
    }
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return path, mark


@pytest.mark.parametrize("micro", [1, 8])
@pytest.mark.parametrize("bits", [16, 4])
def test_a_gradient_that_is_not_finite_names_rows_term_and_module(
    tiny_llama, tmp_path, quiet, bits, micro
) -> None:
    data, mark = marked_rows(tiny_llama, tmp_path)
    function = write_loss(tmp_path, NAN_GRADIENT.replace("MARK", str(mark)))
    config = tiny_run(
        tiny_llama, data, tmp_path / "run", model={"bits": bits},
        losses=[{"name": "next_token"}, {"name": "mine", "function": function}],
        data={"validation_split": 0.0, "packing": False}, audit={"first_step_gate": "off"},
        training={"train_batch_size": 8, "per_device_train_batch_size": micro},
    )  # fmt: skip
    run, state = opened(config, tmp_path / "run")
    before = {name: value.detach().clone() for name, value in run.parameters.items()}
    with pytest.raises(NonFinite) as caught:
        Loop(run, state).execute()
    error = caught.value
    assert error.code == "non_finite_gradient"
    assert "at step 1" in error.message
    assert "28 of 28 tensors" in error.message
    assert error.message.count("rows.json") == 1
    assert error.rows == (run.train.documents[5].origin,)
    assert "from term 'mine'" in error.message
    assert "'next_token'" not in error.message
    assert "the forward is finite" in error.message
    assert "gradient at the output of base_model.model.model.norm" in error.message
    assert all(torch.equal(before[name], value) for name, value in run.parameters.items())
    assert all(value.grad is None for value in run.parameters.values())
    (row,) = audits(tmp_path / "run", "failure")
    terms = {term["name"]: term for term in row["terms"]}
    assert terms["mine"]["norm"] is None
    assert terms["next_token"]["norm"] > 0
    assert row["rows"] == list(error.rows)
    modules = run.adapted.model.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_gradient_norm_that_overflows_says_so(tiny_llama, qa_file, tmp_path, quiet) -> None:
    """Every entry is a number; only the sum of squares is not, so no row and no module is at
    fault."""
    body = "def mine(batch):\n    return batch.hidden.sum() * 1e25, len(batch)\n"
    losses = [{"name": "mine", "function": write_loss(tmp_path, body)}]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=losses, training={"eval_on_start": False}
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == "non_finite_gradient"
    assert "overflows" in caught.value.message
    assert "every loss and gradient is finite" in caught.value.message


REMEMBER = """
SEEN = []
def mine(batch):
    # Not the sum of squares, which the final norm makes the same whatever dropout does.
    total = batch.hidden.float().tanh().sum()
    SEEN.append((batch.step, len(batch), float(total.detach())))
    return total * (float("nan") if batch.step == 3 else 1.0), len(batch)
"""


def test_the_replay_sees_the_same_rows_and_dropout(tiny_llama, qa_file, tmp_path, quiet) -> None:
    losses = [{"name": "mine", "function": write_loss(tmp_path, REMEMBER)}]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=losses, adapter={"lora_dropout": 0.4},
        audit={"every_n_steps": 1},
    )  # fmt: skip
    with pytest.raises(RunError, match="loss term 'mine' is nan at step 3"):
        train(config, progress=quiet)
    seen = [row for row in sys.modules["glasstune_user_mine"].SEEN if row[0] == 3]
    assert seen[-1] == seen[0]
    assert len(seen) > 2  # rows alone in between
    assert seen[0][2] not in {row[2] for row in seen[1:-1]}
    assert [row["step"] for row in audits(tmp_path / "run", "audit")] == [1, 2]
    (failure,) = audits(tmp_path / "run", "failure")
    assert failure["step"] == 3


def test_when_looking_fails_too_the_first_error_is_seen(
    tiny_llama, qa_file, tmp_path, quiet, monkeypatch
) -> None:
    losses = [{"name": "mine", "function": write_loss(tmp_path, REMEMBER)}]
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses)

    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("glasstune.audit.live.failure_text", fail)
    with pytest.raises(RunError, match=r"is nan at step 3.*failed too: MemoryError: no room"):
        train(config, progress=quiet)


# Structure, the gate's words, and the file.


def test_the_gate_says_why(tiny_llama, qa_file, tmp_path, quiet, monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x).detach())
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run")
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    error = caught.value
    assert error.code == "first_step_gate"
    assert "12 trained tensors do not learn" in error.message
    assert "has no gradient although its module ran: the output of" in error.message
    assert "carries its gradient" in error.message
    row = audits(tmp_path / "run", "audit")[0]
    dead = [item for item in row["parameters"] if item["status"] == "none"]
    assert len(dead) == 12
    assert all(".mlp." in item["name"] for item in dead)
    assert {at["reached"] for item in dead for at in item["terms"].values()} == {False}


def test_the_gate_at_the_second_step_says_why_then(
    tiny_llama, qa_file, tmp_path, quiet, monkeypatch
) -> None:
    """A has a zero gradient at both steps because its B never moves: at the first that is
    healthy, so the reason must be the second step's."""
    from glasstune.audit import gate

    monkeypatch.setattr(gate, "PARTNERS", ())  # then nothing excuses A at the first step
    body = "def mine(batch):\n    return (batch.hidden * 0).sum(), len(batch)\n"
    losses = [{"name": "mine", "function": write_loss(tmp_path, body)}]
    config = tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses)
    with pytest.raises(RunError, match=r"exactly zero.*its partner .* is exactly zero"):
        train(config, progress=quiet)


def test_warnings_of_the_structure_are_said_once(
    tiny_llama, qa_file, tmp_path, quiet, monkeypatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: original(self, x).detach())
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        audit={"every_n_steps": 1, "first_step_gate": "off"}, training={"max_steps": 3},
    )  # fmt: skip
    record = train(config, progress=quiet)
    said = [item for item in record.findings if "carries its gradient" in item.message]
    assert len(said) == 1
    assert said[0].severity == "warning"
    assert "12 parameters have no gradient" in said[0].message
    assert sum("12 parameters have no gradient" in line for line in quiet.lines) == 1


def test_a_healthy_run_has_nothing_to_say(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=THREE, training={"max_steps": 3},
        audit={"every_n_steps": 1},
    )  # fmt: skip
    record = train(config, progress=quiet)
    assert record.findings
    assert {item.severity for item in record.findings} == {"info"}  # of the data
    assert not any("gradient" in item.message for item in record.findings)


def test_a_resumed_run_supersedes_its_audits(tiny_llama, qa_file, tmp_path) -> None:
    output = tmp_path / "run"
    options: dict[str, Any] = {
        "training": {"max_steps": 8, "save_steps": 3, "eval_steps": 100},
        "audit": {"every_n_steps": 1},
    }
    with pytest.raises(StoppedBySignal):
        train(tiny_run(tiny_llama, qa_file, output, **options), progress=StopAfter(5))
    with (output / "audit.jsonl").open("a") as file:
        file.write('{"event": "norms", "st')  # as a kill leaves it
    train(
        tiny_run(tiny_llama, qa_file, output, **options), resume="step-3", progress=QuietProgress()
    )
    steps = [(row["step"], row["attempt"]) for row in audits(output, "audit")]
    assert steps == [(s, 1) for s in (1, 2, 3)] + [(s, 2) for s in (4, 5, 6, 7, 8)]
    moved = (output / "audit.superseded.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in moved} == {4, 5}
    whole = tmp_path / "whole"
    train(tiny_run(tiny_llama, qa_file, whole, **options), progress=QuietProgress())
    for kind in ("norms", "audit"):
        mine, theirs = audits(output, kind), audits(whole, kind)
        assert [{**row, "attempt": 0} for row in mine] == [{**row, "attempt": 0} for row in theirs]


def test_overwrite_clears_the_audits(tiny_llama, qa_file, tmp_path, quiet) -> None:
    output = tmp_path / "run"
    for _ in range(2):
        config = tiny_run(tiny_llama, qa_file, output, training={"max_steps": 2})
        train(config, overwrite=True, progress=quiet)
    assert [row["step"] for row in audits(output, "norms")] == [1, 2]


def test_logging_steps_are_those_of_the_norms(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", training={"max_steps": 7, "logging_steps": 3}
    )  # fmt: skip
    train(config, progress=quiet)
    steps = [row["step"] for row in audits(tmp_path / "run", "norms")]
    assert steps == [3, 6, 7] == [row["step"] for row in events(tmp_path / "run", "train")]


def test_a_weight_that_starts_at_zero_has_its_count(tiny_llama, qa_file, tmp_path, quiet) -> None:
    losses = [
        {"name": "next_token"},
        {"name": "z_loss", "weight": {"from": 0.0, "to": 0.1, "steps": 4}},
    ]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=losses, training={"max_steps": 2},
        audit={"every_n_steps": 1},
    )  # fmt: skip
    train(config, progress=quiet)
    rows = audits(tmp_path / "run", "audit"), events(tmp_path / "run", "train")
    for row, logged in zip(*rows, strict=True):
        for term in row["terms"]:
            assert term["value"] == pytest.approx(logged["losses"][term["name"]], rel=1e-6)
            assert term["count"] == logged["trained_tokens"]
            assert term["norm"] > 0


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return batch.hidden.sum(), torch.ones(2)", "loss_count"),
        ("return batch.hidden.sum(), None", "loss_count"),
        ("return batch.hidden.sum(), 'all'", "loss_count"),
        ("return batch.hidden.sum() * 1j, 1", "loss_not_scalar"),
        ("return batch.hidden.sum(1), 1", "loss_not_scalar"),
        ("return batch.hidden.argmax().float(), 1", "loss_without_graph"),
        ("return batch.hidden.sum() / 0, 1", "non_finite_loss"),
        ("return 1 / 0, 1", "loss_function_raised"),
    ],
)
def test_a_bad_term_is_named(tiny_llama, qa_file, tmp_path, quiet, body, code) -> None:
    function = write_loss(tmp_path, f"def mine(batch):\n    {body}\n")
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        losses=[{"name": "next_token"}, {"name": "mine", "function": function}],
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == code
    assert "'mine'" in caught.value.message

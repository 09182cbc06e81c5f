"""Any number of ranks makes the same run: weights, evaluation, rows, checkpoints, audit."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import adapter_weights, distance, events, last_weights
from several import steps, wait_for_steps, written

from glasstune.core.batch import Document
from glasstune.data.packing import PackedSet
from glasstune.training.batching import Schedule, updates

CASES: dict[str, dict[str, Any]] = {
    "adamw": {"training": {"adam_epsilon": 1e-8, "learning_rate": 5e-3}},
    "rows": {},
    "packs": {"data": {"packing": True, "max_length": 64}},
    "dropout": {"adapter": {"lora_dropout": 0.3}},
    "terms": {"losses": [{"name": "next_token"}, {"name": "z_loss", "weight": 0.01}]},
    "kl": {"losses": [{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.1}]},
}


@pytest.fixture(scope="module")
def alone(tiny_llama, qa_file, several, tmp_path_factory):
    """Runs of one process, made when they are asked for."""
    folder = tmp_path_factory.mktemp("alone")
    made: dict[str, Path] = {}

    def run(case: str) -> Path:
        if case not in made:
            made[case] = folder / case
            config = written(tiny_llama, qa_file, made[case], **CASES[case])
            ended = several.run(["train", str(config)], 1)
            assert ended.codes == [0], ended.log
        return made[case]

    return run


SLOW = pytest.mark.slow(reason="two to four processes on two cores")


@pytest.mark.parametrize(
    ("case", "ranks"),
    [
        ("adamw", 2), ("packs", 2), ("dropout", 2),
        *(pytest.param(*pair, marks=SLOW) for pair in (
            ("adamw", 4), ("rows", 2), ("rows", 3), ("rows", 4), ("packs", 3), ("packs", 4),
            ("dropout", 4), ("terms", 2), ("terms", 4), ("kl", 2),
        )),
    ],
)  # fmt: skip
def test_ranks_make_the_run_of_one(
    tiny_llama, qa_file, tmp_path, several, alone, case, ranks
) -> None:
    one, more = alone(case), tmp_path / "run"
    config = written(tiny_llama, qa_file, more, **CASES[case])
    ended = several.run(["train", str(config)], ranks)
    assert ended.codes == [0] * ranks, ended.log
    assert distance(last_weights(more), last_weights(one)) <= 1e-6
    assert distance(adapter_weights(more / "adapter"), adapter_weights(one / "adapter")) <= 1e-6
    assert steps(more) == steps(one)
    here, there = events(more, "eval"), events(one, "eval")
    assert here[0] == there[0]  # the same bits, before the first update
    assert [row["eval_tokens"] for row in here] == [row["eval_tokens"] for row in there]
    losses = [row["eval_loss"] for row in there]
    assert [row["eval_loss"] for row in here] == pytest.approx(losses, rel=1e-6)


@pytest.mark.slow(reason="compiles a layer's graphs, twice")
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_joined_products_and_compiled_layers(tiny_llama, qa_file, tmp_path, several) -> None:
    """The fast path of each rank; packs padded to one shape, of which a rank may have none."""
    changes: dict[str, Any] = {
        "data": {"packing": True, "max_length": 64},
        "training": {"max_steps": 8, "compile": True, "eval_steps": 4},
    }
    found = {}
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        config = written(tiny_llama, qa_file, output, **changes)
        ended = several.run(["train", str(config)], ranks, timeout=200)
        assert ended.codes == [0] * ranks, ended.log
        record = json.loads((output / "run.json").read_text())
        assert {module["way"] for module in record["speed"]["modules"]} == {"wide"}
        assert record["speed"]["compiled"]
        found[ranks] = output
    assert distance(last_weights(found[2]), last_weights(found[1])) <= 1e-6
    assert steps(found[2]) == steps(found[1])


def gradients(output: Path) -> list[torch.Tensor]:
    """AdamW's first moment after one update is (1 - beta1) times the gradient."""
    file = output / "checkpoints" / "step-1" / "optimizer.pt"
    return [state["exp_avg"] for state in torch.load(file)["state"].values()]


def test_gradients_of_the_first_update_for_any_split(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    """S02. 16 rows of unlike lengths, dropout on: 1, 2 and 4 ranks, forwards of 1 to 16 rows."""
    found = {}
    for ranks, micro in ((1, 16), (1, 3), (2, 3), (4, 1)):
        output = tmp_path / f"{ranks}-{micro}"
        training = {
            "max_steps": 1, "train_batch_size": 16, "per_device_train_batch_size": micro,
            "max_grad_norm": 0.0, "eval_on_start": False,
        }  # fmt: skip
        config = written(
            tiny_llama, qa_file, output, training=training, adapter={"lora_dropout": 0.3},
            data={"validation_split": 0},
        )  # fmt: skip
        ended = several.run(["train", str(config)], ranks)
        assert ended.codes == [0] * ranks, ended.log
        found[ranks, micro] = gradients(output)
    truth = found.pop((1, 16))
    assert sum(bool(gradient.any()) for gradient in truth) == len(truth) // 2  # A's are zero
    for split, values in found.items():
        for mine, right in zip(values, truth, strict=True):
            assert float((mine - right).norm()) <= 1e-6 * float(right.norm()), split


@pytest.mark.parametrize(("batch", "ranks"), [(4, 2), (4, 3), (5, 4), (1, 4), (7, 7), (16, 5)])
def test_ranks_divide_every_update_without_overlap(batch, ranks) -> None:
    """Each row once an epoch; together the rows of one process, in its order."""
    ids = torch.arange(3, dtype=torch.int32).numpy()
    documents = [Document(ids, ids, origin=str(number)) for number in range(23)]
    data = PackedSet.build(documents, max_length=8, packed=False, seed=0)

    def stream(rank: int, count: int, start: int = 0):
        schedule = Schedule(23, batch, 2, 2.0, -1, rank, count)
        return list(updates(schedule, data, 5, 0, start, 0, 0))

    whole = stream(0, 1)
    shares = [stream(rank, ranks) for rank in range(ranks)]
    names: list[str] = []
    for number, update in enumerate(whole):
        parts = [share[number] for share in shares]
        mine = [d.origin for part in parts for b in part.micro_batches for d in b.documents]
        assert mine == [d.origin for b in update.micro_batches for d in b.documents]
        assert {part.position for part in parts} == {update.position}
        assert {part.rows for part in parts} == {len(mine)}
        assert max(len(part.micro_batches) for part in parts) == parts[0].forwards
        positions = [b.position for part in parts for b in part.micro_batches]
        assert positions == sorted(set(positions))  # they seed the dropout
        names += mine
    assert sorted(names[:23]) == sorted(names[23:]) == sorted(str(number) for number in range(23))


def test_a_checkpoint_goes_on_with_any_number_of_ranks(
    tiny_llama, qa_file, tmp_path, several, alone
) -> None:
    """S03. Saved by 2, resumed by 1, then by 4: the same rows, and the weights of one process."""
    output = tmp_path / "run"
    constant = {"lr_scheduler_type": "constant", "save_steps": 6}
    for ranks, until in ((2, 6), (1, 12), (4, 20)):
        training = {**constant, "max_steps": until}
        config = written(tiny_llama, qa_file, output, training=training)
        again = ["--resume"] if until > 6 else []
        ended = several.run(["train", str(config), *again], ranks)
        assert ended.codes == [0] * ranks, ended.log
        if again:
            assert f"goes on after update {until - 6 if until < 20 else 12}" in ended.log
            assert "ranks: " in ended.log  # another number is said
    whole = tmp_path / "whole"
    config = written(tiny_llama, qa_file, whole, training=constant)
    assert several.run(["train", str(config)], 1).codes == [0]
    assert steps(output) == steps(whole)
    assert distance(last_weights(output), last_weights(whole)) <= 1e-6
    state = json.loads((output / "checkpoints" / "step-20" / "state.json").read_text())
    assert state["identity"]["environment"]["ranks"] == 4


def test_a_signal_to_one_rank_stops_all_at_the_same_update(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output, training={"max_steps": 500})
    pids = several.start(["train", str(config)], 2)
    wait_for_steps(output, 5)
    os.kill(pids[1], signal.SIGTERM)
    ended = several.end()
    assert ended.codes == [3, 3]
    assert len(ended.errors()) == 1
    done = len(events(output, "train"))
    assert (output / "checkpoints" / f"step-{done}" / "complete.json").is_file()
    config = written(tiny_llama, qa_file, output, training={"max_steps": done + 3})
    assert several.run(["train", str(config), "--resume"], 2).codes == [0, 0]
    assert [step for step, _, _ in steps(output)] == list(range(1, done + 4))


def test_rank_0_alone_writes_and_others_log_on_request(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output, training={"max_steps": 3})
    record = tmp_path / "record.json"
    words = ["train", str(config), "--json", str(record)]
    ended = several.run(words, 2, env={"GLASSTUNE_LOG_RANKS": "1"})
    assert ended.codes == [0, 0]
    said = [line for line in ended.logs[1].splitlines() if line]
    assert said
    assert all(line.startswith("[rank 1] ") for line in said)
    assert json.loads(record.read_text())["updates"] == 3
    assert json.loads((output / "run.json").read_text())["ranks"]["count"] == 2
    assert [row["step"] for row in events(output, "train")] == [1, 2, 3]
    quiet = several.run(["train", str(config), "--overwrite"], 2)
    assert quiet.codes == [0, 0]
    assert quiet.logs[1] == ""


def audits(output: Path) -> list[dict[str, Any]]:
    lines = (output / "audit.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "audit"]


def test_the_audit_of_ranks_is_that_of_one(tiny_llama, qa_file, tmp_path, several) -> None:
    """Two terms on rows of unlike ranks: gradients by term are added once, over all ranks."""
    losses = [{"name": "next_token"}, {"name": "z_loss", "weight": 0.5}]
    found = {}
    for ranks in (1, 2, 3):  # 3: an update of 2 rows leaves one without any
        output = tmp_path / str(ranks)
        config = written(
            tiny_llama, qa_file, output, losses=losses, audit={"every_n_steps": 7},
            training={"max_steps": 14},
        )  # fmt: skip
        ended = several.run(["train", str(config)], ranks)
        assert ended.codes == [0] * ranks, ended.log
        found[ranks] = audits(output)
    truth = found.pop(1)
    assert [row["step"] for row in truth] == [1, 7, 14]
    for rows in found.values():
        assert [row["step"] for row in rows] == [1, 7, 14]
        for mine, right in zip(rows, truth, strict=True):
            assert mine["engine"] == right["engine"] == "grad"
            assert mine["sum_check"] < 1e-5
            for a, b in zip(mine["terms"], right["terms"], strict=True):
                assert (a["name"], a["count"], a["reaches"]) == (
                    b["name"],
                    b["count"],
                    b["reaches"],
                )
                assert a["value"] == pytest.approx(b["value"], rel=1e-5)
                assert a["norm"] == pytest.approx(b["norm"], rel=1e-5)
                assert a["share"] == pytest.approx(b["share"], abs=1e-5)
            for a, b in zip(mine["layers"], right["layers"], strict=True):
                assert a["layer"] == b["layer"]
                for x, y in zip(a["gram"], b["gram"], strict=True):
                    assert x == pytest.approx(y, rel=1e-4)
            assert [p["status"] for p in mine["parameters"]] == [
                p["status"] for p in right["parameters"]
            ]


@SLOW
def test_bf16_with_the_same_rows_of_a_forward(tiny_llama, qa_file, tmp_path, several) -> None:
    """Forwards are the same bits, and their gradients are added in float32."""
    found = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        changes = {**CASES["adamw"], "model": {"dtype": "bfloat16"}}
        config = written(tiny_llama, qa_file, output, **changes)
        assert several.run(["train", str(config)], ranks).codes == [0] * ranks
        found.append(last_weights(output))
    assert distance(found[1], found[0]) <= 1e-6

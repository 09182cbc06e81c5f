"""FSDP2 with compiled layers, joined products and audits by term: the same training.

The compiler's front end alone (`aot_eager`) runs here: plumbing is what can break.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import distance, events, last_weights
from several import written

BITS: dict[int, dict[str, Any]] = {
    16: {},
    8: {"model": {"bits": 8}},
    4: {"model": {"bits": 4, "quantization": {"bnb_4bit_compute_dtype": "float32"}}},
}
pytestmark = pytest.mark.timeout(400)
SLOW = pytest.mark.slow(reason="compiles in three processes on two cores")

FRONT_END = """
import json
from pathlib import Path

from torch._dynamo.utils import counters

import glasstune.training.loop as loop
import glasstune.workflows.trained_speed as speed

speed.COMPILE_OPTIONS["backend"] = BACKEND
real, seen = loop.Loop._update, []


def update(self, *given):
    found = real(self, *given)
    seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    Path(FILE).write_text(json.dumps(seen))
    return found


loop.Loop._update = update
"""


def front_end(file: Path, backend: str = "aot_eager") -> str:
    """What a rank runs before: a backend; graphs and breaks after each update to a file."""
    return FRONT_END.replace("FILE", repr(str(file))).replace("BACKEND", repr(backend))


def compiled_run(
    tiny_llama: Path,
    qa_file: Path,
    output: Path,
    several: Any,
    ranks: int,
    *,
    backend: str = "aot_eager",
    **changes: Any,
) -> dict[str, Any]:
    """Runs 5 updates with compiled layers, one process or sharded; returns `run.json`."""
    training = {
        "max_steps": 5, "eval_steps": 5, "compile": True,
        "distributed": {"strategy": "fsdp2"}, **changes.pop("training", {}),
    }  # fmt: skip
    data = {"packing": True, "max_length": 64, **changes.pop("data", {})}
    config = written(tiny_llama, qa_file, output, training=training, data=data, **changes)
    files = [output.with_suffix(f".{rank}.json") for rank in range(ranks)]
    patches = {rank: front_end(file, backend) for rank, file in enumerate(files)}
    ended = several.run(["train", str(config)], ranks, patches=patches, timeout=150)
    assert ended.codes == [0] * ranks, ended.log
    return dict(json.loads((output / "run.json").read_text()))


@pytest.mark.parametrize(
    ("bits", "recompute", "share", "dropout"),
    [
        (4, "full", 0.0, 0.0),
        *(pytest.param(*case, marks=SLOW) for case in (
            (4, "none", 0.12, 0.3), (8, "none", 0.12, 0.0), (8, "full", 0.12, 0.3),
            (16, "none", 0.12, 0.0), (16, "full", 0.12, 0.3),
        )),
    ],
)  # fmt: skip
def test_compiled_layers_of_a_sharded_base(
    tiny_llama, qa_file, tmp_path, several, bits, recompute, share, dropout
) -> None:
    """Two ranks make the run of one that is compiled as well, and make no graph twice."""
    found = {}
    for ranks in (1, 2):
        record = compiled_run(
            tiny_llama, qa_file, tmp_path / str(ranks), several, ranks,
            training={"recompute": recompute}, data={"validation_split": share},
            adapter={"lora_dropout": dropout}, **BITS[bits],
        )  # fmt: skip
        found[ranks] = record["speed"]
        for rank in range(ranks):
            graphs = json.loads((tmp_path / f"{ranks}.{rank}.json").read_text())
            assert len(graphs) == 5
            assert graphs[1][0] > 0
            assert graphs[1:] == [graphs[1]] * 4  # after the first update nothing is compiled
            assert graphs[-1][1] == 0  # FSDP2's hooks stay outside the graphs
    assert distance(last_weights(tmp_path / "2"), last_weights(tmp_path / "1")) <= 1e-6
    losses = [row["eval_loss"] for row in events(tmp_path / "1", "eval")]
    assert [row["eval_loss"] for row in events(tmp_path / "2", "eval")] == pytest.approx(
        losses, rel=1e-6
    )
    assert found[2]["compiled"] == found[1]["compiled"]
    assert len(found[2]["compiled"]) == 3  # two layers and the last norm
    modules = {module["way"]: module["reason"] for module in found[2]["modules"]}
    joined = {"grouped"} if dropout else {"wide"}
    if bits == 8 and dropout:
        joined.add("compiled only")  # alone with its input: o_proj, down_proj
    assert set(modules) == ({"compiled only"} if bits == 16 else joined)
    stored = 32 if bits == 16 else bits  # the tiny model's floats
    assert {module["bits"] for module in found[2]["modules"]} == {stored}
    if bits == 16:
        assert "gathers its weight for each call" in modules["compiled only"]
    else:
        assert [m["group"] for m in found[2]["modules"]] == [
            m["group"] for m in found[1]["modules"]
        ]


@SLOW
@pytest.mark.parametrize("bits", [4, 16])
def test_the_real_compiler_on_a_sharded_base(tiny_llama, qa_file, tmp_path, several, bits) -> None:
    for ranks in (1, 2):
        compiled_run(
            tiny_llama, qa_file, tmp_path / str(ranks), several, ranks, backend="inductor",
            data={"validation_split": 0.0}, **BITS[bits],
        )  # fmt: skip
    assert distance(last_weights(tmp_path / "2"), last_weights(tmp_path / "1")) <= 1e-6
    for rank in range(2):
        graphs = json.loads((tmp_path / f"2.{rank}.json").read_text())
        assert graphs[1:] == [[graphs[1][0], 0]] * 4


def audits(output: Path) -> list[dict[str, Any]]:
    lines = (output / "audit.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == "audit"]


def check_audits(mine: Path, right: Path) -> None:
    """Compares the audits of two runs: terms, gram matrices of layers, verdicts."""
    rows, truth = audits(mine), audits(right)
    assert [row["step"] for row in rows] == [row["step"] for row in truth]
    assert sum(row["engine"] == "grad" for row in rows) >= 3  # one term alone is not split
    for a, b in zip(rows, truth, strict=True):
        assert a["engine"] == b["engine"]
        assert (a["sum_check"] or 0.0) < 1e-5
        for one, other in zip(a["terms"], b["terms"], strict=True):
            assert (one["name"], one["count"]) == (other["name"], other["count"])
            assert one["reaches"] == other["reaches"]
            for key in ("value", "norm", "share"):
                assert one[key] == pytest.approx(other[key], rel=1e-5)
        for one, other in zip(a["layers"], b["layers"], strict=True):
            assert one["layer"] == other["layer"]
            for x, y in zip(one["gram"], other["gram"], strict=True):
                assert x == pytest.approx(y, rel=1e-4)
        states = [[p["status"] for p in row["parameters"]] for row in (a, b)]
        assert states[0] == states[1]


def two_sources(qa_file: Path, folder: Path) -> list[dict[str, str]]:
    """The rows in two files, of which the second has few: many batches have none of its rows."""
    rows = json.loads(qa_file.read_text())
    for name, part in (("a", rows[:48]), ("b", rows[48:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    return [{"path": str(folder / f"{name}.json"), "name": name} for name in "ab"]


def test_audits_by_term_of_a_sharded_base(tiny_llama, qa_file, tmp_path, several) -> None:
    """Ranks without rows, or without rows of a term, run its backward (and the base) as well."""
    changes: dict[str, Any] = {
        "losses": [
            {"name": "next_token"},
            {"name": "z_loss", "weight": 0.5, "sources": ["b"]},
            {"name": "kl_to_base", "weight": 0.1, "sources": ["b"]},
        ],
        "audit": {"every_n_steps": 2},
        "data": {"sources": two_sources(qa_file, tmp_path)},
    }  # fmt: skip
    for ranks in (1, 3):  # the last update of an epoch has 2 rows
        config = written(
            tiny_llama, qa_file, tmp_path / str(ranks),
            training={"max_steps": 14, "distributed": {"strategy": "fsdp2"}}, **changes,
        )  # fmt: skip
        ended = several.run(["train", str(config)], ranks)
        assert ended.codes == [0] * ranks, ended.log
    check_audits(tmp_path / "3", tmp_path / "1")
    assert distance(last_weights(tmp_path / "3"), last_weights(tmp_path / "1")) <= 1e-6


@SLOW
@pytest.mark.parametrize("bits", [4, 16])
def test_audits_by_term_of_compiled_layers(tiny_llama, qa_file, tmp_path, several, bits) -> None:
    for ranks in (1, 2):
        compiled_run(
            tiny_llama, qa_file, tmp_path / str(ranks), several, ranks,
            losses=[{"name": "next_token"}, {"name": "kl_to_base", "weight": 0.5}],
            audit={"every_n_steps": 2}, **BITS[bits],
        )  # fmt: skip
    check_audits(tmp_path / "2", tmp_path / "1")
    assert distance(last_weights(tmp_path / "2"), last_weights(tmp_path / "1")) <= 1e-6


@SLOW
def test_the_gate_looks_at_hidden_calls_on_all_ranks(
    tiny_llama, qa_file, tmp_path, several
) -> None:
    """Where a graph hides who was called, the forwards run once more: as many on every rank."""
    spare = """
import torch
import glasstune.workflows.trained_model as trained

real_with = trained._with_adapter


def with_spare(prepared, base):
    model = real_with(prepared, base)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.spare = torch.nn.Parameter(torch.ones(3))
    return model


trained._with_adapter = with_spare
"""
    training = {"max_steps": 3, "compile": True, "distributed": {"strategy": "fsdp2"}}
    config = written(tiny_llama, qa_file, tmp_path / "run", training=training, **BITS[4])
    patches = {rank: front_end(tmp_path / f"{rank}.json") + spare for rank in range(3)}
    # Of 4 rows the ranks have 2, 1 and 1.
    ended = several.run(["train", str(config)], 3, patches=patches, timeout=150)
    assert ended.codes == [1, 1, 1], ended.log
    (error,) = ended.errors()
    assert "spare has no gradient although its module ran" in error

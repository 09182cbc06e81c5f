"""The callback where the Trainer wraps the model: two processes (DDP) and torch.compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_runs import make_trainer, same_bits, tiny_lora, trained

import glasstune as gt
from glasstune.core.errors import RunError

SUPPORT = Path(__file__).parents[1] / "support"


def distributed(folder: Path, what: str) -> list[dict]:
    """Runs two processes on the CPU and returns what each saw."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            str(SUPPORT / "ddp_run.py"), str(folder), what,
        ],
        env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow(reason="three runs of two processes")
def test_two_processes(tmp_path: Path) -> None:
    plain = distributed(tmp_path / "plain", "plain")
    ranks = distributed(tmp_path / "watched", "watched")
    assert plain[0]["weights"] == plain[1]["weights"] == ranks[0]["weights"] == ranks[1]["weights"]
    assert [rank["findings"] for rank in ranks] == [[], []]
    # Norms are those of the shared gradient, before clipping: the Trainer's own, on both.
    rows = [row for row in ranks[0]["log"] if "loss" in row]
    assert ranks[0]["norm"] == pytest.approx(rows[-1]["grad_norm"], rel=1e-4)
    assert ranks[1]["norm"] == pytest.approx(ranks[0]["norm"], rel=1e-6)
    # Terms are summed over both, as the Trainer does with its loss.
    for row in rows:
        total = row["loss/next_token"] + 0.01 * row["loss/z_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    # Process 0 alone audits and writes.
    assert [rank["audited"] for rank in ranks] == [True, False]
    lines = (tmp_path / "watched" / "audit.jsonl").read_text().splitlines()
    seen = [(json.loads(line)["event"], json.loads(line)["step"]) for line in lines]
    assert [step for event, step in seen if event == "audit"] == [1, 2]
    assert [step for event, step in seen if event == "norms"] == [1, 2, 3]
    dead = distributed(tmp_path / "dead", "dead")
    for rank in dead:
        assert "2 trained tensors do not learn" in rank["error"]
        assert "layers.0.self_attn.q_proj.lora_B" in rank["error"]


@pytest.mark.slow(reason="compiles three models")
def test_under_torch_compile_gradients_are_all_there_is_to_judge_by(tmp_path: Path) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    loss = gt.term_loss({"next_token": 1.0, "z_loss": 0.1})
    plain = make_trainer(tmp_path / "plain", model=tiny_lora(), loss=loss, **options)
    plain.train()
    callback = gt.GlasstuneCallback()
    ours = make_trainer(
        tmp_path / "ours", model=tiny_lora(), callbacks=[callback], loss=loss, **options
    )
    ours.train()
    assert same_bits(trained(plain), trained(ours))
    assert not callback.findings
    row = ours.state.log_history[0]
    assert row["loss"] == pytest.approx(row["loss/next_token"] + 0.1 * row["loss/z_loss"], rel=1e-5)
    record = json.loads((tmp_path / "ours" / "audit.jsonl").read_text().splitlines()[0])
    assert record["engine"] == "unknown"
    assert "terms_not_split" in {finding["code"] for finding in record["findings"]}

    model = tiny_lora()
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    model.get_submodule(path)._disable_adapters = True
    dead = make_trainer(
        tmp_path / "dead", model=model, callbacks=[gt.GlasstuneCallback()], **options
    )
    with pytest.raises(RunError, match=r"torch\.compile hides whether its module ran") as caught:
        dead.train()
    assert f"{path}.lora_B" in caught.value.message

"""Changes of weights, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from battery import save_battery_model
from merging import adapted, load_plain, logits_of, peft_merged, save_peft, stored

from glasstune.adapters.changes import AddBias, Experts, LowRank, Replace, Rows, same_effect
from glasstune.export.merge import add_changes
from glasstune.workflows.merge import merge


def test_low_rank_by_hand():
    change = LowRank(up=torch.tensor([[1.0], [2.0]]), down=torch.tensor([[3.0, 0, 5]]), scale=2.0)
    weight = torch.zeros(2, 3)
    assert change.apply(weight).tolist() == [[6.0, 0, 10], [12, 0, 20]]
    turned = LowRank(change.up, change.down, 2.0, turned=True).apply(torch.zeros(3, 2))
    assert turned.tolist() == [[6.0, 12], [0, 0], [10, 20]]


def test_dora_by_hand():
    # W + BA = [[3, 4], [0, 2]]: rows of norm 5 and 2; magnitudes 10 and 1.
    change = LowRank(
        torch.tensor([[1.0], [0]]), torch.tensor([[3.0, 4]]), 1.0, magnitude=torch.tensor([10.0, 1])
    )
    assert change.apply(torch.tensor([[0.0, 0], [0, 2]])).tolist() == [[6.0, 8], [0, 1]]


def test_experts_by_hand():
    up = torch.tensor([[[1.0], [2.0]], [[0.0], [1.0]]])  # two experts, n=2, r=1
    down = torch.tensor([[[1.0, 1, 1]], [[2.0, 0, 0]]])
    made = Experts(up, down, 0.5, turned=False).apply(torch.zeros(2, 2, 3))
    assert made[0].tolist() == [[0.5, 0.5, 0.5], [1, 1, 1]]
    assert made[1].tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "scale"), [(16, 16, True, 4.0), (16, 16, False, 1.0)]
)
def test_the_scale_of_rslora(r, alpha, rslora, scale, tmp_path):
    """X05: alpha / sqrt(r), not alpha / r."""
    base = save_battery_model("llama", tmp_path)
    options = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "target_modules": ["q_proj"]}
    adapter = save_peft(adapted(base, options), tmp_path / "adapter")
    merge(adapter, tmp_path / "out", base=str(base), dtype="float32", certificate=False)
    key = "model.layers.0.self_attn.q_proj"
    file = stored(adapter)
    up = file[f"base_model.model.{key}.lora_B.weight"].double()
    down = file[f"base_model.model.{key}.lora_A.weight"].double()
    moved = (
        stored(tmp_path / "out")[f"{key}.weight"].double() - stored(base)[f"{key}.weight"].double()
    )
    found = float((moved * (up @ down)).sum() / (up @ down).square().sum())
    assert math.isclose(found, scale, rel_tol=1e-5)


def test_dora_on_a_small_linear(tmp_path):
    """X04: the magnitude is not dropped, and merged equals unmerged to 1e-6."""
    base = save_battery_model("llama", tmp_path)
    wrapped = adapted(base, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]})
    truth = logits_of(wrapped)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    merge(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert float((logits_of(load_plain(tmp_path / "out")) - truth).abs().max()) < 1e-6


@pytest.mark.parametrize("chunk", [7, 64, 10**6])
def test_rows_in_chunks_change_nothing(chunk, monkeypatch):
    from glasstune.export import merge as module

    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    weight = torch.randn(13, 5)
    up, down, size = torch.randn(13, 2), torch.randn(2, 5), torch.rand(13) + 1
    for changes in (
        [LowRank(up, down, 0.7)],
        [LowRank(up, down, 0.7, magnitude=size)],
        [LowRank(torch.randn(5, 2), torch.randn(2, 13), 0.7, turned=True)],
        [LowRank(torch.randn(5, 2), torch.randn(2, 13), 0.7, turned=True, magnitude=size[:5])],
        [Rows((2, 12), torch.randn(2, 5)), LowRank(up, down, -0.2)],
        [Replace(torch.randn(13, 5)), LowRank(up, down, 0.1)],
        [Replace(torch.randn(20, 5)), Rows((19,), torch.randn(1, 5))],
        [AddBias(torch.randn(13, 5))],
    ):
        whole = weight.clone()
        for change in changes:
            whole = change.apply(whole)
        made = add_changes(weight.clone(), changes, torch.bfloat16)
        # Sums in another order may round to the neighbour: one step of bfloat16.
        assert torch.allclose(made.float(), whole.bfloat16().float(), rtol=2**-7, atol=1e-6)
        made = add_changes(weight.clone(), changes, torch.float32)
        # Sums in another order: a few steps of float32 on values of about 1.
        assert torch.allclose(made, whole, rtol=1e-6, atol=1e-6)
    experts = Experts(torch.randn(3, 4, 2), torch.randn(3, 2, 5), 0.3, turned=False)
    value = torch.randn(3, 4, 5)
    assert torch.allclose(
        add_changes(value.clone(), [experts], torch.float32), experts.apply(value.clone())
    )


def test_one_rounding_not_two():
    """0.4 and 0.3 of a step make 0.7 of one, which rounds up; rounded apart, both are lost."""
    step = 2.0**-7
    weight, moved = torch.tensor([[1.0 + 0.4 * step]]), torch.tensor([[0.3 * step]])
    change = LowRank(torch.tensor([[1.0]]), moved, 1.0)
    made = add_changes(weight.clone(), [change], torch.bfloat16)
    assert float(made) == 1.0 + step
    assert float(weight.bfloat16() + moved.bfloat16()) == 1.0


def test_same_effect():
    up, down = torch.randn(6, 2), torch.randn(2, 4)
    plain = LowRank(up, down, 0.5)
    assert same_effect([], [])
    assert not same_effect([plain], [])
    assert same_effect([plain], [LowRank(down.T, up.T, 0.5, turned=True)])
    assert not same_effect([plain], [LowRank(torch.randn(4, 2), up.T, 0.5, turned=True)])
    assert same_effect([plain], [LowRank(up.clone(), down.clone(), 0.5)])
    assert not same_effect([plain], [LowRank(up, down, 0.25)])
    rows = torch.randn(2, 4)
    assert same_effect([Rows((1, 2), rows)], [Rows((1, 2), rows.clone())])
    assert not same_effect([Rows((1, 2), rows)], [Rows((2, 1), rows)])
    assert not same_effect([Replace(rows)], [Replace(rows + 1)])


def test_peft_itself_is_wrong_on_tied_heads(tmp_path):
    """Why the battery compares logits there: X03 is alive in plain PEFT."""
    base = save_battery_model("llama_tied", tmp_path)
    wrapped = adapted(base, {"r": 3, "target_modules": ["lm_head"]})
    truth = logits_of(wrapped)
    assert float((logits_of(peft_merged(wrapped)) - truth).abs().max()) > 0.01

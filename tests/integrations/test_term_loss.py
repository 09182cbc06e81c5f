"""`gt.term_loss`: the Trainer's own loss where it is the same, exact under accumulation, clear
where a function is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax
from trainer_runs import make_trainer, same_bits, tiny_lora, token_rows, trained
from transformers.modeling_outputs import CausalLMOutput

import glasstune as gt
from glasstune.core.errors import InputError, RunError


def outputs_and_labels(seed: int = 0):
    torch.manual_seed(seed)
    logits = torch.randn(2, 5, 11, requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3, 4], [5, -100, -100, 6, 7]])
    return CausalLMOutput(logits=logits), labels


def mean_nll(outputs, labels):
    """A user's function of two arguments: a mean over the micro-batch."""
    return cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )


def whole_nll(outputs, labels, num_items_in_batch):
    """A user's function of three: its sum over the trained tokens of the update."""
    logits = log_softmax(outputs.logits[:, :-1].float(), dim=-1)
    wanted = labels[:, 1:]
    picked = logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return -(picked * (wanted != -100)).sum() / num_items_in_batch


# Values


def test_z_loss_is_the_mean_square_of_the_log_of_the_denominator() -> None:
    outputs, labels = outputs_and_labels()
    trained_at = [(0, 0), (0, 2), (0, 3), (1, 2), (1, 3)]  # labels 2, 3, 4, 6, 7, one place before
    squares = [outputs.logits[at].double().exp().sum().log() ** 2 for at in trained_at]
    loss = gt.term_loss({"z_loss": 0.5})(outputs, labels)
    assert loss.item() == pytest.approx(0.5 * sum(squares).item() / 5, rel=1e-6)
    whole = gt.term_loss({"z_loss": 1.0})(outputs, labels, num_items_in_batch=torch.tensor(20))
    assert whole.item() == pytest.approx(sum(squares).item() / 20, rel=1e-6)


def test_a_mean_is_weighted_by_its_part_of_the_update() -> None:
    """Two micro-batches of 5 and of 1 trained tokens: 5/6 of one mean and 1/6 of the other."""
    first, labels = outputs_and_labels(0)
    second, _ = outputs_and_labels(1)
    one = torch.full_like(labels, -100)
    one[0, 1] = 3
    loss = gt.term_loss({"mine": mean_nll})
    got = loss(first, labels, torch.tensor(6)) + loss(second, one, torch.tensor(6))
    expected = (5 * mean_nll(first, labels) + mean_nll(second, one)) / 6
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_no_term_itself() -> None:
    """The Trainer multiplies what it gets in place."""
    outputs, labels = outputs_and_labels()
    held = mean_nll(outputs, labels)
    loss = gt.term_loss({"mine": lambda o, y: held})(outputs, labels)
    loss *= 3
    assert held.item() * 3 == pytest.approx(loss.item())


# The real Trainer


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_next_token_is_the_trainers_own_loss_bit_for_bit(tmp_path: Path, accumulation: int) -> None:
    """Rows of unequal length, a short last update (24 rows, 4 or 6 an update), dropout."""
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 5}
    own = make_trainer(tmp_path / "own", **options)
    own.train()
    ours = make_trainer(tmp_path / "ours", loss=gt.term_loss({"next_token": 1.0}), **options)
    ours.train()
    assert same_bits(trained(own), trained(ours))
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (own, ours)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


@pytest.mark.parametrize("function", [mean_nll, whole_nll])
def test_both_kinds_of_functions_stay_exact_under_accumulation(tmp_path: Path, function) -> None:
    """The truth is one micro-batch of all rows; a mean of means would be 10 % off."""
    model_options = {"model": None, "max_steps": 2, "learning_rate": 1e-2}

    def run(name: str, batch: int, accumulation: int):
        trainer = make_trainer(
            tmp_path / name,
            **{**model_options, "model": tiny_lora()},
            loss=gt.term_loss({"mine": (1.0, function)}),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        return trained(trainer), trainer.state.log_history[1]["loss"]

    whole, loss = run("whole", 6, 1)
    parts, same_loss = run("parts", 1, 6)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_terms_are_logged_without_their_weight(tmp_path: Path) -> None:
    callback = gt.GlasstuneCallback()
    loss = gt.term_loss({"next_token": 1.0, "z_loss": 0.01, "mine": (0.5, mean_nll)})
    trainer = make_trainer(tmp_path, callbacks=[callback], loss=loss, logging_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        parts = row["loss/next_token"] + 0.01 * row["loss/z_loss"] + 0.5 * row["loss/mine"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["loss/mine"] == pytest.approx(row["loss/next_token"], rel=1e-5)
    final = trainer.state.log_history[-1]
    assert "train_loss" in final
    assert not [key for key in final if key.startswith(("loss/", "glasstune/"))]


def test_evaluation_uses_the_terms_too(tmp_path: Path) -> None:
    loss = gt.term_loss({"next_token": 1.0})
    model = tiny_lora()
    ours = make_trainer(tmp_path, model=model, loss=loss, eval_rows=token_rows(6, seed=5))
    own = make_trainer(tmp_path, model=model, eval_rows=token_rows(6, seed=5))
    assert ours.evaluate()["eval_loss"] == own.evaluate()["eval_loss"]


# What is wrong is named


@pytest.mark.parametrize(
    ("terms", "code", "word"),
    [
        ({}, "no_terms", "at least one"),
        ({"kl_to_base": 1.0}, "unknown_loss", "kl_to_base"),
        ({"mine": (float("nan"), mean_nll)}, "loss_weight", "mine"),
        ({"mine": ("1", mean_nll)}, "loss_weight", "mine"),
        ({"mine": (True, mean_nll)}, "loss_weight", "mine"),
        ({"mine": (1.0, "file.py:mine")}, "loss_function_missing", "mine"),
        ({"mine": None}, "loss_function_missing", "mine"),
        ({"next_token": 0.0, "mine": (0, mean_nll)}, "learns_nothing", "weighs 0"),
    ],
)
def test_wrong_terms_are_the_users_error(terms, code: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        gt.term_loss(terms)
    assert caught.value.code == code


def raises(outputs, labels):
    return labels.no_such_thing


def per_row(outputs, labels):
    return outputs.logits.mean(dim=(1, 2))


def plain_number(outputs, labels):
    return outputs.logits.mean().item()


def detached(outputs, labels):
    return mean_nll(outputs, labels).detach()


@pytest.mark.parametrize(
    ("function", "code", "text"),
    [
        (raises, "loss_function_raised", r"AttributeError.*test_term_loss.py, line \d+"),
        (per_row, "loss_not_scalar", r"shape \(2,\)"),
        (plain_number, "loss_function_result", "returned float"),
        (detached, "loss_without_graph", "leads to no trained tensor"),
    ],
)
def test_a_wrong_function_stops_the_training_with_its_name(
    tmp_path: Path, function, code: str, text: str
) -> None:
    loss = gt.term_loss({"next_token": 1.0, "broken": (0.5, function)})
    trainer = make_trainer(tmp_path, loss=loss, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError, match=text) as caught:
        trainer.train()
    assert caught.value.code == code
    assert "'broken'" in str(caught.value)


def test_a_constant_of_weight_zero_may_stay(tmp_path: Path) -> None:
    """A term that is only watched needs no graph."""
    loss = gt.term_loss({"next_token": 1.0, "watched": (0.0, detached)})
    trainer = make_trainer(tmp_path, loss=loss, callbacks=[gt.GlasstuneCallback()], max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss/watched"] == pytest.approx(row["loss/next_token"], rel=1e-5)


def test_where_the_model_has_no_graph_the_function_is_not_blamed(tmp_path: Path) -> None:
    model = tiny_lora()
    model.register_forward_hook(
        lambda module, args, out: CausalLMOutput(logits=out.logits.detach())
    )
    trainer = make_trainer(tmp_path, model=model, loss=gt.term_loss({"next_token": 1.0}))
    with pytest.raises(RunError, match="the model's output leads to no trained tensor") as caught:
        trainer.train()
    assert caught.value.code == "loss_without_graph"


def test_a_batch_without_labels_is_named(tmp_path: Path) -> None:
    outputs, _ = outputs_and_labels()
    with pytest.raises(RunError, match="'next_token' needs labels"):
        gt.term_loss({"next_token": 1.0})(outputs, None)

"""`gt.GlasstuneCallback` in the real `transformers.Trainer`: it changes nothing, passes what is
healthy, and names what is dead or not finite."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate.optimizer import patch_optimizer_step
from trainer_runs import (
    checkpointing,
    make_trainer,
    same_bits,
    tiny_base,
    tiny_lora,
    token_rows,
    trained,
)
from transformers import TrainerCallback

import glasstune as gt
from glasstune.core.errors import InputError, RunError

Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def hooks_of(model: torch.nn.Module) -> int:
    """Number of forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Notes(TrainerCallback):
    """Reads, with plain code, what the callback should have read."""

    def __init__(self) -> None:
        self.clipped: list[dict[str, float]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.clipped.append(
            {
                name: value.grad.norm().item()
                for name, value in model.named_parameters()
                if value.grad is not None
            }
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


# It changes nothing


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0},
        checkpointing(use_reentrant=False),
        checkpointing(use_reentrant=True),
    ],
    ids=["plain", "bf16", "no-clip", "checkpointing", "reentrant"],
)
@pytest.mark.parametrize("with_terms", [False, True], ids=["own-loss", "terms"])
def test_the_weights_are_the_same_bit_for_bit(tmp_path: Path, options, with_terms: bool) -> None:
    """Adapters with dropout, audits at steps 1, 2 and 4, two terms where there are terms."""
    terms = {"next_token": 1.0, "z_loss": 0.01}
    loss = gt.term_loss(terms) if with_terms else None
    without = make_trainer(tmp_path / "without", loss=loss, **options)
    without.train()
    callback = gt.GlasstuneCallback(every_n_steps=2)
    with_it = make_trainer(tmp_path / "with", callbacks=[callback], loss=loss, **options)
    with_it.train()
    assert same_bits(trained(without), trained(with_it))
    assert not callback.findings
    assert hooks_of(with_it.model) == hooks_of(without.model)


def test_a_healthy_run_passes_although_its_first_rate_is_zero(tmp_path: Path) -> None:
    callback = gt.GlasstuneCallback()
    trainer = make_trainer(tmp_path, callbacks=[callback], warmup_steps=3)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.0
    assert trainer.state.global_step == 4
    assert not callback.findings


# What it logs


def test_norms_are_those_before_clipping(tmp_path: Path) -> None:
    """Clipping to 0.1 scales every tensor by one factor, which the Trainer's own log tells."""
    notes, callback = Notes(), gt.GlasstuneCallback()
    trainer = make_trainer(
        tmp_path, callbacks=[callback, notes], max_grad_norm=0.01, max_steps=2, warmup_steps=0
    )
    trainer.train()
    for row, clipped in zip(trainer.state.log_history, notes.clipped, strict=False):
        whole = math.sqrt(sum(norm**2 for norm in clipped.values()))
        assert whole == pytest.approx(0.01, rel=1e-3)
        factor = row["grad_norm"] / whole
        assert factor > 2
        wanted = [norm * factor for norm in clipped.values()]
        assert row["glasstune/grad_norm/max"] == pytest.approx(max(wanted), rel=1e-3)
    for name, norm in callback.norms.items():
        assert norm == pytest.approx(notes.clipped[-1][name] * factor, rel=1e-3)


def test_a_few_numbers_not_hundreds_reach_the_log(tmp_path: Path) -> None:
    notes = Notes()
    trainer = make_trainer(tmp_path, callbacks=[gt.GlasstuneCallback(), notes])
    trainer.train()
    first, second = trainer.state.log_history[:2]
    new = {key for key in first if key.startswith("glasstune/")}
    assert len(new) == 4
    assert new <= set(notes.logs[0])  # a callback behind ours
    # At B = 0 the six tensors A have a gradient that is exactly zero, which is healthy; the first
    # learning rate is zero, so at the second step it is the same, and at the third no more.
    zeros = [row.get("glasstune/tensors_with_zero_gradient") for row in trainer.state.log_history]
    assert zeros[:3] == [6.0, 6.0, 0.0]
    assert second["glasstune/tensors_without_gradient"] == 0.0


def test_reporters_see_the_numbers_after_first_in(tmp_path: Path) -> None:
    """The Trainer puts its reporters before a user's callbacks."""
    for moved in (False, True):
        reporter, callback = Notes(), gt.GlasstuneCallback()
        trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=1)
        trainer.callback_handler.callbacks.insert(1, reporter)
        if moved:
            assert callback.first_in(trainer) is callback
        trainer.train()
        seen = [key for key in reporter.logs[0] if key.startswith("glasstune/")]
        assert bool(seen) is moved
        assert trainer.callback_handler.callbacks.count(callback) == 1


# What is dead


def test_a_frozen_b_leaves_its_a_dead(tmp_path: Path) -> None:
    model = tiny_lora()
    model.get_parameter(Q_B).requires_grad_(False)
    trainer = make_trainer(tmp_path, model=model, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert caught.value.code == "first_step_gate"
    assert "1 trained tensors do not learn" in str(caught.value)
    assert Q_B.replace("lora_B", "lora_A") in str(caught.value)
    assert "exactly zero" in str(caught.value)
    assert trainer.state.global_step <= 2


def detach_first_layer(model) -> None:
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, out: out.detach())


def test_a_detached_branch_is_refused_before_the_second_update(tmp_path: Path) -> None:
    model = tiny_lora()
    detach_first_layer(model)
    before = hooks_of(model)
    trainer = make_trainer(tmp_path, model=model, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError) as caught:
        trainer.train()
    error = caught.value
    assert error.code == "first_step_gate"
    assert error.where == "step 1"
    assert "2 trained tensors do not learn" in error.message
    assert Q_B in error.message
    assert "has no gradient" in error.message
    assert "gate_allow" in error.fix
    assert hooks_of(model) == before


def test_warn_goes_on_and_says_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_lora()
    detach_first_layer(model)
    callback = gt.GlasstuneCallback(first_step_gate="warn")
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback])
    with caplog.at_level(logging.WARNING, logger="glasstune"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert {finding.where for finding in callback.findings} == {
        Q_B,
        Q_B.replace("lora_B", "lora_A"),
    }
    assert f"{Q_B} has no gradient" in caplog.text
    assert trainer.state.log_history[0]["glasstune/tensors_without_gradient"] == 2.0


@pytest.mark.parametrize(
    "options",
    [{"first_step_gate": "off"}, {"gate_allow": ["*layers.0.self_attn.q_proj*"]}],
    ids=["off", "allowed"],
)
def test_off_and_allowed_tensors_pass(tmp_path: Path, options) -> None:
    model = tiny_lora()
    detach_first_layer(model)
    callback = gt.GlasstuneCallback(**options)
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback])
    trainer.train()
    assert trainer.state.global_step == 4
    assert not [finding for finding in callback.findings if finding.severity != "info"]


def test_a_disabled_adapter_trains_nothing(tmp_path: Path) -> None:
    """PEFT freezes what it switches off."""
    model = tiny_lora()
    model.base_model.disable_adapter_layers()
    trainer = make_trainer(tmp_path, model=model, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError, match="disabled adapter is frozen") as caught:
        trainer.train()
    assert caught.value.code == "nothing_trained"


def test_an_adapter_switched_off_but_left_trainable_is_named(tmp_path: Path) -> None:
    model = tiny_lora()
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    layer._disable_adapters = True
    trainer = make_trainer(tmp_path, model=model, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError, match=r"layers\.1\.mlp\.down_proj\.lora_A") as caught:
        trainer.train()
    assert caught.value.code == "first_step_gate"


def test_a_full_fine_tune_is_healthy_too(tmp_path: Path) -> None:
    callback = gt.GlasstuneCallback()
    trainer = make_trainer(
        tmp_path, model=tiny_base(), callbacks=[callback], learning_rate=1e-4, weight_decay=0.1
    )
    trainer.train()
    assert not callback.findings


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_without_input_gradients_is_refused(tmp_path: Path) -> None:
    """The head is trained, so the loss falls, while the adapters in the blocks get nothing."""

    class Fault(TrainerCallback):
        """The Trainer itself switches input gradients on."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.disable_input_require_grads()

    trainer = make_trainer(
        tmp_path,
        model=tiny_lora(targets=("q_proj", "v_proj", "lm_head")),
        callbacks=[Fault(), gt.GlasstuneCallback()],
        **checkpointing(use_reentrant=True),
    )
    with pytest.raises(RunError, match="8 trained tensors do not learn") as caught:
        trainer.train()
    assert caught.value.code == "first_step_gate"
    assert "lm_head" not in caught.value.message


# What is not finite


class Poison(torch.autograd.Function):
    """The identity; one entry of its gradient is replaced."""

    @staticmethod
    def forward(ctx, value, bad):
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = ctx.bad
        return gradient, None


def poison(model, path: str, bad: float, from_call: int) -> None:
    calls = [0]

    def hook(module, args, out):
        calls[0] += module.training
        return Poison.apply(out, bad) if calls[0] >= from_call else out

    model.get_submodule(path).register_forward_hook(hook)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_the_tensor_with_a_bad_gradient_is_named_before_clipping_spreads_it(
    tmp_path: Path, bad: float, max_grad_norm: float
) -> None:
    """Behind the last layer's down_proj nothing trained follows, so that its B alone is bad."""
    path = "base_model.model.model.layers.1.mlp.down_proj"
    model = tiny_lora(targets=("down_proj",))
    # The poison sits between A and B: only A's own gradient and what lies before it is reached.
    poison(model, f"{path}.lora_A.default", bad, from_call=7)
    weights: list[dict] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    trainer = make_trainer(
        tmp_path,
        model=model,
        callbacks=[gt.GlasstuneCallback(), Keep()],
        max_steps=10,
        max_grad_norm=max_grad_norm,
    )
    with pytest.raises(RunError) as caught:
        trainer.train()
    error = caught.value
    assert error.code == "non_finite_gradient"
    assert error.where == "step 4"  # two forwards an update
    assert f"{path}.lora_A.default.weight" in error.message
    assert "layers.1.mlp.down_proj.lora_B" not in error.message
    assert "after clipping" not in error.message
    # The optimiser did not move.
    after = {n: p.detach() for n, p in model.named_parameters()}
    assert same_bits(weights[-1], after)


def test_non_finite_can_warn(tmp_path: Path) -> None:
    model = tiny_lora(targets=("down_proj",))
    poison(model, "base_model.model.model.layers.1.mlp.down_proj", float("nan"), from_call=7)
    callback = gt.GlasstuneCallback(non_finite="warn")
    trainer = make_trainer(tmp_path, model=model, callbacks=[callback])
    trainer.train()
    assert [finding.code for finding in callback.findings] == ["non_finite_gradient"]


def test_a_loss_that_is_not_finite_names_its_term(tmp_path: Path) -> None:
    loss = gt.term_loss(
        {"next_token": 1.0, "bad": (0.1, lambda out, labels: out.logits.float().sum() * math.inf)}
    )
    trainer = make_trainer(tmp_path, loss=loss, callbacks=[gt.GlasstuneCallback()])
    with pytest.raises(RunError, match=r"loss term 'bad' is (nan|-?inf)") as caught:
        trainer.train()
    assert caught.value.code == "non_finite_loss"
    assert "'next_token'" not in caught.value.message


def test_an_update_without_a_trained_label_is_named(tmp_path: Path) -> None:
    """The Trainer itself logs 0.0 for it and goes on with NaN weights."""
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 8
    trainer = make_trainer(tmp_path, rows=rows, callbacks=[gt.GlasstuneCallback()], max_steps=1)
    with pytest.raises(RunError, match="the loss is nan") as caught:
        trainer.train()
    assert caught.value.code == "non_finite_loss"


class Scaler(torch.amp.GradScaler):
    """A real one on the CPU, put where accelerate has its own under fp16."""

    def put(self, optimizer) -> None:
        self.scale(torch.zeros(()))  # sets it up
        optimizer.scaler = self
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(
            optimizer, optimizer.optimizer.step
        )


@pytest.mark.parametrize(("overflowing", "said"), [(3, False), (25, True)])
def test_updates_that_an_fp16_scaler_passes_over_are_not_judged(
    tmp_path: Path, overflowing: int, said: bool
) -> None:
    """The first updates overflow, as under fp16; the gate judges those after them."""
    model = tiny_lora(targets=("down_proj",))
    path = "base_model.model.model.layers.1.mlp.down_proj"
    calls = [0]

    def spoil(module, args, out):
        calls[0] += module.training
        return Poison.apply(out, math.inf) if calls[0] <= overflowing else out

    model.get_submodule(path).register_forward_hook(spoil)
    scaler = Scaler("cpu", init_scale=1.0)

    class Fp16(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            scaler.put(optimizer)

    callback = gt.GlasstuneCallback()
    trainer = make_trainer(
        tmp_path,
        model=model,
        callbacks=[Fp16(), callback],
        gradient_accumulation_steps=1,
        max_steps=overflowing + 4,
        warmup_steps=0,
        max_grad_norm=0.0,
    )
    before = trained(trainer)
    trainer.train()
    assert trainer.state.global_step == overflowing + 4
    assert scaler.get_scale() == 0.5**overflowing
    assert not same_bits(before, trained(trainer))
    assert [finding.code for finding in callback.findings] == ["fp16_overflow"] * said
    if said:
        assert f"{path}.lora_B.default.weight" in callback.findings[0].message
        assert "20 updates in a row" in callback.findings[0].message
    assert callback._gate is None  # it has judged


# Around the training


def test_resume_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped after 2 of 4 updates, resumed: as without a stop and as without the callback."""
    options = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    plain = make_trainer(tmp_path / "plain", max_steps=4, **options)
    plain.train()
    first = make_trainer(
        tmp_path / "run", callbacks=[gt.GlasstuneCallback()], max_steps=2, **options
    )
    first.train()
    callback = gt.GlasstuneCallback(every_n_steps=1)
    second = make_trainer(tmp_path / "run", callbacks=[callback], max_steps=4, **options)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert same_bits(trained(plain), trained(second))
    assert not callback.findings


def test_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    options = {"eval_rows": token_rows(6, seed=3), "eval_strategy": "steps", "eval_steps": 1}
    plain = make_trainer(tmp_path / "plain", eval_on_start=True, **options)
    plain.train()
    callback = gt.GlasstuneCallback()
    loss = gt.term_loss({"next_token": 1.0})
    ours = make_trainer(
        tmp_path / "ours", callbacks=[callback], loss=loss, eval_on_start=True, **options
    )
    ours.train()
    assert same_bits(trained(plain), trained(ours))
    assert not callback.findings
    evals = [row for row in ours.state.log_history if "eval_loss" in row]
    assert len(evals) == 5
    assert not [key for row in evals for key in row if key.startswith(("loss/", "glasstune/"))]


def test_two_trainers_in_one_process_keep_apart(tmp_path: Path) -> None:
    """The first breaks off inside a backward; the second has another loss and no callback."""
    broken = gt.term_loss({"next_token": 1.0, "broken": (1.0, lambda out, labels: 1 / 0)})
    callback = gt.GlasstuneCallback()
    first = make_trainer(tmp_path / "first", loss=broken, callbacks=[callback])
    with pytest.raises(RunError):
        first.train()
    second = make_trainer(tmp_path / "second", loss=gt.term_loss({"z_loss": 1.0}))
    second.train()
    assert "loss/z_loss" not in second.state.log_history[0]
    assert not callback._sums
    # The same callback in a third Trainer starts anew.
    third = make_trainer(tmp_path / "third", callbacks=[callback])
    third.train()
    assert not callback.findings
    assert "loss/next_token" not in third.state.log_history[0]


def test_a_training_that_broke_off_in_its_backward_hears_no_other(tmp_path: Path) -> None:
    model = tiny_lora()

    def stop(parameter):
        raise KeyboardInterrupt

    # Runs in the Trainer's own backward alone, not where the audit asks for gradients.
    model.get_parameter(Q_B).register_post_accumulate_grad_hook(stop)
    callback = gt.GlasstuneCallback()
    loss = gt.term_loss({"next_token": 1.0})
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path / "first", model=model, loss=loss, callbacks=[callback]).train()
    heard = dict(callback._sums)
    assert set(heard) == {"next_token"}
    make_trainer(tmp_path / "second", loss=gt.term_loss({"z_loss": 1.0})).train()
    assert callback._sums == heard


def test_the_class_itself_can_be_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=[gt.GlasstuneCallback], max_steps=1)
    trainer.train()
    assert "glasstune/grad_norm/max" in trainer.state.log_history[0]


@pytest.mark.parametrize(
    "options",
    [
        {"first_step_gate": "yes"},
        {"non_finite": None},
        {"every_n_steps": -1},
        {"every_n_steps": True},
    ],
)
def test_wrong_options_are_the_users_error(options) -> None:
    with pytest.raises(InputError) as caught:
        gt.GlasstuneCallback(**options)
    assert caught.value.code == "wrong_value"
    assert next(iter(options)) in str(caught.value)


class DeepSpeedOptimizerWrapper(torch.optim.SGD):
    """Named as accelerate names its own."""


class DTensor(torch.nn.Parameter):
    """Named as torch names a sharded tensor."""


@pytest.mark.parametrize("who", ["DeepSpeed", "FSDP"])
def test_what_hides_gradients_is_refused_before_the_first_step(tmp_path: Path, who: str) -> None:
    """Their `.grad` is None or a part: the gate would stop a healthy run."""
    callback = gt.GlasstuneCallback()
    trainer = make_trainer(tmp_path, model=tiny_lora(), callbacks=[callback])
    optimizer = torch.optim.SGD(trainer.model.parameters())
    if who == "DeepSpeed":
        optimizer = DeepSpeedOptimizerWrapper(trainer.model.parameters())
    else:
        layer = trainer.model.get_submodule(Q_B.removesuffix(".weight"))
        layer.weight = DTensor(layer.weight.detach())
    with pytest.raises(InputError, match=f"{who} keeps gradients") as caught:
        callback.on_train_begin(
            trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=optimizer
        )
    assert caught.value.code == "gradients_hidden"
    assert hooks_of(trainer.model) == 0

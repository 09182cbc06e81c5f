"""PEFT adapters over a base at 16, 8 and 4 bit: healthy ones, and each switch that stops one."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch

import glasstune as gt
from glasstune.audit.gradient_audit import GradientAudit

IDS = torch.tensor([[5, 9, 300, 17, 2, 8], [40, 41, 7, 7, 100, 3]])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def recompute_layers(model, reentrant: bool) -> None:
    """Checkpointing of every layer, by its name in either version of transformers."""
    kwargs = {"use_reentrant": reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


def terms(model):
    ids = IDS.to(model.device)
    logits = model(input_ids=ids).logits.float()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return {"nll": (1.0, nll), "z": (0.01, logits.logsumexp(-1).square().mean())}


def audited(model, **options):
    with GradientAudit(model, **options) as audit:
        audit.combine(terms(model)).backward()
    return audit


def adapted(folder: Path, bits: int | str = 16, **options):
    loaded = {"bits": 8, "int8_compute": "llm_int8"} if bits == "llm_int8" else {"bits": bits}
    model, _ = gt.load_model(str(folder), **loaded)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **options})).train()


@pytest.mark.parametrize("bits", [16, 8, "llm_int8", 4])
def test_g03_first_step_of_a_lora_is_healthy(tiny_llama: Path, bits: int) -> None:
    model = adapted(tiny_llama, bits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    report = audited(model, optimizer=optimizer).report
    for row in report.parameters:
        if "lora_A" in row.name:
            assert (row.status, row.reason.code) == ("zero", "partner_zero")
            assert row.reason.healthy
            assert "lora_B" in row.reason.text
            assert row.terms["nll"].reached is True
        elif "lora_B" in row.name:
            assert row.status == "ok"
            assert row.grad_after.norm > 0
        else:
            packed = bits != 16 and row.dtype in ("uint8", "int8")
            assert (row.status, row.reason.code) == ("frozen", "packed" if packed else "frozen")
            assert (row.value is None) is packed
    assert sum(row.reason is not None and row.reason.code == "packed" for row in report.parameters
               ) == (0 if bits == 16 else 14)  # fmt: skip
    assert report.sum_check < 1e-2  # activations are bfloat16
    assert [item for item in report.findings if item.severity != "info"] == []
    assert [layer.layer for layer in report.layers] == [
        f"base_model.model.model.layers.{index}" for index in range(2)
    ]


@pytest.mark.parametrize("bits", [16, 8, "llm_int8", 4])
@pytest.mark.parametrize("recompute", ["none", "plain", "reentrant"])
def test_terms_at_every_precision_and_recomputation(
    tiny_llama: Path, bits: int, recompute: str
) -> None:
    """The truth: each loss alone, on a fresh model, by an ordinary backward."""

    def model_of():
        model = adapted(tiny_llama, bits, lora_dropout=0.1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        if recompute != "none":
            model.enable_input_require_grads()
            recompute_layers(model, recompute == "reentrant")
        return model

    truth = {}
    for name in ("nll", "z"):
        model = model_of()
        torch.manual_seed(3)
        terms(model)[name][1].backward()
        truth[name] = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    model = model_of()
    torch.manual_seed(3)
    audit = audited(model)
    assert audit.report.record.engine == ("backward" if recompute == "reentrant" else "grad")
    for name, found in truth.items():
        for key, gradient in found.items():
            assert audit.report[key].terms[name].reached is True
            torch.testing.assert_close(audit.gradient(name, key), gradient, rtol=1e-5, atol=1e-7)
    assert {row.status for row in audit.report.parameters} == {"ok", "frozen"}


def test_both_factors_zero_never_learn(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0.self_attn.q_proj.lora_A" in name:
                parameter.zero_()
    report = audited(model).report
    dead = [row for row in report.parameters if row.reason and row.reason.code == "both_zero"]
    assert len(dead) == 2
    (finding,) = [item for item in report.findings if item.severity == "error"]
    assert finding.code == "both_zero"


def test_kl_to_base_alone_is_at_its_minimum(tiny_llama: Path) -> None:
    """Teacher and student in one forward, so that their difference is exactly zero."""
    model = adapted(tiny_llama)
    with GradientAudit(model) as audit:
        logits = model(input_ids=IDS.to(model.device)).logits.double().log_softmax(-1)
        base = logits.detach()
        loss = (logits - base).square().sum()
        audit.combine({"kl": (1.0, loss)}).backward()
    codes = {
        (row.status, row.reason.code) for row in audit.report.parameters if "lora_" in row.name
    }
    assert codes == {("zero", "partner_zero"), ("zero", "untouched_adapter")}
    assert [item for item in audit.report.findings if item.severity != "info"] == []


def test_a_disabled_adapter(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    with GradientAudit(model) as audit:
        with model.disable_adapter():
            model(input_ids=IDS.to(model.device))
        model.lm_head.weight.requires_grad_(True)
        audit.combine(terms(model)).backward()
    assert all(row.status != "none" for row in audit.report.parameters)
    with GradientAudit(model) as audit:
        with model.disable_adapter():
            found = terms(model)
        audit.combine(found).backward()
    rows = [row for row in audit.report.parameters if "lora_" in row.name]
    assert {(row.status, row.reason.code) for row in rows} == {("none", "adapter_disabled")}
    assert rows[0].reason.module.endswith("q_proj")
    with model.disable_adapter(), GradientAudit(model) as audit:
        audit.combine(terms(model)).backward()
    rows = [row for row in audit.report.parameters if "lora_" in row.name]
    assert {row.reason.code for row in rows} == {"adapter_disabled"}


def test_an_inactive_adapter(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    model.add_adapter("other", peft.LoraConfig(**LORA))
    report = audited(model).report
    rows = [row for row in report.parameters if ".other." in row.name]
    assert {(row.status, row.reason.code) for row in rows} == {("frozen", "adapter_inactive")}
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.requires_grad_(True)
    model.zero_grad()
    report = audited(model).report
    rows = [row for row in report.parameters if ".other." in row.name]
    assert {(row.status, row.reason.code) for row in rows} == {("none", "adapter_inactive")}
    assert "active: default" in rows[0].reason.text


def test_a_merged_adapter(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    model.lm_head.weight.requires_grad_(True)
    model.merge_adapter()
    rows = [row for row in audited(model).report.parameters if "lora_" in row.name]
    assert {row.reason.code for row in rows} == {"adapter_merged"}


def test_adapted_embeddings_and_saved_modules(tiny_llama: Path) -> None:
    model = adapted(
        tiny_llama, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]
    )
    report = audited(model).report
    by_part = {
        part: {row.status for row in report.parameters if part in row.name}
        for part in ("lora_embedding_A", "lora_embedding_B", "modules_to_save", "original_module")
    }
    assert by_part == {
        "lora_embedding_A": {"ok"},  # of an embedding, A is what starts at zero
        "lora_embedding_B": {"zero"},
        "modules_to_save": {"ok"},
        "original_module": {"frozen"},
    }
    (row,) = [row for row in report.parameters if "lora_embedding_B" in row.name]
    assert row.reason.code == "partner_zero"
    with GradientAudit(model) as audit:
        with model.disable_adapter():
            found = terms(model)
        with pytest.raises(gt.core.errors.InputError):
            audit.terms(found)
    codes = {
        row.reason.code
        for row in audit.report.parameters
        if "lora_embedding" in row.name or "modules_to_save" in row.name
    }
    assert codes == {"loss_without_graph"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
def test_g02_kbit_preparation_as_peft_does_it(tiny_llama: Path) -> None:
    """PEFT's default is reentrant checkpointing with input gradients: all is reached."""
    model, _ = gt.load_model(str(tiny_llama), bits=4)
    model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA)).train()
    report = audited(model).report
    assert report.record.engine == "backward"
    assert {row.status for row in report.parameters if "lora_B" in row.name} == {"ok"}
    assert {row.reason.code for row in report.parameters if "lora_A" in row.name} == {
        "partner_zero"
    }


def test_g02_head_trained_and_blocks_silent(tiny_llama: Path) -> None:
    """The input gradients are missing: the loss falls by the head alone, and each block says so."""
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj", "lm_head"])
    recompute_layers(model, True)
    for hook in list(model.base_model.model.get_input_embeddings()._forward_hooks):
        del model.base_model.model.get_input_embeddings()._forward_hooks[hook]
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        report = audited(model).report
    lost = [row for row in report.parameters if row.status == "none"]
    assert len(lost) == 8
    assert {row.reason.code for row in lost} == {"reentrant_without_input_gradient"}
    assert all(".layers." in row.name for row in lost)
    (head,) = [row for row in report.parameters if "lm_head.lora_B" in row.name]
    assert head.status == "ok"


def test_a_training_step_of_peft_is_the_same_bit_for_bit(tiny_llama: Path) -> None:
    def train(audit_it: bool):
        model = adapted(tiny_llama, 4, lora_dropout=0.2)
        model.enable_input_require_grads()
        recompute_layers(model, True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            if audit_it:
                audited(model, optimizer=optimizer)
            else:
                (weight, nll), (other, z) = terms(model).values()
                (weight * nll + other * z).backward()
            optimizer.step()
        return [p.detach().clone() for p in trained], torch.rand(2)

    plain, plain_drawn = train(False)
    seen, seen_drawn = train(True)
    assert torch.equal(plain_drawn, seen_drawn)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


def test_our_adapter_on_every_family_layout(tiny_llama: Path) -> None:
    model, _ = gt.load_model(str(tiny_llama), bits=8)
    model = gt.add_adapter(model, r=2, target_modules="all-linear").train()
    audit = audited(model)
    truth = copy.deepcopy(model)
    truth.zero_grad()
    terms(truth)["nll"][1].backward()
    for name, parameter in truth.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(audit.gradient("nll", name), parameter.grad)

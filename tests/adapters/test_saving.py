"""Saving, reading back, plain PEFT, other people's prefixes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import family_model
from peft import PeftModel

from glasstune.adapters.inject import (
    add_adapter,
    load_adapter_for_inference,
    start_from,
    trainable,
)
from glasstune.adapters.saving import save_adapter, verify_saved
from glasstune.adapters.state import adapter_state, restore_state
from glasstune.core.errors import InputError, RunError
from glasstune.core.tensors import load_tensors, save_tensors
from glasstune.models.int8 import convert_to_int8

IDS = torch.arange(3, 21).reshape(2, 9)
FILE = "adapter_model.safetensors"

CASES = {
    "lora": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "bloom": ("bloom", {"bias": "all"}),
    "gpt2_bias": ("gpt2", {"bias": "lora_only"}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
    "dora": ("llama", {"use_dora": True}),
    "rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "regex": ("llama", {"target_modules": r".*\.[qv]_proj"}),
}


def trained(case: str, bits: int = 16):
    family, options = CASES[case]
    base = family_model(family)
    if bits == 8:
        convert_to_int8(base, None)
    torch.manual_seed(0)
    model = add_adapter(base, r=4, **options)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def base_of(case: str, bits: int = 16):
    base = family_model(CASES[case][0])
    if bits == 8:
        convert_to_int8(base, None)
    return base


@pytest.mark.parametrize("case", CASES)
def test_m04_saved_and_loaded_logits_are_equal_to_the_bit(case, tmp_path):
    model = trained(case)
    truth = model(input_ids=IDS).logits
    assert (truth - base_of(case)(input_ids=IDS).logits).abs().max() > 0.01
    save_adapter(model, tmp_path, "owner/base")
    verify_saved(model, tmp_path)
    loaded = load_adapter_for_inference(base_of(case), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, truth)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    again = start_from(base_of(case), tmp_path)
    assert trainable(again).keys() == trainable(model).keys()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["inference_mode"] is True


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_plain_peft_opens_it_with_the_same_logits(case, tmp_path):
    model = trained(case)
    save_adapter(model, tmp_path, "owner/base")
    theirs = PeftModel.from_pretrained(base_of(case), str(tmp_path)).eval()
    assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_adapter_that_peft_saved_loads_here(tmp_path):
    model = trained("head")
    model.save_pretrained(tmp_path)  # holds the whole embedding and head beside their LoRA
    assert (tmp_path / FILE).stat().st_size > 0
    loaded = load_adapter_for_inference(base_of("head"), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_an_8_bit_base_takes_adapters_too(case, tmp_path):
    model = trained(case, bits=8)
    save_adapter(model, tmp_path, "owner/base")
    verify_saved(model, tmp_path)
    loaded = load_adapter_for_inference(base_of(case, bits=8), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(InputError, match="8-bit"):
        model.merge_and_unload()  # never silently lost in an int8 weight


def test_m04_each_asked_module_is_in_the_file(tmp_path):
    save_adapter(trained("saved"), tmp_path, "x")
    names = load_tensors(tmp_path / FILE).keys()
    assert "base_model.model.lm_head.weight" in names
    save_adapter(trained("head"), tmp_path, "x")
    text = " ".join(load_tensors(tmp_path / FILE))
    assert "lm_head.lora_A" in text
    assert "embed_tokens.lora_embedding_A" in text
    assert "base_layer" not in text  # what was not trained is not stored


def rewritten(folder: Path, change) -> None:
    tensors = load_tensors(folder / FILE)
    save_tensors({change(name): tensor for name, tensor in tensors.items()}, folder / FILE)


PREFIXES = {
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "compile outside": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "missing": lambda name: name.removeprefix("base_model.model."),
    "multimodal": lambda name: name.replace(".model.layers", ".model.language_model.layers"),
    "multimodal outside": lambda name: name.replace("model.model.", "model.language_model.model."),
    "adapter name": lambda name: name.replace("lora_A.", "lora_A.default."),
    "both": lambda name: f"module._orig_mod.{name}",
}


@pytest.mark.parametrize("change", PREFIXES.values(), ids=PREFIXES)
def test_c10_known_wrappers_are_stripped(change, tmp_path):
    model = trained("lora")
    save_adapter(model, tmp_path, "x")
    rewritten(tmp_path, change)
    assert load_tensors(tmp_path / FILE).keys() != adapter_state(model).keys()
    loaded = load_adapter_for_inference(base_of("lora"), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_c10_other_names_are_refused_with_both_lists(tmp_path):
    save_adapter(trained("lora"), tmp_path, "x")
    rewritten(tmp_path, lambda name: name.replace("layers", "blocks"))
    with pytest.raises(InputError) as caught:
        start_from(base_of("lora"), tmp_path)
    assert caught.value.code == "adapter_keys"
    assert "blocks.0" in caught.value.message
    assert "layers.0" in caught.value.message


def test_c10_one_tensor_too_few_or_too_many_is_refused(tmp_path):
    save_adapter(trained("lora"), tmp_path, "x")
    tensors = load_tensors(tmp_path / FILE)
    first = next(iter(tensors))
    save_tensors({n: t for n, t in tensors.items() if n != first}, tmp_path / FILE)
    with pytest.raises(InputError, match="1 of 28 places"):
        start_from(base_of("lora"), tmp_path)
    extra = {"base_model.model.extra.lora_A.weight": tensors[first].clone()}
    save_tensors({**tensors, **extra}, tmp_path / FILE)
    with pytest.raises(InputError, match="1 of 29 tensors"):
        start_from(base_of("lora"), tmp_path)
    save_tensors({**tensors, first: tensors[first][:1].clone()}, tmp_path / FILE)
    with pytest.raises(InputError) as caught:
        start_from(base_of("lora"), tmp_path)
    assert caught.value.code == "adapter_shape"


def test_folders_that_hold_no_adapter(tmp_path):
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        start_from(base_of("lora"), tmp_path)
    save_adapter(trained("lora"), tmp_path, "x")
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(InputError) as caught:
        start_from(base_of("lora"), tmp_path)
    assert caught.value.code == "bad_adapter"
    (tmp_path / FILE).unlink()
    with pytest.raises(InputError) as caught:
        start_from(base_of("lora"), tmp_path)
    assert caught.value.code == "no_adapter"
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3", "task_type": "CAUSAL_LM"}')
    with pytest.raises(InputError, match="IA3"):
        start_from(base_of("lora"), tmp_path)


def changed_value(tensors):
    name = next(iter(tensors))
    return {**tensors, name: tensors[name] + 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: {}, "missing or too many"),  # the 40-byte file of the reports
        (lambda tensors: dict(list(tensors.items())[1:]), "missing or too many"),
        (changed_value, "other values"),
        (lambda t: {n: v.bfloat16() for n, v in t.items()}, "bfloat16"),
        (lambda t: {n: v[:1].clone() for n, v in t.items()}, "came back as"),
    ],
    ids=["empty", "one missing", "value", "type", "shape"],
)
def test_c08_a_file_that_is_not_the_adapter_fails_the_run(change, says, tmp_path):
    model = trained("lora")
    save_adapter(model, tmp_path, "x")
    save_tensors(change(load_tensors(tmp_path / FILE)), tmp_path / FILE)
    with pytest.raises(RunError, match=says) as caught:
        verify_saved(model, tmp_path)
    assert caught.value.code == "save_damaged"


def test_c08_bytes_that_are_cut_or_added_are_seen(tmp_path):
    model = trained("lora")
    save_adapter(model, tmp_path, "x")
    content = (tmp_path / FILE).read_bytes()
    for damaged in (content[:-7], content + b"1234", content[:40], b""):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(RunError):
            verify_saved(model, tmp_path)


def test_c08_an_adapter_that_learned_nothing_is_seen(tmp_path):
    model = add_adapter(family_model("llama"), r=4)
    save_adapter(model, tmp_path, "x")
    verify_saved(model, tmp_path, learned=False)
    with pytest.raises(RunError, match="nothing was learned"):
        verify_saved(model, tmp_path)


def test_c08_a_trained_tensor_outside_the_adapter_is_seen(tmp_path):
    model = trained("lora")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    save_adapter(model, tmp_path, "x")
    with pytest.raises(RunError, match=r"model\.norm\.weight"):
        verify_saved(model, tmp_path)


def test_restoring_is_strict_and_exact():
    model, other = trained("saved"), trained("saved")
    state = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    with torch.no_grad():
        for parameter in trainable(other).values():
            parameter.zero_()
    restore_state(other, state)
    assert torch.equal(other(input_ids=IDS).logits, model(input_ids=IDS).logits)
    state.pop(next(iter(state)))
    with pytest.raises(RunError, match="missing"):
        restore_state(other, state)

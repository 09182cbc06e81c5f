"""Baichuan's checkpoints as people have them: loading, precisions, configs, inspection."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import bitsandbytes
import pytest
import torch
from baichuan import baichuan_config, baichuan_model, save_baichuan
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from glasstune.cli import main as cli
from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.kernels.int8_linear.reference import expand_rows, quantize_rows
from glasstune.models.facts import model_facts
from glasstune.models.families.baichuan import BaichuanConfig, BaichuanForCausalLM
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model

KINDS = ["rope", "alibi"]


def ids(rows: int = 2, length: int = 17, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 640, (rows, length), generator=generator)


def load(folder: Any, **options: Any) -> Any:
    config = ModelConfig(path=str(folder), **{"device": "cpu", "dtype": "float32", **options})
    trust = config.trust_remote_code
    resolved = resolve_model(str(folder), trust_remote_code=trust)
    return load_base(config, resolved, choices=Choices())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_checkpoints_load_and_come_back(kind, tmp_path):
    """Their code raises when it is run, also where it is trusted."""
    right = baichuan_model(kind)(input_ids=ids()).logits
    for weights in ("bin", "safetensors"):
        folder = save_baichuan(tmp_path / weights, kind, weights=weights, dtype="float32")
        for trust in (False, True):
            model = load(folder, trust_remote_code=trust)
            assert type(model) is BaichuanForCausalLM
            assert torch.equal(model(input_ids=ids()).logits, right)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert type(again) is BaichuanForCausalLM
    assert torch.equal(again(input_ids=ids()).logits, right)
    content = json.loads((tmp_path / "again/config.json").read_text())
    assert content["model_type"] == "baichuan"
    assert content["alibi"] is (kind == "alibi")
    assert content["normalize_head"] is True
    assert not [key for key in content if key.startswith("_")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "layer"),
    [
        ({"bits": 8}, "Int8Linear"),
        ({"bits": 8, "int8_compute": "llm_int8"}, "Linear8bitLt"),
        ({"bits": 4}, "Linear4bit"),
    ],
    ids=["w8a16", "llm_int8", "nf4"],
)
@torch.no_grad()
def test_eight_and_four_bits_leave_the_head(kind, options, layer, tmp_path):
    """Logits are those of a plain model with the weights that the packed ones stand for."""
    folder = save_baichuan(tmp_path, kind, dtype="float32")
    model = load(folder, **options)
    kinds = {name: type(part).__name__ for name, part in model.named_modules()}
    small = {name for name, found in kinds.items() if found == layer}
    parts = ("self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj")  # fmt: skip
    assert small == {f"model.layers.{number}.{part}" for number in (0, 1) for part in parts}
    assert type(model.lm_head) is nn.Linear
    plain = baichuan_model(kind)
    for name in small:
        weight, packed = plain.get_submodule(name).weight, model.get_submodule(name).weight
        if layer == "Linear4bit":
            weight.copy_(bitsandbytes.functional.dequantize_4bit(packed, packed.quant_state))
        else:
            weight.copy_(expand_rows(*quantize_rows(weight), torch.float32))
    right = plain(input_ids=ids()).logits
    error = float((model(input_ids=ids()).logits - right).norm() / right.norm())
    # LLM.int8 rounds its inputs to 8 bit too.
    assert error < (0.1 if layer == "Linear8bitLt" else 1e-4)


# Which of the four a config describes.
PUBLISHED = {
    "Baichuan-7B": ({"vocab_size": 64000, "hidden_size": 4096, "max_position_embeddings": 4096,
                     "num_attention_heads": 32}, "rope", "plain"),
    "Baichuan-13B": ({"vocab_size": 64000, "hidden_size": 5120, "model_max_length": 4096,
                      "num_attention_heads": 40}, "alibi", "plain"),
    "Baichuan2-7B": ({"vocab_size": 125696, "hidden_size": 4096, "max_position_embeddings": 4096,
                      "model_max_length": 4096, "num_attention_heads": 32, "z_loss_weight": 0},
                     "rope", "normalised"),
    "Baichuan2-13B": ({"vocab_size": 125696, "hidden_size": 5120, "model_max_length": 4096,
                       "num_attention_heads": 40, "z_loss_weight": 0}, "alibi", "normalised"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_four_published_models(name):
    keys, positions, head = PUBLISHED[name]
    config = BaichuanConfig(**keys)
    assert [choice.value for choice in config.native_choices()] == [positions, head]
    assert all(choice.reason for choice in config.native_choices())
    facts = model_facts(config)
    assert facts.max_positions == (None if positions == "alibi" else 4096)
    assert facts.can_pack
    # Its own key decides; what was saved says the same again, whatever its sizes are.
    other = BaichuanConfig(**keys, alibi=positions == "rope", normalize_head=head == "plain")
    assert other.alibi is (positions == "rope")
    again = BaichuanConfig.from_dict({**other.to_dict(), "hidden_size": 640})
    assert (again.alibi, again.normalize_head) == (other.alibi, other.normalize_head)


def test_a_run_says_what_was_read_from_the_config(tmp_path):
    choices = Choices()
    resolve_model(
        str(save_baichuan(tmp_path, "alibi", weights="none", z_loss_weight=0.1)), choices=choices
    )
    said = {choice.name: choice for choice in choices}
    assert said["model.code"].value == "glasstune"
    assert said["model.positions"].value == "alibi"
    assert "model_max_length without" in said["model.positions"].reason
    assert said["model.head"].value == "normalised"
    assert any("z_loss_weight 0.1" in text for text in choices.warnings())


def test_one_product_makes_all_three():
    config = BaichuanConfig.from_dict(baichuan_config(num_key_value_heads=2))
    assert config.num_key_value_heads == config.num_attention_heads == 4


# Layers, width, inner width, heads, parameters of the model and of LoRA with r=1 on W_pack.
SIZES = {
    "rope": (32, 4096, 11008, 32, 7_505_973_248, 524_288),
    "alibi": (40, 5120, 13696, 40, 13_896_668_160, 819_200),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_inspected_without_its_code(kind, tmp_path, capsys):
    """The published sizes, from a folder as people have it; nothing of 28 GB is made."""
    layers, width, inner, heads, size, lora = SIZES[kind]
    folder = save_baichuan(
        tmp_path, kind, weights="none", hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, vocab_size=125_696,
    )  # fmt: skip
    words = ["inspect", str(folder), "--target-modules", "W_pack", "--r", "1", "--json", "-"]
    assert cli.run(words) == 0
    out, tree = capsys.readouterr()
    assert f"trainable params: {lora:,} || all params: {size + lora:,}" in tree
    assert f"(0-{layers - 1}): {layers} x BaichuanDecoderLayer" in tree
    assert f"(W_pack): Linear({width}, {3 * width}) + LoRA(r=1)" in tree
    record = json.loads(out)
    rows = {row["path"]: row for row in record["precisions"]["4"]["modules"]}
    assert rows["model.layers.0.self_attn.W_pack"]["class"] == "Linear4bit"
    assert rows["lm_head"]["class"] == "Linear"
    said = [note["message"] for note in record["findings"] if note["code"] == "native_family"]
    assert len(said) == 3
    assert any(f"positions: {kind} (hidden size {width} is" in text for text in said)
    assert any("head: normalised (125,696 entries" in text for text in said)


@pytest.mark.parametrize("command", ["inspect", "api"])
def test_a_fresh_process_knows_the_family(command, tmp_path):
    """Nothing but a road of ours that opens the folder has entered it in the registries."""
    folder = str(save_baichuan(tmp_path))
    load = f"import glasstune as gt; print(gt.load_model({folder!r}, device='cpu')[0])"
    words = ["-m", "glasstune", "inspect", folder] if command == "inspect" else ["-c", load]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "BaichuanAttention" in done.stdout

"""What can be inspected, and one clear message for everything that cannot."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors
from tiny import tiny_config, tiny_tokenizer
from tiny_gguf import write_tiny_gguf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from glasstune.core.errors import InputError
from glasstune.models.gguf import expand_gguf
from glasstune.models.inspect import source as source_module
from glasstune.models.inspect.dry_run import skeleton
from glasstune.models.inspect.precision import precision_record, supported_bits
from glasstune.models.inspect.source import open_source, stored_bytes

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def write(folder: Path, content, name: str = "config.json") -> Path:
    file = folder / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        file.write_text(text, encoding="utf-8")
    return file


def refused(target) -> InputError:
    """Everything that a user of `inspect` would run."""
    with pytest.raises(InputError) as caught:
        precision_record(open_source(target), 4)
    assert caught.value.exit_code == 2
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_file_folder_object_and_module_give_one_tree(tiny_llama, tmp_path):
    copy = Path(shutil.copy(tiny_llama / "config.json", tmp_path / "anything.json"))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    targets = [
        (str(tiny_llama), "folder", tiny_llama),
        (str(tiny_llama / "config.json"), "config", tiny_llama),
        (str(copy), "config", None),
        (model.config, "config", None),
        (model, "module", None),
    ]
    trees = []
    for target, kind, weights in targets:
        source = open_source(target)
        assert (source.kind, source.weights) == (kind, weights)
        assert source.findings == []
        rows = [row.to_dict() for row in precision_record(source, 4).modules]
        # A live model needs gradients until it is frozen; what would be loaded never does.
        assert any(row["trainable"] for row in rows) == (kind == "module")
        trees.append([{**row, "trainable": None} for row in rows])
    assert all(tree == trees[0] for tree in trees)


def test_a_hub_id_asks_for_its_config_only(tiny_llama, monkeypatch):
    asked = []

    def download(model_id, name):
        asked.append((model_id, name))
        return str(tiny_llama / name)

    real = source_module.AutoConfig.from_pretrained
    monkeypatch.setattr(source_module, "hf_hub_download", download)
    monkeypatch.setattr(
        source_module,
        "AutoConfig",
        SimpleNamespace(from_pretrained=lambda _, **options: real(str(tiny_llama), **options)),
    )
    source = open_source("owner/name")
    assert asked == [("owner/name", "config.json")]
    assert (source.kind, source.weights, source.name) == ("hub", None, "owner/name")


def test_a_hub_that_refuses_says_what_to_do(monkeypatch):
    def refuse(*_):
        response = SimpleNamespace(status_code=403, headers={}, request=None)
        raise errors.GatedRepoError("gated", response=response)

    monkeypatch.setattr(source_module, "hf_hub_download", refuse)
    assert refused("owner/name").code == "gated_model"


def test_a_gguf_header_is_read_and_nothing_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    source = open_source(str(file))
    assert (source.kind, source.weights) == ("gguf", None)
    assert [finding.code for finding in source.findings] == ["gguf_expanded"]
    record = precision_record(source, 16)
    assert not (tmp_path / "cache").exists()
    # The model that a run would load.
    model = AutoModelForCausalLM.from_pretrained(expand_gguf(file), dtype=torch.bfloat16)
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    assert record.total_bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert [row.path for row in record.modules] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        ({}, "unknown_architecture", "no model_type"),
        ({**LLAMA, "model_type": None}, "unknown_architecture", "no model_type"),
        ({"architectures": ["LlamaForCausalLM"]}, "unknown_architecture", "LlamaForCausalLM"),
        ({**LLAMA, "model_type": "lama"}, "unknown_architecture", "nearest known: llama"),
        ({**LLAMA, "model_type": ["llama"]}, "unknown_architecture", "llama"),
        ({**LLAMA, "model_type": "mine", "auto_map": {"A": "b.C"}}, "remote_code_needed", "code"),
        ("[1, 2]", "bad_model_config", "list"),
        ("model_type: llama\n", "bad_model_config", "not JSON"),
        ("", "bad_model_config", "empty"),
        ("\ufeff" + json.dumps(LLAMA), "bad_model_config", "byte order mark"),
        ('{"model_type": "llama"', "bad_model_config", "not valid JSON"),
        ('{"a":' * 100_000, "bad_model_config", "not valid JSON"),
        (b"\x00\x01\xff\xfe" * 30, "bad_model_config", "not JSON"),
        (b"{\xff\xfe}", "bad_model_config", "not valid JSON"),
        ({"model": {"type": "BPE"}, "added_tokens": []}, "bad_model_config", "tokenizer"),
        ({"tokenizer_class": "X", "model_max_length": 9}, "bad_model_config", "tokenizer"),
        ({"weight_map": {}, "metadata": {}}, "bad_model_config", "index"),
        ({"peft_type": "LORA", "base_model_name_or_path": "B"}, "adapter_not_model", "base: B"),
        ({"model_type": "t5"}, "no_causal_model", "t5"),
        ({**LLAMA, "hidden_size": 7, "num_attention_heads": 3}, "bad_model_config", "multiple"),
        ({**LLAMA, "model_type": "mistral", "hidden_size": 7, "num_attention_heads": 3},
         "bad_model_config", "multiple"),
        ({**LLAMA, "model_type": "bloom", "hidden_size": 7, "n_head": 3}, "bad_model_config", "7"),
        ({**LLAMA, "hidden_size": -48}, "bad_model_config", "hidden_size is -48"),
        ({**LLAMA, "num_hidden_layers": -1}, "bad_model_config", "num_hidden_layers is -1"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "bad_model_config", "num_hidden_layers"),
        ({**LLAMA, "vocab_size": 0}, "bad_model_config", "vocab_size is 0"),
        ({**LLAMA, "vocab_size": 10**14}, "bad_model_config", "vocab_size"),
        ({**LLAMA, "num_attention_heads": 0}, "bad_model_config", ""),
        ({**LLAMA, "hidden_size": "wide"}, "bad_model_config", "hidden_size"),
        ({**LLAMA, "hidden_act": "nope"}, "bad_model_config", "nope"),
        ({**LLAMA, "dtype": "nonsense"}, "bad_model_config", "nonsense"),
        ({**LLAMA, "pad_token_id": 500}, "bad_model_config", "Padding_idx"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)  # fmt: skip
@pytest.mark.parametrize("how", ["file", "folder", "other_name"])
def test_bad_configs_are_one_clear_message(content, code, word, how, tmp_path):
    file = write(tmp_path, content, "mine.json" if how == "other_name" else "config.json")
    error = refused(str(tmp_path if how == "folder" else file))
    assert word in error.message
    assert error.code == code
    assert "\n" not in error.message


def test_files_and_folders_that_are_no_config(tmp_path, tiny_llama):
    assert refused(str(tmp_path)).code == "not_a_model"
    assert refused(str(tmp_path / "no.json")).code == "model_not_found"
    assert refused(str(write(tmp_path, b"GGUF" + b"\x07" * 40, "bad.gguf"))).code == "bad_gguf"
    assert refused(str(write(tmp_path, b"nothing", "other.gguf"))).code == "bad_gguf"
    weights = refused(str(tiny_llama / "model.safetensors"))
    assert "holds weights" in weights.message
    assert str(tiny_llama) in weights.fix
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)
    assert "tokenizer" in refused(str(tokenizer / "tokenizer.json")).message
    assert "tokenizer" in refused(str(tokenizer / "tokenizer_config.json")).message
    for name in ("generation_config.json", "run.json"):
        other = write(tokenizer, {"eos_token_id": 1}, name)
        assert f"{name} is no model's config" in refused(str(other)).message
    assert refused(str(other)).fix == f"give the run's folder ({tokenizer})"
    other.unlink()
    write(tokenizer, LLAMA)
    beside = refused(str(tokenizer / "generation_config.json"))
    assert beside.fix == f"give {tokenizer / 'config.json'}"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter, {"peft_type": "LORA"}, "adapter_config.json")
    assert refused(str(adapter)).code == "adapter_not_model"


def test_code_of_a_checkpoint_runs_only_when_trusted(tmp_path):
    map_ = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    write(tmp_path, {"model_type": "mine", "auto_map": map_, "width": 6})
    write(
        tmp_path,
        "from pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from torch import nn\n"
        "from transformers import PreTrainedConfig, PreTrainedModel\n"
        "class Config(PreTrainedConfig):\n"
        "    model_type = 'mine'\n"
        "    width: int = 4\n"
        "class Model(PreTrainedModel):\n"
        "    config_class = Config\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        self.a = nn.Linear(config.width, 10)\n"
        "        self.b = nn.Linear(10, 3)\n"
        "        self.post_init()\n",
        "mine.py",
    )
    assert refused(str(tmp_path)).code == "remote_code_needed"
    assert not (tmp_path / "ran").exists()
    source = open_source(str(tmp_path), trust_remote_code=True)
    record = precision_record(source, 16)
    assert record.total_bytes == 2 * (6 * 10 + 10 + 10 * 3 + 3)
    lone = write(tmp_path, (tmp_path / "config.json").read_text(), "lone.json")
    with pytest.raises(InputError, match=r"config\.json"):
        open_source(str(lone), trust_remote_code=True)


def test_an_attention_that_is_not_here_does_not_hide_the_tree(tmp_path, monkeypatch):
    """Nothing runs: which kernel a GPU would use for attention changes no module and no byte."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # where it is installed
    asked = {**LLAMA, "_attn_implementation": "flash_attention_2"}
    with pytest.raises((ImportError, ValueError), match=r"(?i)flash"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(write(tmp_path, asked)))
    source = open_source(str(write(tmp_path, asked)))
    for bits in (16, 4):
        record = precision_record(source, bits)
        plain = precision_record(open_source(str(write(tmp_path, LLAMA, "plain.json"))), bits)
        assert [row.to_dict() for row in record.modules] == [r.to_dict() for r in plain.modules]
    assert [finding.code for finding in source.findings] == ["attention_missing"]
    assert "flash_attention_2" in source.findings[0].message


def test_an_encoder_is_shown_with_a_warning():
    source = open_source(tiny_config("bert", tie_word_embeddings=True))
    assert [finding.code for finding in source.findings] == ["not_a_decoder"]
    assert precision_record(source, 4).total_bytes > 0


def test_a_checkpoint_of_another_method_says_so_and_what_its_files_hold(tiny_llama, tmp_path):
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "gptq"))
    content = json.loads((copy / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    write(copy, content)
    source = open_source(str(copy))
    (finding,) = source.findings
    assert (finding.code, finding.severity) == ("checkpoint_quantized", "warning")
    assert "gptq" in finding.message
    tensors = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).state_dict()
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored_bytes(copy) == stored
    assert f"{stored:,} bytes" in finding.message
    bits, said = supported_bits(source, (16, 8, 4))
    assert bits == [16]
    assert [item.code for item in said] == ["precision_left_out"]
    assert (
        precision_record(source, 16).total_bytes
        == precision_record(open_source(str(tiny_llama)), 16).total_bytes
    )


def test_a_damaged_weight_header_is_named(tiny_llama, tmp_path):
    copy = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    (copy / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json}      ")
    with pytest.raises(InputError) as caught:
        stored_bytes(copy)
    assert caught.value.code == "bad_weights"


def test_a_config_object_is_not_changed():
    config = tiny_config("llama")
    before = config.to_dict()
    source = open_source(config)
    for bits in (16, 8, 4):
        skeleton(source, bits)
    assert config.to_dict() == before


def test_a_dense_model_of_a_family_of_mixtures_has_no_experts():
    options = {**LLAMA, "num_local_experts": 0, "num_experts_per_tok": 0}
    options |= {"layer_types": ["attention"], "shared_intermediate_size": 64, "mamba_n_heads": 8}
    options.pop("model_type")
    source = open_source(AutoConfig.for_model("granitemoehybrid", **options))
    assert precision_record(source, 4).total_bytes > 0
    with pytest.raises(InputError, match="num_local_experts is -1"):
        open_source(AutoConfig.for_model("mixtral", num_local_experts=-1))


def test_any_module_is_a_source():
    source = open_source(nn.Sequential(nn.Linear(3, 5), nn.ReLU()))
    assert (source.kind, source.config, source.name) == ("module", None, "Sequential")

"""`inspect_model` from every kind of source, against real loads, real runs and plain PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import tiny_run
from safetensors.torch import load_file
from tiny import save_tiny_model, tiny_config
from tiny_gguf import write_tiny_gguf
from torch import nn
from transformers import AutoModelForCausalLM

import glasstune as gt
from glasstune.core.errors import InputError
from glasstune.core.files import dump_json
from glasstune.workflows.inspect import inspect_model
from glasstune.workflows.train import train

CONFIGS = Path(__file__).parents[1] / "support" / "configs"
FIELDS = {
    "model", "family", "architecture", "source", "rule", "versions", "precisions",
    "trainable_parameters", "all_parameters", "peft_line", "adapter", "findings", "error",
}  # fmt: skip
# The contract's names; a record may say more.
ROW = {"path", "class", "shape", "bytes", "parameters", "reason", "lora"}
FINDING = {"code", "severity", "where", "message", "fix"}


def codes(result) -> list[str]:
    record = result.record
    every = [*record.findings, *(f for p in record.precisions.values() for f in p.findings)]
    return [finding.code for finding in every]


def rows(result, bits: int) -> dict:
    return {row.path: row for row in result.record.precisions[str(bits)].modules}


def stored(module: nn.Module) -> int:
    """Bytes of a module's parameters, each memory once."""
    seen = {value.data_ptr(): value for value in module.parameters()}
    return sum(value.numel() * value.element_size() for value in seen.values())


@pytest.fixture(scope="module")
def trained(tiny_llama, qa_file, tmp_path_factory):
    """A run at 4 bit with an adapter of its own kind, and its config."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_run(
        tiny_llama, qa_file, folder / "run",
        model={"bits": 4, "dtype": "bfloat16", "quantization": {"bnb_4bit_quant_type": "fp4"}},
        adapter={
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2}, "modules_to_save": ["lm_head"],
        },
        training={"max_steps": 2},
    )  # fmt: skip
    from runs import QuietProgress

    train(config, progress=QuietProgress())
    return folder / "run"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_counts_and_line_are_those_of_a_real_load(tiny_llama, bits, capsys):
    laid = inspect_model(str(tiny_llama), (16, 8, 4), r=8, target_modules=["q_proj", "up_proj"])
    model, _ = gt.load_model(str(tiny_llama), bits=bits)
    real = gt.add_adapter(model, r=8, lora_alpha=32, target_modules=["q_proj", "up_proj"])
    capsys.readouterr()
    real.print_trainable_parameters()
    assert laid.record.peft_line == capsys.readouterr().out.strip()
    counts = (laid.record.trainable_parameters, laid.record.all_parameters)
    assert counts == real.get_nb_trainable_parameters()
    added = sum(p.numel() * p.element_size() for p in real.parameters() if p.requires_grad)
    assert sum(row.lora.weight_bytes for row in rows(laid, bits).values() if row.lora) == added
    # Weights, gradients and two moments, all float32.
    assert laid.record.precisions[str(bits)].adapter_bytes == 4 * added


def test_a_run_shows_its_precision_first_and_its_own_adapter(trained, capsys):
    laid = inspect_model(str(trained))
    record = laid.record
    assert record.source == "run"
    assert record.model == str(trained)
    assert list(record.precisions) == ["4", "16", "8"]
    assert record.precisions["4"].label.startswith("FP4")
    file = load_file(trained / "adapter" / "adapter_model.safetensors")
    overlays = [row.lora for row in record.precisions["4"].modules if row.lora]
    assert sum(lora.parameters for lora in overlays) == sum(t.numel() for t in file.values())
    assert sum(lora.weight_bytes for lora in overlays) == sum(t.nbytes for t in file.values())
    assert record.trainable_parameters == sum(t.numel() for t in file.values())
    assert rows(laid, 4)["model.layers.1.mlp.down_proj"].lora.r == 2
    assert rows(laid, 4)["lm_head"].trainable
    assert "trained_precision" in codes(laid)
    # A bare run was trained at 8 bit by w8a16, our own default.
    assert rows(laid, 8)["model.layers.0.self_attn.q_proj"].class_name == "Int8Linear"


def test_the_runs_config_and_adapter_tell_the_same(trained):
    of_run = inspect_model(trained).record
    for part in ("adapter", "config.yaml"):
        record = inspect_model(trained / part).record
        assert record.peft_line == of_run.peft_line
        assert list(record.precisions) == list(of_run.precisions)
        assert record.source == ("adapter" if part == "adapter" else "folder")
        assert record.adapter["r"] == 4
        assert record.adapter["rank_pattern"] == {"down_proj": 2}


def test_what_is_asked_goes_over_the_runs_options(trained):
    record = inspect_model(trained, [4], r=2, quantization={"bnb_4bit_quant_type": "nf4"}).record
    assert record.precisions["4"].label.startswith("NF4")
    assert record.adapter["r"] == 2
    assert record.adapter["modules_to_save"] == ["lm_head"]


def test_a_run_without_an_adapter_yet_shows_what_it_will_train(trained, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    record = inspect_model(tmp_path).record
    assert record.source == "run"
    assert record.peft_line == inspect_model(trained).record.peft_line


def test_the_saved_adapter_counts_and_not_what_the_config_says_of_it(trained, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    saved = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**saved, "r": 3}))
    assert inspect_model(tmp_path).record.adapter["r"] == 3


def test_the_optimiser_of_a_configuration_counts(trained, tmp_path):
    text = (trained / "config.yaml").read_text()
    assert "optim: adamw_torch" in text
    file = tmp_path / "c.yaml"
    file.write_text(text.replace("optim: adamw_torch", "optim: adamw_8bit"))
    head = rows(inspect_model(file), 16)["lm_head"].lora
    # 512 x 64 values: two moments of a byte each and a float32 scale for 256 of them.
    assert head.optimizer_bytes == 2 * (32_768 + 4 * 128)


def test_a_run_whose_base_has_moved_says_so(trained, tmp_path):
    (tmp_path / "adapter").mkdir()
    text = (trained / "config.yaml").read_text()
    base = next(line.split(":", 1)[1].strip() for line in text.splitlines() if "path:" in line)
    (tmp_path / "config.yaml").write_text(text.replace(base, "/gone/away"))
    with pytest.raises(InputError) as caught:
        inspect_model(tmp_path)
    assert caught.value.code == "base_not_found"
    assert "/gone/away" in caught.value.message
    assert caught.value.where == str(tmp_path)


def test_a_foreign_adapter_folder_brings_base_and_options(tiny_llama, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["v_proj"])
    real = get_peft_model(model, config)
    real.save_pretrained(tmp_path)
    record = inspect_model(tmp_path).record
    assert record.source == "adapter"
    assert list(record.precisions) == ["16", "8", "4"]
    capsys.readouterr()
    real.print_trainable_parameters()
    assert record.peft_line == capsys.readouterr().out.strip()
    assert (record.adapter["r"], record.adapter["lora_alpha"]) == (3, 5)


def test_sources_of_one_model_agree(tiny_llama):
    folder = inspect_model(str(tiny_llama)).to_dict()
    file = inspect_model(Path(tiny_llama) / "config.json").to_dict()
    assert (folder["source"], file["source"]) == ("folder", "config")
    assert folder["precisions"] == file["precisions"]
    live = inspect_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).requires_grad_(False)
    ).to_dict()
    assert live["source"] == "module"
    assert live["precisions"] == folder["precisions"]
    assert live["peft_line"] == folder["peft_line"]


def test_a_gguf_file_is_laid_out_from_its_header(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSTUNE_CACHE", str(tmp_path / "cache"))
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    laid = inspect_model(file)
    assert laid.record.source == "gguf"
    assert not (tmp_path / "cache").exists()
    model, _ = gt.load_model(str(file))
    buffers = sum(value.numel() * value.element_size() for value in model.buffers())
    assert laid.record.precisions["16"].total_bytes == stored(model) + buffers
    real = gt.add_adapter(model, r=16, lora_alpha=32)
    assert laid.record.all_parameters == real.get_nb_trainable_parameters()[1]


def test_a_live_module_shows_its_own_flags_and_adapter(tiny_llama):
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    record = inspect_model(plain).record
    assert record.adapter is None
    assert (
        record.trainable_parameters
        == record.all_parameters
        == sum(p.numel() for p in plain.parameters())
    )
    assert all(row.trainable for row in record.precisions["16"].modules if row.parameters)

    asked = inspect_model(plain, r=4, target_modules=["q_proj"])
    assert [row.path for row in rows(asked, 4).values() if row.trainable] == []
    assert all(value.requires_grad for value in plain.parameters())

    model, _ = gt.load_model(str(tiny_llama), bits=4)
    adapted = gt.add_adapter(model, r=4, target_modules=["q_proj"], modules_to_save=["model.norm"])
    names = [name for name, _ in adapted.named_modules()]
    laid = inspect_model(adapted)
    assert [name for name, _ in adapted.named_modules()] == names
    assert list(laid.record.precisions) == ["4"]
    at = rows(laid, 4)
    assert at["model.layers.0.self_attn.q_proj"].lora.r == 4
    assert at["model.layers.0.self_attn.q_proj"].class_name == "Linear4bit"
    assert [path for path, row in at.items() if row.trainable] == ["model.norm"]
    adapted.requires_grad_(False)
    frozen = inspect_model(adapted).record
    assert frozen.trainable_parameters == 0
    assert (
        frozen.precisions["4"].adapter_bytes
        == sum(p.numel() * 4 for name, p in adapted.named_parameters() if "lora_" in name) + 64 * 4
    )


def test_a_quantised_module_without_an_adapter_gets_the_default_one(tiny_llama):
    for bits in (8, 4):
        model, _ = gt.load_model(str(tiny_llama), bits=bits)
        assert (
            inspect_model(model).record.peft_line == inspect_model(str(tiny_llama)).record.peft_line
        )


def test_any_module_has_a_tree():
    record = inspect_model(nn.ModuleDict({"first": nn.Linear(8, 4), "act": nn.ReLU()})).record
    assert record.family == "ModuleDict"
    assert record.precisions["4"].modules[1].class_name == "Linear4bit"
    assert record.peft_line == "trainable params: 36 || all params: 36 || trainable%: 100.0000"


@pytest.mark.parametrize("target", [3, None, {"model_type": "llama"}, nn.Linear, [1]])
def test_an_object_that_is_no_module_is_refused(target):
    with pytest.raises(InputError) as caught:
        inspect_model(target)
    assert caught.value.code == "not_a_model"


def test_an_adapter_is_not_laid_over_another(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(InputError, match="carries an adapter"):
        inspect_model(gt.add_adapter(model, r=2), r=4)


@pytest.mark.parametrize("bits", [5, (), (16, 16), ("4",), 0])
def test_bad_bits_are_refused(tiny_llama, bits):
    with pytest.raises(InputError, match="bits is"):
        inspect_model(str(tiny_llama), bits)


def test_the_record_has_the_contracts_names_and_is_json(tiny_llama):
    record = json.loads(dump_json(inspect_model(str(tiny_llama)).to_dict()))
    assert set(record) == FIELDS
    for precision in record["precisions"].values():
        assert set(precision) >= {"total_bytes", "modules", "findings"}
        for row in precision["modules"]:
            assert set(row) >= ROW
        for finding in precision["findings"]:
            assert set(finding) == FINDING
        assert precision["total_bytes"] == sum(row["bytes"] for row in precision["modules"])
    assert record["versions"].keys() >= {"transformers", "bitsandbytes", "peft", "torch"}


def test_adapter_traps_of_a_precision(tiny_llama):
    laid = inspect_model(
        str(tiny_llama), target_modules=["q_proj", "lm_head"],
        adapter={"modules_to_save": ["down_proj"]},
    )  # fmt: skip
    by_bits = {
        bits: [finding for finding in precision.findings if "16bit" not in finding.code]
        for bits, precision in laid.record.precisions.items()
    }
    assert by_bits["16"] == []
    for bits in ("8", "4"):
        found = {finding.code: finding for finding in by_bits[bits]}
        assert found["saved_module_quantized"].severity == "error"
        assert found["target_not_quantized"].severity == "info"
        assert found["target_not_quantized"].message.startswith("1 of 3 LoRA targets")
        assert "lm_head" in found["target_not_quantized"].message


@pytest.mark.parametrize("bits", [8, 4])
def test_a_saved_module_that_is_quantised_stops_a_real_load(tiny_llama, bits):
    """The truth behind the finding above."""
    model, _ = gt.load_model(str(tiny_llama), bits=bits)
    with pytest.raises(InputError) as caught:
        gt.add_adapter(model, target_modules=["q_proj"], modules_to_save=["down_proj"])
    assert caught.value.code == "saved_module_quantized"


def test_tokens_beyond_the_embedding_are_said(tmp_path):
    save_tiny_model(tmp_path, vocab_size=400)  # the tokenizer has about 400 entries
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert "tokens_without_rows" not in codes(inspect_model(tmp_path))
    tokenizer.add_tokens([f"<new{n}>" for n in range(200)])
    tokenizer.save_pretrained(tmp_path)
    laid = inspect_model(tmp_path)
    (finding,) = [f for f in laid.record.findings if f.code == "tokens_without_rows"]
    assert finding.severity == "warning"
    assert f"ids up to {len(tokenizer) - 1:,}" in finding.message
    assert "400 rows" in finding.message
    for size, said in ((len(tokenizer), False), (len(tokenizer) - 1, True)):
        tiny_config("llama", vocab_size=size).save_pretrained(tmp_path)
        assert ("tokens_without_rows" in codes(inspect_model(tmp_path))) is said
    saved = inspect_model(tmp_path, adapter={"modules_to_save": ["embed_tokens"]})
    (finding,) = [f for f in saved.record.findings if f.code == "tokens_without_rows"]
    assert finding.severity == "info"


def test_error_reads_the_weights_of_every_layer_that_would_be_quantised(tiny_llama, quiet):
    report = inspect_model(str(tiny_llama), [16], error=True, progress=quiet).record.error
    assert len(report.layers) == 14
    assert 0 < report.mean["8"] < report.mean["nf4"] < report.mean["fp4"] < 1
    assert json.loads(dump_json(inspect_model(str(tiny_llama), [4], error=True).to_dict()))["error"]


def test_bloom_2_6b_is_the_tree_that_its_users_know():
    """`print(model)` of the seed: 30 blocks of hidden 2560, fused attention, a head that stays."""
    laid = inspect_model(CONFIGS / "bloom-2.6b.json")
    at = "transformer.h.29."
    shapes = {
        f"{at}self_attention.query_key_value": [7680, 2560],
        f"{at}self_attention.dense": [2560, 2560],
        f"{at}mlp.dense_h_to_4h": [10240, 2560],
        f"{at}mlp.dense_4h_to_h": [2560, 10240],
    }
    for bits, name in ((16, "Linear"), (8, "Linear8bitLt"), (4, "Linear4bit")):
        tree = rows(laid, bits)
        for path, shape in shapes.items():
            assert (tree[path].class_name, tree[path].shape) == (name, shape)
            assert tree[path].lora.r == 16
        assert tree["lm_head"].class_name == "Linear"
        assert tree["lm_head"].lora is None
        assert tree["transformer.word_embeddings"].shape == [46145, 2560]
    text = str(laid)
    assert "(0-29): 30 x BloomBlock" in text
    # 30 x r x (in + out) of the four layers.
    layers = sum(sum(shape) for shape in shapes.values())
    assert laid.record.trainable_parameters == 30 * 16 * layers
    assert laid.record.peft_line in text


def test_it_prints_and_writes_a_page(tiny_llama, tmp_path):
    laid = inspect_model(str(tiny_llama), depth=1)
    assert str(laid) == repr(laid)
    assert "LlamaModel(...)" in str(laid)
    assert laid.to_html(tmp_path / "p.html").read_text(encoding="utf-8").count("</html>") == 1
    assert laid._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(InputError, match="needs the folder"):
        laid.to_html(tmp_path / "no" / "p.html")


def test_one_skip_module_and_torchs_own_dtype(tiny_llama):
    one = inspect_model(str(tiny_llama), 4, skip_modules="lm_head", dtype=torch.float16)
    listed = inspect_model(str(tiny_llama), 4, skip_modules=["lm_head"], dtype="float16")
    assert one.to_dict() == listed.to_dict()
    skipped = {row.path for row in one.record.precisions["4"].modules
               if row.reason_code == "skip_list"}  # fmt: skip
    assert skipped == {"lm_head"}


def test_another_class_than_the_configs_is_said(tiny_llama, tmp_path):
    """A classifier's folder is laid out as what Glasstune would train, and that is said."""
    content = json.loads((tiny_llama / "config.json").read_text())
    file = tmp_path / "config.json"
    codes = {}
    for named in ("LlamaForCausalLM", "LlamaForSequenceClassification"):
        file.write_text(json.dumps({**content, "architectures": [named]}))
        codes[named] = [found.code for found in inspect_model(str(file), 16).record.findings]
    assert "other_class" not in codes["LlamaForCausalLM"]
    assert "other_class" in codes["LlamaForSequenceClassification"]


def test_it_is_exported(tiny_llama):
    config = tiny_config("llama")
    assert gt.inspect_model(config, bits=(16,)).record.family == "llama"


def test_where_all_linear_is_refused_the_tree_is_shown_without_an_adapter(tmp_path) -> None:
    """PEFT refuses Mamba's `out_proj`; nobody asked for it, so it is a finding."""
    file = tmp_path / "mamba.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4}
    file.write_text(json.dumps({"model_type": "mamba", **sizes}))
    record = inspect_model(str(file)).record
    assert [item.code for item in record.findings] == ["adapter_refused"]
    assert record.adapter is None
    assert record.trainable_parameters == 0
    assert record.all_parameters == sum(row.parameters for row in record.precisions["16"].modules)
    with pytest.raises(InputError) as caught:
        inspect_model(str(file), r=4)
    assert caught.value.code == "adapter_refused"


def test_sizes_that_each_layer_may_have_of_its_own(tmp_path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know Gemma 4")
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50, "intermediate_size": 64}
    file.write_text(json.dumps({"model_type": "gemma4_text", **sizes}))
    assert inspect_model(str(file)).record.precisions["4"].total_bytes > 0

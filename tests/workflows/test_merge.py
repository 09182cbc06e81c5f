"""`gt.merge` from end to end: which base, which adapter, what lies in the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from battery import save_battery_model
from merging import (
    ROWS,
    adapted,
    edit_json,
    load_plain,
    logits_of,
    method_options,
    peft_merged,
    rename_keys,
    save_peft,
    stored,
)
from runs import StopAfter, tiny_run
from tiny import save_tiny_model
from tiny_gguf import write_tiny_gguf

import glasstune as gt
from glasstune.core.errors import InputError, RunError, StoppedBySignal


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("merge") / "base")
    edit_json(folder / "config.json", torch_dtype="float32")
    return folder


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return save_peft(adapted(base, method_options("llama", "lora")), base.parent / "adapter")


@pytest.fixture(scope="module")
def run(base, qa_file, tmp_path_factory) -> Path:
    """A run of two epochs; its best checkpoint is not its last."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = tiny_run(
        base, qa_file, folder,
        training={"num_train_epochs": 2, "save_steps": 5, "save_total_limit": 4,
                  "eval_steps": 5, "learning_rate": 2e-2},
    )  # fmt: skip
    gt.train(config)
    return folder


def _same_logits(output, truth, limit=2e-5) -> None:
    apart = float((logits_of(load_plain(output)) - truth).abs().max())
    assert apart <= limit * max(1.0, float(truth.abs().max()))


def _tuned(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(base), adapter).eval()


def test_a_run_is_merged_with_its_held_out_rows(run, base, tmp_path):
    record = gt.merge(run, tmp_path / "out", dtype="float32")
    assert record.passed
    assert record.prompts["held_out"] > 0
    assert record.base_kl_mean == 0.0
    assert record.base["trained_on"] == record.base["fingerprint"]
    _same_logits(tmp_path / "out", logits_of(_tuned(base, run / "adapter")))
    content = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert content["passed"] is True
    contract = {
        "passed", "gate", "max_kl", "merge_kl_mean", "merge_kl_max", "merge_max_logit_difference",
        "token_agreement", "greedy_agreement", "base_kl_mean", "prompts", "base", "onto", "dtype",
        "readers",
    }  # fmt: skip
    assert contract <= content.keys()
    assert content["readers"].keys() == {"peft", "vllm", "llama.cpp"}
    assert content["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_any_checkpoint_of_a_run(run, base, tmp_path):
    gt.merge(run, tmp_path / "out", checkpoint="step-5", dtype="float32", certificate=False)
    _same_logits(tmp_path / "out", logits_of(_tuned(base, run / "checkpoints" / "step-5")))
    with pytest.raises(InputError, match="step-5") as caught:
        gt.merge(run, tmp_path / "other", checkpoint="step-7")
    assert caught.value.code == "no_checkpoint"


def test_the_fingerprint_travels_with_a_copied_adapter(run, base, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    record = gt.merge(tmp_path / "adapter", tmp_path / "out", certificate=False)
    assert record.base["trained_on"] == record.base["fingerprint"]
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the same files") as caught:
        gt.merge(tmp_path / "adapter", tmp_path / "out2", base=str(other))
    assert caught.value.code == "wrong_base"
    assert str(other) in caught.value.message
    assert str(base) in caught.value.message
    assert not (tmp_path / "out2").exists()


def test_a_wrong_base_of_a_run_is_refused_naming_both(run, base, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="trained on") as caught:
        gt.merge(run, tmp_path / "out", base=str(other))
    assert caught.value.code == "wrong_base"
    assert str(base) in caught.value.message
    assert str(other) in caught.value.message
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)  # the same files elsewhere are the same base
    assert gt.merge(run, tmp_path / "out", base=str(moved), certificate=False).passed is None


def test_a_base_that_is_gone_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    lines = config.read_text().splitlines()
    lines = ["  path: /no/such/model" if line.startswith("  path: /") else line for line in lines]
    config.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="/no/such/model") as caught:
        gt.merge(tmp_path / "run", tmp_path / "out")
    assert caught.value.code == "base_not_found"
    assert "--base" in caught.value.fix


def test_a_relative_base_from_another_folder_is_named(hub, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="some/base")
    with pytest.raises(InputError) as caught:
        gt.merge(tmp_path / "adapter", tmp_path / "out")
    assert caught.value.code == "base_not_found"
    assert "--base" in caught.value.fix


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
        lambda key: "module." + key,
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace(
            "base_model.model.model.", "base_model.model.language_model.model."
        ),
    ],
    ids=["compiled", "data_parallel", "no_prefix", "multimodal"],
)
def test_wrong_prefixes_are_understood(base, adapter, tmp_path, rename):
    """C10: PEFT loads nothing of these and only warns."""
    renamed = rename_keys(adapter, tmp_path / "renamed", rename)
    record = gt.merge(renamed, tmp_path / "out", base=str(base), dtype="float32")
    truth = logits_of(_tuned(base, adapter))
    _same_logits(tmp_path / "out", truth)
    assert float((logits_of(load_plain(base)) - truth).abs().max()) > 1e-3
    assert not record.readers["peft"].accepts
    assert "prefix" in record.readers["peft"].reasons[0]


def test_names_that_fit_nothing_are_refused_with_both_lists(base, adapter, tmp_path):
    renamed = rename_keys(adapter, tmp_path / "renamed", lambda key: key.replace("q_proj", "query"))
    with pytest.raises(InputError) as caught:
        gt.merge(renamed, tmp_path / "out", base=str(base))
    assert caught.value.code == "adapter_keys"
    assert "query" in caught.value.message
    assert "q_proj" in caught.value.message


def test_no_tensor_of_the_adapter_is_lost_in_silence(base, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, tmp_path / "more")
    file = tmp_path / "more" / "adapter_model.safetensors"
    extra = "base_model.model.model.layers.0.self_attn.rotary.lora_A.weight"
    save_file({**load_file(file), extra: torch.ones(3, 64)}, file)
    with pytest.raises(InputError, match="rotary"):
        gt.merge(tmp_path / "more", tmp_path / "out", base=str(base))
    content = load_file(adapter / "adapter_model.safetensors")
    content.pop(sorted(content)[0])
    save_file(content, file)
    with pytest.raises(InputError, match=r"1 of 28 places of the model have no tensor"):
        gt.merge(tmp_path / "more", tmp_path / "out", base=str(base))


def test_tied_heads_are_untied_in_the_config(tmp_path):
    """X03: the delta of the head stays out of the embedding, also after a reload."""
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    wrapped = adapted(base, {"r": 3, "target_modules": ["lm_head"]})
    adapter = save_peft(wrapped, tmp_path / "adapter")
    record = gt.merge(adapter, tmp_path / "out", dtype="float32")
    _same_logits(tmp_path / "out", logits_of(wrapped))
    assert record.tied == "untied"
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    after, before = stored(tmp_path / "out"), stored(base)
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert "lm_head.weight" not in before


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "target_modules": ["q_proj"]},
        {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [4, 9]},
        {"r": 3, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
         "ensure_weight_tying": True},
    ],
    ids=["untouched", "tokens", "both", "saved"],
)  # fmt: skip
def test_what_changes_both_alike_stays_tied(options, tmp_path):
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    wrapped = adapted(base, options)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    record = gt.merge(adapter, tmp_path / "out", dtype="float32")
    assert record.tied == "kept"
    assert "lm_head.weight" not in stored(tmp_path / "out")
    _same_logits(tmp_path / "out", logits_of(wrapped))


def test_a_tie_that_the_files_contradict(tmp_path):
    """The config ties, the checkpoint stores two: transformers loads two, and so do we."""
    from safetensors.torch import save_file

    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    head = torch.randn(512, 64)
    save_file(
        {**stored(base), "lm_head.weight": head}, base / "model.safetensors", {"format": "pt"}
    )
    plain = load_plain(base)
    assert torch.equal(plain.lm_head.weight, head)
    wrapped = adapted(plain, {"r": 3, "target_modules": ["q_proj", "lm_head"]})
    adapter = save_peft(wrapped, tmp_path / "adapter")
    gt.merge(adapter, tmp_path / "out", base=str(base), dtype="float32")
    _same_logits(tmp_path / "out", logits_of(wrapped))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["modules_to_save", "save_embedding_layers", "tokens"])
def test_added_tokens(how, tied, tmp_path):
    """The vocabulary was resized before training: the output has the new rows and says so."""
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    torch.manual_seed(1)
    plain = load_plain(base)
    plain.resize_token_embeddings(515, mean_resizing=False)
    options = {"r": 3, "target_modules": ["q_proj", "v_proj"]}
    if how == "modules_to_save":
        options["modules_to_save"] = ["embed_tokens", "lm_head"]
    if how == "tokens":
        options["trainable_token_indices"] = {"embed_tokens": [3, 512, 513, 514]}
        options["trainable_token_indices"] |= {} if tied else {"lm_head": [512, 513, 514]}
    wrapped = adapted(plain, options)
    rows = [[5, 512, 7], [514, 3]]
    truth = logits_of(wrapped, rows)
    save = how == "save_embedding_layers"
    adapter = save_peft(wrapped, tmp_path / "adapter", save_embedding_layers=save)
    record = gt.merge(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert record.passed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 515
    found = logits_of(load_plain(tmp_path / "out"), rows)
    assert found.shape == truth.shape
    assert float((found - truth).abs().max()) < 1e-3 * float(truth.abs().max())
    assert float((found - truth).abs().max()) < 1e-4
    assert record.tied == ("no" if not tied else "untied" if how == "modules_to_save" else "kept")
    assert "resize_token_embeddings(515)" in record.readers["peft"].reasons[0]
    assert not record.readers["vllm"].accepts


def test_new_rows_that_nobody_saved_are_refused(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    plain = load_plain(base)
    plain.resize_token_embeddings(515, mean_resizing=False)
    wrapped = adapted(plain, {"r": 3, "target_modules": ["lm_head"]})
    adapter = save_peft(wrapped, tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(InputError, match=r"515 rows in model\.embed_tokens") as caught:
        gt.merge(adapter, tmp_path / "out", base=str(base))
    assert caught.value.code == "rows_not_saved"


def test_config_and_small_files(base, run, tmp_path):
    source = tmp_path / "base"
    shutil.copytree(base, source)
    (source / "LICENSE").write_text("free")
    (source / "notes.md").write_text("mine")
    edit_json(
        source / "config.json", torch_dtype="float32", dtype=None,
        custom={"kept": 1}, auto_map={"AutoConfig": "configuration_tiny.TinyConfig"},
    )  # fmt: skip
    (source / "configuration_tiny.py").write_text("X = 1\n")
    edit_json(source / "generation_config.json", eos_token_id=5, temperature=0.7, do_sample=True)
    adapter = save_peft(adapted(base, method_options("llama", "lora")), tmp_path / "adapter")
    gt.merge(adapter, tmp_path / "out", base=str(source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["custom"] == {"kept": 1}
    assert config["auto_map"] == {"AutoConfig": "configuration_tiny.TinyConfig"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"configuration_tiny.py", "LICENSE", "tokenizer.json", "chat_template.jinja"} <= names
    assert "notes.md" not in names
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    assert generation["eos_token_id"] == [5, 1]  # the tokenizer's <|im_end|> ends an answer too
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    text = "What is 3 plus 4? 用户问"
    assert after(text)["input_ids"] == before(text)["input_ids"]


def test_the_adapters_tokenizer_wins(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "chat_template.jinja").write_text("{{ 'trained' }}")
    gt.merge(tmp_path / "run", tmp_path / "out", certificate=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'trained' }}"
    assert (tmp_path / "out" / "glasstune_template.json").is_file()


def test_own_code_of_the_base_comes_along(tmp_path):
    base = save_tiny_model(tmp_path / "base")
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}  # fmt: skip
    edit_json(base / "config.json", model_type="own", auto_map=auto)
    wrapped = adapted(load_plain(base, trust_remote_code=True), method_options("llama", "lora"))
    adapter = save_peft(wrapped, tmp_path / "adapter")
    with pytest.raises(InputError, match="runs Python code") as caught:
        gt.merge(adapter, tmp_path / "out", base=str(base))
    assert caught.value.code == "remote_code_needed"
    record = gt.merge(
        adapter, tmp_path / "out", base=str(base), dtype="float32", trust_remote_code=True
    )
    assert record.passed
    merged = load_plain(tmp_path / "out", trust_remote_code=True)
    assert type(merged).__name__ == "OwnForCausalLM"
    assert float((logits_of(merged) - logits_of(wrapped)).abs().max()) < 1e-4


def test_a_gguf_base_and_its_expansion(tmp_path):
    from glasstune.models.gguf import expand_gguf

    file = write_tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    expanded = expand_gguf(file)
    options = {"r": 3, "target_modules": ["q_proj", "down_proj"]}
    wrapped = adapted(expanded, options)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    record = gt.merge(adapter, tmp_path / "out", base=str(file), dtype="float32")
    assert record.passed
    rows = [[5, 6, 7], [300, 2]]
    truth = logits_of(wrapped, rows)
    found = logits_of(load_plain(tmp_path / "out"), rows)
    assert float((found - truth).abs().max()) < 1e-4 * float(truth.abs().max())


def test_base_in_many_shards_and_in_bin_files(base, adapter, tmp_path):
    model = load_plain(base)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    truth = logits_of(_tuned(base, adapter))
    record = gt.merge(adapter, tmp_path / "out", base=str(tmp_path / "shards"), dtype="float32")
    assert record.passed
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert len(names) > 4
    _same_logits(tmp_path / "out", truth)
    bins = tmp_path / "bins"
    bins.mkdir()
    shutil.copy(base / "config.json", bins)
    torch.save(model.state_dict(), bins / "pytorch_model.bin")
    record = gt.merge(adapter, tmp_path / "out2", base=str(bins), dtype="float32")
    assert "whole_files_read" in {finding.code for finding in record.findings}
    _same_logits(tmp_path / "out2", truth)


def test_merging_twice_is_merging_onto_the_merged(base, adapter, tmp_path):
    """A merged model is a base like any other."""
    gt.merge(adapter, tmp_path / "one", base=str(base), dtype="float32")
    second = adapted(tmp_path / "one", {"r": 2, "target_modules": ["v_proj"]}, seed=7)
    truth = logits_of(second)
    save_peft(second, tmp_path / "second")
    gt.merge(tmp_path / "second", tmp_path / "two", dtype="float32")
    _same_logits(tmp_path / "two", truth)


def test_options_and_targets_that_are_wrong(base, adapter, run, tmp_path):
    cases = [
        ({"dtype": "int8"}, "--dtype"),
        ({"onto": "both"}, "--onto"),
        ({"max_kl": -1.0}, "--max-kl"),
        ({"max_kl": float("nan")}, "--max-kl"),
        ({"gguf": ["q4_0"]}, "--gguf"),
        ({"gguf": ["f16", "f16"]}, "--gguf"),
        ({"device": "gpu"}, "--device"),
    ]
    for options, where in cases:
        with pytest.raises(InputError) as caught:
            gt.merge(adapter, tmp_path / "out", base=str(base), **options)
        assert caught.value.where == where
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device") as caught:
            gt.merge(adapter, tmp_path / "out", base=str(base), device="cuda", certificate=False)
        assert caught.value.where == "--device"
    with pytest.raises(InputError, match="lies in none") as caught:
        gt.merge(adapter, tmp_path / "out", base=str(base), onto="training")
    assert caught.value.code == "no_training_precision"
    with pytest.raises(InputError, match="nothing to merge"):
        gt.merge(base, tmp_path / "out")
    with pytest.raises(InputError, match="does not exist"):
        gt.merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="only a run folder has checkpoints"):
        gt.merge(adapter, tmp_path / "out", checkpoint="last")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"init_lora_weights": "pissa"}, "cannot_merge"),
        ({"init_lora_weights": "olora"}, "cannot_merge"),
        ({"alora_invocation_tokens": [1, 2]}, "cannot_merge"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "cannot_merge"),
        ({"r": 4}, "adapter_shape"),
        ({"target_modules": ["q_proj"]}, "adapter_keys"),
        ({"use_dora": True}, "adapter_keys"),
    ],
)
def test_adapters_that_cannot_be_merged_say_why(base, adapter, tmp_path, changes, code):
    shutil.copytree(adapter, tmp_path / "other")
    edit_json(tmp_path / "other" / "adapter_config.json", **changes)
    with pytest.raises(InputError) as caught:
        gt.merge(tmp_path / "other", tmp_path / "out", base=str(base))
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_other_kinds_of_adapters_are_named(base, tmp_path):
    (tmp_path / "other").mkdir()
    content = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    content["base_model_name_or_path"] = str(base)
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="of type IA3, not LoRA"):
        gt.merge(tmp_path / "other", tmp_path / "out")


def test_a_base_that_is_stored_quantised_is_refused(base, adapter, tmp_path):
    shutil.copytree(base, tmp_path / "quantised")
    edit_json(
        tmp_path / "quantised" / "config.json",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )
    with pytest.raises(InputError, match="stored quantised") as caught:
        gt.merge(adapter, tmp_path / "out", base=str(tmp_path / "quantised"))
    assert caught.value.code == "base_quantized"
    assert "--base" in caught.value.fix


def test_numbers_that_float16_cannot_hold_are_refused(base, adapter, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(base, tmp_path / "huge")
    content = stored(base)
    content["model.layers.0.mlp.up_proj.weight"] *= 1e6
    save_file(content, tmp_path / "huge" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="NaN or Inf as float16") as caught:
        gt.merge(adapter, tmp_path / "out", base=str(tmp_path / "huge"), dtype="float16")
    assert caught.value.code == "not_finite"
    assert "bfloat16" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_is_merged_from_its_last_checkpoint(base, qa_file, tmp_path):
    config = tiny_run(base, qa_file, tmp_path / "run", training={"save_steps": 2})
    with pytest.raises(StoppedBySignal):
        gt.train(config, progress=StopAfter(5))
    with pytest.raises(InputError, match="written when a run ends"):
        gt.merge(tmp_path / "run", tmp_path / "out")
    record = gt.merge(tmp_path / "run", tmp_path / "out", checkpoint="last", dtype="float32")
    assert record.passed
    assert record.prompts["held_out"] > 0


def test_an_adapter_in_the_old_file_format(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "old")
    torch.save(stored(adapter), tmp_path / "old" / "adapter_model.bin")
    (tmp_path / "old" / "adapter_model.safetensors").unlink()
    gt.merge(tmp_path / "old", tmp_path / "out", base=str(base), dtype="float32")
    _same_logits(tmp_path / "out", logits_of(_tuned(base, adapter)))


def test_rounding_the_base_is_said(base, adapter, tmp_path):
    record = gt.merge(adapter, tmp_path / "out", base=str(base), certificate=False)
    assert "base_rounded" in {finding.code for finding in record.findings}
    assert record.passed is None
    assert record.merge_kl_mean is None
    truth = peft_merged(_tuned(base, adapter)).state_dict()
    after = stored(tmp_path / "out")
    key = "model.layers.1.mlp.down_proj.weight"
    assert (
        float((after[key].float() - truth[key]).abs().max()) < float(truth[key].abs().max()) / 128
    )
    assert ROWS


def test_held_out_rows_that_are_gone_are_said(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("qa.json", "gone.json"))
    record = gt.merge(tmp_path / "run", tmp_path / "out")
    assert record.prompts["held_out"] == 0
    assert "no_held_out_rows" in {finding.code for finding in record.findings}


def test_a_falcon_without_a_head_of_its_own_in_the_files(tmp_path):
    """Keys without the head's prefix (a checkpoint of the bare model) are found all the same."""
    from safetensors.torch import save_file

    base = save_battery_model("gpt2", tmp_path)
    bare = {key.removeprefix("transformer."): value for key, value in stored(base).items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    wrapped = adapted(base, {"r": 3, "target_modules": ["c_attn"]})
    adapter = save_peft(wrapped, tmp_path / "adapter")
    gt.merge(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert sorted(stored(tmp_path / "out")) == sorted(bare)
    _same_logits(tmp_path / "out", logits_of(wrapped))


def test_generate_answers_alike_from_the_run_and_from_the_merged_model(run, tmp_path):
    gt.merge(run, tmp_path / "out", dtype="float32", certificate=False)
    prompts = ["What is 3 plus 3?", "What is 20 plus 6?"]
    tuned = gt.generate(str(run), prompts, max_new_tokens=12)
    merged = gt.generate(str(tmp_path / "out"), prompts, max_new_tokens=12, dtype="float32")
    plain = gt.generate(str(run), prompts, max_new_tokens=12, no_adapter=True)
    assert merged == tuned
    assert plain != tuned


@pytest.fixture
def hub(base, monkeypatch, tmp_path):
    """A hub cache with the base as owner/base and an adapter as owner/adapter; no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name: str, source: Path) -> Path:
        commit = "0123456789abcdef0123456789abcdef01234567"
        folder = cache / f"models--owner--{name}"
        shutil.copytree(source, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    add("base", base)
    return add


def test_a_base_and_an_adapter_on_the_hub(hub, base, adapter, tmp_path):
    record = gt.merge(adapter, tmp_path / "out", base="owner/base", dtype="float32")
    assert record.passed
    assert record.base["path"] == "owner/base"
    assert "snapshots" in record.base["folder"]
    truth = logits_of(_tuned(base, adapter))
    _same_logits(tmp_path / "out", truth)
    hub("adapter", adapter)
    gt.merge("owner/adapter", tmp_path / "out2", base="owner/base", dtype="float32")
    _same_logits(tmp_path / "out2", truth)
    with pytest.raises(InputError) as caught:
        gt.merge("owner/nothing", tmp_path / "out3", base="owner/base")
    assert caught.value.code == "hub_unreachable"
    with pytest.raises(InputError, match="nothing to merge"):
        gt.merge("owner/base", tmp_path / "out3")


def test_an_adapter_that_the_hub_does_not_have(hub, tmp_path):
    with pytest.raises(InputError) as caught:
        gt.merge("someone/no-such-adapter", tmp_path / "out")
    assert caught.value.where == "RUN_OR_ADAPTER"
    assert "model.path" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_hub_base_is_compared_with_a_folder_through_its_files(hub, base, qa_file, tmp_path):
    config = tiny_run(base, qa_file, tmp_path / "run", training={"max_steps": 2})
    config.model.path = "owner/base"
    gt.train(config)
    assert gt.merge(tmp_path / "run", tmp_path / "a", certificate=False).base["trained_on"]
    record = gt.merge(tmp_path / "run", tmp_path / "b", base=str(base), certificate=False)
    assert "base_unverified" not in {finding.code for finding in record.findings}
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="owner/base") as caught:
        gt.merge(tmp_path / "run", tmp_path / "c", base=str(other))
    assert caught.value.code == "wrong_base"
    shutil.rmtree(tmp_path / "hub")
    record = gt.merge(tmp_path / "run", tmp_path / "d", base=str(base), certificate=False)
    assert "base_unverified" in {finding.code for finding in record.findings}

import json
from pathlib import Path

import pytest
from baichuan import save_baichuan

from glasstune.cli.main import run
from glasstune.core.config_load import load_config, load_text
from glasstune.core.errors import InputError
from glasstune.workflows.init import init
from glasstune.workflows.translate import translate_file

FINE_TUNE = r"""hostfile=""
deepspeed --hostfile=$hostfile fine-tune.py  \
    --report_to "none" \
    --data_path "data/rows.json" \
    --model_name_or_path "baichuan-inc/Baichuan2-7B-Base" \
    --output_dir "output" \
    --model_max_length 512 \
    --num_train_epochs 4 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --save_strategy epoch \
    --learning_rate 2e-5 \
    --lr_scheduler_type constant \
    --adam_beta1 0.9 \
    --adam_beta2 0.98 \
    --adam_epsilon 1e-8 \
    --max_grad_norm 1.0 \
    --weight_decay 1e-4 \
    --warmup_ratio 0.0 \
    --logging_steps 1 \
    --gradient_checkpointing True \
    --deepspeed ds_config.json \
    --bf16 True \
    --tf32 True \
    --use_lora True
"""

FACTORY = """
model_name_or_path: org/model
quantization_bit: 4
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: first,second
template: llama3
cutoff_len: 1024
overwrite_cache: true
output_dir: saves/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
"""

AXOLOTL = """
base_model: org/model
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: org/rows
    type: alpaca
val_set_size: 0.1
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [gate_proj, down_proj]
lora_fan_in_fan_out:
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
loss_watchdog_threshold: 5.0
flash_attention: true
"""


def translated(tmp_path, name, text, **options):
    file = tmp_path / name
    file.write_text(text)
    result = init(options.get("model"), options.get("data"), from_file=file)
    return load_text(result.text).config, result


def test_baichuan2_command_line(tmp_path):
    config, result = translated(tmp_path, "run.sh", FINE_TUNE)
    assert config.model.path == "baichuan-inc/Baichuan2-7B-Base"
    assert config.model.dtype == "bfloat16"
    assert not config.model.trust_remote_code
    assert config.adapter.lora_options() == {
        "r": 1,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["W_pack"],
    }
    (source,) = config.data.sources
    assert (source.path, source.format) == ("data/rows.json", "baichuan2")
    assert config.data.max_length == 512
    training = config.training
    assert training.train_batch_size == 16
    assert training.per_device_train_batch_size == 16
    assert training.save_strategy == "epoch"
    assert training.learning_rate == 2e-5
    assert training.lr_scheduler_type == "constant"
    assert (training.adam_beta1, training.adam_beta2) == (0.9, 0.98)
    assert (training.adam_epsilon, training.weight_decay) == (1e-8, 1e-4)
    assert training.warmup_steps == 0
    assert training.recompute == "full"
    assert training.num_train_epochs == 4
    assert not config.data.packing
    assert [text.split()[0] for text in result.lost] == ["deepspeed:", "tf32", "the"]


def test_llama_factory_yaml(tmp_path):
    config, result = translated(tmp_path, "lf.yaml", FACTORY, data="mine.json")
    assert config.model.bits == 4
    assert config.adapter.r == 8
    assert config.adapter.lora_alpha == 16  # its default: twice the rank
    assert config.adapter.target_modules == "all-linear"
    assert config.data.max_length == 1024
    assert config.data.truncation == "cut"
    assert not config.data.packing
    assert config.training.train_batch_size == 8
    assert config.training.warmup_steps == 0.1
    assert [source.path for source in config.data.sources] == ["mine.json"]
    assert any(text.startswith("template") for text in result.lost)
    assert not any("resume" in text for text in result.lost)


def test_llama_factory_data_sets_are_looked_up(tmp_path):
    (tmp_path / "data").mkdir()
    info = {
        "first": {"file_name": "first.json"},
        "second": {
            "file_name": "second.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {"role_tag": "role"},
        },
        "third": {
            "hf_hub_url": "org/third",
            "columns": {"prompt": "q", "query": "i", "response": "a"},
        },
        "fourth": {"file_name": "c4.jsonl", "columns": {"prompt": "text"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    text = FACTORY.replace("first,second", "first,second,third,fourth,fifth")
    config, result = translated(tmp_path, "lf.yaml", text)
    first, second, third, fourth, fifth = config.data.sources
    assert Path(first.path) == tmp_path / "data" / "first.json"
    assert first.format == "alpaca"
    assert (second.format, second.columns) == ("messages", {"messages": "talk"})
    assert third.path == "org/third"
    assert third.columns == {"instruction": "q", "input": "i", "output": "a"}
    assert fourth.format == "text"
    assert fifth.path == "fifth"
    assert any("fifth is not in" in text for text in result.lost)


def test_axolotl_yaml(tmp_path):
    config, result = translated(tmp_path, "ax.yml", AXOLOTL)
    assert config.model.bits == 4
    assert config.adapter.r == 32
    assert config.adapter.target_modules == ["gate_proj", "down_proj"]
    assert config.data.packing
    assert config.data.validation_split == 0.1
    assert config.training.train_batch_size == 8
    assert config.training.optim == "adamw_8bit"
    assert config.training.recompute == "full"
    lost = {text.split()[0].strip(":") for text in result.lost}
    assert lost == {"loss_watchdog_threshold", "flash_attention"}


def test_what_is_missing_stays_a_placeholder_that_is_named(tmp_path):
    config, result = translated(tmp_path, "lf.yaml", "finetuning_type: full\nlearning_rate: 1e-5\n")
    assert config.model.path == "MODEL"
    assert config.data.sources[0].path == "DATA"
    assert config.training.learning_rate == 1e-5
    assert any("replace MODEL" in text for text in result.lost)
    assert any("finetuning_type" in text for text in result.lost)


def test_contradictions_and_unreadable_files_are_refused(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("load_in_4bit: true\nload_in_8bit: true\n")
    with pytest.raises(InputError, match="load_in_8bit"):
        translate_file(file)
    file.write_text("just words\n")
    with pytest.raises(InputError) as caught:
        translate_file(file)
    assert caught.value.code == "from_unknown"
    with pytest.raises(InputError) as caught:
        translate_file(tmp_path / "absent.yaml")
    assert caught.value.code == "from_unreadable"


def test_init_reads_model_and_data(tiny_llama, qa_file, tmp_path, capsys):
    output = tmp_path / "config.yaml"
    words = ["init", "--model", str(tiny_llama), "--data", str(qa_file), "-o", str(output)]
    assert run([*words, "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["output"] == str(output)
    assert record["config"] == output.read_text()
    config = load_config(output).config
    assert config.model.path == str(tiny_llama)
    assert config.data.sources[0].format == "alpaca"
    assert config.data.max_length in (64, 128, 256)
    assert output.read_text().count("#") > 5
    # A second time the file is there.
    assert run(words) == 2
    assert "already" in capsys.readouterr().err


def test_init_knows_the_rule_of_baichuan2(tmp_path):
    model = save_baichuan(tmp_path / "m", weights="none")
    rows = tmp_path / "rows.json"
    turns = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]
    rows.write_text(json.dumps([{"conversations": turns}] * 3))
    config = load_text(init(str(model), str(rows)).text).config
    assert (config.data.sources[0].format, config.data.chat_template) == (
        "conversations",
        "baichuan2",
    )
    assert not config.model.trust_remote_code


def test_init_names_what_is_missing(capsys, tmp_path):
    assert run(["init", "--model", "m"]) == 2
    assert "--data" in capsys.readouterr().err
    assert run(["init", "--from", str(tmp_path / "none"), "-o", "/no/such/folder/c.yaml"]) == 2
    assert "folder" in capsys.readouterr().err


def test_a_config_of_our_own_is_not_translated(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: {path: m}\ndata: {sources: [{path: rows.json}]}\n")
    with pytest.raises(InputError) as error:
        translate_file(file)
    assert error.value.code == "from_own"
    assert "glasstune train" in error.value.fix

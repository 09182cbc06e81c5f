"""Each option of `Trainer`: `HfArgumentParser` over `TrainingArguments` says what it means."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from baichuan2_command import PUBLISHED
from transformers import HfArgumentParser, TrainingArguments, get_scheduler

from glasstune.core.config import Config
from glasstune.core.config_load import load_text
from glasstune.core.errors import InputError
from glasstune.training.schedule import learning_rate
from glasstune.workflows.init import InitResult, init
from glasstune.workflows.translate_command import read_options


@dataclass
class ScriptArguments(TrainingArguments):
    """The published script's options (its three dataclasses in one)."""

    model_name_or_path: str | None = field(default="baichuan-inc/Baichuan2-7B-Base")
    data_path: str | None = field(default=None)
    cache_dir: str | None = field(default=None)
    model_max_length: int = field(default=512)
    use_lora: bool = field(default=False)


PARSER = HfArgumentParser(ScriptArguments)
NO_WORDS = ("liger_kernel_config", "parallelism_config")
"""Options that its parser takes from no command line."""
FIELDS = {item.name: item for item in dataclasses.fields(ScriptArguments)
          if item.init and item.name not in NO_WORDS}  # fmt: skip


def kinds(name: str) -> set[Any]:
    annotation = FIELDS[name].type
    return {annotation, *get_args(annotation)}


def theirs(*words: str) -> Any:
    return PARSER.parse_args(list(words))


def translated(*words: str) -> tuple[Config, InitResult]:
    text = "fine-tune.py --use_lora True --data_path x.json " + " ".join(words)
    result = init(None, None, from_file=text)
    return load_text(result.text).config, result


def sample(name: str) -> list[str]:
    """A value of the option that is not its default, as words."""
    special = {
        "optim": ["adamw_torch"],
        "lr_scheduler_type": ["cosine"],
        "save_strategy": ["epoch"],
        "report_to": ["wandb"],
        "include_for_metrics": ["inputs"],
        "debug": ["underflow_overflow"],
        "metric_for_best_model": ["accuracy"],
        "lr_scheduler_kwargs": ['{"num_cycles": 2}'],
        "train_sampling_strategy": ["group_by_length"],
        "use_lora": ["True"],
        "save_total_limit": ["3"],
        "warmup_steps": ["7"],
        "adam_beta1": ["0.8"],
        "adam_beta2": ["0.98"],
        "max_steps": ["11"],
        "logging_strategy": ["epoch"],
        "eval_strategy": ["steps"],
        "hub_strategy": ["end"],
        "include_num_input_tokens_seen": ["True"],
        "dataloader_multiprocessing_context": ["spawn"],
        "ddp_backend": ["nccl"],
        "log_level": ["debug"],
        "log_level_replica": ["debug"],
    }
    if name in special:
        return special[name]
    if bool in kinds(name):
        return ["False" if FIELDS[name].default is True else "True"]
    if any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds(name)):
        raise AssertionError(f"{name}: give a sample")
    if dict in {getattr(kind, "__origin__", kind) for kind in kinds(name)}:
        return ['{"a": 1}']
    return ["5"] if kinds(name) & {int, float} else ["text"]


@pytest.mark.parametrize("name", FIELDS)
def test_each_option_is_read_as_its_parser_reads_it(name: str) -> None:
    words = sample(name)
    for spelled in ([f"--{name}", *words], [f"--{name.replace('_', '-')}", *words]):
        own = getattr(theirs(*spelled), name)
        if isinstance(own, str) and own.startswith("{"):
            own = json.loads(own)
        ours = read_options(spelled)[name]
        assert (ours if isinstance(own, list) == isinstance(ours, list) else [ours]) == own
    if len(words) == 1:
        assert read_options([f"--{name}={words[0]}"]) == read_options([f"--{name}", words[0]])


@pytest.mark.parametrize("name", [name for name in FIELDS if bool in kinds(name)])
def test_each_switch_has_all_spellings_of_its_parser(name: str) -> None:
    bare = [[]] if type(None) not in kinds(name) else []  # `bool | None` wants a word
    for words in (*bare, ["True"], ["true"], ["1"], ["yes"], ["False"], ["no"], ["0"], ["f"]):
        own = getattr(theirs(f"--{name}", *words), name)
        assert read_options([f"--{name}", *words])[name] is own
    if FIELDS[name].default is True:
        assert getattr(theirs(f"--no_{name}"), name) is False
        assert read_options([f"--no_{name}"]) == {name: False}


PLAIN = translated()


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("use_lora", "data_path")])
def test_no_option_is_lost_in_silence(name: str) -> None:
    config, result = translated(f"--{name}", *(f"'{word}'" for word in sample(name)))
    assert not any("not known here" in text for text in result.lost), result.lost
    if name == "optim":  # its value is the script's own default
        return
    said = [text for text in (*result.lost, *result.notes) if name in text]
    assert config != PLAIN[0] or said, "neither set nor said"


OF_2023 = {
    "overwrite_output_dir": ("False", "True"),
    "evaluation_strategy": ("no", "steps"),
    "per_gpu_train_batch_size": ("8", "2"),
    "per_gpu_eval_batch_size": ("", "2"),
    "warmup_ratio": ("0.0", "0.1"),
    "logging_dir": ("", "x"),
    "save_safetensors": ("False", "True"),
    "no_cuda": ("False", "True"),
    "use_mps_device": ("False", "True"),
    "jit_mode_eval": ("False", "True"),
    "use_ipex": ("False", "True"),
    "fp16_opt_level": ("O1", "O2"),
    "half_precision_backend": ("auto", "apex"),
    "tpu_num_cores": ("", "8"),
    "tpu_metrics_debug": ("False", "True"),
    "past_index": ("-1", "1"),
    "sharded_ddp": ("''", "simple"),
    "fsdp_min_num_params": ("0", "100"),
    "fsdp_transformer_layer_cls_to_wrap": ("", "DecoderLayer"),
    "adafactor": ("False", "True"),
    "group_by_length": ("False", "True"),
    "use_legacy_prediction_loop": ("False", "True"),
    "include_inputs_for_metrics": ("False", "True"),
    "fp16_backend": ("auto", "apex"),
    "push_to_hub_model_id": ("", "x"),
    "push_to_hub_organization": ("", "x"),
    "push_to_hub_token": ("", "x"),
    "mp_parameters": ("''", "x"),
    "torchdynamo": ("", "inductor"),
    "ray_scope": ("last", "all"),
    "dispatch_batches": ("", "True"),
}
"""Options of transformers 4.33, with which the script was published, that are gone since; their
default (empty: None) and another value."""


@pytest.mark.parametrize("name", OF_2023)
def test_options_of_the_scripts_own_time(name: str) -> None:
    default, other = OF_2023[name]
    if default:
        config, result = translated(f"--{name} {default}")
        config.training.per_device_train_batch_size = "auto"
        assert config == PLAIN[0]
        assert not result.lost
    config, result = translated(f"--{name} {other}")
    assert not any("not known here" in text for text in result.lost), result.lost
    said = [text for text in (*result.lost, *result.notes) if name in text]
    changes = config != PLAIN[0] or name in ("save_safetensors",)  # safetensors are written anyway
    assert changes or said, "neither set nor said"


SAME = {
    "learning_rate": ("training.learning_rate", "3e-5"),
    "weight_decay": ("training.weight_decay", "1e-4"),
    "adam_beta1": ("training.adam_beta1", "0.85"),
    "adam_beta2": ("training.adam_beta2", "0.98"),
    "adam_epsilon": ("training.adam_epsilon", "1e-6"),
    "max_grad_norm": ("training.max_grad_norm", "0.5"),
    "num_train_epochs": ("training.num_train_epochs", "4"),
    "max_steps": ("training.max_steps", "40"),
    "per_device_train_batch_size": ("training.per_device_train_batch_size", "4"),
    "lr_scheduler_type": ("training.lr_scheduler_type", "constant_with_warmup"),
    "warmup_steps": ("training.warmup_steps", "30"),
    "save_strategy": ("training.save_strategy", "epoch"),
    "save_steps": ("training.save_steps", "50"),
    "save_total_limit": ("training.save_total_limit", "3"),
    "logging_steps": ("training.logging_steps", "10"),
    "eval_steps": ("training.eval_steps", "20"),
    "ddp_timeout": ("training.distributed.timeout_seconds", "90"),
    "seed": ("training.seed", "7"),
    "run_name": ("training.run_name", "12"),
    "output_dir": ("training.output_dir", "2023"),
    "full_determinism": ("training.deterministic", "True"),
    "torch_compile": ("training.compile", "True"),
    "dataloader_num_workers": ("data.num_workers", "2"),
    "model_max_length": ("data.max_length", "256"),
    "model_name_or_path": ("model.path", "baichuan-inc/Baichuan2-13B-Base"),
}


@pytest.mark.parametrize("name", SAME)
def test_the_value_of_an_option_arrives(name: str) -> None:
    key, word = SAME[name]
    found: Any = translated(f"--{name} {word}")[0]
    for part in key.split("."):
        found = getattr(found, part)
    assert found == getattr(theirs(f"--{name}", word), name)


def test_what_is_not_given_has_the_parsers_default() -> None:
    own, config = theirs(), PLAIN[0]
    training = config.training
    for name in ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
                 "max_grad_norm", "num_train_epochs", "max_steps", "lr_scheduler_type",
                 "warmup_steps", "save_total_limit"):  # fmt: skip
        assert getattr(training, name) == getattr(own, name), name
    rows = own.per_device_train_batch_size * own.gradient_accumulation_steps
    assert training.train_batch_size == rows
    assert config.data.max_length == own.model_max_length
    assert config.model.path == own.model_name_or_path
    assert (own.bf16, own.fp16, config.model.dtype) == (False, False, "float32")
    # What the script does in its code, from its text: rows cut, nothing held out, its LoRA.
    assert (config.data.truncation, config.data.packing) == ("cut", False)
    assert config.data.validation_split == 0
    assert config.adapter.lora_options() == {
        "r": 1, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["W_pack"],
    }  # fmt: skip
    assert not config.model.trust_remote_code


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warm", [0, 6])
def test_the_schedule_is_theirs_but_for_the_first_update(kind: str, warm: int) -> None:
    config, result = translated(f"--lr_scheduler_type {kind} --warmup_steps {warm} --max_steps 40")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warm, num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    config.training.learning_rate = 1.0
    ours = [learning_rate(config.training, step, 40) for step in range(1, 41)]
    rises = warm if kind != "constant" else 0
    assert ours[rises:] == pytest.approx(rates[rises:], abs=1e-12)  # the same formula in doubles
    assert ours[:rises] == pytest.approx([*rates[1:rises], 1.0][:rises], abs=1e-12)
    assert any("update k of w" in text for text in result.notes) is bool(rises)


def test_sizes_of_an_update() -> None:
    """Rows a device x forwards x devices, as `TrainingArguments.train_batch_size` counts them."""
    sizes = "--per_device_train_batch_size 4 --gradient_accumulation_steps 3 --use_lora True"
    for start, number in (("fine-tune.py", 1), ("deepspeed --num_gpus 2 fine-tune.py", 2),
                          ("deepspeed fine-tune.py", None)):  # fmt: skip
        result = init("m", "x.json", from_file=f"{start} {sizes}")
        training = load_text(result.text).config.training
        assert training.train_batch_size == 4 * 3 * (number or 1)
        assert training.per_device_train_batch_size == 4
        told = [text for text in result.lost if "number of devices is not told" in text]
        assert bool(told) is (number is None)
        assert load_text(result.text, overrides=["training.train_batch_size=96"])


def test_options_that_cancel_each_other_there() -> None:
    config, _ = translated("--warmup_steps 5 --warmup_ratio 0.5")
    assert config.training.warmup_steps == 5
    config, _ = translated("--warmup_steps 0 --warmup_ratio 0.5")
    assert config.training.warmup_steps == 0.5
    config, _ = translated("--save_strategy epoch --save_steps 500")
    assert config.training.save_strategy == "epoch"
    assert config.training.save_steps == "auto"
    with pytest.raises(InputError, match="float16"):
        translated("--bf16 True --fp16 True")


@pytest.mark.parametrize(
    ("option", "key", "value", "said"),
    [
        ("lr_scheduler_type polynomial", "lr_scheduler_type", "linear", "polynomial is not here"),
        ("lr_scheduler_type cosine_with_restarts", "lr_scheduler_type", "cosine", "not here"),
        ("optim adafactor", "optim", "adamw_torch", "adafactor is not here"),
        ("adafactor True", "optim", "adamw_torch", "adafactor is not here"),
        ("optim paged_adamw_8bit", "optim", "adamw_8bit", ""),
        ("save_strategy no", "save_strategy", "steps", "save_strategy: no"),
        ("save_strategy best", "save_strategy", "steps", "save_strategy: best"),
        ("save_steps 0.2", "save_steps", "auto", "share of all updates"),
        ("save_total_limit 0", "save_total_limit", None, ""),
        ("report_to all", "report_to", [], "all is not here"),
        ("report_to none", "report_to", [], ""),
        ("report_to tensorboard comet_ml", "report_to", ["tensorboard"], "comet_ml is not here"),
        ("metric_for_best_model loss", "metric_for_best_model", "eval_loss", ""),
        ("metric_for_best_model bleu", "metric_for_best_model", "eval_loss", "bleu"),
        ("gradient_checkpointing True", "recompute", "full", ""),
        ("gradient_checkpointing False", "recompute", "none", ""),
        ("label_smoothing_factor 0.1", "optim", "adamw_torch", "no such regulariser"),
        ("group_by_length True", "seed", 0, "random"),
        ("dataloader_drop_last True", "seed", 0, "smaller update"),
        ("fsdp 'full_shard offload'", "seed", 0, "fsdp: offload"),
        ("fsdp full_shard", "seed", 0, ""),
        ("lora_rank 8", "seed", 0, ""),
        ("lerning_rate 1", "seed", 0, "did you mean learning_rate?"),
    ],
)
def test_values_without_a_counterpart_are_said(
    option: str, key: str, value: Any, said: str
) -> None:
    config, result = translated(f"--{option}")
    assert getattr(config.training, key) == value
    assert any(said in text for text in result.lost) if said else not result.lost


def test_precisions_and_devices() -> None:
    assert translated("--bf16")[0].model.dtype == "bfloat16"
    assert translated("--fp16 yes")[0].model.dtype == "float16"
    assert translated("--use_cpu")[0].model.device == "cpu"
    assert translated("--no_cuda True")[0].model.device == "cpu"
    assert translated("--lora_rank 8")[0].adapter.r == 8
    text = "accelerate launch --mixed_precision bf16 fine-tune.py --use_lora"
    assert load_text(init("m", "d", from_file=text).text).config.model.dtype == "bfloat16"


def test_a_value_that_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="num_train_epochs: expected a number above 0") as caught:
        translated("--num_train_epochs many")
    assert caught.value.where.startswith("the translation:")
    _, result = translated("--deepspeed", "1" * 400)
    assert "is not here" in result.lost[0]


def test_a_short_name_is_completed_as_argparse_does() -> None:
    assert theirs("--learning_r", "3e-5").learning_rate == 3e-5
    config, result = translated("--learning_r 3e-5")
    assert config.training.learning_rate == 3e-5
    assert "--learning_r is short for --learning_rate" in result.notes


def test_training_of_all_weights_is_refused() -> None:
    for text in (
        "fine-tune.py --data_path x.json",
        PUBLISHED.replace("use_lora True", "use_lora 0"),
    ):
        with pytest.raises(InputError) as caught:
            init(None, None, from_file=text)
        assert caught.value.code == "full_fine_tuning"
        assert "--use_lora True" in caught.value.fix


DEEPSPEED = {
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "offload_optimizer": {"device": "none"},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def with_deepspeed(tmp_path: Path, content: Any, *options: str) -> tuple[Config, InitResult]:
    (tmp_path / "ds_config.json").write_text(json.dumps(content))
    file = tmp_path / "run.sh"
    words = " ".join(options)
    file.write_text(
        f"deepspeed --num_gpus 1 fine-tune.py --use_lora --deepspeed ds_config.json {words}"
    )
    result = init("m", "x.json", from_file=file)
    return load_text(result.text).config, result


def test_deepspeeds_file_is_read_beside_the_command(tmp_path: Path) -> None:
    config, result = with_deepspeed(tmp_path, DEEPSPEED, "--learning_rate 2e-5 --bf16 True")
    assert config.training.learning_rate == 2e-5
    assert any("ZeRO stage 3" in text for text in result.notes)
    assert [text for text in result.lost if "offload" in text] == [
        "deepspeed: offload_param to cpu has no counterpart: the frozen weights stay on the "
        "device: model.bits: 8 or 4 halves or quarters them"
    ]
    assert len(result.lost) == 1


def test_numbers_of_deepspeeds_file_confirm_or_contradict(tmp_path: Path) -> None:
    content = {
        "fp16": {"enabled": True, "loss_scale": 0},
        "gradient_clipping": 0.3,
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {
            "type": "Adam",
            "params": {"lr": 1e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
        },
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}},
    }
    config, result = with_deepspeed(tmp_path, content, "--fp16 True")
    training = config.training
    assert config.model.dtype == "float16"
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.1)
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.8, 0.95, 1e-6)
    assert training.max_grad_norm == 0.3
    assert (training.train_batch_size, training.per_device_train_batch_size) == (32, 4)
    assert (training.lr_scheduler_type, training.warmup_steps) == ("constant_with_warmup", 9)
    assert any("logarithmic" in text for text in result.lost)
    with pytest.raises(InputError, match=r"lr is 0\.0001, but --learning_rate is 0\.001"):
        with_deepspeed(tmp_path, content, "--learning_rate 1e-3")


def test_other_parts_of_deepspeeds_file_are_named(tmp_path: Path) -> None:
    content = {
        "optimizer": {"type": "Lamb"},
        "scheduler": {"type": "OneCycle"},
        "zero_optimization": {"stage": 2, "cpu_offload": True},
        "curriculum_learning": {"enabled": True},
    }
    _, result = with_deepspeed(tmp_path, content)
    for word in ("Lamb", "OneCycle", "offload_optimizer to cpu", "curriculum_learning"):
        assert any(word in text for text in result.lost), word
    (tmp_path / "ds_config.json").write_text("{")
    with pytest.raises(InputError, match="no JSON"):
        init("m", "d", from_file=tmp_path / "run.sh")
    (tmp_path / "ds_config.json").unlink()
    result = init("m", "d", from_file=tmp_path / "run.sh")
    assert any("ds_config.json is not here" in text for text in result.lost)

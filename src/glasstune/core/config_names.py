"""The one table of foreign names: what other tools call our keys.

Sources: transformers' `TrainingArguments` and `BitsAndBytesConfig`, TRL's `SFTConfig`, PEFT's
`LoraConfig`, LLaMA-Factory, Axolotl, Unsloth, alpaca-lora and Baichuan2's `fine-tune.py`.
A name maps to a key, or is known to have no counterpart, or asks for something that Glasstune
does not do; each case is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from glasstune.core.errors import InputError


@dataclass(slots=True)
class Translation:
    """What a foreign name and its value mean here.

    Args:
        values: Dotted keys and the values to set.
        forbids: Dotted keys and values that contradict the name (`load_in_4bit: false`).
        notes: Sentences to say once.
    """

    values: dict[str, Any] = field(default_factory=dict)
    forbids: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Rule = Callable[[str, Any], Translation]


def _expect(name: str, value: Any, expected: str) -> InputError:
    return InputError("wrong_type", f"{name}: expected {expected}, found {value!r}", where=name)


def _to(key: str, change: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    def rule(name: str, value: Any) -> Translation:
        new = change(value) if change else value
        said = f"{name} is {key} here" if new == value else f"{name}: {value} is {key}: {new} here"
        return Translation({key: new}, notes=[said + (f" ({note})" if note else "")])

    return rule


def _true_means(key: str, new: Any, forbids: Any = None, note: str = "") -> Rule:
    """`name: true` sets a key; `name: false` sets nothing, but may contradict a value."""

    def rule(name: str, value: Any) -> Translation:
        if value in (None, "auto"):
            return Translation()
        if not isinstance(value, bool):
            raise _expect(name, value, "true or false")
        if not value:
            return Translation(forbids={} if forbids is None else {key: forbids})
        said = f"{name}: true is {key}: {new} here" + (f" ({note})" if note else "")
        return Translation({key: new}, notes=[said])

    return rule


def _switch(key: str, on: Any, off: Any, words: tuple[str, ...] = ()) -> Rule:
    def rule(name: str, value: Any) -> Translation:
        if value is None:
            return Translation()
        if not isinstance(value, bool) and value not in words:
            raise _expect(name, value, "true or false")
        new = on if value else off
        return Translation({key: new}, notes=[f"{name}: {_say(value)} is {key}: {_say(new)} here"])

    return rule


def _nothing(reason: str) -> Rule:
    def rule(name: str, value: Any) -> Translation:
        if not value or value in ("none", "no"):
            return Translation()
        return Translation(notes=[f"{name} has no counterpart and is ignored: {reason}"])

    return rule


def _only(allowed: tuple[Any, ...], what: str) -> Rule:
    def rule(name: str, value: Any) -> Translation:
        if value in allowed or value is None:
            return Translation()
        raise InputError(
            "not_supported",
            f"{name}: {_say(value)} asks for {what}, which Glasstune does not do",
            where=name,
            fix="Glasstune tunes LoRA adapters on a causal language model by next-token loss; "
            f"remove {name} to do that",
        )

    return rule


def _say(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _names(value: Any) -> Any:
    """`all` and comma-separated names, as LLaMA-Factory writes targets."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return "all-linear"
    if isinstance(value, str) and not set(value) & set("\\()|^$*+?"):
        return [part.strip() for part in value.strip("[] ").split(",") if part.strip()]
    return value


def _bits(name: str, value: Any) -> Translation:
    if value is None:
        return Translation()
    if isinstance(value, bool) or value not in (4, 8, 16):
        raise _expect(name, value, "4, 8 or 16")
    return Translation({"model.bits": value}, notes=[f"{name} is model.bits here"])


def _warmup_ratio(name: str, value: Any) -> Translation:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise _expect(name, value, "a number of at least 0 and below 1")
    note = f"{name} is training.warmup_steps here (below 1 it is a share of all updates)"
    return Translation({"training.warmup_steps": value}, notes=[note])


def _held_out(name: str, value: Any) -> Translation:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise _expect(name, value, "a number of at least 0 and below 1")
    if value >= 1:
        raise InputError(
            "not_supported",
            f"{name}: {value} is a number of rows; here the held-out part is a share",
            where=name,
            fix="write data.validation_split: 0.02 (two per cent of the texts), or name files "
            "in data.validation",
        )
    return Translation(
        {"data.validation_split": value}, notes=[f"{name} is data.validation_split here"]
    )


def _sources(key: str) -> Rule:
    def rule(name: str, value: Any) -> Translation:
        items = value.split(",") if isinstance(value, str) else value
        items = [items] if isinstance(items, dict) else items
        if not isinstance(items, list) or not items:
            raise _expect(name, value, "a path or a list of data sets")
        notes = [f"{name} is {key} here"]
        sources = [source for item in items for source in _source(name, item, notes)]
        return Translation({key: sources}, notes=notes)

    return rule


_FORMATS = {"alpaca": "alpaca", "sharegpt": "conversations", "completion": "text"}


def _source(name: str, item: Any, notes: list[str]) -> list[dict[str, Any]]:
    if isinstance(item, str):
        return [{"path": item.strip()}]
    if not isinstance(item, dict) or not isinstance(item.get("path"), str):
        raise _expect(name, item, "a path, or a map with a path")
    kind = item.get("type")
    source: dict[str, Any] = {"path": item["path"]}
    if isinstance(kind, str) and kind.split(".")[0] in _FORMATS:
        source["format"] = _FORMATS[kind.split(".")[0]]
    for theirs, ours in (("split", "split"), ("name", "subset")):
        if isinstance(item.get(theirs), str):
            source[ours] = item[theirs]
    lost = sorted(set(item) - {"path", "type", "split", "name", "data_files", "ds_type"})
    if lost:
        notes.append(f"{name}: {', '.join(lost)} of {item['path']} has no counterpart; see columns")
    files = item.get("data_files")
    if not files:
        return [source]
    files = [files] if isinstance(files, str) else files
    return [{**source, "path": str(file)} for file in files]


def _adapter_kind(name: str, value: Any) -> Translation:
    """Axolotl's `adapter: lora` or `qlora`, which stands where our section stands."""
    if value == "lora":
        return Translation()
    if value == "qlora":
        return Translation({"model.bits": 4}, notes=["adapter: qlora is model.bits: 4 here"])
    raise _expect(name, value, "a section (keys of LoraConfig), lora or qlora")


def _chat_kwargs(key: str) -> Rule:
    return _to(f"data.chat_template_kwargs.{key}")


_RENAMED = {
    "model.path": "model_name_or_path model_name base_model model_id model_path pretrained_model",
    "model.attn_implementation": "_attn_implementation",
    "adapter.r": "lora_rank lora_r",
    "adapter.modules_to_save": "additional_target lora_modules_to_save",
    "adapter.use_rslora": "peft_use_rslora",
    "adapter.use_dora": "peft_use_dora",
    "adapter.path": "adapter_name_or_path lora_model_dir resume_adapter peft_path",
    "data.max_length": "cutoff_len sequence_len max_seq_length max_seq_len model_max_length "
    "block_size",
    "data.packing": "sample_packing neat_packing",
    "data.num_workers": "dataloader_num_workers",
    "training.num_train_epochs": "num_epochs epochs",
    "training.train_batch_size": "global_batch_size",
    "training.per_device_train_batch_size": "micro_batch_size",
    "training.gradient_accumulation_steps": "grad_accumulation_steps",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "lr_scheduler",
    "training.max_grad_norm": "gradient_clipping max_norm",
    "training.optim": "optimizer",
    "training.seed": "random_state",
    "training.deterministic": "full_determinism",
    "training.compile": "torch_compile",
    "training.run_name": "wandb_name",
    "training.report_to": "log_with",
    "model.quantization.bnb_4bit_quant_type": "quantization_type",
    "model.quantization.bnb_4bit_use_double_quant": "double_quantization double_quant",
}

_NONE = {
    "evaluation gives one number whatever the batch size": "per_device_eval_batch_size "
    "eval_batch_size eval_accumulation_steps prediction_loss_only",
    "evaluation runs whenever there is validation data; see training.eval_steps": "do_eval "
    "eval_strategy evaluation_strategy evals_per_epoch do_predict",
    "checkpoints follow training.save_strategy and save_steps": "saves_per_epoch save_only_model "
    "save_safetensors",
    "the run decides how many devices take part": "deepspeed fsdp fsdp_config ddp_timeout "
    "ddp_find_unused_parameters local_rank ddp_backend device_map",
    "Glasstune chooses attention itself; see model.attn_implementation": "flash_attn "
    "flash_attention xformers_attention sdp_attention",
    "the tokenizer's own template is used; see data.chat_template": "template",
    "a run folder that holds a run asks for --overwrite or --resume": "overwrite_output_dir",
    "write --resume on the command line": "resume_from_checkpoint auto_resume_from_checkpoints",
    "Glasstune keeps no cache of tokens that it could mix up": "overwrite_cache "
    "dataset_prepared_path preprocessing_num_workers preprocessing_batch_size streaming",
    "the tokenizer and the model's class come from the checkpoint": "model_type tokenizer_type "
    "tokenizer_config special_tokens use_fast_tokenizer resize_vocab is_llama_derived_model",
    "every row is trained; see data.sources repeat": "max_samples train_dataset_sample",
    "rows are packed instead": "group_by_length pad_to_sequence_len eval_sample_packing",
    "matrix products follow model.dtype and training.compute": "tf32",
    "it does not change what is trained here": "do_train plot_loss logging_dir disable_tqdm "
    "logging_first_step logging_strategy remove_unused_columns push_to_hub hub_model_id "
    "hub_strategy hub_token wandb_project wandb_entity wandb_watch wandb_log_model strict "
    "use_liger_kernel lazy_preprocess use_cache cache_dir "
    "gradient_checkpointing_kwargs dataset_dir include_num_input_tokens_seen save_on_each_node "
    "bf16_full_eval dataloader_pin_memory debug hf_use_auth_token",
    "Glasstune has no such regulariser": "neftune_noise_alpha label_smoothing_factor",
    "one learning rate serves A and B": "loraplus_lr_ratio loraplus_lr_embedding",
    "one seed orders the data too": "data_seed",
}

FOREIGN: dict[str, Rule] = {
    **{name: _to(key) for key, names in _RENAMED.items() for name in names.split()},
    **{name: _nothing(reason) for reason, names in _NONE.items() for name in names.split()},
    "load_in_4bit": _true_means("model.bits", 4, forbids=4),
    "load_in_8bit": _true_means("model.bits", 8, forbids=8),
    "quantization_bit": _bits,
    "torch_dtype": _to("model.dtype"),
    "bf16": _true_means("model.dtype", "bfloat16"),
    "fp16": _true_means("model.dtype", "float16", note="adapters and optimiser stay float32"),
    "float16": _true_means("model.dtype", "float16"),
    "bfloat16": _true_means("model.dtype", "bfloat16"),
    "quantization_method": _only(("bnb", "bitsandbytes"), "another quantisation"),
    "quant_method": _only(("bitsandbytes",), "another quantisation"),
    "gradient_checkpointing": _switch("training.recompute", "full", "none", ("unsloth", "offload")),
    "use_gradient_checkpointing": _switch("training.recompute", "full", "none", ("unsloth",)),
    "activation_checkpointing": _switch("training.recompute", "full", "none"),
    "lora_target": _to("adapter.target_modules", _names),
    "lora_target_modules": _to("adapter.target_modules", _names),
    "lora_target_linear": _true_means("adapter.target_modules", "all-linear"),
    "pissa_init": _true_means("adapter.init_lora_weights", "pissa"),
    "use_lora": _only((True,), "training of all weights"),
    "finetuning_type": _only(("lora",), "training of all weights"),
    "sft_type": _only(("lora",), "training of all weights"),
    "stage": _only(("sft",), "another kind of training"),
    "rl": _only((), "training on preferences"),
    "warmup_ratio": _warmup_ratio,
    "val_set_size": _held_out,
    "val_size": _held_out,
    "dataset": _sources("data.sources"),
    "datasets": _sources("data.sources"),
    "data_path": _sources("data.sources"),
    "train_file": _sources("data.sources"),
    "dataset_name": _sources("data.sources"),
    "eval_dataset": _sources("data.validation"),
    "test_datasets": _sources("data.validation"),
    "validation_file": _sources("data.validation"),
    "eval_data_path": _sources("data.validation"),
    "train_on_inputs": _switch("data.train_on", "all", "assistant"),
    "assistant_only_loss": _true_means("data.train_on", "assistant"),
    "completion_only_loss": _true_means("data.train_on", "assistant"),
    "mask_history": _true_means("data.train_on", "last_assistant"),
    "enable_thinking": _chat_kwargs("enable_thinking"),
}
"""Foreign name to rule. Looked up where a name is no key of ours."""

_QUANTIZATION = "bnb_4bit_", "llm_int8_"

_FLAT = {
    "adapter": "r lora_alpha lora_dropout target_modules use_rslora use_dora bias "
    "modules_to_save init_lora_weights rank_pattern alpha_pattern layers_to_transform "
    "exclude_modules",
    "data": "max_length packing chat_template chat_template_kwargs",
    "model": "trust_remote_code attn_implementation dtype",
}
"""Our own names as flat files (TrainingArguments, SFTConfig, LoraConfig) give them."""

FLAT: dict[str, str] = {
    name: f"{section}.{name}" for section, names in _FLAT.items() for name in names.split()
}

_OPTIMISERS = {
    "adamw": "adamw_torch",
    "adamw_hf": "adamw_torch",
    "adamw_torch_fused": "adamw_torch",
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw": "adamw_torch",
}
_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
}
VALUES: dict[str, dict[Any, Any]] = {
    "training.optim": _OPTIMISERS,
    "model.dtype": _DTYPES,
    "adapter.target_modules": {"all": "all-linear"},
    "data.chat_template": {"tokenizer_default": None},
    "training.report_to": {
        "none": [],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
    },
}
"""Foreign values of our own keys."""


def translate(section: str, name: str, value: Any, own: dict[str, str]) -> Translation | None:
    """Translates a name that is no key of ours where it stands.

    Args:
        section: Dotted place it stands in; empty at the top level.
        name: The name.
        value: Its value.
        own: Our flat training names, name to dotted key.

    Returns:
        What to set, or None where the name is unknown.

    Raises:
        InputError: The value does not fit, or asks for what Glasstune does not do.
    """
    if section == "" and name == "adapter" and isinstance(value, str):
        return _adapter_kind(name, value)
    if name in FOREIGN:
        if value is None:
            return Translation()
        return FOREIGN[name](name, value)
    if name.startswith(_QUANTIZATION) and section != "model.quantization":
        return _to(f"model.quantization.{name}")(name, value)
    flat = own if section == "" else {}
    key = (FLAT | flat).get(name) if section in ("", "training") else None
    if key is not None:
        return Translation({key: value}, notes=[f"{name} is {key} here"])
    return None


def renamed() -> dict[str, list[str]]:
    """Returns, for the documentation, the keys that a foreign name sets, with these names."""
    found: dict[str, set[str]] = {}
    for name, rule in FOREIGN.items():
        for probe in (True, 4, 0.1, "x", ["x"]):
            try:
                meaning = rule(name, probe)
            except InputError:
                continue
            for key in meaning.values:
                found.setdefault(key, set()).add(name)
    return {key: sorted(names) for key, names in sorted(found.items())}


def known_value(key: str, value: Any) -> tuple[Any, str]:
    """Translates a foreign value of one of our keys.

    Returns:
        The value to use, and a note (empty where nothing changed).
    """
    table = VALUES.get(key, {})
    if isinstance(value, (str, int, float)) and value in table:
        return table[value], f"{key}: {value} is {table[value]} here"
    return value, ""

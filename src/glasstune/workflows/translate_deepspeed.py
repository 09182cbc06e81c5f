"""A DeepSpeed configuration beside `Trainer`'s options: what it sets, and what it does not.

`Trainer` fills in each `auto` from its own options and stops where a number differs from them, so
a number here can only confirm an option or stand in for one that was left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasstune.core.errors import InputError
from glasstune.workflows.translate_command import is_file
from glasstune.workflows.translate_trainer import Translated

_SPEED = frozenset(
    [
        "steps_per_print",
        "wall_clock_breakdown",
        "dump_state",
        "prescale_gradients",
        "gradient_predivide_factor",
        "sparse_gradients",
        "communication_data_type",
        "comms_logger",
        "disable_allgather",
        "flops_profiler",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "memory_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "data_types",
        "autotuning",
        "checkpoint",
        "dataloader_drop_last",
        "aio",
        "amp_master_weights",
        "seq_parallel_communication_data_type",
    ]
)
"""Keys of how DeepSpeed works and reports; none changes what is computed."""

_SHARDS = {
    1: "the optimiser's state",
    2: "the optimiser's state and the gradients",
    3: "the optimiser's state, the gradients and the weights",
}
_SCHEDULES = {
    "WarmupLR": "constant_with_warmup",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}


def apply_deepspeed(
    given: dict[str, Any], asked: Any, folders: Sequence[Path], result: Translated
) -> None:
    """Puts what a DeepSpeed configuration sets into the options, and says the rest.

    Args:
        given: Options by `Trainer`'s names; changed.
        asked: The value of `--deepspeed`: a file, or the configuration itself.
        folders: Where a relative file is looked for.
        result: Gets what was said.

    Raises:
        InputError: The file is no JSON, or sets another number than an option.
    """
    if isinstance(asked, dict):
        content, name = asked, "deepspeed"
    else:
        name = str(asked)
        file = next((f / name for f in folders if is_file(f / name)), None)
        if file is None:
            result.lost.append(
                f"deepspeed: {name} is not here, so what it sets is not translated (optimiser and "
                "schedule in it would win over the options); ZeRO itself changes no result"
            )
            return
        content, name = _read(file), str(file)
    for key, value in content.items():
        if key in _RULES:
            _RULES[key](given, value, name, result)
        elif key not in _SPEED and value not in (None, False, "auto", {}):
            result.lost.append(f"deepspeed: {key} of {Path(name).name} is not known here")


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(
            "from_unreadable", f"is no JSON: {error}", where=str(file), fix="correct it"
        ) from None
    if not isinstance(content, dict):
        raise InputError(
            "from_unreadable", "holds no JSON object", where=str(file), fix="give the right file"
        )
    return content


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _confirm(given: dict[str, Any], option: str, value: Any, key: str, where: str) -> None:
    """Takes a number over, or stops where an option says another, as `Trainer` does."""
    if value in (None, "auto"):
        return
    if option in given and given[option] != value:
        raise InputError(
            "contradiction",
            f"{key} is {value!r}, but --{option} is {given[option]!r}; Trainer stops there too",
            where=where,
            fix=f'write "auto" for {key}, or the same value in both',
        )
    given[option] = value


def _flag(option: str) -> Any:
    def rule(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
        enabled = value.get("enabled") if isinstance(value, dict) else value
        if enabled is True:
            _confirm(given, option, True, f"{option}.enabled", where)
        if option == "fp16" and enabled:
            result.notes.append("deepspeed: loss scaling is not needed: adapters are float32")

    return rule


def _number(option: str) -> Any:
    def rule(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
        _confirm(given, option, value, _KEYS.get(option, option), where)

    return rule


_KEYS = {
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "max_grad_norm": "gradient_clipping",
}


def _zero(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
    value = _mapping(value)
    stage = value.get("stage", 0)
    if isinstance(stage, int) and stage in _SHARDS:
        result.notes.append(
            f"deepspeed: ZeRO stage {stage} spreads {_SHARDS[stage]} over devices and changes no "
            "result; of LoRA only the adapter has gradients and optimiser state, and the frozen "
            "weights are spread where they do not fit (training.distributed.strategy: auto)"
        )
    old = {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_params"}
    where_to = {
        "offload_optimizer": "the optimiser's state of an adapter is small: it stays",
        "offload_param": "the frozen weights stay on the device: model.bits: 8 or 4 halves or "
        "quarters them",
    }
    for key, instead in where_to.items():
        entry = value.get(key, value.get(old[key]))
        device = entry.get("device") if isinstance(entry, dict) else "cpu" if entry else None
        if device not in (None, "none"):
            result.lost.append(f"deepspeed: {key} to {device} has no counterpart: {instead}")


def _optimizer(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
    value = _mapping(value)
    kind, params = str(value.get("type", "AdamW")), _mapping(value.get("params"))
    if kind.lower() not in ("adam", "adamw") or params.get("adam_w_mode") is False:
        said = f"{kind} without adam_w_mode" if kind.lower() in ("adam", "adamw") else kind
        result.lost.append(
            f"deepspeed: its optimiser {said} wins there over --optim and is not here: written as "
            "adamw_torch"
        )
        given["optim"] = "adamw_torch"
    elif given.get("optim", "adamw_torch") != "adamw_torch":
        result.notes.append(
            f"deepspeed: its AdamW is used there, not optim: {given['optim']}: adamw_torch here"
        )
        given["optim"] = "adamw_torch"
    betas = params.get("betas")
    pair = betas if isinstance(betas, list) and len(betas) == 2 else (None, None)
    for option, number, key in (
        ("learning_rate", params.get("lr"), "lr"),
        ("adam_beta1", pair[0], "betas"),
        ("adam_beta2", pair[1], "betas"),
        ("adam_epsilon", params.get("eps"), "eps"),
        ("weight_decay", params.get("weight_decay"), "weight_decay"),
    ):
        _confirm(given, option, number, f"optimizer.params.{key}", where)


def _scheduler(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
    value = _mapping(value)
    kind, params = str(value.get("type")), _mapping(value.get("params"))
    if kind not in _SCHEDULES:
        result.lost.append(
            f"deepspeed: its schedule {kind} wins there over --lr_scheduler_type and is not here"
        )
        return
    new, before = _SCHEDULES[kind], given.get("lr_scheduler_type", "linear")
    if new != before:
        result.notes.append(
            f"deepspeed: its schedule {kind} is used there, not lr_scheduler_type: {before}: "
            f"{new} here"
        )
    given["lr_scheduler_type"] = new
    _confirm(given, "learning_rate", params.get("warmup_max_lr"), "warmup_max_lr", where)
    steps = params.get("warmup_num_steps")
    if isinstance(steps, int) and not isinstance(steps, bool):
        if not given.get("warmup_steps"):
            given.pop("warmup_steps", None)
        given.pop("warmup_ratio", None)
        _confirm(given, "warmup_steps", steps, "warmup_num_steps", where)
    warm = given.get("warmup_steps") or given.get("warmup_ratio")
    if warm and params.get("warmup_type", "log") == "log" and kind != "WarmupCosineLR":
        result.lost.append(
            f"deepspeed: the warm-up of {kind} is logarithmic (warmup_type: log); here it is linear"
        )


def _activations(given: dict[str, Any], value: Any, where: str, result: Translated) -> None:
    if value:
        result.notes.append(
            "deepspeed: activation_checkpointing does nothing without DeepSpeed's own layers, "
            "there and here; see training.recompute"
        )


_RULES: dict[str, Any] = {
    "zero_optimization": _zero,
    "optimizer": _optimizer,
    "scheduler": _scheduler,
    "bf16": _flag("bf16"),
    "bfloat16": _flag("bf16"),
    "fp16": _flag("fp16"),
    "gradient_clipping": _number("max_grad_norm"),
    "gradient_accumulation_steps": _number("gradient_accumulation_steps"),
    "train_micro_batch_size_per_gpu": _number("per_device_train_batch_size"),
    "train_batch_size": _number("train_batch_size"),
    "activation_checkpointing": _activations,
}

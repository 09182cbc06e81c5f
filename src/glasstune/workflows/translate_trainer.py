"""What options of transformers' `Trainer` mean here where a name alone does not say it.

The names are in `core/config_names.py`. Here are values that Glasstune does not have, options
that cancel each other in `Trainer`, its defaults, and the options that change nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from glasstune.core.config import TrainingConfig
from glasstune.core.config_fields import show_default
from glasstune.core.config_names import VALUES

TRAINER = {
    "training.learning_rate": 5e-5,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "data.packing": False,
}
"""What `Trainer` does where nothing is said, and differs from our defaults."""


@dataclass(slots=True)
class Translated:
    """What became of a foreign file.

    Args:
        values: Nested mapping of our own keys.
        notes: What was translated, one sentence a name.
        lost: Names without a counterpart, or that ask for what Glasstune does not do.
        kind: What the file was.
        name: Its path; empty where the text itself was given.
    """

    values: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    kind: str = ""
    name: str = ""


def fill(
    result: Translated, defaults: dict[str, Any], said: str = "not given there, so its defaults"
) -> None:
    """Writes the other tool's defaults, so that the same updates are computed."""
    filled = []
    for key, value in defaults.items():
        section, name = key.split(".")
        if name not in result.values.setdefault(section, {}):
            result.values[section][name] = value
            filled.append(f"{key}: {show_default(value)}")
    if filled:
        result.notes.append(f"{said}: {', '.join(filled)}")


def settle(given: dict[str, Any], result: Translated) -> dict[str, Any]:
    """Replaces what has no counterpart by what is nearest, and says each.

    Args:
        given: Options by their foreign names; not changed.
        result: Gets what was said.

    Returns:
        Options whose values `core/config_names.py` knows.
    """
    kept = dict(given)
    for name in given:
        if name in _UNUSED:
            value, default = kept.pop(name), _DEFAULTS.get(name, False)
            if value != default and (value or default is True):
                result.lost.append(f"{name}: {_say(value)} has no counterpart: {_UNUSED[name]}")
        elif name in _DEFAULTS and given[name] == _DEFAULTS[name]:
            del kept[name]
    for rule in (
        _aliases,
        _devices,
        _warmup,
        _schedule,
        _optimiser,
        _saving,
        _intervals,
        _sinks,
        _best,
    ):
        rule(kept, result)
    return kept


def _say(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _section(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns one of our own sections among the options; a text of that name gives way."""
    if not isinstance(given.get(name), dict):
        given[name] = {}
    section: dict[str, Any] = given[name]
    return section


def _aliases(given: dict[str, Any], result: Translated) -> None:
    if "per_gpu_train_batch_size" in given:
        given["per_device_train_batch_size"] = given.pop("per_gpu_train_batch_size")
    for name in ("use_cpu", "no_cuda"):
        if given.pop(name, None) is True:
            _section(given, "model")["device"] = "cpu"
            result.notes.append(f"{name}: true is model.device: cpu here")
    if given.pop("adafactor", None) is True:
        given["optim"] = "adafactor"
    if given.pop("auto_find_batch_size", None) is True:
        asked = given.get("per_device_train_batch_size", 8)
        result.notes.append(
            f"auto_find_batch_size: {asked} rows stay an update; rows of one forward follow from "
            "the memory plan"
        )


def _devices(given: dict[str, Any], result: Translated) -> None:
    limit = given.pop("ddp_timeout", None)
    if isinstance(limit, int) and not isinstance(limit, bool):
        _section(given, "training")["distributed"] = {"timeout_seconds": limit}
        result.notes.append(
            f"ddp_timeout: {limit} is training.distributed.timeout_seconds: {limit} here"
        )
    asked = given.pop("fsdp", None)
    if asked:
        words = asked if isinstance(asked, list) else [asked]
        result.notes.append(
            f"fsdp: {' '.join(map(str, words))}: the frozen weights are spread over devices where "
            "they do not fit (training.distributed.strategy: auto; fsdp2 always does)"
        )
        if "offload" in " ".join(map(str, words)):
            result.lost.append("fsdp: offload has no counterpart: model.bits: 8 or 4 is smaller")


def _warmup(given: dict[str, Any], result: Translated) -> None:
    """`Trainer` takes the share only where no number of steps is given."""
    steps, share = given.get("warmup_steps"), given.get("warmup_ratio")
    if steps is not None and share is not None:
        unused = "warmup_ratio" if steps else "warmup_steps"
        if given.pop(unused):
            result.notes.append(f"{unused}: {share} is not used beside warmup_steps: {steps}")
    warm = given.get("warmup_steps") or given.get("warmup_ratio")
    if given.get("lr_scheduler_type") == "constant":
        if warm:
            result.notes.append("warm-up: the constant schedule has none, there and here")
    elif warm:
        result.notes.append(
            "warm-up: update k of w runs at k/w of the rate; there it is (k-1)/w, so its first "
            "update changes nothing"
        )


_NEAREST = {
    "polynomial": "linear",
    "cosine_with_restarts": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine",
    "inverse_sqrt": "cosine",
    "warmup_stable_decay": "constant_with_warmup",
    "reduce_lr_on_plateau": "constant",
}


def _schedule(given: dict[str, Any], result: Translated) -> None:
    for name in ("lr_scheduler_type", "lr_scheduler"):
        value = given.get(name)
        known = _allowed("lr_scheduler_type")
        if isinstance(value, str) and value not in known:
            given[name] = _NEAREST.get(value, "linear")
            result.lost.append(
                f"{name}: {value} is not here ({', '.join(known)} are): written as {given[name]}"
            )


def _optimiser(given: dict[str, Any], result: Translated) -> None:
    for name in ("optim", "optimizer"):
        value = given.get(name)
        known = (*_allowed("optim"), *VALUES["training.optim"])
        if isinstance(value, str) and value not in known:
            given[name] = "adamw_torch"
            result.lost.append(
                f"{name}: {value} is not here (adamw_torch and adamw_8bit are): written as "
                "adamw_torch, which may want another learning rate"
            )


def _saving(given: dict[str, Any], result: Translated) -> None:
    if given.get("save_strategy") in ("no", "best", False):
        value = _say(given.pop("save_strategy"))
        result.lost.append(
            f"save_strategy: {'no' if value == 'false' else value}: here the newest checkpoint "
            "and the best are always kept"
        )
    if given.get("save_strategy") == "epoch" and given.pop("save_steps", None) is not None:
        result.notes.append("save_steps is not used beside save_strategy: epoch, there and here")
    limit = given.get("save_total_limit")
    if isinstance(limit, int) and limit < 1:
        given["save_total_limit"] = None


def _intervals(given: dict[str, Any], result: Translated) -> None:
    """A share of all updates, as `Trainer` takes it, is no number of updates."""
    for name in ("save_steps", "eval_steps", "logging_steps"):
        value = given.get(name)
        if isinstance(value, float) and value >= 1 and value == int(value):
            given[name] = int(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value < 1:
            del given[name]
            result.lost.append(f"{name}: {value} is a share of all updates there; left at default")


def _sinks(given: dict[str, Any], result: Translated) -> None:
    for name in ("report_to", "log_with"):
        asked = given.get(name)
        if asked is None:
            continue
        values = asked if isinstance(asked, list) else str(asked).replace(",", " ").split()
        known = [value for value in values if value in VALUES["training.report_to"]]
        given[name] = [value for value in known if value != "none"]
        for value in values:
            if value not in known:
                result.lost.append(
                    f"{name}: {value} is not here (tensorboard, wandb and mlflow are); "
                    "metrics.jsonl is always written"
                )


def _best(given: dict[str, Any], result: Translated) -> None:
    value = given.get("metric_for_best_model")
    if value in ("loss", "eval_loss"):
        given["metric_for_best_model"] = "eval_loss"
    elif value is not None:
        del given["metric_for_best_model"]
        result.lost.append(f"metric_for_best_model: {value}: here the held-out loss decides")


def _allowed(name: str) -> tuple[str, ...]:
    return get_args(TrainingConfig.model_fields[name].annotation)


_REASONS = {
    "a schedule has its usual shape": "lr_scheduler_kwargs",
    "AdamW has no further options": "optim_args optim_target_modules",
    "all trained tokens of an update count alike, whatever the devices": "average_tokens_across_"
    "devices",
    "evaluation follows model.dtype": "fp16_full_eval bf16_full_eval half_precision_backend "
    "fp16_backend fp16_opt_level",
    "see training.recompute": "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
    "see training.compile": "torch_compile_backend torch_compile_mode torchdynamo jit_mode_eval",
    "Glasstune has kernels of its own": "liger_kernel_config use_liger_kernel use_ipex",
    "memory is planned before the start": "torch_empty_cache_steps skip_memory_metrics",
    "metrics.jsonl holds every update": "log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "include_tokens_per_second logging_strategy",
    "the held-out loss is one number over all rows": "eval_delay eval_do_concat_batches "
    "eval_use_gather_object include_for_metrics include_inputs_for_metrics batch_eval_metrics "
    "greater_is_better label_names per_gpu_eval_batch_size past_index use_legacy_prediction_loop",
    "a signal always saves a checkpoint": "enable_jit_checkpoint",
    "nothing is sent anywhere": "hub_private_repo hub_always_push hub_revision "
    "push_to_hub_model_id push_to_hub_organization push_to_hub_token",
    "a resumed run goes on with the row that comes next": "ignore_data_skip "
    "restore_callback_states_from_checkpoint",
    "the run decides how devices share the work": "accelerator_config parallelism_config "
    "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph sharded_ddp fsdp_min_num_params "
    "fsdp_transformer_layer_cls_to_wrap tpu_num_cores tpu_metrics_debug mp_parameters "
    "use_mps_device xpu_backend dispatch_batches split_batches ray_scope",
    "the last rows of an epoch make a smaller update": "dataloader_drop_last",
    "batches are prepared in threads": "dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context dataloader_in_order dataloader_pin_memory",
    "columns that no format names are not read": "remove_unused_columns",
    "the order of rows is random, set by training.seed": "train_sampling_strategy "
    "length_column_name group_by_length",
}
_UNUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

OPTIONS = frozenset(_UNUSED)
"""Names that change nothing here."""

_DEFAULTS: dict[str, Any] = {
    "average_tokens_across_devices": True,
    "log_on_each_node": True,
    "logging_nan_inf_filter": True,
    "logging_strategy": "steps",
    "log_level": "passive",
    "log_level_replica": "warning",
    "project": "huggingface",
    "eval_do_concat_batches": True,
    "eval_delay": 0,
    "skip_memory_metrics": True,
    "dataloader_in_order": True,
    "dataloader_pin_memory": True,
    "train_sampling_strategy": "random",
    "length_column_name": "length",
    "past_index": -1,
    "half_precision_backend": "auto",
    "fp16_backend": "auto",
    "fp16_opt_level": "O1",
    "ray_scope": "last",
    "eval_strategy": "no",
    "evaluation_strategy": "no",
    "hub_strategy": "every_save",
    "remove_unused_columns": True,
    "save_safetensors": True,
    "ddp_timeout": 1800,
    "local_rank": -1,
    "per_device_eval_batch_size": 8,
    "include_num_input_tokens_seen": "no",
    "optim_args": "",
    "tf32": None,
}
"""Options at these values ask for nothing, so nothing is said of them."""

"""How many devices a launcher starts, and so how many rows one update has.

`Trainer` counts rows a device; here `training.train_batch_size` counts the rows of an update over
all devices, so that the same config makes the same updates on any number of them.
"""

from __future__ import annotations

import re
from typing import Any

from glasstune.workflows.translate_command import Command
from glasstune.workflows.translate_trainer import Translated

_IGNORED = {
    "deepspeed": "hostfile master_port master_addr launcher launcher_args num_gpus num_nodes "
    "include exclude H i e no_local_rank no_python no_ssh ssh_port force_multi "
    "enable_each_rank_log bind_cores_to_rank bind_core_list save_pid elastic_training autotuning "
    "module node_rank",
    "torchrun": "nproc_per_node nnodes node_rank master_addr master_port rdzv_backend "
    "rdzv_endpoint rdzv_id rdzv_conf standalone max_restarts monitor_interval start_method "
    "log_dir redirects tee run_path local_addr role use_env u m",
    "accelerate": "num_processes num_machines multi_gpu config_file gpu_ids machine_rank "
    "main_process_ip main_process_port main_training_function same_network num_cpu_threads_per_"
    "process mixed_precision use_deepspeed zero_stage deepspeed_config_file deepspeed_hostfile "
    "offload_optimizer_device offload_param_device gradient_accumulation_steps gradient_clipping "
    "zero3_init_flag zero3_save_16bit_model cpu use_fsdp dynamo_backend rdzv_backend debug m",
    "python": "u m O B W X",
}


def apply_launcher(command: Command, given: dict[str, Any], result: Translated) -> int | None:
    """Takes over what the launcher decides.

    Args:
        command: The command.
        given: The script's options; gets what the launcher adds to them.
        result: Gets what was said.

    Returns:
        The number of devices, or None where the command does not tell.
    """
    kind, launch = command.launcher, command.launch
    if kind and kind not in _IGNORED:
        result.lost.append(f"{kind}: this launcher is not known here")
    unknown = sorted(set(launch) - set(_IGNORED.get(kind, "").split()))
    if unknown and kind in _IGNORED:
        result.lost.append(
            f"{kind}: {', '.join('--' + name for name in unknown)} is not known here"
        )
    if kind == "accelerate":
        _accelerate(launch, given, result)
    return devices(command)


def devices(command: Command) -> int | None:
    """Returns how many devices the command trains on, or None where it does not tell."""
    launch = command.launch
    listed = command.environment.get("CUDA_VISIBLE_DEVICES")
    visible = len([part for part in listed.split(",") if part.strip()]) if listed else None
    if command.launcher == "deepspeed":
        include = launch.get("include", launch.get("i"))
        if include is not None:
            return _included(str(include))
        nodes = launch.get("num_nodes", 1)
        a_node = launch.get("num_gpus", visible)
        hosts = launch.get("hostfile", launch.get("H"))
        excluded = launch.get("exclude", launch.get("e"))
        known = isinstance(a_node, int) and isinstance(nodes, int) and a_node > 0
        return a_node * nodes if known and not hosts and not excluded else None
    if command.launcher == "torchrun":
        a_node, nodes = launch.get("nproc_per_node", 1), launch.get("nnodes", 1)
        known = isinstance(a_node, int) and isinstance(nodes, int)
        return a_node * nodes if known else None
    if command.launcher == "accelerate":
        number = launch.get("num_processes")
        return number if isinstance(number, int) else None
    if command.launcher == "python":
        return visible  # one process: Trainer splits each batch over all devices that it sees
    return 1


def _included(text: str) -> int | None:
    """Counts the slots of `localhost:0,1@other:2`; a host without slots has an unknown number."""
    count = 0
    for host in text.split("@"):
        _, sign, slots = host.partition(":")
        if not sign:
            return None
        count += len([slot for slot in re.split(r"[,\s]+", slots) if slot])
    return count


def _accelerate(launch: dict[str, Any], given: dict[str, Any], result: Translated) -> None:
    precision = launch.get("mixed_precision")
    if precision in ("bf16", "fp16") and not (given.get("bf16") or given.get("fp16")):
        given[precision] = True
    if launch.get("cpu") is True:
        given["use_cpu"] = True
    if launch.get("config_file"):
        result.lost.append(
            f"accelerate: {launch['config_file']} is not read: precision and DeepSpeed settings in "
            "it are not translated"
        )
    deepspeed: dict[str, Any] = {}
    if launch.get("use_deepspeed") is True:
        deepspeed["zero_optimization"] = {
            "stage": launch.get("zero_stage", 2),
            "offload_optimizer": {"device": launch.get("offload_optimizer_device")},
            "offload_param": {"device": launch.get("offload_param_device")},
        }
    if "deepspeed" not in given and (launch.get("deepspeed_config_file") or deepspeed):
        given["deepspeed"] = launch.get("deepspeed_config_file") or deepspeed
    unused = [n for n in ("gradient_accumulation_steps", "gradient_clipping") if n in launch]
    if unused:
        result.notes.append(
            f"accelerate: {', '.join(unused)} is not read by Trainer, which has options of its own"
        )


def rows_of_update(result: Translated, number: int | None, given: dict[str, Any]) -> None:
    """Turns rows a device and forwards into the rows of a whole update.

    Args:
        result: With `Trainer`'s two sizes filled in; they become `train_batch_size`.
        number: Of devices, or None.
        given: The script's options.
    """
    training = result.values["training"]
    rows, forwards = (
        training["per_device_train_batch_size"],
        training["gradient_accumulation_steps"],
    )
    if not isinstance(rows, int) or not isinstance(forwards, int):
        return  # the check of the config says what is wrong
    del training["gradient_accumulation_steps"]
    if "per_device_train_batch_size" not in given or given.get("auto_find_batch_size") is True:
        del training["per_device_train_batch_size"]
    total = training.get("train_batch_size")
    if isinstance(total, int):
        result.notes.append(f"training.train_batch_size: {total}, as the DeepSpeed file says")
        return
    training["train_batch_size"] = rows * forwards * (number or 1)
    arithmetic = f"{rows} rows x {forwards} forward{'s' * (forwards > 1)}"
    if number is None:
        result.lost.append(
            f"the number of devices is not told: an update has {rows * forwards} rows for each, so "
            f"with N devices there write training.train_batch_size: N x {rows * forwards}"
        )
    elif number > 1:
        result.notes.append(
            f"training.train_batch_size: {rows * forwards * number} is {arithmetic} x {number} "
            f"devices: the same update on any number of them; train --nproc {number} starts as many"
        )

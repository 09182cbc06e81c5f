"""The adapted model of a configuration, its optimiser and gate: shared by `train` and `audit`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from glasstune.core.config import Config
from glasstune.core.findings import Finding
from glasstune.core.protocols import Exchange, StepHook
from glasstune.workflows.fp8_keep import Fp8Keep
from glasstune.workflows.prepare_run import Prepared
from glasstune.workflows.trained_speed import SpeedChoice, choose_speed

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from glasstune.training.step import AdaptedModel
    from glasstune.training.terms import Term

Note = Callable[[Finding], None]


def open_trained(
    prepared: Prepared,
    note: Note,
    *,
    updates: int | None = None,
    plainly: str = "",
    keep: Fp8Keep | None = None,
) -> tuple[AdaptedModel, dict[str, Parameter], Optimizer]:
    """Loads the base, adds the adapter, builds the optimiser and speeds the model up.

    Args:
        prepared: The run before its weights; its config is resolved further in place.
        note: Takes what should be said.
        updates: How many updates will be made, for `training.compile: auto`.
        plainly: Why nothing is compiled nor grouped, whatever the config says; empty: it decides.
        keep: Resolves `training.fp8_keep`, and holds what was measured for it.

    Returns:
        (model, trained tensors by name, optimiser over exactly those).

    Raises:
        InputError: The base, the adapter or one of their options is wrong.
        RunError: Nothing can be trained.
    """
    from glasstune.adapters.inject import trainable
    from glasstune.models.load import load_base
    from glasstune.training.optimizer import make_optimizer

    config = prepared.config
    # A 4-bit base is packed on the device, and PEFT reads its packing: it is sharded at the end.
    at_once = prepared.sharded and config.model.bits != 4
    if prepared.sharded:
        check_sharded(prepared)
    base = load_base(config.model, prepared.resolved, choices=prepared.choices, on_host=at_once)
    if config.training.compute == "fp8":
        from glasstune.models.fp8 import to_fp8

        (keep or Fp8Keep()).resolve(prepared, base)
        to_fp8(base, config, prepared.choices)
    if at_once:
        _shard(prepared, base)
    speed = choose_speed(prepared, base.device, updates, plainly)
    adapted = _adapt(prepared, base, note, speed)
    if prepared.sharded:
        rows = prepared.data.train
        adapted.filler = rows.micro_batch([rows.rows - 1], 0, prepared.pad_id)
        if not at_once:
            _shard(prepared, adapted.model)
    parameters = trainable(adapted.model)
    optimizer = make_optimizer(parameters, config.training)
    budget = 1.0 if prepared.recompute is None else prepared.recompute.budget
    speed.apply(adapted, prepared.choices, list(parameters.values()), budget)
    return adapted, parameters, optimizer


def check_sharded(prepared: Prepared) -> None:
    """Refuses, before anything is loaded, what a run with a sharded base cannot do.

    Raises:
        InputError: `cannot_shard`.
    """
    from glasstune.core.errors import InputError

    model = prepared.config.model
    if prepared.config.training.compute == "fp8" and model.bits == 16:
        raise InputError(
            "cannot_shard",
            "float8 layers of a 16-bit base keep a second copy of each weight, which fsdp2 does "
            "not divide",
            where="training.compute",
            fix="set model.bits: 8 or 4, leave training.compute out, or set "
            "training.distributed.strategy: ddp",
        )
    asked = {"llm_int8_threshold", "llm_int8_has_fp16_weight"} & set(model.quantization)
    if model.bits == 8 and (model.int8_compute == "llm_int8" or asked):
        raise InputError(
            "cannot_shard",
            "bitsandbytes' Linear8bitLt (model.int8_compute: llm_int8) cannot be sharded by fsdp2",
            where="model.int8_compute",
            fix="set model.int8_compute: w8a16, without llm_int8_threshold and "
            "llm_int8_has_fp16_weight",
        )
    options = prepared.config.adapter.lora_options()
    init = options.get("init_lora_weights", True)
    if model.bits != 4 and (init not in (True, False, "gaussian") or options.get("use_dora")):
        raise InputError(
            "cannot_shard",
            "DoRA and adapters that begin from the base's weights read each as a whole, and with "
            "fsdp2 no rank holds it while the model is built",
            where="adapter.use_dora" if options.get("use_dora") else "adapter.init_lora_weights",
            fix="leave it out, or set training.distributed.strategy: ddp",
        )
    own = [term.name for term in prepared.terms if term.function is not None]
    if own:
        raise InputError(
            "cannot_shard",
            f"loss term {own[0]!r} is a function of your own, which may run forwards: with fsdp2 "
            "all ranks must run the same number, also those without rows of the term",
            where="losses",
            fix="leave the term out, or set training.distributed.strategy: ddp",
        )


def _shard(prepared: Prepared, model: Any) -> None:
    from glasstune.core.units import format_bytes
    from glasstune.models.load import choose_device
    from glasstune.training.sharding import shard_base

    ranks = prepared.schedule.ranks
    device = choose_device(prepared.config.model.device, prepared.choices)
    held = shard_base(model, device, ranks)
    prepared.choices.record(
        "training.distributed.sharded_bytes", held,
        f"{format_bytes(held)} of the layers' weights are on each of {ranks} ranks",
    )  # fmt: skip


def first_step_gate(
    config: Config,
    adapted: AdaptedModel,
    terms: Sequence[Term] = (),
    exchange: Exchange | None = None,
) -> list[StepHook]:
    """Returns the gate as a hook, or nothing where it is off.

    Args:
        config: `audit.first_step_gate` and `gate_allow`.
        adapted: The model.
        terms: Loss terms, for a look at the calls that compiled blocks hide.
        exchange: The ranks that share an update.
    """
    from glasstune.audit.gate import FirstStepGate

    audit = config.audit
    if audit.first_step_gate == "off":
        return []
    look = None
    if adapted.compiled:
        from glasstune.training.step import run_plainly

        look = partial(run_plainly, adapted, terms)
    gate = FirstStepGate(
        adapted.model, audit.first_step_gate, audit.gate_allow,
        calls_seen=look is None, look=look, exchange=exchange,
    )  # fmt: skip
    return [gate]


def _adapt(prepared: Prepared, base: Any, note: Note, speed: SpeedChoice) -> AdaptedModel:
    import torch

    from glasstune.adapters.inject import adapter_findings, keep_activation_dtype
    from glasstune.models.families.install import install_attention, install_packing
    from glasstune.models.head import fold_head, split_head
    from glasstune.models.load import autocast_dtype
    from glasstune.training.dropout import RowSeeds, seed_dropout, unseeded_dropout
    from glasstune.training.recompute import apply_recompute, resolve_recompute
    from glasstune.training.step import AdaptedModel

    config, choices = prepared.config, prepared.choices
    if prepared.data.train.packed:
        how = install_packing(base, compiled=speed.compiled)
        choices.record("data.packing_method", how, f"of {base.config.model_type}")
    elif attention := install_attention(base):
        choices.record("model.attention", attention, "the model's own makes every score")
    split = split_head(base)  # before adapters: its probe runs outside autocast
    if not split.proven:
        choices.record("loss.full_logits", True, split.reason)
    torch.manual_seed(config.training.seed)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
    torch.use_deterministic_algorithms(config.training.deterministic)
    model = _with_adapter(prepared, base)
    fold_head(model, choices)
    for finding in adapter_findings(model):
        note(finding)
    autocast = autocast_dtype(base)
    if autocast is not None:
        keep_activation_dtype(model)
    rows = RowSeeds()
    seed_dropout(model, rows)
    for key, share in unseeded_dropout(base.config).items():
        text = (
            f"the base model itself drops {share:g} there, seeded by micro-batch: another "
            "split of the same update gives slightly other gradients"
        )
        note(Finding("dropout_per_micro_batch", "warning", f"model's {key}", text))
    length = config.data.max_length if speed.shape is None else speed.shape.length
    recompute = prepared.recompute or resolve_recompute(
        model, config.training, prepared.schedule.micro, length, choices,
        compiled=speed.compiled, itemsize=4 if autocast is None else 2,
    )  # fmt: skip
    apply_recompute(model, recompute)
    return AdaptedModel(
        model=model,
        split=split,
        device=base.device,
        autocast=autocast,
        vocabulary=int(split.weight.shape[0]),
        source_weights=prepared.data.loss_weights,
        seed=config.training.seed,
        rows=rows,
        shape=speed.shape,
    )


def _with_adapter(prepared: Prepared, base: Any) -> Any:
    from glasstune.adapters.inject import add_adapter, start_from
    from glasstune.adapters.options import saved_options

    adapter = prepared.config.adapter
    if adapter.path is None:
        return add_adapter(base, **adapter.lora_options())
    model = start_from(base, adapter.path, adapter.given_options())
    for name, value in saved_options(model.peft_config[model.active_adapter]).items():
        setattr(adapter, name, value)  # what config.yaml then says is what is trained
    prepared.choices.record("adapter", adapter.path, "adapter.path: its weights go on")
    return model

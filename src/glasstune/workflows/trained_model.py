"""The adapted model of a configuration, its optimiser and gate: shared by `train` and `audit`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glasstune.core.config import Config
from glasstune.core.findings import Finding
from glasstune.core.protocols import StepHook
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from glasstune.training.step import AdaptedModel

Note = Callable[[Finding], None]


def open_trained(
    prepared: Prepared, note: Note
) -> tuple[AdaptedModel, dict[str, Parameter], Optimizer]:
    """Loads the base, adds the adapter and builds the optimiser.

    Args:
        prepared: The run before its weights; its config is resolved further in place.
        note: Takes what should be said.

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
    base = load_base(config.model, prepared.resolved, choices=prepared.choices)
    adapted = _adapt(prepared, base, note)
    parameters = trainable(adapted.model)
    return adapted, parameters, make_optimizer(parameters, config.training)


def first_step_gate(config: Config, model: nn.Module) -> list[StepHook]:
    """Returns the gate as a hook, or nothing where it is off."""
    from glasstune.audit.gate import FirstStepGate

    audit = config.audit
    if audit.first_step_gate == "off":
        return []
    return [FirstStepGate(model, audit.first_step_gate, audit.gate_allow)]


def _adapt(prepared: Prepared, base: Any, note: Note) -> AdaptedModel:
    import torch

    from glasstune.adapters.inject import adapter_findings, keep_activation_dtype
    from glasstune.models.families.install import install_packing
    from glasstune.models.head import split_head
    from glasstune.models.load import autocast_dtype
    from glasstune.training.dropout import RowSeeds, seed_dropout, unseeded_dropout
    from glasstune.training.recompute import enable_recompute
    from glasstune.training.step import AdaptedModel

    config, choices = prepared.config, prepared.choices
    if prepared.data.train.packed:
        choices.record("data.packing_method", install_packing(base), f"of {base.config.model_type}")
    split = split_head(base)  # before adapters: its probe runs outside autocast
    if not split.proven:
        choices.record("loss.full_logits", True, split.reason)
    torch.manual_seed(config.training.seed)
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
    torch.use_deterministic_algorithms(config.training.deterministic)
    model = _with_adapter(prepared, base)
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
    enable_recompute(model, config, prepared.schedule.micro, choices)
    return AdaptedModel(
        model=model,
        split=split,
        device=base.device,
        autocast=autocast,
        vocabulary=int(split.weight.shape[0]),
        source_weights=prepared.data.loss_weights,
        seed=config.training.seed,
        rows=rows,
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

"""The base model inside an adapted one, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from glasstune.adapters.inject import base_biases
from glasstune.adapters.options import BASE_MOVED
from glasstune.core.errors import InputError


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Switches off every adapter, saved module, trained token and trained bias.

    Inside, the model computes what the base computes, bit for bit; what needs a gradient stays as
    it was, and no weight is copied. It does not nest into a forward that is running.

    Args:
        model: A PEFT model; a plain model passes unchanged.

    Raises:
        InputError: `base_moved`: the adapter's initialisation changed the base's weights.
    """
    if isinstance(model, PeftModel):
        _check_unmoved(model)
    switched: list[tuple[nn.Module, bool]] = []
    biases = base_biases(model)
    trained = {parameter: parameter.data for parameter in biases}
    try:
        for part in model.modules():
            if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                switched.append((part, part._disable_adapters))
                part._disable_adapters = True
        for parameter, original in biases.items():
            parameter.data = original
        yield
    finally:
        for part, before in switched:
            part._disable_adapters = before  # type: ignore[assignment]
        for parameter, value in trained.items():
            parameter.data = value


def _check_unmoved(model: PeftModel) -> None:
    for config in model.peft_config.values():
        how = str(getattr(config, "init_lora_weights", "")).lower()
        if how.startswith(BASE_MOVED) or getattr(config, "kasa_config", None) is not None:
            raise InputError(
                "base_moved",
                f"init_lora_weights={how} changes the base's weights, so the base itself is gone",
                where="adapter.init_lora_weights",
                fix="use init_lora_weights=true, or leave out what needs the base "
                "(kl_to_base, comparison with the base)",
            )

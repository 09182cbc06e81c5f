"""A saved adapter on a model without weights, with every tensor of its file accounted for.

PEFT injects into the model on the meta device, so that its own forward can run with the base's
weights filled in layer by layer, and what it would change can be read off.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import Parameter

from glasstune.adapters.inject import read_lora_config
from glasstune.adapters.options import BASE_MOVED, peft_remarks_unsaid
from glasstune.adapters.reading import bare_name, fit_keys, read_adapter_file
from glasstune.adapters.state import adapter_state
from glasstune.core.errors import InputError

_NOT_LINEAR = {
    "use_qalora": "QA-LoRA pools its input",
    "alora_invocation_tokens": "an activated LoRA depends on where its tokens stand",
    "use_bdlora": "block-diagonal LoRA has a layout of its own",
    "arrow_config": "Arrow routes each token on its own",
    "kasa_config": "KaSA changes the base's singular values",
    "monteclora_config": "MonteCLoRA draws its weights",
    "layer_replication": "it builds a model with more layers than its base",
    "megatron_config": "Megatron splits its layers",
}


@dataclass
class Attached:
    """An adapter laid onto an empty base.

    Args:
        model: PEFT's model; the base's own weights are on the meta device, the adapter's float32.
        config: The adapter's options.
        tensors: How many tensors the file has; all of them are in the model.
        replaced: Names of the base's own tensors that the file brings (trained biases, whole
            embeddings) to their values.
        whole: Ids of the modules that PEFT put around something.
        unread: Ids of modules whose weights no forward reads: the originals of saved copies.
        renamed: Whether the file's names carried a wrapper's prefix that was taken off.
        stored: The file's names, as they are.
    """

    model: PeftModel
    config: LoraConfig
    tensors: int
    replaced: dict[str, Tensor]
    whole: set[int]
    unread: set[int]
    renamed: bool
    stored: list[str]


def attach(
    model: Any, folder: Path, paths: Mapping[int, str], tensors: Mapping[str, Tensor] | None = None
) -> Attached:
    """Lays a saved adapter onto a base on the meta device.

    Args:
        model: From `models.empty.empty_model`, with as many embedding rows as `embedding_rows`
            says; PEFT wraps its modules in place.
        folder: In PEFT's format.
        paths: `models.streaming.module_paths` of the model as it is now.
        tensors: The file's content where it was read already.

    Raises:
        InputError: `no_adapter`, `bad_adapter`; `cannot_merge`: a method that is no change of
            weights; `adapter_keys`, `adapter_shape`: a tensor has no place, or a place no tensor.
    """
    config = read_lora_config(folder)
    refuse_unmergeable(config, folder)
    tensors = read_adapter_file(folder) if tensors is None else tensors
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.init_lora_weights = True  # how it once started does not matter to weights from a file
    config.base_model_name_or_path = None
    try:
        with peft_remarks_unsaid(), torch.device("meta"):
            wrapped: PeftModel = get_peft_model(model, config)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        says = " ".join(str(error).split())
        raise InputError(
            "adapter_refused",
            f"the adapter does not fit this base: {says}",
            where=str(folder),
            fix="give the adapter's own base with --base",
        ) from error
    expected = adapter_state(wrapped)
    whole_names = _whole_embeddings(model, paths, tensors, expected)
    rest = {name: value for name, value in tensors.items() if name not in whole_names}
    fitted = fit_keys(rest, expected, folder)
    renamed = any(name not in expected for name in rest)
    with peft_remarks_unsaid(), _stay_put(wrapped):
        set_peft_model_state_dict(
            wrapped, {name: _float(value) for name, value in fitted.items()}, low_cpu_mem_usage=True
        )
    _check_all_there(adapter_state(wrapped), fitted, folder)
    for name, path in whole_names.items():
        _replace(model, paths, path, _float(tensors[name]))
    wrapped.requires_grad_(False)
    wrapped.eval()
    return Attached(
        model=wrapped,
        config=config,
        tensors=len(tensors),
        replaced=_replaced(model, paths),
        whole={
            id(part)
            for part in wrapped.modules()
            if isinstance(part, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and not hasattr(part, "peft_config")
        },
        unread={
            id(inner)
            for part in wrapped.modules()
            if isinstance(part, ModulesToSaveWrapper)
            for inner in part.original_module.modules()
        },
        renamed=renamed,
        stored=list(tensors),
    )


@contextmanager
def _stay_put(model: nn.Module) -> Iterator[None]:
    """Keeps PEFT from moving adapters to where their base is: on the meta device they are lost."""
    move = "_move_adapter_to_device_of_base_layer"
    layers = [part for part in model.modules() if hasattr(part, move)]
    for layer in layers:
        layer.__dict__[move] = lambda *_, **__: None
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__[move]


def refuse_unmergeable(config: LoraConfig, folder: Path) -> None:
    """Refuses what is no fixed change of the base's weights.

    Raises:
        InputError: `cannot_merge`.
    """
    how = str(getattr(config, "init_lora_weights", "")).lower()
    if how.startswith(BASE_MOVED):
        raise InputError(
            "cannot_merge",
            f"the adapter started with init_lora_weights={how}, which moved part of the base's "
            "weights into it: its tensors belong to that moved base, not to the original",
            where=str(folder),
            fix="save it from PEFT with path_initial_model_for_weight_conversion, which turns it "
            "into an ordinary LoRA, and merge that",
        )
    for name, reason in _NOT_LINEAR.items():
        if getattr(config, name, None):
            raise InputError(
                "cannot_merge",
                f"{name} is set, and {reason}: there is no one weight that does the same",
                where=str(folder),
                fix="serve it with PEFT",
            )


def embedding_rows(tensors: Mapping[str, Tensor], model: Any, paths: Mapping[int, str]) -> int:
    """Returns how many rows the embedding had in training, read from an adapter's tensors.

    Args:
        tensors: Content of the adapter's file.
        model: The empty base.
        paths: Its modules' paths.

    Returns:
        The base's own number where no tensor of embedding or head says another.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    for name, value in tensors.items():
        bare = bare_name(name)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            path = paths.get(id(module))
            if path is None or not bare.startswith(f"{path}."):
                continue
            part = bare.removeprefix(f"{path}.").removeprefix("base_layer.")
            if part == "weight":
                rows = int(value.shape[0])
            elif part == "lora_embedding_A":
                rows = int(value.shape[1])
            elif part == "lora_B.weight":
                rows = int(value.shape[0])
    return rows


def _whole_embeddings(
    model: Any, paths: Mapping[int, str], tensors: Mapping[str, Tensor], expected: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the file's names of whole embeddings or heads beside their adapters, with paths.

    PEFT saves them so where the vocabulary was resized or they are targets.
    """
    known = {bare_name(name) for name in expected}
    found = {}
    for name in tensors:
        bare = bare_name(name)
        if bare in known:
            continue
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            inner = getattr(module, "base_layer", module)  # PEFT may stand around it already
            path = paths.get(id(inner)) or paths.get(id(getattr(module, "original_module", None)))
            if path is not None and bare in (f"{path}.weight", f"{path}.base_layer.weight"):
                found[name] = path
    return found


def _replace(model: Any, paths: Mapping[int, str], path: str, value: Tensor) -> None:
    """Puts a whole embedding in place, and into what is tied to it, as loading it would."""
    by_path = {paths[id(part)]: part for part in model.modules() if id(part) in paths}
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    name = f"{path}.weight"
    source = tied.get(name, name)
    for other in {name, source, *(key for key, to in tied.items() if to == source)}:
        by_path[other.removesuffix(".weight")]._parameters["weight"] = Parameter(
            value, requires_grad=False
        )


def _replaced(model: nn.Module, paths: Mapping[int, str]) -> dict[str, Tensor]:
    """Returns the base's own parameters that are no longer empty."""
    return {
        f"{paths[id(part)]}.{name}": value.detach()
        for part in model.modules()
        if id(part) in paths
        for name, value in part._parameters.items()
        if value is not None and not value.is_meta
    }


def _check_all_there(
    state: Mapping[str, Tensor], fitted: Mapping[str, Tensor], folder: Path
) -> None:
    lost = [
        name
        for name, value in fitted.items()
        if name not in state or state[name].is_meta or not torch.equal(state[name], _float(value))
    ]
    empty = [name for name, value in state.items() if value.is_meta]
    if lost or empty:
        raise InputError(
            "adapter_keys",
            f"{len(lost)} of {len(fitted)} tensors of the file did not arrive in the model, for "
            f"example {lost[:3]}; {len(empty)} places of the model stayed empty, for example "
            f"{empty[:3]}",
            where=str(folder),
            fix="save the adapter again with the installed PEFT",
        )


def _float(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value

"""Why each module converts or stays: a stable code and a sentence."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from glasstune.models.inspect.dry_run import converts_subclasses
from glasstune.models.quantization import is_quantized
from glasstune.models.skips import SkipReason, matches

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_DEFAULT_SENTENCES: dict[SkipReason, str] = {
    "head": "output head: transformers leaves it as it is by default",
    "last": "holds the model's last parameter: transformers leaves that module by default",
    "float32": "its class keeps it in float32 (_keep_in_fp32_modules)",
    "default": "on transformers' default list of what stays",
}
_DEFAULT_CODES: dict[SkipReason, str] = {
    "head": "output_head",
    "last": "last_module",
    "float32": "kept_float32",
    "default": "default_skip",
    "tied": "tied",
    "user": "skip_list",
}


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was asked for.

    Args:
        quantizes: Whether layers are converted at all.
        keys: Skip keys with their reasons; empty where nothing is converted.
        tied: Path of a module to the name that shares its weight.
        head: Path of the output head, None where there is none.
        already: Whether the module came quantised.
    """

    quantizes: bool
    keys: Mapping[str, SkipReason]
    tied: Mapping[str, str]
    head: str | None
    already: bool = False


def explain(
    path: str, module: nn.Module, original: nn.Module, tied_to: str | None, what: Conversion
) -> tuple[str, str]:
    """Returns the reason code and sentence of a module.

    Args:
        path: Its dotted name.
        module: As it is at this precision.
        original: As it is at 16 bit; the same object where it did not change.
        tied_to: Parameter that it shares and that counts elsewhere.
        what: The conversion.

    Returns:
        Two empty strings for a container without parameters of its own.
    """
    own = any(value is not None for value in module._parameters.values())
    if not own:
        return ("", "") if module._modules else _without_weights(module)
    if is_quantized(module):
        return _converted(module, original, tied_to, what)
    if tied_to is not None:
        return "tied", f"shares {tied_to}" + (", which stays" if what.quantizes else "")
    if not what.quantizes:
        return "kept_16bit", "nothing is converted at this precision"
    if is_eligible(original):
        if what.already:
            return "kept_16bit", "not quantised in this module"
        return _skipped(path, what)
    return _no_candidate(path, original, what)


def rule_text() -> str:
    """Returns the rule that the installed transformers converts by, found by trying it."""
    version = importlib.metadata.version("transformers")
    kinds = (
        "nn.Linear, its subclasses and Conv1D"
        if converts_subclasses()
        else "exactly nn.Linear and Conv1D, no subclass"
    )
    return (
        f"transformers {version} converts {kinds}; it leaves the output head, both sides of tied "
        "weights and the module of the last parameter, unless llm_int8_skip_modules replaces "
        "that list"
    )


def versions() -> dict[str, str]:
    """Returns the installed versions that decide what a load does."""
    names = ("transformers", "bitsandbytes", "peft", "torch")
    return {name: importlib.metadata.version(name) for name in names}


def _without_weights(module: nn.Module) -> tuple[str, str]:
    if any(value is not None for value in module._buffers.values()):
        return "no_weights", "holds no weights, only buffers"
    return "no_weights", "holds no weights"


def _converted(
    module: nn.Module, original: nn.Module, tied_to: str | None, what: Conversion
) -> tuple[str, str]:
    name = type(module).__name__
    if what.already:
        return "converted", f"{name}: quantised already"
    if tied_to is not None:
        return "converted_tied", (
            f"becomes {name}, but its weight is {tied_to}, which stays: the first forward raises"
        )
    turned = ", its weight transposed" if isinstance(original, Conv1D) else ""
    return "converted", f"{type(original).__name__} becomes {name}{turned}"


def is_eligible(module: nn.Module) -> bool:
    """Whether the installed transformers converts modules of this class."""
    if isinstance(module, Conv1D):
        return True
    return isinstance(module, nn.Linear) if converts_subclasses() else type(module) is nn.Linear


def _skipped(path: str, what: Conversion) -> tuple[str, str]:
    hits = {key: why for key, why in what.keys.items() if matches(path, key)}
    for key, why in hits.items():
        if why == "user":
            return "skip_list", f"the skip key {key!r} matches"
    # Its own key before one that hits by its ending.
    for key in sorted(hits, key=lambda key: key != path):
        why = hits[key]
        if why == "tied":
            partner = what.tied.get(path, "another parameter")
            return "tied", f"tied to {partner}: transformers leaves both sides"
        return _DEFAULT_CODES[why], _DEFAULT_SENTENCES[why]
    return "not_converted", "transformers left it as it is"


def _no_candidate(path: str, module: nn.Module, what: Conversion) -> tuple[str, str]:
    kind = type(module).__name__
    if path == what.head:
        return "output_head", _DEFAULT_SENTENCES["head"]
    if isinstance(module, nn.Linear):
        return "linear_subclass", (
            f"{kind} is a subclass of nn.Linear; this transformers converts exactly nn.Linear and "
            "Conv1D"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or kind.endswith("Embedding"):
        partner = what.tied.get(path)
        shares = f"; {partner} shares its weight" if partner else ""
        return "embedding", f"an embedding, not a Linear layer{shares}"
    if isinstance(module, _CONVOLUTIONS):
        return "convolution", "a convolution, not a Linear layer"
    if "norm" in kind.lower():
        return "norm", "a normalisation, not a Linear layer"
    deep = [tuple(value.shape) for value in module._parameters.values() if value is not None]
    experts = [shape for shape in deep if len(shape) == 3]
    if experts:
        text = " and ".join(" x ".join(f"{size:,}" for size in shape) for shape in experts)
        return "experts_3d", f"expert weights are 3-D tensors ({text}), not Linear layers"
    return "own_parameters", f"{kind} holds parameters itself and is not a Linear layer"

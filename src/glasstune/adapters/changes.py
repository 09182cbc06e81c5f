"""What an adapter does to each weight of its base, as plain float32 arithmetic.

Every change takes the base's weight in float32 and gives the adapted one; nothing is rounded in
between. Shape letters: n out, i in, r rank, V vocabulary, d width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import (
    DoraEmbeddingVariant,
    DoraLinearVariant,
    VeloraLinearVariant,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor

from glasstune.adapters.attach import Attached
from glasstune.core.errors import InputError


class Change(Protocol):
    """One change of one weight."""

    @property
    def kind(self) -> str:
        """What it is, for the record."""

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the changed weight; may work in the memory of the float32 one it was given."""

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns the change of these rows of the stored weight; None where it looks across."""


@dataclass(frozen=True)
class LowRank:
    """W + s B A, with DoRA's magnitude scaled to m by row.

    Args:
        up: B [n, r].
        down: A [r, i].
        scale: s.
        turned: The weight is stored as [i, n] (Conv1D, embeddings).
        magnitude: m [n] of DoRA, or None.
    """

    up: Tensor
    down: Tensor
    scale: float
    turned: bool = False
    magnitude: Tensor | None = None
    kind: str = "lora"

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the changed weight, in the memory of the one it was given."""
        view_NI = weight.T if self.turned else weight
        view_NI.addmm_(self.up, self.down, alpha=self.scale)
        if self.magnitude is not None:
            norm_N = torch.linalg.vector_norm(view_NI, dim=1)
            view_NI.mul_((self.magnitude.reshape(-1) / norm_N).unsqueeze(1))
        return weight

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns the change of some stored rows; a turned DoRA norms over all of them."""
        if self.turned:
            if self.magnitude is not None:
                return None
            return replace(self, down=self.down[:, start:stop])
        magnitude = None if self.magnitude is None else self.magnitude.reshape(-1)[start:stop]
        return replace(self, up=self.up[start:stop], magnitude=magnitude)


@dataclass(frozen=True)
class Experts:
    """W[e] + s B[e] A[e] for a parameter that holds all experts.

    Args:
        up: [E, n, r].
        down: [E, r, i].
        scale: s.
        turned: Each expert is stored as [i, n].
    """

    up: Tensor
    down: Tensor
    scale: float
    turned: bool
    kind: str = "lora on a parameter"

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the changed weight, in the memory of the one it was given."""
        for part, up, down in zip(weight, self.up, self.down, strict=True):
            (part.T if self.turned else part).addmm_(up, down, alpha=self.scale)
        return weight

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns the change of some experts."""
        return replace(self, up=self.up[start:stop], down=self.down[start:stop])


@dataclass(frozen=True)
class Replace:
    """Another tensor in its place: a saved module, a trained bias, a whole embedding."""

    value: Tensor
    kind: str = "saved whole"

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the new tensor."""
        return self.value.clone()

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns some of the new rows."""
        return replace(self, value=self.value[start:stop])


@dataclass(frozen=True)
class Rows:
    """Some rows of an embedding are others.

    Args:
        indices: Which.
        values: [len(indices), d].
    """

    indices: tuple[int, ...]
    values: Tensor
    kind: str = "trained tokens"

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the weight with its new rows."""
        return weight.index_copy(0, torch.tensor(self.indices, dtype=torch.long), self.values)

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns those that lie between."""
        inside = [place for place, index in enumerate(self.indices) if start <= index < stop]
        indices = tuple(self.indices[place] - start for place in inside)
        return replace(self, indices=indices, values=self.values[inside])


@dataclass(frozen=True)
class AddBias:
    """A bias of LoRA's own (`lora_bias`), added to the layer's."""

    value: Tensor
    kind: str = "lora_bias"

    def apply(self, weight: Tensor) -> Tensor:
        """Returns the sum."""
        return weight + self.value

    def rows(self, start: int, stop: int) -> Change | None:
        """Returns the part of some entries."""
        return replace(self, value=self.value[start:stop])


Changes = dict[str, list[Change]]


def read_changes(attached: Attached, paths: Mapping[int, str]) -> Changes:
    """Returns every weight that an adapter changes, by its name in the plain base.

    Args:
        attached: From `attach`.
        paths: Of the plain base's modules, as given to `attach`.

    Raises:
        InputError: `cannot_merge`: a layer whose adapter has no weight of the same effect.
    """
    changes: Changes = {name: [Replace(value)] for name, value in attached.replaced.items()}
    wrapped = attached.model
    name = wrapped.active_adapter
    for path, module in wrapped.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            _saved_module(changes, module, name, paths)
        elif isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            target = f"{paths[id(layer.base_layer)]}.weight"
            indices = tuple(int(index) for index in layer.token_indices[name])
            rows = layer.trainable_tokens_delta[name].detach()
            changes.setdefault(target, []).append(Rows(indices, rows))
        elif isinstance(module, BaseTunerLayer) and not hasattr(module, "peft_config"):
            if type(module).__name__ == "TrainableTokensLayer":
                continue
            if name in getattr(module, "scaling", {}):
                _layer(changes, module, name, paths, path)
    return changes


def same_effect(one: Sequence[Change], other: Sequence[Change]) -> bool:
    """Whether two lists of changes make one weight into the same, up to float32's rounding."""
    if len(one) != len(other):
        return False
    return all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(a: Change, b: Change) -> bool:
    if isinstance(a, Replace) and isinstance(b, Replace):
        return a.value.shape == b.value.shape and torch.equal(a.value, b.value)
    if isinstance(a, Rows) and isinstance(b, Rows):
        return a.indices == b.indices and torch.equal(a.values, b.values)
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        if a.magnitude is not None or b.magnitude is not None:
            return False
        return torch.equal(*_factors(a, b, "left")) and torch.equal(*_factors(a, b, "right"))
    return False


def _factors(a: LowRank, b: LowRank, side: str) -> tuple[Tensor, Tensor]:
    """The factor on one side of both, as of the weight that is stored; scaled on the left."""
    left = side == "left"
    found = []
    for change in (a, b):
        factor = change.up if left != change.turned else change.down
        factor = factor.T if change.turned else factor
        found.append(factor * change.scale if left else factor)
    return (found[0], found[1]) if found[0].shape == found[1].shape else (found[0], found[0] + 1)


def _saved_module(
    changes: Changes, module: ModulesToSaveWrapper, name: str, paths: Mapping[int, str]
) -> None:
    original, saved = module.original_module, module.modules_to_save[name]
    # By the original's own tree: PEFT copies it whole, so the names below are equal.
    by_name = dict(original.named_modules())
    for inner, part in saved.named_modules():
        base = paths[id(by_name[inner])]
        persistent = part._buffers.keys() - part._non_persistent_buffers_set
        own = {**part._parameters, **{key: part._buffers[key] for key in persistent}}
        for key, value in own.items():
            if value is not None:
                changes.setdefault(f"{base}.{key}", []).append(Replace(value.detach()))


def _layer(changes: Changes, module: Any, name: str, paths: Mapping[int, str], path: str) -> None:
    variant = module.lora_variant.get(name)
    base = paths[id(module.get_base_layer())]
    scale = float(module.scaling[name])
    if isinstance(module, ParamWrapper):
        target = f"{base}.{module.parameter_name}"
        changes.setdefault(target, []).append(_experts(module, name, scale))
        return
    known = (DoraLinearVariant, DoraEmbeddingVariant, VeloraLinearVariant)
    if variant is not None and type(variant) not in known:
        raise _refused(path, f"of the variant {type(variant).__name__}")
    magnitude = None
    if isinstance(variant, DoraLinearVariant):  # DoRA of embeddings is one too
        magnitude = module.lora_magnitude_vector[name].weight.detach()
    if type(module) is LoraEmbedding:
        up, down = module.lora_embedding_B[name].detach(), module.lora_embedding_A[name].detach()
        change = LowRank(up, down, scale, True, magnitude, _kind(magnitude))
    elif type(module) is LoraLinear:
        up, down = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
        turned = bool(module.fan_in_fan_out)
        change = LowRank(up, down, scale, turned, magnitude, _kind(magnitude))
        bias = module.lora_B[name].bias
        if bias is not None:
            if module.get_base_layer().bias is None:
                raise _refused(path, "with lora_bias on a layer without a bias")
            changes.setdefault(f"{base}.bias", []).append(AddBias(bias.detach() * scale))
    else:
        raise _refused(path, f"of the class {type(module).__name__}")
    changes.setdefault(f"{base}.weight", []).append(change)


def _experts(module: Any, name: str, scale: float) -> Change:
    down, up = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
    count = int(module.num_experts)
    if module.get_param().ndim == 2:
        return LowRank(up, down, scale, kind="lora on a parameter")
    down_ERI = down.reshape(count, -1, down.shape[-1])
    up_ENR = up.reshape(up.shape[0], -1, count).permute(2, 0, 1).contiguous()
    return Experts(up_ENR, down_ERI, scale, turned=not module._did_swap_in_out_features)


def _kind(magnitude: Tensor | None) -> str:
    return "lora" if magnitude is None else "dora"


def _refused(path: str, what: str) -> InputError:
    return InputError(
        "cannot_merge",
        f"the adapter on {path.removeprefix('base_model.model.')} is {what}, which has no weight "
        "of the same effect that is known here",
        where="adapter",
        fix="merge it with PEFT's merge_and_unload, or serve it with PEFT",
    )

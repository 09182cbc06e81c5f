"""How a training run is sped up: decided before the weights are adapted, applied after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.speed import ModuleSpeed, SpeedRecord
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from glasstune.training.inputs import FixedShape
    from glasstune.training.step import AdaptedModel

COMPILE_OPTIONS: dict[str, Any] = {}
"""More of `torch.compile`'s options, for every run of this process."""


@dataclass(frozen=True)
class SpeedChoice:
    """What `training.compile` comes to.

    Args:
        compiled: Whether blocks are compiled.
        grouped: Whether `speed_up` is used at all.
        reason: Why.
        shape: What batches are padded to; None = as they come.
        splits: Whether audits run a backward of their own for each term, on a compiled graph.
        options: Of `torch.compile`.
        ranks: Processes that share each update.
    """

    compiled: bool
    grouped: bool
    reason: str
    shape: FixedShape | None = None
    splits: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1

    def apply(
        self,
        adapted: AdaptedModel,
        choices: Choices,
        parameters: Sequence[Tensor],
        budget: float = 1.0,
    ) -> None:
        """Speeds a model up, and leaves the record of it in the model.

        Args:
            adapted: The model, complete but for this.
            choices: Where automatic choices are noted.
            parameters: Its trained tensors.
            budget: Share of their activations that compiled blocks keep.
        """
        from glasstune.fast.speed_up import speed_up
        from glasstune.training.replay import Replays

        if not self.grouped:
            adapted.speed_record = _all_plain(adapted.model, self.reason)
            return
        adapted.speed = speed_up(
            adapted.model, compile=self.compiled, choices=choices, compile_options=self.options,
            memory_budget=budget if budget < 1 else None,
        )  # fmt: skip
        adapted.speed_record = adapted.speed.record
        if self.compiled and self.splits:
            _keep_graphs(adapted)
        if not self.compiled or adapted.device.type != "cuda":
            return
        if why := self._no_replay(adapted):
            choices.record("training.cuda_graphs", False, why)
            return
        adapted.replays = Replays(adapted.model, adapted.speed, parameters, adapted.rows, choices)

    def _no_replay(self, adapted: AdaptedModel) -> str:
        """Returns why no forward can be replayed; empty: whether it pays is measured."""
        from glasstune.training.dropout import unseeded_dropout
        from glasstune.training.recompute import decoder_layers

        if self.ranks > 1:
            return "several ranks: NCCL's own thread asks the device while a graph is captured"
        if self.splits:
            return "an audited update runs one backward a term, a replayed forward has one in all"
        if self.shape is None or self.shape.multiple:
            return "rows are not packed: batches have many shapes"
        config: Any = adapted.model.config
        if unseeded_dropout(config):
            return "the base model's own dropout draws from torch's generator"
        if any(getattr(x, "gradient_checkpointing", False) for x in decoder_layers(adapted.model)):
            return "layers are computed again in the backward"
        return ""


def choose_speed(
    prepared: Prepared, device: torch.device, updates: int | None, plainly: str
) -> SpeedChoice:
    """Resolves `training.compile`.

    On a CPU the fast path is taken only where it is asked for: it was measured slower there at 4
    and 8 bit. But packed layers have float8 products nowhere else.

    Args:
        prepared: The run before its weights.
        device: Of the base.
        updates: How many will be made.
        plainly: Why nothing is sped up; empty: the config decides.

    Raises:
        InputError: `no_compiler`: asked for where it cannot work.
    """
    from glasstune.fast.compile import decide
    from glasstune.training.inputs import FixedShape

    config, choices = prepared.config, prepared.choices
    asked = config.training.compile
    inside = config.training.compute == "fp8" and config.model.bits != 16
    if plainly:
        if inside:
            choices.record("training.compute", "bf16", f"packed layers as PEFT has them: {plainly}")
        if asked is not False:
            choices.record("training.compile", False, plainly)
        return SpeedChoice(False, False, plainly)
    compiled, reason = decide(asked, device, updates, choices)
    if not compiled:
        return SpeedChoice(False, device.type != "cpu" or inside, reason)
    schedule, data = prepared.schedule, prepared.data
    shape = FixedShape.of_run(schedule.share, schedule.micro, (data.train, data.validation))
    return SpeedChoice(
        True, True, reason, shape,
        splits=len(prepared.terms) > 1 and config.audit.every_n_steps > 0,
        options={**({"dynamic": False} if shape and not shape.multiple else {}), **COMPILE_OPTIONS},
        ranks=prepared.schedule.ranks,
    )  # fmt: skip


def speed_line(record: SpeedRecord) -> str:
    """Says in one line how adapted modules are computed."""
    ways: Counter[str] = Counter(module.way for module in record.modules)
    reasons: dict[str, Counter[str]] = {}
    for module in record.modules:
        reasons.setdefault(module.way, Counter())[module.reason] += 1
    parts = []
    for way, count in ways.items():
        (first, _), *others = reasons[way].most_common()
        more = f" and {len(others)} more reasons" if len(others) > 1 else ""
        parts.append(f"{count} {way} ({first}{'; ' + others[0][0] if others else ''}{more})")
    compiled = f"; {len(record.compiled)} regions compiled" if record.compiled else ""
    return f"speed: of {len(record.modules)} adapted modules {', '.join(parts)}{compiled}"


def _keep_graphs(adapted: AdaptedModel) -> None:
    """Lets a compiled graph run more than one backward, until the model is undone.

    A graph that may give its saved tensors away saves a little memory and can run only one.
    """
    import torch._functorch.config as functorch

    before = functorch.donated_buffer
    functorch.donated_buffer = False
    adapted.after.append(lambda: setattr(functorch, "donated_buffer", before))


def _all_plain(model: Any, reason: str) -> SpeedRecord:
    from glasstune.adapters.lora_layers import adapted_modules
    from glasstune.fast.bases import stored_bits

    modules = []
    for path, layer in adapted_modules(model).items():
        part: Any = layer
        base = part.get_base_layer() if hasattr(part, "get_base_layer") else part.original_module
        modules.append(ModuleSpeed(path, "plain", reason, stored_bits(base)))
    return SpeedRecord(modules, [], [])

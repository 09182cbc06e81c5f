"""`glasstune plan`: bytes, seconds and disk of a run, before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.plan import Alternative, Moment, PlanRecord, Several
from glasstune.core.protocols import Progress
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes
from glasstune.workflows.plan_batch import shape_of
from glasstune.workflows.plan_device import Device, device_of
from glasstune.workflows.prepare_run import Prepared, prepare

if TYPE_CHECKING:
    from glasstune.planner.choose import Option
    from glasstune.planner.model import MemoryModel
    from glasstune.planner.trace import Batch

_MANY = (2, 4, 8)


def plan(config: Config, *, measure: bool = False, progress: Progress | None = None) -> PlanRecord:
    """Foretells a run; no weight is read unless it is measured.

    Args:
        config: The whole configuration; resolved in place.
        measure: Whether the model is loaded and one step of the longest batch is run.
        progress: Bars and log; None draws them on a terminal.

    Raises:
        InputError: Config, data or model are wrong, or the run does not fit (with the numbers).
    """
    if progress is None:
        from glasstune.reports.terminal import RichProgress

        progress = RichProgress()
    choices = Choices()
    prepared = prepare(config, choices, progress)
    planned = plan_run(prepared, progress)
    if measure:
        from glasstune.workflows.plan_measure import measured

        return measured(planned, progress)
    return planned.record


@dataclass(frozen=True)
class Planned:
    """A plan, and the run that it is of.

    Args:
        record: What is foretold.
        prepared: The run before its weights; the rows of a forward are those of the plan.
        recompute: Layers computed again.
    """

    record: PlanRecord
    prepared: Prepared
    recompute: Recompute


def plan_run(prepared: Prepared, progress: Progress, *, updates: int | None = None) -> Planned:
    """Plans a prepared run; refuses one that does not fit.

    Args:
        prepared: The run before its weights.
        progress: Log.
        updates: How many will be made by this start; None for all.

    Raises:
        InputError: `does_not_fit`: names the bytes and three ways out.
    """
    progress.say("planning memory and time")
    work = _Work(prepared, updates)
    option, rows = work.choose()
    schedule = replace(prepared.schedule, micro=rows)
    prepared.config.training.per_device_train_batch_size = rows
    record = work.record(option, rows)
    prepared.choices.record("plan.peak", format_bytes(record.peak_bytes), record.reason)
    return Planned(record, replace(prepared, schedule=schedule), option.recompute)


class _Work:
    """The numbers of one run."""

    def __init__(self, prepared: Prepared, updates: int | None) -> None:
        from glasstune.models.inspect.source import open_source
        from glasstune.planner.host import host_of
        from glasstune.planner.model import MemoryModel

        self.prepared = prepared
        self.config = prepared.config
        self.total = prepared.schedule.total if updates is None else updates
        self.device: Device = device_of(prepared, self.total)
        source = open_source(
            prepared.resolved.folder_or_id, trust_remote_code=prepared.resolved.trust_remote_code
        )
        self.model: MemoryModel = MemoryModel(_setup(prepared, self.device, source))
        batch = self._batch(prepared.schedule.micro)
        self.activations = self.model.activations(batch)
        self.batch = batch
        self.asked_rows = prepared.choices.get("training.per_device_train_batch_size") is None
        self.host = host_of(self.model) if self.device.kind == "cpu" else None
        self.device.measure(self.model, batch)
        self.limit, self.limit_reason = self.device.limit(self.config)

    def _batch(self, rows: int) -> Batch:
        from glasstune.planner.shadow import packing_of

        data = self.prepared.data
        base = self.model.shadow.model.get_base_model()
        way = packing_of(base, self.device.kind)
        return shape_of(
            (data.train, data.validation), rows, self.prepared.pad_id,
            documents=way == "documents", mask=way == "mask",
        )  # fmt: skip

    def choose(self) -> tuple[Option, int]:
        """Returns the fastest way that fits, and its rows of a forward."""
        from glasstune.planner.choose import fastest

        found: list[tuple[Option, int]] = []
        for rows in self._row_numbers():
            option = fastest(self.options(rows), self.limit)
            if option is not None:
                found.append((option, rows))
        if not found:
            raise self._refusal()
        return min(found, key=lambda pair: (pair[0].seconds, -pair[1]))

    def _row_numbers(self) -> list[int]:
        """Rows of a forward that may be tried: the schedule's, and smaller equal parts of it."""
        most, batch = self.prepared.schedule.micro, self.prepared.schedule.batch
        if self.asked_rows:
            return [most]
        parts = {-(-batch // forwards) for forwards in range(-(-batch // most), batch + 1)}
        return sorted((rows for rows in parts if rows <= most), reverse=True)

    def options(self, rows: int, length: int | None = None) -> list[Option]:
        """Works out every policy that the configuration allows, for some rows of a forward."""
        from glasstune.planner.choose import ways

        asked = self.config.training.recompute
        layers = self.model.layers
        cuda = self.device.kind == "cuda"

        def cost(recompute: Recompute) -> tuple[int, float]:
            return self.peak(rows, recompute, length).bytes, self.seconds(rows, recompute, length)

        every = ways(layers, cost, offload=cuda)
        if asked == "auto":
            return every
        wanted = Recompute(
            0 if asked == "none" else layers, offload=asked == "offload" and cuda and layers > 0
        )
        return [option for option in every if option.recompute == wanted]

    def moments(self, rows: int, recompute: Recompute, length: int | None = None) -> list[Moment]:
        """Returns the peaks of every phase."""
        from glasstune.planner.host import HOLES
        from glasstune.planner.peak import moments
        from glasstune.planner.trace import with_rows

        batch = with_rows(self.batch, rows)
        if length is not None:
            batch = replace(batch, length=length)
        activations = (
            self.activations if batch == self.batch else self.model.scaled(batch, self.batch)
        )
        static, host = self.model.static, self.host
        if host is not None:
            static = replace(static, base=static.base + host.mapped)
        return moments(
            static, activations, recompute,
            context=self.device.context if host is None else host.context,
            workspace=self.device.library if host is None else host.packed_head,
            holes=self.device.slack if host is None else HOLES[self.config.audit.every_n_steps > 0],
        )  # fmt: skip

    def peak(self, rows: int, recompute: Recompute, length: int | None = None) -> Moment:
        """Returns the highest moment."""
        from glasstune.planner.peak import peak

        return peak(self.moments(rows, recompute, length))

    def seconds(self, rows: int, recompute: Recompute, length: int | None = None) -> float:
        """Returns the mean seconds of an update."""
        from glasstune.planner.peak import step_flops
        from glasstune.planner.seconds import forward_seconds

        schedule = self.prepared.schedule
        share = rows * (length or self.batch.length) / self.batch.tokens
        flops = round(step_flops(self.activations, recompute) * share)
        forwards = schedule.batch / rows * self.batch.length / (length or self.batch.length)
        tokens = rows * (length or self.batch.length)
        once = forward_seconds(
            flops, tokens, self.device.rate, self.device.kind, self.model.setup.compiled
        )
        return forwards * once

    def record(self, option: Option, rows: int) -> PlanRecord:
        """Builds the record of a chosen way."""
        from glasstune.planner.choose import policy_name, reason
        from glasstune.planner.peak import owner, peak
        from glasstune.planner.several import ddp, fsdp2

        found = self.moments(rows, option.recompute)
        high = peak(found)
        training, data = self.config.training, self.prepared.data
        evaluation = self.evaluation_seconds(rows)
        layers = self.model.layers
        static = self.model.static
        layer = static.base // max(1, layers)
        shares = [] if self.device.kind == "cpu" else [
            share for count in _MANY for share in (ddp(static, count), fsdp2(static, count, layer))
        ]  # fmt: skip
        saved = static.adapters + static.optimizer
        kept = (training.save_total_limit or 1) + (1 if data.validation is not None else 0)
        return PlanRecord(
            peak_bytes=high.bytes,
            parts=high.parts,
            recompute_layers=option.recompute.layers,
            reason=reason(option, self.options(rows), self.limit, layers),
            updates=self.total,
            tokens_per_epoch=data.train.tokens,
            seconds_per_update=option.seconds,
            total_seconds=option.seconds * self.total + evaluation,
            basis="estimate",
            disk_bytes=kept * saved + static.adapters,
            alternatives=self.alternatives(option, rows),
            limit_bytes=self.limit,
            limit_reason=self.limit_reason,
            phase=high.phase,
            owner=owner(high),
            moments=found,
            layers=layers,
            recompute=policy_name(option.recompute, layers),
            model=self.config.model.path,
            bits=self.config.model.bits,
            device=self.device.name,
            rows=rows,
            length=self.batch.length,
            trained_tokens=self.batch.trained or self.batch.tokens,
            tokens_per_second=data.train.tokens
            / max(1e-9, option.seconds * self.prepared.schedule.updates_per_epoch),
            evaluation_seconds=evaluation,
            download_bytes=self.device.download(self.prepared, static.base),
            host_bytes=option.recompute.layers * self.activations.entering
            if option.recompute.offload
            else 0,
            basis_of=self._basis(),
            several=[self._several(share, rows, option.recompute) for share in shares],
            findings=self._findings(),
        )

    def _several(self, share: Any, rows: int, recompute: Recompute) -> Several:
        from glasstune.planner.peak import moments, peak
        from glasstune.planner.trace import with_rows

        batch = with_rows(self.batch, rows)
        activations = (
            self.activations if batch == self.batch else self.model.scaled(batch, self.batch)
        )
        high = peak(
            moments(
                share.static, activations, recompute, context=self.device.context,
                workspace=self.device.library + share.workspace, holes=self.device.slack,
            )
        )  # fmt: skip
        return Several(share.strategy, share.devices, high.bytes, high.parts)

    def evaluation_seconds(self, rows: int) -> float:
        """Returns the seconds of all evaluations: a third of a step's operations a row."""
        from glasstune.training.batching import evaluation_interval

        validation = self.prepared.data.validation
        if validation is None or self.total < 1:
            return 0.0
        training = self.config.training
        times = self.total // evaluation_interval(training, self.total)
        times += 1 if training.eval_on_start else 0
        once = self.seconds(rows, Recompute(0)) / self.prepared.schedule.batch / 3
        return times * once * validation.rows

    def alternatives(self, chosen: Option, rows: int) -> list[Alternative]:
        """Returns other policies, rows of a forward and lengths, those that fit first."""
        from glasstune.planner.choose import policy_name

        schedule, longest = self.prepared.schedule, self.batch.length
        found: list[Alternative] = []

        def add(change: dict[str, Any], recompute: Recompute, count: int, length: int) -> None:
            peak = self.peak(count, recompute, length).bytes
            seconds = self.seconds(count, recompute, length)
            total = seconds * self.total + self.evaluation_seconds(count)
            found.append(Alternative(change, peak, total, peak <= self.limit, seconds))

        layers = self.model.layers
        for policy in (Recompute(0), Recompute(layers), Recompute(layers, offload=True)):
            cuda = self.device.kind == "cuda"
            if policy != chosen.recompute and layers and (cuda or not policy.offload):
                name = policy_name(policy, layers)
                add({"training.recompute": name}, policy, rows, longest)
        for count in sorted({rows * 2, rows // 2, 1} - {rows, 0}):
            if count <= schedule.batch:
                key = "training.per_device_train_batch_size"
                add({key: count}, chosen.recompute, count, longest)
        for length in (longest // 2, longest * 2):
            if length >= 64:
                add({"data.max_length": length}, chosen.recompute, max(1, rows), length)
        return sorted(found, key=lambda item: (not item.fits, item.total_seconds))

    def _refusal(self) -> InputError:
        smallest = min(self._row_numbers())
        least = min(self.options(smallest), key=lambda option: option.peak)
        moment = self.peak(smallest, least.recompute)
        parts = ", ".join(
            f"{name} {format_bytes(size)}"
            for name, size in sorted(moment.parts.items(), key=lambda item: -item[1])[:3]
        )
        return InputError(
            "does_not_fit",
            f"the run needs {format_bytes(least.peak)} at its {moment.phase} ({parts}), and "
            f"{format_bytes(self.limit)} may be used ({self.limit_reason})",
            where="training.max_memory" if self.config.training.max_memory else "model.path",
            fix="; or ".join(self._ways_out(least, smallest)),
        )

    def _ways_out(self, least: Option, rows: int) -> list[str]:
        """Three ways, each with its number."""
        found = []
        config = self.config
        if config.model.bits > 4:
            fewer = self._base_at(4)
            peak = least.peak - self.model.static.base - self.model.static.wide + fewer
            found.append(f"model.bits: 4 (about {format_bytes(peak)})")
        if config.training.recompute in ("none", "full") and self.device.kind == "cuda":
            policy = Recompute(self.model.layers, offload=True)
            peak = self.peak(rows, policy).bytes
            found.append(f"training.recompute: auto or offload ({format_bytes(peak)})")
        elif config.training.recompute == "none":
            peak = self.peak(rows, Recompute(self.model.layers)).bytes
            found.append(f"training.recompute: auto ({format_bytes(peak)})")
        if rows > 1:
            peak = self.peak(1, least.recompute).bytes
            found.append(f"training.per_device_train_batch_size: 1 ({format_bytes(peak)})")
        length = max(64, self.batch.length // 2)
        shorter = self.peak(rows, least.recompute, length).bytes
        found.append(f"data.max_length: {length} ({format_bytes(shorter)})")
        found.append(f"a device or max_memory of {format_bytes(least.peak)} and more")
        if len(found) < 3:
            found.insert(0, "a smaller base model")
        return found[-3:] if len(found) > 3 and shorter > self.limit else found[:3]

    def _base_at(self, bits: int) -> int:
        from glasstune.models.inspect.precision import precision_record

        setup = self.model.setup
        record = precision_record(
            setup.source, bits, {"bnb_4bit_use_double_quant": True}, dtype=setup.dtype
        )
        return record.total_bytes

    def _basis(self) -> dict[str, str]:
        from glasstune.planner.host import HOLES

        found = {
            "base": "exact: transformers' own conversion, bytes by formula",
            "adapters": "exact: PEFT's own layers; gradients and optimiser states likewise",
            "activations": "; ".join(self.activations.notes),
            "seconds": self.device.rate_note,
            **self.device.notes,
        }
        if self.host is not None:
            found["context"] = "measured: what this process holds before the model is loaded"
            found["workspace"] = (
                "calibrated: free pieces that the heap cannot use again, "
                f"{HOLES[self.config.audit.every_n_steps > 0]:.0%} of the activations (resident "
                "peaks of SmolLM2-135M, glibc 2.36)"
            )
        return found

    def _findings(self) -> list[Finding]:
        names = [loss.name for loss in self.config.losses if loss.name != "next_token"]
        if not names:
            return []
        return [
            Finding(
                "terms_not_planned",
                "info",
                "losses",
                f"what {', '.join(names)} keep beside the next token's loss is not in the plan",
                "--measure runs a real step",
            )
        ]


def _setup(prepared: Prepared, device: Device, source: Any) -> Any:
    from glasstune.planner.model import Setup

    model = prepared.config.model
    adapter = prepared.config.adapter
    options = adapter.lora_options()
    if adapter.path is not None:
        from glasstune.adapters.overlay import saved_adapter_options

        options = {**saved_adapter_options(adapter.path), **adapter.given_options()}
    return Setup(
        source=source, bits=model.bits, adapter=options, quantization=model.quantization,
        dtype=model.dtype, int8_compute=model.int8_compute,
        optim=prepared.config.training.optim, target=device.kind, fast=device.fast,
        compiled=device.compiled, attention=model.attn_implementation or device.attention,
        packed=prepared.data.train.packed,
    )  # fmt: skip

"""The numbers of one run: bytes and seconds of every way to run it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glasstune.core.findings import Finding
from glasstune.core.plan import Moment, PlanRecord, Several
from glasstune.core.recompute import Recompute
from glasstune.core.units import format_bytes
from glasstune.workflows.plan_batch import shape_of
from glasstune.workflows.plan_device import Device, device_of
from glasstune.workflows.plan_disk import disk_bytes, no_room
from glasstune.workflows.plan_fp8 import fp8_note, with_fp8
from glasstune.workflows.plan_terms import planned_terms, terms_note, unplanned_terms
from glasstune.workflows.plan_ways import alternatives, in_order, refusal
from glasstune.workflows.prepare_run import Prepared

if TYPE_CHECKING:
    from glasstune.planner.choose import Option
    from glasstune.planner.model import MemoryModel
    from glasstune.planner.trace import Batch

_MANY = (2, 4, 8)

_HERE = (
    "on a CPU the inputs of recomputed layers are in host memory as it is, so all are recomputed"
)


class Work:
    """The numbers of one run.

    Args:
        prepared: The run before its weights.
        updates: How many will be made by this start; None for all.
        least: Free bytes of the rank that has least, where there are several.
        length: What the longest row is cut to; None for its own.
    """

    def __init__(
        self,
        prepared: Prepared,
        updates: int | None,
        least: int | None = None,
        length: int | None = None,
    ) -> None:
        from glasstune.models.inspect.source import open_source
        from glasstune.planner.host import host_of
        from glasstune.planner.model import MemoryModel

        self.prepared = prepared
        self.config = prepared.config
        self.total = prepared.schedule.total if updates is None else updates
        self.whole = updates is None
        self.device: Device = device_of(prepared, self.total)
        if prepared.sharded and self.config.model.bits == 16:  # compiled, but not joined
            self.device = replace(self.device, fast=False)
        source = open_source(
            prepared.resolved.folder_or_id, trust_remote_code=prepared.resolved.trust_remote_code
        )
        self.model: MemoryModel = MemoryModel(_setup(prepared, self.device, source))
        batch = self._batch(prepared.schedule.micro)
        if length is not None:
            batch = _cut(batch, length)
        self.activations = self.model.activations(batch)
        self.batch = batch
        self.asked_rows = prepared.choices.get("training.per_device_train_batch_size") is None
        self.host = host_of(self.model) if self.device.kind == "cpu" else None
        self.device.measure(self.model, batch)
        self.limit, self.limit_reason = self.device.limit(self.config)
        self._of_ranks(least)

    def _of_ranks(self, least: int | None) -> None:
        """Takes what several ranks leave each of them."""
        from glasstune.planner.several import NCCL_BYTES, ddp, fsdp2, layer_weights

        static, ranks = self.model.static, self.prepared.schedule.ranks
        self.sharded_bytes, self.layer_bytes = layer_weights(self.model)
        self.static, self.exchange = static, 0
        if ranks == 1:
            return
        share = ddp(static, ranks)
        if self.prepared.sharded:
            share = fsdp2(static, ranks, sharded=self.sharded_bytes, layer=self.layer_bytes)
        cuda = self.device.kind == "cuda"
        self.static = share.static
        self.exchange = share.workspace - (0 if cuda else NCCL_BYTES)
        if least is not None and least + self.device.context < self.limit:
            self.limit = least + self.device.context
            self.limit_reason = "the rank that has least" if cuda else "shared by the ranks here"

    def _batch(self, rows: int) -> Batch:
        from glasstune.planner.shadow import packing_of

        data = self.prepared.data
        base = self.model.shadow.model.get_base_model()
        way = packing_of(base, self.device.kind, self.device.fast or self.device.compiled)
        batch = shape_of(
            (data.train, data.validation), rows, self.prepared.pad_id,
            documents=way == "documents", mask=way == "mask",
        )  # fmt: skip
        if self.device.compiled and not data.train.packed:
            from glasstune.training.inputs import FixedShape

            schedule = self.prepared.schedule
            shape = FixedShape.of_run(schedule.share, schedule.micro, (data.train, data.validation))
            batch = replace(batch, length=batch.length if shape is None else shape.length)
        return batch

    def choose(self) -> tuple[Option, int]:
        """Returns the fastest way that fits, and its rows of a forward."""
        from glasstune.planner.choose import fastest

        found: list[tuple[Option, int]] = []
        for rows in self.row_numbers():
            option = fastest(self.options(rows), self.limit)
            if option is not None:
                found.append((option, rows))
        if not found:
            raise refusal(self)
        return min(found, key=lambda pair: (pair[0].seconds, -pair[1]))

    def changed(self, prepared: Prepared, length: int | None = None) -> Work:
        """Works another run out, against the same limit.

        Args:
            prepared: It.
            length: What its longest row is cut to.
        """
        other = Work(prepared, self.total, length=length)
        other.limit, other.limit_reason = self.limit, self.limit_reason
        other.asked_rows = self.asked_rows
        if other.host is not None and self.host is not None:  # planning itself made it grow
            other.host = replace(other.host, context=self.host.context)
        return other

    def least_option(self) -> tuple[Option, int]:
        """Returns the way that takes the fewest bytes, and its rows of a forward."""
        rows = min(self.row_numbers())
        return min(self.options(rows), key=lambda option: option.peak), rows

    def row_numbers(self) -> list[int]:
        """Returns the rows of a forward that may be tried: the schedule's, smaller equal parts."""
        most, batch = self.prepared.schedule.micro, self.prepared.schedule.share
        if self.asked_rows:
            return [most]
        parts = {-(-batch // forwards) for forwards in range(-(-batch // most), batch + 1)}
        return sorted((rows for rows in parts if rows <= most), reverse=True)

    def options(self, rows: int, length: int | None = None) -> list[Option]:
        """Works out every policy that the configuration allows, for some rows of a forward."""
        from glasstune.planner.choose import ways
        from glasstune.training.recompute import decoder_layers

        asked = self.config.training.recompute
        layers = self.model.layers
        cuda = self.device.kind == "cuda"

        def cost(recompute: Recompute) -> tuple[int, float]:
            return self.peak(rows, recompute, length).bytes, self.seconds(rows, recompute, length)

        every = ways(layers, cost, offload=cuda)
        if asked == "auto":
            if self.device.compiled and every[0].peak > self.limit:
                self.activations = self.model.lighter(self.batch)
                every = ways(layers, cost, offload=cuda, budgets=(1.0, *self.activations.light))
            if len(decoder_layers(self.model.shadow.model)) == len(self.model.shadow.blocks):
                return every
            # An old family has one switch for all layers.
            return [option for option in every if option.recompute.layers in (0, layers)]
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
        static, host = self.static, self.host
        if host is not None:
            static = replace(static, base=static.base + host.mapped)
        return moments(
            static, activations, recompute,
            context=self.device.context if host is None else host.context,
            workspace=self.exchange
            + (self.device.library if host is None else host.packed_head),
            holes=self.device.slack if host is None else HOLES[self.config.audit.every_n_steps > 0],
            split=self.model.setup.split, accumulates=self.prepared.schedule.share > rows,
        )  # fmt: skip

    def peak(self, rows: int, recompute: Recompute, length: int | None = None) -> Moment:
        """Returns the highest moment."""
        from glasstune.planner.peak import peak

        return peak(self.moments(rows, recompute, length))

    def seconds(self, rows: int, recompute: Recompute, length: int | None = None) -> float:
        """Returns the mean seconds of an update."""
        from glasstune.planner.peak import step_flops, step_traffic
        from glasstune.planner.seconds import forward_seconds

        schedule = self.prepared.schedule
        share = rows * (length or self.batch.length) / self.batch.tokens
        flops = round(step_flops(self.activations, recompute) * share)
        forwards = schedule.share / rows * self.batch.length / (length or self.batch.length)
        tokens = rows * (length or self.batch.length)
        traffic = step_traffic(self.activations, recompute) * share
        once = forward_seconds(
            flops, tokens, self.device.rate, self.device.kind, self.model.setup.compiled,
            traffic / self.device.bandwidth, self.model.float8_flops(tokens, recompute),
        )  # fmt: skip
        return forwards * once

    def record(self, option: Option, rows: int) -> PlanRecord:
        """Builds the record of a chosen way."""
        from glasstune.planner.choose import policy_name, reason
        from glasstune.planner.peak import owner, peak
        from glasstune.planner.several import ddp, fsdp2

        found = self.moments(rows, option.recompute)
        high = peak(found)
        data, seconds = self.prepared.data, option.seconds * self.total
        disk = disk_bytes(self.prepared, self.model.static, self.total, seconds)
        evaluation = self.evaluation_seconds(rows)
        layers = self.model.layers
        static = self.model.static
        sharded, layer = self.sharded_bytes, self.layer_bytes
        others = alternatives(self, option, rows)
        findings = [*self._findings(), *no_room(self.prepared, disk)]
        if self.whole and (fp8 := with_fp8(self, rows)) is not None:
            others, findings = sorted([*others, fp8[0]], key=in_order), [*findings, fp8[1]]
        shares = [] if self.device.kind == "cpu" else [
            share
            for count in _MANY
            for share in (ddp(static, count), fsdp2(static, count, sharded=sharded, layer=layer))
        ]  # fmt: skip
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
            disk_bytes=disk,
            alternatives=others,
            limit_bytes=self.limit,
            limit_reason=self.limit_reason,
            phase=high.phase,
            owner=owner(high),
            moments=found,
            layers=layers,
            layer_bytes=self._layer_bytes(option.recompute),
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
            findings=findings,
        )

    def _layer_bytes(self, recompute: Recompute) -> list[int]:
        blocks = self.activations.blocks(recompute)
        away = recompute.layers if recompute.offload else 0
        return [0 if index < away else block.kept for index, block in enumerate(blocks)]

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
                split=self.model.setup.split,
                accumulates=self.prepared.schedule.share > rows,
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
        schedule = self.prepared.schedule
        once = self.seconds(rows, Recompute(0)) / schedule.share / 3
        return times * once * -(-validation.rows // schedule.ranks)

    def _basis(self) -> dict[str, str]:
        from glasstune.planner.host import HOLES

        found = {
            "base": "exact: transformers' own conversion, bytes by formula",
            "adapters": "exact: PEFT's own layers; gradients and optimiser states likewise",
            "activations": "; ".join(self.activations.notes),
            **({"losses": note} if (note := terms_note(self.prepared.terms)) else {}),
            **({"fp8": fp8_note(self.config)} if self.config.training.compute == "fp8" else {}),
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
        found: list[Finding] = []
        if self.config.training.recompute == "offload" and self.device.kind != "cuda":
            found.append(
                Finding(
                    "offload_is_full", "info", "training.recompute", f"offload asked for: {_HERE}"
                )
            )
        free, given = self.device.free(), self.config.training.max_memory
        if given is not None and self.limit > free:
            text = f"{given} may be used, and {format_bytes(free)} are free on the device now"
            fix = "lower it, or free the device: the plan does not keep the run from running short"
            where = "training.max_memory"
            found.append(Finding("max_memory_above_free", "warning", where, text, fix))
        found += unplanned_terms(self.prepared.terms)
        return found


def _cut(batch: Batch, length: int) -> Batch:
    """Returns the same rows, cut; all that is left may be trained."""
    trained = None if batch.trained is None else min(batch.trained, batch.rows * length)
    bounds = None if batch.bounds is None else ((0, length),) * batch.rows
    return replace(batch, length=length, trained=trained, bounds=bounds)


def _setup(prepared: Prepared, device: Device, source: Any) -> Any:
    from glasstune.planner.model import Setup

    model = prepared.config.model
    adapter = prepared.config.adapter
    options = adapter.lora_options()
    if adapter.path is not None:
        from glasstune.adapters.overlay import saved_adapter_options

        options = {**saved_adapter_options(adapter.path), **adapter.given_options()}
    training = prepared.config.training
    keep = () if training.fp8_keep == "auto" else tuple(training.fp8_keep)
    return Setup(
        source=source, bits=model.bits, adapter=options, quantization=model.quantization,
        dtype=model.dtype, int8_compute=model.int8_compute,
        optim=prepared.config.training.optim, target=device.kind, fast=device.fast,
        compiled=device.compiled, attention=model.attn_implementation or device.attention,
        packed=prepared.data.train.packed, fp8=training.compute == "fp8", fp8_keep=keep,
        **planned_terms(prepared),
    )  # fmt: skip

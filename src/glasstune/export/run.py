"""A whole merge: planned, written aside, compared, put in place."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from glasstune.core.certificate import Certificate
from glasstune.core.choices import Choices
from glasstune.core.errors import RunError
from glasstune.core.files import disk_full_named, write_json_atomic
from glasstune.core.findings import Finding
from glasstune.core.memory import peak_resident_bytes
from glasstune.core.protocols import Progress
from glasstune.export.certificate import Measured, measure
from glasstune.export.companions import write_companions
from glasstune.export.merge import write_weights
from glasstune.export.merge_plan import MergeJob, MergePlan, make_plan
from glasstune.export.place import aside, check_space, put_in_place
from glasstune.export.prompts import Prompts
from glasstune.export.readers import readers
from glasstune.models.load import choose_device

GATE = "merge_kl_mean"
_PACKAGES = ("glasstune", "torch", "transformers", "peft", "safetensors")
_SPARE = 64 * 2**20

Extra = Callable[[Path], list[Path]]
"""Writes further files (GGUF) into the finished folder and names them."""


@dataclass
class MergeRun:
    """What `merge` needs beside the plan.

    Args:
        job: What is merged into what.
        output: The folder to make; checked by `place.check_output`.
        prompts: Makes what is compared, once everything fits; None measures nothing.
        max_kl: Limit of the gate.
        stops: Ids that end an answer.
        trained_on: The base's fingerprint that the adapter names, or None.
        extra: Writes further files; None writes none.
        extra_bytes: An estimate of their size, from that of the weights.
        choices: What was decided before.
        findings: What was found before.
        device: Where the comparison runs: `auto`, `cpu`, `cuda`.
    """

    job: MergeJob
    output: Path
    prompts: Callable[[], Prompts] | None
    max_kl: float
    stops: Sequence[int] = ()
    trained_on: str | None = None
    extra: Extra | None = None
    extra_bytes: Callable[[int], int] = lambda size: 0
    choices: Choices = field(default_factory=Choices)
    findings: list[Finding] = field(default_factory=list)
    device: str = "auto"


def merge(run: MergeRun, progress: Progress | None = None) -> Certificate:
    """Merges an adapter and puts the output in place where its certificate passes.

    Raises:
        InputError: Base, adapter and options do not fit each other.
        RunError: `disk_full`, `not_finite`, or `certificate_failed`: the output is not there, the
            certificate beside it is.
    """
    began = time.monotonic()
    plan = make_plan(run.job)
    prompts = None if run.prompts is None else run.prompts()
    check_space(run.output, _needed(run, plan, prompts))
    if progress is not None:
        for finding in (*run.findings, *plan.findings, *_type_findings(plan)):
            hint = f" (hint: {finding.fix})" if finding.fix else ""
            progress.say(f"{finding.severity}: {finding.where}: {finding.message}{hint}")
    with aside(run.output) as folder:
        try:
            with disk_full_named(run.output, plan.bytes):
                write_companions(plan, folder, run.stops, run.choices)
                changed = write_weights(plan, folder, progress)
                written = time.monotonic()
                measured = _measure(run, plan, prompts, folder, progress)
                record = _record(run, plan, prompts or Prompts(), changed, measured)
                record.seconds = {
                    "merge": round(written - began, 3),
                    "certificate": round(time.monotonic() - written, 3),
                }
                _gate(run, record, measured)
                if run.extra is not None:
                    run.extra(folder)
                record.files = sorted(
                    [*(str(f.relative_to(folder)) for f in folder.rglob("*") if _shown(f)),
                     "certificate.json"]
                )  # fmt: skip
                record.peak_memory_bytes = peak_resident_bytes()
                write_json_atomic(folder / "certificate.json", record.to_dict())
                put_in_place(folder, run.output)
        except RunError as error:
            if error.code == "disk_full":
                error.fix = "free space, or name a folder on another disk with --output"
            raise
    failed_certificate(run.output).unlink(missing_ok=True)
    return record


def failed_certificate(output: Path) -> Path:
    """Returns where the certificate of a refused merge lies: beside the output."""
    return output.with_name(f"{output.name}.certificate.json")


def _shown(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _needed(run: MergeRun, plan: MergePlan, prompts: Prompts | None) -> int:
    """Bytes on the disk: weights, small files, and logits of two models for the comparison."""
    logits = 0
    if prompts is not None:
        rows = plan.rows or plan.job.resolved.config.get_text_config(decoder=True).vocab_size
        logits = 2 * 4 * (prompts.tokens + 8 * len(prompts.generic)) * rows
    return plan.bytes + logits + run.extra_bytes(plan.bytes) + _SPARE


def _measure(
    run: MergeRun, plan: MergePlan, prompts: Prompts | None, folder: Path,
    progress: Progress | None,
) -> Measured | None:  # fmt: skip
    if prompts is None:
        return None
    device = choose_device(run.device, run.choices)
    return measure(plan, folder, prompts, device=device, progress=progress)


def _gate(run: MergeRun, record: Certificate, measured: Measured | None) -> None:
    if measured is None or record.passed:
        return
    place = failed_certificate(run.output)
    write_json_atomic(place, record.to_dict())
    held_out = record.prompts["held_out"]
    row = measured.worst_row
    less = "" if run.job.dtype == "float32" else "--dtype float32 rounds less, "
    worst = f"held-out row {row + 1}" if row < held_out else f"generic prompt {row + 1 - held_out}"
    raise RunError(
        "certificate_failed",
        f"the merged model is not the tuned one: {GATE} is {measured.merge.mean:.3g}, the limit is "
        f"{run.max_kl:g} (worst token {measured.merge.worst:.3g}, in {worst}); the output was not "
        "put in place",
        where=str(run.output),
        fix=f"{place} has all numbers; {less}--max-kl moves the limit",
    )


def _record(
    run: MergeRun, plan: MergePlan, prompts: Prompts, changed: int, measured: Measured | None
) -> Certificate:
    job = run.job
    mean = None if measured is None else measured.merge.mean
    kinds = Counter(change.kind for changes in plan.changes.values() for change in changes)
    return Certificate(
        passed=None if mean is None else bool(mean <= run.max_kl),  # a NaN does not pass
        gate=GATE,
        max_kl=run.max_kl,
        merge_kl_mean=mean,
        merge_kl_max=None if measured is None else measured.merge.worst,
        merge_max_logit_difference=None if measured is None else measured.merge.logit_difference,
        token_agreement=None if measured is None else measured.merge.agreement,
        greedy_agreement=None if measured is None else measured.greedy_agreement,
        rounding_kl_mean=None
        if measured is None or measured.rounding is None
        else measured.rounding.mean,
        base_kl_mean=None if measured is None else measured.base_kl_mean,
        prompts={
            "held_out": len(prompts.held_out),
            "generic": len(prompts.generic),
            "tokens": 0 if measured is None else measured.tokens,
            "greedy_tokens": 0 if measured is None else measured.greedy_tokens,
        },
        base={
            "path": job.resolved.path,
            "folder": str(job.folder),
            "fingerprint": job.resolved.fingerprint,
            "trained_on": run.trained_on,
            "precision": None if plan.training is None else plan.training.label,
        },
        onto=job.onto,
        dtype=job.dtype,
        readers=readers(plan),
        adapter={
            "path": str(job.adapter),
            "kinds": dict(kinds),
            "tensors": plan.attached.tensors,
        },
        weights={
            "changed": changed,
            "copied": len(plan.slots) - changed,
            "bytes": plan.bytes,
        },
        tied=plan.tied,
        output=str(run.output),
        peak_memory_bytes=peak_resident_bytes(),
        choices=run.choices.to_list(),
        findings=[*run.findings, *plan.findings, *_type_findings(plan)],
        versions={name: version(name) for name in _PACKAGES},
    )


def _type_findings(plan: MergePlan) -> list[Finding]:
    """Says where the output's type rounds the base itself, and what it does to ties."""
    found = []
    stored = Counter(
        plan.reader.places[key].dtype for group in plan.reader.map.groups for key in group.keys
    )
    main, dtype = stored.most_common(1)[0][0], plan.job.dtype
    if main != dtype and dtype != "float32":
        found.append(
            Finding(
                "base_rounded",
                "warning",
                "--dtype",
                f"the base is stored as {main}: as {dtype} its own weights are rounded too",
                f"--dtype {main} keeps them",
            )
        )
    if plan.tied == "untied":
        names = ", ".join(plan.untied)
        says = f"{names} is a weight of its own now, written so in config.json: the adapter "
        says += "changes it apart from what it shared"
        found.append(Finding("untied", "info", names, says))
    if plan.job.onto == "training" and plan.training is not None:
        says = f"the adapter was added to the base as training had it ({plan.training.label})"
        found.append(Finding("onto_training", "info", "--onto", says))
    return found

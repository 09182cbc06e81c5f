"""`glasstune merge`: a run or adapter in, a whole model with a certificate out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from glasstune.core.certificate import Certificate, Onto
from glasstune.core.choices import Choices
from glasstune.core.config import Config, ModelConfig
from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError
from glasstune.core.findings import Finding
from glasstune.core.protocols import Progress
from glasstune.workflows.open_model import ADAPTER_CONFIG, Location, is_run, locate

if TYPE_CHECKING:
    from glasstune.export.prompts import Prompts
    from glasstune.models.resolve import ResolvedModel

GGUF_KINDS = ("f16", "q8_0")
FINGERPRINT = "glasstune_base"
"""Key in the header of an adapter's file: the fingerprint of the base that it was trained on."""


def merge(
    run_or_adapter: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    checkpoint: str | None = None,
    dtype: str = "bfloat16",
    onto: str = "original",
    max_kl: float = 1e-3,
    certificate: bool = True,
    gguf: Sequence[str] = (),
    force: bool = False,
    trust_remote_code: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> Certificate:
    """Merges an adapter into a 16- or 32-bit copy of its base and compares the two.

    The base is read tensor by tensor, so a model far larger than the memory can be merged.

    Args:
        run_or_adapter: Run folder, adapter folder in PEFT's format, or the hub id of one.
        output: The folder to make.
        base: Folder, hub id or GGUF file of the base; None for the one that the run or adapter
            names. It must be the one that the adapter was trained on.
        checkpoint: `best`, `last` or `step-N` of a run.
        dtype: Type of the merged weights: bfloat16, float16 or float32.
        onto: `original`: the base's own weights; `training`: what the run's 8- or 4-bit storage
            made of them.
        max_kl: Largest mean divergence of the merged model from base and adapter apart, in nats.
        certificate: Whether they are compared at all.
        gguf: `f16`, `q8_0` or both: GGUF files beside the weights.
        force: Whether a model in the output folder is replaced.
        trust_remote_code: Whether code of the checkpoint may run.
        device: Where the comparison runs: auto, cpu or cuda.
        progress: Bars and log.

    Returns:
        The certificate, as it lies in the output's `certificate.json`.

    Raises:
        InputError: Adapter, base or options do not fit; nothing was written.
        RunError: `certificate_failed`, `disk_full` or `not_finite`: the output is not there.
    """
    _check_options(dtype, onto, max_kl, gguf, device)
    target = Path(output).expanduser()
    location = _locate(str(run_or_adapter), checkpoint, base)
    assert location.adapter is not None
    config = _run_config(location.adapter)
    trained = None if config is None else config.model
    if onto == "training" and trained is None:
        raise InputError(
            "no_training_precision",
            "only a run tells the precision that training used, and this adapter lies in none",
            where=str(run_or_adapter),
            fix="leave --onto out, or name the run's folder",
        )
    choices, findings = Choices(), list[Finding]()
    trust = trust_remote_code or bool(trained and trained.trust_remote_code)
    from glasstune.export.merge_plan import MergeJob
    from glasstune.export.place import check_output
    from glasstune.export.run import MergeRun
    from glasstune.export.run import merge as run
    from glasstune.models.empty import local_folder

    sources = [location.adapter]
    local = Path(base or location.model.path).expanduser()
    sources += [local] if local.exists() else []
    if config is not None:
        sources.append(_run_folder(location.adapter))
    check_output(target, sources, force=force)
    resolved = _resolve(base, location, trust, choices)
    trained_on = _check_base(resolved, location, config, findings)
    job = MergeJob(
        adapter=location.adapter, resolved=resolved, folder=local_folder(resolved),
        trained=trained, onto=cast(Onto, onto), dtype=dtype, fp8_keep=_fp8_keep(config),
    )  # fmt: skip
    tokenizer = _tokenizer(location.adapter, job.folder, trust, findings)
    if gguf:
        from glasstune.export.gguf_check import check_gguf_form

        check_gguf_form(
            resolved.config, _tokenizer_folder(location.adapter, job.folder), resolved.path
        )

    def prompts() -> Prompts:
        return _prompts(tokenizer, resolved, config, findings, progress)

    return run(
        MergeRun(
            job=job, output=target, prompts=prompts if certificate else None, max_kl=max_kl,
            stops=_stops(tokenizer),
            trained_on=trained_on, choices=choices, findings=findings, device=device,
            extra=_gguf_step(gguf, progress), extra_bytes=lambda size: size * len(gguf),
        ),
        progress,
    )  # fmt: skip


def _check_options(dtype: str, onto: str, max_kl: float, gguf: Sequence[str], device: str) -> None:
    for option, value, allowed in (
        ("--dtype", [dtype], ("bfloat16", "float16", "float32")),
        ("--onto", [onto], ("original", "training")),
        ("--gguf", gguf, GGUF_KINDS),
        ("--device", [device], ("auto", "cpu", "cuda")),
    ):
        for word in value:
            if word not in allowed:
                raise InputError(
                    "bad_option",
                    f"{word!r} is not one of {', '.join(allowed)}",
                    where=option,
                    fix=f"use {' or '.join(allowed)}",
                )
    if len(set(gguf)) != len(gguf):
        raise InputError("bad_option", "a kind is named twice", where="--gguf", fix="name it once")
    if not (max_kl >= 0 and math.isfinite(max_kl)):
        raise InputError(
            "bad_option",
            f"max_kl is {max_kl}, but must be a number of 0 or more",
            where="--max-kl",
            fix="give a limit in nats, for example 0.001",
        )
    if device == "cuda":  # seen now, not after all weights are written
        from glasstune.models.load import choose_device

        try:
            choose_device(device, Choices())
        except InputError as error:
            error.where, error.message = "--device", "torch sees no CUDA device"
            error.fix = "use --device cpu, or install a CUDA build of torch and a driver"
            raise


def _locate(target: str, checkpoint: str | None, base: str | None) -> Location:
    """A run's or adapter's place; an adapter on the hub is fetched."""
    try:
        location = locate(target, checkpoint)
    except InputError as error:
        if error.code != "no_base":
            raise
        if base is None:
            error.fix = "name it with --base"
            raise
        return Location("adapter", ModelConfig(path=base), Path(target).expanduser())
    if location.kind != "model":
        return location
    path = Path(target).expanduser()
    if not path.exists():
        from glasstune.models.hub import hub_adapter
        from glasstune.models.resolve import looks_like_path, missing_path

        if looks_like_path(target):
            missing = missing_path(target, path)
            missing.where = "RUN_OR_ADAPTER"
            raise missing
        try:
            folder = hub_adapter(target)
        except InputError as error:
            error.where = "RUN_OR_ADAPTER"
            error.fix = error.fix.replace(
                "give a local folder as model.path", "name the folder of a run or an adapter"
            )
            raise
        if folder is not None:
            return _locate(str(folder), None, base)
    raise InputError(
        "no_adapter",
        f"{target} is neither a run nor an adapter: there is nothing to merge",
        where="RUN_OR_ADAPTER",
        fix=f"name a run's folder, or a folder that holds {ADAPTER_CONFIG}",
    )


def _run_folder(adapter: Path) -> Path:
    return adapter.parent if is_run(adapter.parent) else adapter.parent.parent


def _run_config(adapter: Path) -> Config | None:
    """The configuration of the run that an adapter lies in, or None."""
    folder = _run_folder(adapter)
    return load_config(folder / "config.yaml", []).config if is_run(folder) else None


def _resolve(base: str | None, location: Location, trust: bool, choices: Choices) -> ResolvedModel:
    from glasstune.models.resolve import resolve_model

    path = base or location.model.path
    try:
        return resolve_model(path, trust_remote_code=trust, choices=choices)
    except InputError as error:
        if error.code == "remote_code_needed":
            error.fix = "read that code, then give --trust-remote-code"
        # A relative path without a separator looks like an id of the hub from another folder.
        gone = ("model_not_found", "hub_unreachable", "bad_model_id")
        if base is None and error.code in gone:
            raise InputError(
                "base_not_found",
                f"the base that the adapter names is not there: {error.message}",
                where=str(location.adapter),
                fix="name it with --base (relative paths are taken from the folder in which the "
                "command runs)",
            ) from error
        if base is not None:
            error.where = "--base"
        raise


def _check_base(
    resolved: ResolvedModel, location: Location, config: Config | None, findings: list[Finding]
) -> str | None:
    """Compares the base with the one that the adapter was trained on, as far as both tell.

    Raises:
        InputError: `wrong_base`, naming both.
    """
    assert location.adapter is not None
    trained_on = _trained_on(location.adapter, config)
    if trained_on is None:
        says = "the adapter does not tell the fingerprint of its base: only names and shapes of "
        says += "its tensors were compared"
        findings.append(Finding("base_unverified", "info", str(location.adapter), says))
        return None
    if trained_on == resolved.fingerprint:
        return trained_on
    named = location.model.path
    if _is_hub(named) != (resolved.kind == "hub"):
        # One has a commit, the other files: compared through the files where they are here.
        other = _snapshot_fingerprint(named if resolved.kind != "hub" else None)
        if other is None:
            says = f"trained on {named}, merged into {resolved.path}: a hub model and a folder "
            says += "have no fingerprint in common, so they could not be compared"
            fix = "make sure that it is the same checkpoint"
            findings.append(Finding("base_unverified", "warning", "--base", says, fix))
            return trained_on
        if other == resolved.fingerprint:
            return trained_on
    raise InputError(
        "wrong_base",
        f"the adapter was trained on {named} (fingerprint {trained_on[:12]}), and the base is "
        f"{resolved.path} (fingerprint {resolved.fingerprint[:12]}): they are not the same files",
        where=str(location.adapter),
        fix="give the checkpoint that training used, unchanged, with --base",
    )


def _fp8_keep(config: Config | None) -> list[str] | None:
    """Returns the layers that a run with float8 products left alone; None for other runs."""
    if config is None or config.training.compute != "fp8":
        return None
    keep = config.training.fp8_keep
    return [] if keep == "auto" else keep


def _trained_on(adapter: Path, config: Config | None) -> str | None:
    from glasstune.core.tensors import tensor_metadata

    file = adapter / "adapter_model.safetensors"
    saved = tensor_metadata(file).get(FINGERPRINT) if file.is_file() else None
    if saved is None and config is not None:
        record = _run_folder(adapter) / "run.json"
        if record.is_file():
            saved = json.loads(record.read_text(encoding="utf-8")).get("base")
    return saved


def _is_hub(path: str) -> bool:
    from glasstune.models.resolve import looks_like_path

    return not looks_like_path(path) and not Path(path).expanduser().exists()


def _snapshot_fingerprint(hub_id: str | None) -> str | None:
    """The fingerprint of a hub model's files as of a folder, where they are in the cache."""
    if hub_id is None:
        return None
    from glasstune.models.hub import cached_folder
    from glasstune.models.resolve import resolve_model

    folder = cached_folder(hub_id)
    return None if folder is None else resolve_model(str(folder)).fingerprint


def _tokenizer_folder(adapter: Path, base: Path) -> Path:
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def _tokenizer(adapter: Path, base: Path, trust: bool, findings: list[Finding]) -> Any | None:
    from glasstune.data.tokenizer import load_tokenizer

    folder = _tokenizer_folder(adapter, base)
    try:
        return load_tokenizer(str(folder), trust_remote_code=trust)
    except InputError as error:
        says = f"no tokenizer was found ({error.message}): the output has none, and random ids "
        says += "stand for the generic prompts"
        findings.append(Finding("no_tokenizer", "warning", str(folder), says))
        return None


def _stops(tokenizer: Any | None) -> tuple[int, ...]:
    from glasstune.generation.generate import stop_ids

    return () if tokenizer is None else stop_ids(tokenizer)


def _prompts(
    tokenizer: Any | None, resolved: ResolvedModel, config: Config | None,
    findings: list[Finding], progress: Progress | None,
) -> Prompts:  # fmt: skip
    from glasstune.export.prompts import GENERIC, GENERIC_TOKENS, Prompts, random_prompts
    from glasstune.models.facts import model_facts

    facts = model_facts(resolved.config)
    vocabulary = facts.vocabulary_rows
    longest = max(1, min(GENERIC_TOKENS, (facts.max_positions or 1 << 30) - 16))
    if tokenizer is None:
        return Prompts(generic=random_prompts(vocabulary, longest))
    rows = [list(tokenizer(text)["input_ids"])[:longest] for text in GENERIC]
    generic = [row for row in rows if row and max(row) < vocabulary]
    if not generic:
        says = "the tokenizer makes no token of this model from any text: random ids stand for "
        says += "the generic prompts"
        findings.append(Finding("tokenizer_misfits", "warning", "tokenizer", says))
        generic = random_prompts(vocabulary, longest)
    held_out = [] if config is None else _held_out(tokenizer, config, facts, findings, progress)
    return Prompts(held_out=held_out, generic=generic)


def _held_out(
    tokenizer: Any, config: Config, facts: Any, findings: list[Finding], progress: Progress | None
) -> list[list[int]]:
    """The first validation rows of the run, prepared as training prepared them."""
    from glasstune.data.prepare import prepare_data
    from glasstune.export.prompts import HELD_OUT_ROWS, HELD_OUT_TOKENS

    try:
        data = prepare_data(
            config.data, tokenizer, facts, seed=config.training.seed, choices=Choices(),
            progress=progress,
        )  # fmt: skip
    except InputError as error:
        says = f"the run's data cannot be read any more ({error.message}): only generic prompts "
        says += "were compared"
        findings.append(Finding("no_held_out_rows", "warning", error.where, says))
        return []
    if data.validation is None:
        says = "the run holds no row out: only generic prompts were compared"
        findings.append(Finding("no_held_out_rows", "info", "data.validation", says))
        return []
    documents = data.validation.documents
    count = min(len(documents), HELD_OUT_ROWS)
    return [documents[index].ids[:HELD_OUT_TOKENS].tolist() for index in range(count)]


def _gguf_step(kinds: Sequence[str], progress: Progress | None) -> Any | None:
    if not kinds:
        return None

    def write(folder: Path) -> list[Path]:
        from glasstune.export.gguf import write_gguf

        return list(write_gguf(folder, list(kinds), progress))

    return write

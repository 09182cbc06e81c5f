"""Everything of a run that needs no weights: model config, tokenizer, data, terms, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glasstune.core.choices import Choices
from glasstune.core.config import Config
from glasstune.core.config_load import dump_config
from glasstune.core.errors import InputError
from glasstune.core.protocols import Progress
from glasstune.core.recompute import Recompute
from glasstune.core.records import DryRunRecord
from glasstune.core.units import parse_bytes

if TYPE_CHECKING:
    from glasstune.data.prepare import PreparedData
    from glasstune.models.resolve import ResolvedModel
    from glasstune.training.batching import Schedule
    from glasstune.training.terms import Term


@dataclass(frozen=True)
class Prepared:
    """A run before its weights.

    Args:
        config: Resolved.
        choices: What was decided so far.
        resolved: The base model, found.
        tokenizer: Its tokenizer.
        data: Rows, packed.
        terms: Loss terms.
        schedule: Sizes and number of updates.
        pad_id: Padding token id.
        recompute: Layers computed again, where the plan has chosen.
        strategy: How ranks share the model: `ddp` or `fsdp2`.
    """

    config: Config
    choices: Choices
    resolved: ResolvedModel
    tokenizer: Any
    data: PreparedData
    terms: tuple[Term, ...]
    schedule: Schedule
    pad_id: int
    recompute: Recompute | None = None
    strategy: str = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the base."""
        return self.strategy == "fsdp2" and self.schedule.ranks > 1

    @property
    def may_shard(self) -> bool:
        """Whether the base may be sharded where it does not fit."""
        asked = self.config.training.distributed.strategy
        training, model = self.config.training, self.config.model
        fp8 = training.compute == "fp8" and model.bits == 16  # its second copy is not sharded
        return asked == "auto" and self.schedule.ranks > 1 and not self.sharded and not fp8

    def dry_run_record(self) -> DryRunRecord:
        """What `--dry-run` reports."""
        return DryRunRecord(
            ok=True,
            updates=self.schedule.total,
            data=self.data.record,
            choices=self.choices.to_list(),
            config=dump_config(self.config),
        )


def prepare(
    config: Config, choices: Choices, progress: Progress, *, rank: int = 0, ranks: int = 1
) -> Prepared:
    """Resolves, reads and checks; the config's `auto` sizes are filled in place.

    Args:
        config: The whole configuration.
        choices: Where decisions are noted.
        progress: Bars and log.
        rank: This process.
        ranks: Processes that share each update.

    Raises:
        InputError: Model, data, template or a loss term are wrong.
    """
    check_supported(config)
    from glasstune.adapters.options import check_option_names
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import load_tokenizer
    from glasstune.models.facts import model_facts
    from glasstune.models.load import choose_device
    from glasstune.models.quantization import check_quantization_keys
    from glasstune.models.resolve import resolve_model
    from glasstune.training.batching import make_schedule, record_intervals
    from glasstune.training.terms import resolve_terms

    model = config.model
    check_option_names(config.adapter.lora_options())
    check_quantization_keys(model.quantization)
    resolved = resolve_model(model.path, trust_remote_code=model.trust_remote_code, choices=choices)
    tokenizer = load_tokenizer(resolved.folder_or_id, trust_remote_code=model.trust_remote_code)
    data = prepare_data(
        config.data,
        tokenizer,
        model_facts(resolved.config),
        seed=config.training.seed,
        keep_columns=any(loss.function for loss in config.losses),
        choices=choices,
        progress=progress,
    )
    config.data = data.config
    # The names of validation files come last; a term sees none of their rows.
    terms = resolve_terms(config.losses, data.sources[: len(config.data.sources)])
    device = choose_device(model.device, choices).type
    if config.training.compile is True:
        _check_compiler(device)
    _check_validation(config, data, choices)
    schedule = make_schedule(config, data.train, device, choices, rank=rank, ranks=ranks)
    record_intervals(config.training, schedule, choices)
    config.training.per_device_train_batch_size = schedule.micro
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = choices.record(
            "pad_token_id", tokenizer.eos_token_id or 0, "no pad token; any id under the mask"
        )
    asked = config.training.distributed.strategy
    strategy = "fsdp2" if asked == "fsdp2" and ranks > 1 else "ddp"
    if asked != "auto" and ranks == 1:
        choices.record("training.distributed.strategy", "none", f"{asked}: there is one process")
    return Prepared(
        config, choices, resolved, tokenizer, data, terms, schedule, int(pad_id), strategy=strategy
    )


def check_supported(config: Config) -> None:
    """Refuses what is not built yet, by name, before anything is loaded.

    Raises:
        InputError: Names the key.
    """
    training, model = config.training, config.model
    other = training.compute == "bf16" and model.dtype != "bfloat16"
    if other:
        raise InputError(
            "contradiction",
            f"training.compute is bf16, but model.dtype is {model.dtype}",
            where="training.compute",
            fix="set model.dtype: it is the type of the products too",
        )
    if training.compute == "fp8":
        check_fp8(config)
    if training.learning_rate == 0:
        raise InputError(
            "learns_nothing",
            "the learning rate is 0: no update would change anything",
            where="training.learning_rate",
            fix="give one above 0, for example 2e-4",
        )
    if training.max_memory is not None:
        parse_bytes(training.max_memory, where="training.max_memory")
    if training.save_strategy == "epoch" and training.save_steps != "auto":
        raise InputError(
            "contradiction",
            f"training.save_steps is {training.save_steps}, but training.save_strategy is epoch",
            where="training.save_steps",
            fix="keep one of them",
        )


def check_fp8(config: Config) -> None:
    """Refuses what float8 products do not go with."""
    from glasstune.adapters.options import BASE_MOVED

    model = config.model
    if model.dtype == "float32":
        raise InputError(
            "contradiction",
            "training.compute is fp8, but model.dtype is float32: float8 products give bfloat16",
            where="training.compute",
            fix="set model.dtype: bfloat16, or leave training.compute out",
        )
    threshold = "llm_int8_threshold" in model.quantization
    if model.bits == 8 and (model.int8_compute == "llm_int8" or threshold):
        raise InputError(
            "contradiction",
            "LLM.int8 multiplies in int8, training.compute: fp8 in float8",
            where="training.compute",
            fix="set model.int8_compute: w8a16, without llm_int8_threshold",
        )
    init = config.adapter.lora_options().get("init_lora_weights", True)
    if str(init).lower().startswith(BASE_MOVED):
        raise InputError(
            "contradiction",
            f"adapter.init_lora_weights: {init} changes the base's weights, and a float8 base is "
            "rounded once",
            where="adapter.init_lora_weights",
            fix="leave it out, or leave training.compute out",
        )
    if model.bits != 16 and any(loss.name == "kl_to_base" for loss in config.losses):
        raise InputError(
            "contradiction",
            f"the loss term kl_to_base compares with the base, and at {model.bits} bit the base "
            "alone is not multiplied in float8: the distance would begin with its rounding",
            where="losses",
            fix="set model.bits: 16, leave the term out, or leave training.compute out",
        )


def _check_compiler(device: str) -> None:
    """Refuses `training.compile: true` where it cannot work, before weights are loaded."""
    import torch

    from glasstune.fast.compile import decide

    decide(True, torch.device(device), None, Choices())


def _check_validation(config: Config, data: PreparedData, choices: Choices) -> None:
    """Says that there are no held-out rows, and refuses what asks for them then."""
    split = config.data.validation_split
    if data.validation is None and split > 0:
        choices.record(
            "data.validation_split", split, "nothing is held out: the rows hold only one text"
        )
    if data.validation is None and config.training.early_stopping_patience is not None:
        raise InputError(
            "no_validation",
            "early stopping needs held-out rows, and there are none",
            where="training.early_stopping_patience",
            fix="give data.validation, or raise data.validation_split",
        )

"""The configuration: every key of the contract, its type, its default and its meaning.

Loading from YAML, overrides, foreign names and messages live in `config_load.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

Count = Annotated[int, Field(ge=1)]
"""A whole number of at least 1, inside a union."""


class Section(BaseModel):
    """Base of every part: unknown keys are errors, docstrings become the schema's descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, strict=False
    )


class ModelConfig(Section):
    """The base model and its precision."""

    path: str
    """Hub id, folder or GGUF file."""
    bits: Literal[16, 8, 4] = 16
    """Storage of the base's linear weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of all other weights and of the products."""
    quantization: dict[str, Any] = Field(default_factory=dict)
    """Keys of transformers' `BitsAndBytesConfig`, by its own names."""
    int8_compute: Literal["w8a16", "llm_int8"] = "w8a16"
    """How an 8-bit base multiplies: weights expanded to 16 bit, or bitsandbytes' LLM.int8."""
    attn_implementation: str | None = None
    """Attention of transformers (`sdpa`, `eager`, ...); null lets Glasstune choose."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the checkpoint may run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model lives; auto takes a GPU where there is one."""


class AdapterConfig(BaseModel):
    """The adapter: PEFT's `LoraConfig` by its own names, checked against its fields on use."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    r: int = Field(16, ge=1)
    """Rank."""
    lora_alpha: float = 32
    """Scale; the product is multiplied by lora_alpha / r (or / sqrt(r) with use_rslora)."""
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Module names, a regular expression, or all-linear."""
    path: str | None = None
    """Saved adapter to start from (its weights; optimiser and schedule are new)."""

    def lora_options(self) -> dict[str, Any]:
        """Returns all keys but `path`: what `LoraConfig` takes."""
        return self.model_dump(exclude={"path"})

    def given_options(self) -> dict[str, Any]:
        """Returns the keys of `lora_options` that were set, not left at their default."""
        return self.model_dump(exclude={"path"}, exclude_unset=True)


class SourceConfig(Section):
    """One data source."""

    path: str
    """File, glob or hub id."""
    name: str | None = None
    """Name in records and for loss terms; null takes the file's stem."""
    format: Literal[
        "auto", "alpaca", "conversations", "messages", "prompt_completion", "text", "baichuan2"
    ] = "auto"
    """Shape of a row; auto decides from its keys."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Maps a format's key to a column (dots and indices reach inside: `instances.0.output`) or to
    a template in braces, for example `{prompt: question, completion: "{label}"}`."""
    repeat: float = Field(1.0, gt=0)
    """How often the rows appear in an epoch; 0.5 takes a fixed half."""
    loss_weight: float = Field(1.0, ge=0)
    """Weight of its tokens in the loss (a weighted mean)."""
    rows: SkipJsonSchema[list[Any] | None] = Field(None, exclude=True, repr=False)
    """Rows given from Python (a list of dicts as `path`); never written to a config file."""

    @model_validator(mode="before")
    @classmethod
    def _rows_as_path(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), list):
            return {**value, "path": "<rows>", "rows": value["path"]}
        return value


class DataConfig(Section):
    """Rows, their template and their packing."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Training data."""
    validation: list[SourceConfig] = Field(default_factory=list)
    """Validation data; excludes validation_split."""
    validation_split: float = Field(0.02, ge=0, lt=1)
    """Share of the training texts held out when `validation` is empty."""
    max_length: int = Field(1024, ge=2)
    """Longest document in tokens, and the length of a pack."""
    packing: bool = True
    """Several documents in one row, isolated from each other; a batch then counts packs."""
    truncation: Literal["drop", "cut"] = "drop"
    """What happens to a longer document: dropped (counted), or cut (its answer gets no end)."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a bad row stops the run or is skipped and counted."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to rows with the same text."""
    chat_template: str | None = None
    """null = the tokenizer's own; or chatml, alpaca, plain, baichuan2, or a Jinja file."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables of the template, saved with the adapter."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which text is trained."""
    markers: dict[str, int] = Field(default_factory=lambda: {"user": 195, "assistant": 196})
    """Marker token ids of the baichuan2 rule."""
    num_workers: int = Field(0, ge=0)
    """Threads that prepare batches; changes neither order nor content."""

    @model_validator(mode="after")
    def _one_validation(self) -> DataConfig:
        share_given = "validation_split" in self.model_fields_set and self.validation_split
        if self.validation and share_given:
            raise ValueError("validation and validation_split exclude each other: keep one of them")
        return self


class WeightSchedule(Section):
    """A loss weight that moves linearly with the update number."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True)

    start: float = Field(alias="from")
    """Weight at the first update."""
    end: float = Field(alias="to")
    """Weight after `steps` updates."""
    steps: int = Field(ge=1)
    """Updates over which the weight moves; `to` is reached at update steps + 1."""

    def at(self, step: int) -> float:
        """Returns the weight of the 1-based update `step`."""
        share = min(1.0, (step - 1) / self.steps)
        return self.start + (self.end - self.start) * share


class LossConfig(Section):
    """One named term of the loss."""

    name: str
    """next_token, z_loss, kl_to_base, or a name of your own with `function`."""
    weight: float | WeightSchedule = 1.0
    """A number, or `{from, to, steps}`."""
    function: str | None = None
    """`file.py:function` for a term of your own: (batch) -> (sum, count)."""
    sources: list[str] | None = None
    """Names of the data sources that the term sees; null = all."""

    def weight_at(self, step: int) -> float:
        """Returns the weight of the 1-based update `step`."""
        return self.weight.at(step) if isinstance(self.weight, WeightSchedule) else self.weight


class DistributedConfig(Section):
    """Several devices."""

    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """How ranks share the model."""
    timeout_seconds: int = Field(600, ge=1)
    """How long a collective may wait."""


class TrainingConfig(Section):
    """Updates, optimiser, saving and evaluation; names of transformers' `TrainingArguments`."""

    output_dir: str | None = None
    """Run folder; null = runs/<model>-<data>."""
    num_train_epochs: float = Field(3, gt=0)
    """Passes over the data."""
    max_steps: int = Field(-1, ge=-1)
    """Number of updates; -1 = from the epochs."""
    train_batch_size: int = Field(16, ge=1)
    """Rows (packs) in one update over all devices."""
    per_device_train_batch_size: Count | Literal["auto"] = "auto"
    """Rows in one forward on one device."""
    gradient_accumulation_steps: Count | Literal["auto"] = "auto"
    """Forwards in one update; follows from the other two."""
    learning_rate: float = Field(2.0e-4, ge=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Shape after warm-up."""
    warmup_steps: float = Field(0.03, ge=0)
    """Updates of warm-up; below 1 a share of all updates. Rises as (step+1)/warmup_steps."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First moment's decay."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Second moment's decay."""
    adam_epsilon: float = Field(1.0e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm is clipped to this; 0 = no clipping."""
    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """Optimiser; its state is fp32, or 8 bit by bitsandbytes."""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """Seed of data order, adapter init and dropout."""
    deterministic: bool = False
    """Deterministic kernels only (slower on a GPU)."""
    save_strategy: Literal["steps", "epoch"] = "steps"
    """When checkpoints are written."""
    save_steps: Count | Literal["auto"] = "auto"
    """Updates between checkpoints; auto = every ten minutes and at each epoch's end."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints kept beside the best; the newest and the best are never deleted."""
    eval_steps: Count | Literal["auto"] = "auto"
    """Updates between evaluations; auto = at least five in a run."""
    eval_on_start: bool = True
    """Whether held-out loss is measured before the first update."""
    load_best_model_at_end: bool = True
    """Whether adapter/ is the best by metric_for_best_model (else the last)."""
    metric_for_best_model: Literal["eval_loss"] = "eval_loss"
    """Lower is better."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """Evaluations without improvement after which the run stops."""
    logging_steps: int = Field(1, ge=1)
    """Updates between metric rows."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)
    """Metric sinks beside metrics.jsonl."""
    run_name: str | None = None
    """Name shown by metric sinks."""
    recompute: Literal["auto", "none", "full", "offload"] = "auto"
    """Which layers' activations are recomputed in backward."""
    max_memory: str | None = None
    """Memory the run may take, for example "22GiB"; null = what is free."""
    compute: Literal["auto", "bf16", "fp8"] = "auto"
    """Type of the base's products; fp8 = float8 rows with a scale each, on GPUs that have them."""
    fp8_keep: Literal["auto"] | list[str] = "auto"
    """Layers that stay in bfloat16 under fp8, as globs of paths; auto = those whose output or
    gradient would be off by more than 0.08, measured on the first rows (fp8.json)."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile of each decoder layer."""
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    """Several devices."""

    @field_validator("max_steps")
    @classmethod
    def _some_updates(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 updates train nothing: write -1 for num_train_epochs, or a number")
        return value


class AuditConfig(Section):
    """What is watched while training."""

    every_n_steps: int = Field(50, ge=0)
    """Updates between per-term audits into audit.jsonl; the first update has one too. 0 = none."""
    first_step_gate: Literal["stop", "warn", "off"] = "stop"
    """What happens when an adapter tensor does not learn at the first step."""
    gate_allow: list[str] = Field(default_factory=list)
    """Glob patterns of tensors that the gate lets pass."""


class Config(Section):
    """A whole run."""

    model: ModelConfig
    """Base model."""
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    """LoRA."""
    data: DataConfig
    """Data."""
    losses: list[LossConfig] = Field(
        default_factory=lambda: [LossConfig(name="next_token")], min_length=1
    )
    """Weighted terms of the loss."""
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    """Training."""
    audit: AuditConfig = Field(default_factory=AuditConfig)
    """Audit."""

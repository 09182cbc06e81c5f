"""FSDP2: a sharded base trains the same adapter, and each rank holds a part of it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import QuietProgress, distance, events, last_weights, tiny_run
from several import steps, written
from tiny import save_tiny_model
from torch import nn

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError
from glasstune.kernels.int8_linear import Int8Linear
from glasstune.training.sharding import _as_floats, check_shardable
from glasstune.workflows.plan import plan_run
from glasstune.workflows.plan_work import Work
from glasstune.workflows.prepare_run import prepare

KINDS: dict[str, dict[str, Any]] = {
    "16 bit": {},
    "8 bit": {"model": {"bits": 8}},
    "4 bit": {"model": {"bits": 4, "quantization": {"bnb_4bit_compute_dtype": "float32"}}},
    "recomputed": {"training": {"recompute": "full"}},
    "packs": {"data": {"packing": True, "max_length": 64}},
}


def options(kind: str, strategy: str) -> dict[str, Any]:
    found = {name: {**values} for name, values in KINDS[kind].items()}
    training = found.setdefault("training", {})
    training.update(max_steps=14, eval_steps=7, distributed={"strategy": strategy})
    found.setdefault("data", {})["validation_split"] = 0.12
    return found


SLOW = pytest.mark.slow(reason="up to three processes on two cores")


@pytest.mark.parametrize(
    "kind",
    ["4 bit", *(pytest.param(kind, marks=SLOW) for kind in KINDS if kind != "4 bit")],
)
def test_a_sharded_base_trains_the_same_adapter(
    tiny_llama, qa_file, tmp_path, several, kind
) -> None:
    """The last update of an epoch has one row and evaluation seven: some of three run nothing."""
    found = {}
    for ranks, strategy in ((1, "auto"), (3, "fsdp2")):
        output = tmp_path / str(ranks)
        config = written(tiny_llama, qa_file, output, **options(kind, strategy))
        ended = several.run(["train", str(config)], ranks)
        assert ended.codes == [0] * ranks, ended.log
        found[ranks] = output
    assert distance(last_weights(found[3]), last_weights(found[1])) <= 1e-6
    assert steps(found[3]) == steps(found[1])
    losses = [row["eval_loss"] for row in events(found[1], "eval")]
    assert [row["eval_loss"] for row in events(found[3], "eval")] == pytest.approx(losses, rel=1e-6)
    record = json.loads((found[3] / "run.json").read_text())
    assert record["ranks"]["strategy"] == "fsdp2"
    assert {module["way"] for module in record["speed"]["modules"]} == {"plain"}
    (held,) = [c["value"] for c in record["choices"] if c["name"].endswith("sharded_bytes")]
    assert held == part_of_layers(tiny_llama, kind, 3)


def part_of_layers(model: Path, kind: str, ranks: int) -> int:
    """Bytes of rank 0's rows of every weight in the decoder layers, counted by hand."""
    from transformers import AutoModelForCausalLM

    layers = AutoModelForCausalLM.from_pretrained(model, dtype="float32").model.layers
    total = 0
    for value in layers.parameters():
        rows, width = value.shape[0], value[0].numel() * value.element_size()
        if value.dim() == 2 and kind == "8 bit":
            width //= 4
        elif value.dim() == 2 and kind == "4 bit":  # two values a byte, four bytes a row
            rows, width = value.numel() // 8, 4
        total += -(-rows // ranks) * width
    return total


@pytest.mark.parametrize("shape", [(256, 1), (16, 16), (12, 6)])
def test_packed_bytes_pass_for_floats_and_come_back(shape) -> None:
    """FSDP2 shards only what could have a gradient (torch 2.11): no byte may change by that."""
    size = shape[0] * shape[1]
    stored = torch.arange(size).sub(size // 2).to(torch.int8).view(shape)  # NaN's patterns too
    given = _as_floats(stored)
    assert given.dtype == torch.float32
    assert not given.requires_grad
    copied = torch.empty_like(given)
    copied.copy_(given)
    assert torch.equal(copied.view(-1).view(torch.int8), stored.view(-1))
    linear = Int8Linear(shape[1], shape[0], bias=False)
    linear.scale.fill_(0.5)
    linear.weight = nn.Parameter(given, requires_grad=False)
    assert torch.equal(linear.rows, stored)
    x = torch.eye(shape[1])
    torch.testing.assert_close(linear(x), stored.float().T * 0.5 / 127)
    assert _as_floats(torch.zeros(3, 1, dtype=torch.uint8)).dtype == torch.uint8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"bits": 8, "int8_compute": "llm_int8"}}, "Linear8bitLt"),
        ({"model": {"bits": 8, "quantization": {"llm_int8_threshold": 5.0}}}, "Linear8bitLt"),
        ({"losses": [{"name": "mine", "function": "FOLDER/mine.py:loss"}]}, "function of your own"),
        ({"adapter": {"use_dora": True}}, "DoRA"),
        ({"adapter": {"init_lora_weights": "pissa"}}, "base's weights"),
    ],
)
def test_what_cannot_be_sharded_is_refused_by_name(
    tiny_llama, qa_file, tmp_path, several, changes, says
) -> None:
    training = {"distributed": {"strategy": "fsdp2"}}
    (tmp_path / "mine.py").write_text("def loss(batch):\n    return batch.hidden.sum(), 1.0\n")
    config = written(tiny_llama, qa_file, tmp_path / "run", training=training, **changes)
    config.write_text(config.read_text().replace("FOLDER", str(tmp_path)))
    ended = several.run(["train", str(config)], 2)
    assert ended.codes == [2, 2]
    (error,) = ended.errors()
    assert says in error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_16_bit_base_in_float8_is_refused_before_it_is_loaded() -> None:
    from types import SimpleNamespace

    from glasstune.core.config_load import config_from_mapping
    from glasstune.workflows.trained_model import check_sharded

    for bits, refused in ((16, True), (8, False)):
        sections = {"model": {"path": "m", "bits": bits}, "training": {"compute": "fp8"}}
        config = config_from_mapping({**sections, "data": {"sources": [{"path": "d"}]}}).config
        prepared: Any = SimpleNamespace(config=config, terms=[])
        with pytest.raises(InputError, match="second copy") if refused else nullcontext():
            check_sharded(prepared)


def test_layers_that_cannot_be_sharded_are_refused() -> None:
    """Where no configuration tells of them: a model that holds them already."""
    for name, key in (("Linear8bitLt", "model.int8_compute"), ("Fp8Linear", "training.compute")):
        model = nn.Sequential(type(name, (nn.Linear,), {})(4, 4))
        with pytest.raises(InputError, match="fsdp2 cannot shard") as caught:
            check_shardable(model)
        assert (caught.value.code, caught.value.where) == ("cannot_shard", key)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 MiB in sixteen layers: two of them are a small part."""
    return save_tiny_model(
        tmp_path_factory.mktemp("deep") / "llama", hidden_size=256, intermediate_size=512,
        num_hidden_layers=16, num_key_value_heads=4,
    )  # fmt: skip


def test_the_plan_shards_what_does_not_fit(deep, qa_file, tmp_path, several) -> None:
    config = tiny_run(deep, qa_file, tmp_path / "run", training={"max_memory": "64GiB"})
    prepared = prepare(config, Choices(), QuietProgress(), ranks=2)
    # First of all: what a plan itself leaves in this process's memory is then there already.
    assert plan_run(prepared, QuietProgress()).prepared.strategy == "ddp"
    whole = Work(prepared, None)
    split = Work(replace(prepared, strategy="fsdp2"), None)
    assert whole.sharded_bytes == part_of_layers(deep, "16 bit", 1)
    assert whole.layer_bytes == whole.sharded_bytes // 16
    assert whole.static.base - split.static.base == whole.sharded_bytes // 2
    assert split.static.optimizer == whole.static.optimizer
    assert split.exchange == whole.exchange + 2 * whole.layer_bytes
    rows = prepared.schedule.micro
    peaks = [min(option.peak for option in work.options(rows)) for work in (whole, split)]
    assert peaks[1] < peaks[0] - 10 * 2**20
    config.training.max_memory = f"{sum(peaks) // 2 // 2**20}MiB"
    planned = plan_run(prepared, QuietProgress())
    assert planned.prepared.strategy == "fsdp2"
    choice = planned.prepared.choices.get("training.distributed.strategy")
    assert choice is not None
    assert choice.value == "fsdp2"
    assert "the run needs" in choice.reason


@SLOW
def test_ranks_follow_the_plan_of_the_first(deep, qa_file, tmp_path, several) -> None:
    """Rank 1 plans nothing itself: it shards because rank 0 has found that it must."""
    output = tmp_path / "run"
    tight = (
        "import glasstune.workflows.plan as plan\n"
        "from glasstune.core.errors import InputError\n"
        "import glasstune.workflows.plan_work as work\n"
        "real = work.Work.choose\n"
        "def choose(self):\n"
        "    if not self.prepared.sharded:\n"
        "        raise InputError('does_not_fit', 'the run needs too much')\n"
        "    return real(self)\n"
        "work.Work.choose = choose\n"
    )
    training = {"max_steps": 2, "max_memory": "64GiB", "recompute": "full"}
    config = written(deep, qa_file, output, training=training)
    ended = several.run(["train", str(config)], 2, patches={0: tight})
    assert ended.codes == [0, 0], ended.log
    assert "training.distributed.strategy: fsdp2 (with the whole base on each device" in ended.log
    assert json.loads((output / "run.json").read_text())["ranks"]["strategy"] == "fsdp2"


@SLOW
def test_a_sharded_run_is_merged_like_any_other(tiny_llama, qa_file, tmp_path, several) -> None:
    from glasstune.workflows.merge import merge

    output = tmp_path / "run"
    config = written(tiny_llama, qa_file, output, **options("4 bit", "fsdp2"))
    assert several.run(["train", str(config)], 2).codes == [0, 0]
    certificate = merge(str(output), tmp_path / "merged", progress=QuietProgress())
    assert certificate.passed

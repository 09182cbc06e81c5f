"""The tree on a terminal: as print(model), readable at any width, nothing left out."""

from __future__ import annotations

import io
from typing import Any

import pytest
from inspections import bloom, bloom_record, llama70b_record, precision, record
from rich.console import Console
from tiny import tiny_config

from glasstune.core.inspection import LoraOverlay, ModuleRow, PrecisionRecord
from glasstune.reports.inspect_text import short_detail
from glasstune.reports.inspect_tree import print_inspect, tree_lines


def printed(made: Any, width: int, depth: int | None = None, **options: Any) -> str:
    stream = io.StringIO()
    print_inspect(made, Console(file=stream, width=width, highlight=False, **options), depth)
    return stream.getvalue()


def rows_of(model: Any) -> list[ModuleRow]:
    """Rows of a real model, with nothing but what print(model) reads."""
    return [
        ModuleRow(
            path=path, class_name=type(module).__name__, original_class=type(module).__name__,
            detail=module.extra_repr(), container=bool(list(module.children())), shape=None,
            dtype="", bytes=0, parts={}, parameters=0, transient_bytes=0, trainable=False,
            tied_to=None, reason_code="", reason="",
        )
        for path, module in model.named_modules()
    ]  # fmt: skip


def bare(rows: list[ModuleRow]) -> PrecisionRecord:
    return PrecisionRecord(16, "bfloat16", {}, 0, {}, 0, 1.0, 0, 0, rows)


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen2", "opt", "falcon"])
def test_tree_lines_are_print_model(family: str) -> None:
    """torch folds lists of blocks by the same rule, so the whole text is equal."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        tiny_config(family, num_hidden_layers=3) if family != "bloom" else tiny_config(family)
    )
    assert "\n".join(tree_lines(bare(rows_of(model)))) == repr(model)


def test_tree_lines_of_ordinary_modules_are_print_model() -> None:
    from torch import nn

    class Wordy(nn.Linear):
        def extra_repr(self) -> str:
            return "first line\nsecond line"

    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)),
            "list": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)]),
            "empty": nn.ModuleList(),
            "wordy": Wordy(2, 2),
        }
    )
    assert "\n".join(tree_lines(bare(rows_of(model)))) == repr(model)
    # torch writes equal layers of a Sequential out; we fold them.
    twice = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert tree_lines(bare(rows_of(twice))) == [
        "Sequential(",
        "  (0-1): 2 x Linear(in_features=2, out_features=2, bias=True)",
        ")",
    ]


def test_tree_lines_show_classes_of_the_precision_and_lora() -> None:
    made = bloom_record(3)
    text = "\n".join(tree_lines(made.precisions["4"]))
    assert (
        "(dense): Linear4bit(in_features=2560, out_features=2560, bias=True) + LoRA(r=16)" in text
    )
    assert "(0-2): 3 x BloomBlock(" in text
    assert "(lm_head): Linear(in_features=2560, out_features=46145, bias=False)" in text
    assert "Linear4bit" not in "\n".join(tree_lines(made.precisions["16"]))


def test_tree_lines_fold_by_depth() -> None:
    lines = tree_lines(precision(bloom(3), 16), depth=1)
    assert lines == [
        "BloomForCausalLM(",
        "  (transformer): BloomModel(...)",
        "  (lm_head): Linear(in_features=2560, out_features=46145, bias=False)",
        ")",
    ]
    assert tree_lines(precision(bloom(3), 16), depth=0) == ["BloomForCausalLM(...)"]


def test_a_wide_terminal_shows_the_precisions_side_by_side() -> None:
    text = printed(bloom_record(), 140)
    line = next(line for line in text.splitlines() if "(query_key_value)" in line)
    assert line.split() == [
        "(query_key_value):", "Linear(2560,", "7680)", "+", "LoRA(r=16)", "39.3", "MB",
        "Linear8bitLt", "19.7", "MB", "Linear4bit", "10.2", "MB",
    ]  # fmt: skip
    block = next(line for line in text.splitlines() if "30 x BloomBlock" in line)
    assert " ".join(block.split()[-12:]) == "30 x 157.4 MB 30 x 78.8 MB 30 x 40.6 MB"
    # Sizes of a column end at one place.
    tree = text.split("stays at 16 bit:")[0].splitlines()[4:]
    ends = {line.rstrip(" ab").rindex("B") for line in tree if line.rstrip(" ab").endswith("B")}
    assert len(ends) == 1


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 140, 200])
@pytest.mark.parametrize("make", [bloom_record, llama70b_record])
def test_no_line_of_the_tree_is_wider_than_the_terminal(make: Any, width: int) -> None:
    text = printed(make(), width)
    tree, rest = text.split("\nstays at 16 bit:\n")
    body = tree.splitlines()[1:] + rest.split("\n\n")[0].splitlines()
    assert max(map(len, body)) <= width
    # Every leaf is there at any width, with its class after conversion.
    for name in ("dense_h_to_4h", "lm_head") if make is bloom_record else ("q_proj", "lm_head"):
        assert f"({name})" in tree
    assert "Linear4bit" in tree


def test_a_narrow_terminal_stacks_the_precisions() -> None:
    text = printed(bloom_record(), 80)
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if "(query_key_value)" in line)
    assert lines[at + 1].strip() == "16: 39.3 MB · 8: Linear8bitLt 19.7 MB · 4: Linear4bit 10.2 MB"


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_no_number_of_the_totals_is_broken(width: int) -> None:
    made = bloom_record()
    text = printed(made, width, depth=0)
    for value in made.precisions.values():
        numbers = [value.total_bytes, *value.bytes_by_part.values()]
        assert all(f" {number:,}" in text for number in numbers)


def test_what_stays_has_a_letter_and_its_reason() -> None:
    text = printed(bloom_record(), 140)
    head = next(line for line in text.splitlines() if "(lm_head)" in line)
    assert head.count(" b") == 2, "at 8 and 4 bit, not at 16"
    assert (
        "  b  the output head stays at 16 bit by transformers' default list [output_head]" in text
    )


def test_a_tied_head_names_its_partner() -> None:
    made = record("m", "bloom", bloom(2))
    for value in made.precisions.values():
        row = value.modules[-1]
        row.bytes, row.parts, row.parameters = 0, {}, 0
        row.tied_to = "transformer.word_embeddings.weight"
        row.reason_code, row.reason = "tied", "tied: both sides stay"
    text = printed(made, 160)
    assert "= transformer.word_embeddings.weight" in text
    assert "tied: both sides stay [tied]" in text


def test_depth_folds_containers() -> None:
    text = printed(bloom_record(), 140, depth=3)
    assert "30 x BloomBlock(...)" in text
    assert "query_key_value): " not in text


def test_totals_are_exact_and_findings_are_last_with_hints() -> None:
    text = printed(bloom_record(), 140)
    for words in ("5,193,134,080", "2,836,602,880", "1,691,761,120", "5.19 GB", "9.1%"):
        assert words in text
    assert "trainable params: 7,372,800 || all params: 2,603,939,840" in text
    assert "query_key_value: LoRA(r=16) on 30: 4,915,200 parameters, 78.6 MB" in text
    tail = text.splitlines()[-6:]
    assert tail[0].startswith("warning [int8_checkpointing] transformer.h (LLM.int8): ")
    assert tail[1].startswith("  hint: ")
    assert tail[-1].startswith("  hint: ")
    assert tail[-2].startswith("info [untrained_tokens]")


def test_errors_are_listed_worst_first() -> None:
    text = printed(bloom_record(), 140)
    layers = [line.split()[0] for line in text.splitlines() if line.startswith("transformer.h.")]
    assert layers[0] == "transformer.h.29.self_attention.query_key_value"
    assert len(layers) == 20
    assert "40 better layers are not shown" in text
    assert "10.920%" in text


def test_json_and_record_print_the_same() -> None:
    made = bloom_record(2)
    assert printed(made, 100) == printed(made.to_dict(), 100)


def test_no_color_and_files_get_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in printed(bloom_record(), 120)
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(bloom_record(), 120, force_terminal=True)
    assert not any(f"\x1b[{code}" in text for code in ("3", "9", "4"))


def test_names_with_markup_are_printed_as_they_are() -> None:
    made = record("[bold]x[/bold] [link=y]", "bloom", bloom(2))
    for value in made.precisions.values():
        value.modules[2].reason = "[red]not[/red]"
    text = printed(made, 140)
    assert "[bold]x[/bold] [link=y]: BloomForCausalLM" in text
    assert "[red]not[/red] [not_linear]" in text


def test_one_precision_and_a_model_without_parameters() -> None:
    text = printed(record("m", "bloom", bloom(2), bits=(4,)), 80)
    assert "bfloat16" not in text.split("bytes")[0]
    empty = record("m", "x", bloom(1))
    for value in empty.precisions.values():
        value.modules = value.modules[:1]
        value.total_bytes, value.bytes_by_part = 0, {}
    assert "BloomForCausalLM" in printed(empty, 80)


def test_other_overlays_are_named() -> None:
    made = record("m", "bloom", bloom(2))
    for value in made.precisions.values():
        value.modules[-1].lora = LoraOverlay("modules_to_save", None, None, 10, 40, 40, 80)
        value.modules[2].lora = LoraOverlay("dora", 4, 8.0, 10, 40, 40, 80)
    text = printed(made, 160)
    assert "bias=False) + trained copy" in text
    assert "Embedding(46145, 2560) + DoRA(r=4)" in text


@pytest.mark.parametrize(
    ("detail", "short"),
    [
        ("in_features=2560, out_features=7680, bias=True", "2560, 7680"),
        ("(2560,), eps=1e-05, elementwise_affine=True, bias=True", "(2560,)"),
        ("46145, 2560, padding_idx=3", "46145, 2560"),
        ("(3, 4), eps=1", "(3, 4)"),
        ("nf=2304, nx=768", "2304, 768"),
        ("p=0.0, inplace=False", ""),
        ("", ""),
    ],
)
def test_short_details_keep_sizes(detail: str, short: str) -> None:
    assert short_detail(detail) == short

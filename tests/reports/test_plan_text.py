"""The plan on a terminal: the bar to scale, the numbers of the record."""

from __future__ import annotations

import io

from plans import GIB, hand_plan

from glasstune.reports.plan_text import LETTERS, bar_lines, layers_text, print_plan
from glasstune.reports.terminal import console_for


def printed(**changes: object) -> str:
    text = io.StringIO()
    print_plan(hand_plan(**changes), console_for(text))
    return text.getvalue()


def test_the_bar_is_to_scale() -> None:
    (line,) = bar_lines(hand_plan().to_dict(), 88)
    assert len(line) == 90
    # 22 GiB on 88 characters: 4 a GiB.
    counts = {name: line.count(letter) for name, letter in LETTERS.items()}
    assert counts == {
        "base": 24, "adapters": 1, "gradients": 0, "optimizer": 2, "activations": 36,
        "workspace": 8, "context": 2,
    }  # fmt: skip
    assert line.count(".") == 88 - 73


def test_one_is_not_many() -> None:
    text = printed(rows=1, updates=1)
    assert "Largest batch: 1 row of 2,048 tokens" in text
    assert "Time: 1 update of" in text


def test_layers_that_keep_the_same_stand_together() -> None:
    assert layers_text([GIB, GIB, 0, 2 * GIB]) == "0 to 1: 1.0 GiB, 2: 0 B, 3: 2.0 GiB"
    text = printed(layer_bytes=[GIB // 8] * 12 + [GIB] * 20)
    assert "Kept by each layer: 0 to 11: 128.0 MiB, 12 to 31: 1.0 GiB" in text


def test_choices_are_printed_with_their_reasons() -> None:
    choice = {"name": "training.compile", "value": False, "reason": "[of] no use here"}
    text = printed(choices=[choice])
    assert "training.compile: False ([of] no use here)" in text
    assert "Chosen by itself" not in printed()


def test_a_peak_above_the_limit_and_a_measured_one_are_marked() -> None:
    lines = bar_lines(hand_plan(limit_bytes=10 * GIB, measured_peak_bytes=15 * GIB).to_dict(), 73)
    assert lines[1].index("^") == 1 + 40
    assert lines[2].index("^") == 1 + 60


def test_the_numbers_are_those_of_the_record() -> None:
    text = printed(measured_peak_bytes=19 * GIB, error=-0.0395)
    for words in (
        "meta-llama/Llama-3.1-8B at 4 bit on NVIDIA H100: peak 18.2 GiB of 22.0 GiB",
        "The peak is in the loss (head and loss); the largest part is then activations.",
        "the first 12 of 32 layers computed again", "19.0 GiB", "-4.0%",
        "1,200 updates of 2.5 s, 52 min 00 s in all", "Disk: 3.0 GiB written; download: 16.0 GiB",
        "training.recompute=none", "no", "fsdp2", "context: calibrated on a card",
        "info [terms_not_planned]",
    ):  # fmt: skip
        assert words in text, words

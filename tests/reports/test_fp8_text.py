"""The short table of what float8 products cost."""

from __future__ import annotations

from glasstune.core.files import dump_json
from glasstune.core.findings import Finding
from glasstune.core.fp8 import Fp8Layer, Fp8Record
from glasstune.reports.fp8_text import fp8_lines


def layer(path: str, output: float | None, gradient: float | None, **more: object) -> Fp8Layer:
    return Fp8Layer(
        path, [64, 32], weight_error=0.0266, output_error=output, row_error=output,
        gradient_error=gradient, rows=100, **more,  # type: ignore[arg-type]
    )  # fmt: skip


def record() -> Fp8Record:
    return Fp8Record(
        layers=[
            layer("h.0.up", 0.03, 0.04, peak=12.0),
            layer("h.0.down", 0.05, 0.02, peak=25352.4, outliers=0.0625),
            layer("h.1.up", 0.05, 0.03, peak=15.0),
            layer("h.1.down", 0.31, 0.02, peak=1000.0),
            layer("h.2.up", 0.04, None),
            Fp8Layer("odd.gate", [24, 32], problem="24 is no multiple of 16"),
            layer("h.2.down", 0.04, 0.09),
        ],
        tokens=1402,
        documents=1,
        emulated=True,
        findings=[Finding("not_seen", "info", "odd.gate", "one layer was not called")],
    )


def test_medians_and_the_worst_by_kind_and_what_is_kept() -> None:
    found = record()
    found.decide()
    assert fp8_lines(found.to_dict()) == [
        "fp8: relative errors against bfloat16, 1 row of 1,402 tokens, emulated; medians and the "
        "worst by kind of layer",
        "  layers  number  output   worst  gradient   worst  weight    peak  outliers",
        "  up           3  0.0400  0.0500    0.0350  0.0400  0.0266      15      0.0%",
        "  down         3  0.0500  0.3100    0.0200  0.0900  0.0266  25,352      6.2%",
        "  gate         1       -       -         -       -       -       0      0.0%",
        "  h.1.down: output 0.3100, gradient 0.0200, weight 0.0266",
        "  h.2.down: output 0.0400, gradient 0.0900, weight 0.0266",
        "  h.0.down: output 0.0500, gradient 0.0200, weight 0.0266",
        "  kept in bfloat16: h.1.down: its output would be 0.310 off the bfloat16 one (from 0.08 "
        "on; usual numbers give 0.037; its largest input is 1,000 times its row's median)",
        "  kept in bfloat16: odd.gate: 24 is no multiple of 16",
        "  kept in bfloat16: h.2.down: its input's gradient would be 0.090 off the bfloat16 one "
        "(from 0.08 on; usual numbers give 0.037; its largest input is 0 times its row's median)",
        "  info: odd.gate: one layer was not called",
    ]


def test_nothing_kept_is_said_with_the_rule() -> None:
    found = Fp8Record([layer("up", 0.03, 0.03)], 10, 2, emulated=False)
    found.decide()
    lines = fp8_lines(found.to_dict())
    assert lines[0].startswith("fp8: relative errors against bfloat16, 2 rows of 10 tokens; ")
    assert lines[-1] == "  kept in bfloat16: none (an error of 0.08 would ask for it)"
    assert dump_json(found.to_dict())

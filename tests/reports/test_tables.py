import io

from glasstune.core.findings import Finding
from glasstune.core.records import DataRecord, EvaluateRecord, TrainRecord
from glasstune.reports.tables import print_choices, print_findings, print_record
from glasstune.reports.terminal import console_for

FINDING = Finding("short_rows", "warning", "d.json:4", "12 rows are short", "look at them")


def printed(kind, record):
    stream = io.StringIO()
    print_record(kind, record, console_for(stream))
    return stream.getvalue()


def test_findings_say_their_severity_in_words():
    stream = io.StringIO()
    print_findings([FINDING], console_for(stream))
    assert stream.getvalue() == (
        "warning [short_rows] d.json:4: 12 rows are short\n  hint: look at them\n"
    )


def test_choices_print_their_reason():
    stream = io.StringIO()
    print_choices([{"name": "a.b", "value": 3, "reason": "why"}], console_for(stream))
    assert stream.getvalue() == "a.b: 3 (why)\n"


def test_train_record():
    record = TrainRecord(
        ok=True, stopped_by="done", updates=1200, eval_loss_before=2.5, eval_loss_after=None,
        best_step=None, seconds=65.0, trained_tokens=12345, peak_memory_bytes=2**30,
        adapter="runs/x/adapter", resumable=True, findings=[FINDING],
    )  # fmt: skip
    text = printed("train", record.to_dict())
    for words in ("1,200", "2.5000", "12,345", "1 min 05 s", "1.0 GiB", "runs/x/adapter", "hint"):
        assert words in text


def test_data_record():
    record = DataRecord(
        rows=10, kept=8, dropped={"too_long": 2, "empty": 0}, tokens=100, trained_tokens=40,
        lengths={"p50": 9, "max": 30}, by_source={"a": {"rows": 10, "tokens": 100}},
        findings=[FINDING],
    )  # fmt: skip
    text = printed("data", record.to_dict())
    for words in ("too_long 2", "40 (40%)", "p50 9", "source"):
        assert words in text
    assert "empty 0" not in text


def test_data_record_without_tokens():
    record = DataRecord(0, 0, {}, 0, 0, {}, {}, [])
    assert "0 (0%)" in printed("data", record.to_dict())


def test_evaluate_record():
    record = EvaluateRecord(1.25, 3.49, 0.5, 100, {}, {"a": {"loss": 1.0}, "b": {"loss": 1.5}})
    text = printed("evaluate", record.to_dict())
    for words in ("1.2500", "3.490", "50.00%", "1.5000"):
        assert words in text


def test_unknown_records_still_print():
    assert "answers" in printed("other", {"answers": ["a", "b"], "n": {"x": 1.5}})

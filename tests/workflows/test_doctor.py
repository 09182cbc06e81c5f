import pytest

from glasstune.core.files import dump_json
from glasstune.core.records import Check
from glasstune.reports.tables import print_record
from glasstune.reports.terminal import console_for
from glasstune.workflows import doctor as module
from glasstune.workflows.doctor import doctor


@pytest.fixture(scope="module")
def record():
    return doctor(compile=False)


def test_plain_precisions_and_w8a16_work_everywhere(record):
    for name in ("float32", "bfloat16", "8 bit (w8a16)"):
        assert record.checks[name].status == "works", record.checks[name]


def test_every_check_has_a_word_and_a_reason(record):
    for check in record.checks.values():
        assert check.status in ("works", "fails", "missing")
        assert check.detail


def test_sizes_are_sensible(record):
    device = record.device
    assert 0 < device["free_bytes"] <= device["total_bytes"]
    fits = record.fits_parameters
    assert 0 < fits["16"] < fits["8"] < fits["4"]
    assert fits["16"] * 2 < device["free_bytes"]
    assert record.versions["torch"] != "not installed"


def test_the_record_prints_and_is_json(record, capsys):
    import sys

    plain = record.to_dict()
    assert dump_json(plain)
    print_record("doctor", plain, console_for(sys.stdout))
    out = capsys.readouterr().out
    for words in ("free memory", "bfloat16", "works:", "billion"):
        assert words in out


def test_what_fails_is_a_finding_and_not_a_crash(monkeypatch):
    def broken(bits, device):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("glasstune.models.probe.try_quantized_layer", broken)
    record = doctor(compile=False)
    assert record.checks["4 bit (NF4)"] == Check("fails", "RuntimeError: no kernel image")
    assert any(item.code == "bitsandbytes" for item in record.findings)


def test_compile_is_tried_and_a_missing_compiler_named(monkeypatch):
    monkeypatch.setattr("glasstune.fast.probe.compiler_found", lambda: None)
    check = module._probes("cpu", True)["torch.compile"]()
    assert check.status == "missing"
    assert "g++" in check.detail
    monkeypatch.setattr("glasstune.fast.probe.compiler_found", lambda: "g++")
    monkeypatch.setattr("glasstune.fast.probe.try_compile", lambda device: 1.5)
    assert module._probes("cpu", True)["torch.compile"]().status == "works"

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


def test_float8_products_on_a_cpu_are_said_to_be_emulated(record):
    if record.device["kind"] != "cpu":
        pytest.skip("on a GPU nothing is emulated")
    check = record.checks["fp8"]
    assert check.status == "works"
    assert check.detail.startswith("emulated")
    assert "within 3." in check.detail  # e4m3 of both factors: 3.7 %


def test_float8_products_are_tried_by_rows(monkeypatch):
    from glasstune.kernels.fp8 import op

    real = op.fp8_rows

    def one_scale(parts, *rest):
        rows, scale = real(parts, *rest)
        whole = scale.max().expand_as(scale).contiguous()
        return (rows.float() * scale / whole).to(rows.dtype), whole

    monkeypatch.setattr(op, "fp8_rows", one_scale)
    check = module._try(module._probes("cpu", False)["fp8"])
    assert check.status == "fails"
    assert "ArithmeticError: outputs are off by" in check.detail


def test_an_older_gpu_is_told_what_it_can_use_instead(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Test Card 3000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    check = module._try(module._probes("cuda", False)["fp8"])
    assert check.status == "missing"
    for words in ("Test Card 3000", "8.6", "8.9", "leave training.compute out"):
        assert words in check.detail

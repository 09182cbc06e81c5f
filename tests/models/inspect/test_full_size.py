"""Full-size models from their configs alone, and the speed of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glasstune.models.inspect.precision import precision_record
from glasstune.models.inspect.source import open_source

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "support" / "configs"

# GB at 16 bit, LLM.int8 and NF4 with double quantisation, as real loads have them.
SIZES = {
    "llama-3-8b": ("16.06", "9.09", "5.70"),
    "qwen2.5-0.5b": ("0.99", "0.63", "0.46"),
    "mixtral-8x7b": ("93.4", "92.1", "91.4"),
    "falcon-7b": ("13.84", "13.84", "13.84"),
}
PARAMETERS = {
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "mixtral-8x7b": 46_702_792_704,
    "falcon-7b": 6_921_720_704,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_known_sizes(name):
    source = open_source(str(CONFIGS / f"{name}.json"))
    for bits, expected in zip((16, 8, 4), SIZES[name], strict=True):
        digits = len(expected.partition(".")[2])
        assert f"{precision_record(source, bits).total_bytes / 1e9:.{digits}f}" == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_by_logical_shape(name):
    source = open_source(str(CONFIGS / f"{name}.json"))
    for bits in (16, 8, 4):
        rows = precision_record(source, bits).modules
        assert sum(row.parameters for row in rows) == PARAMETERS[name]


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt"), (16, "Linear")])
def test_the_three_trees_of_bloom(bits, kind):
    """BLOOM 2.6B: 30 blocks, four layers each, and a head that stays."""
    record = precision_record(open_source(str(CONFIGS / "bloom-2.6b.json")), bits, dtype="float16")
    rows = {row.path: row for row in record.modules}
    layers = {
        "self_attention.query_key_value": (2560, 7680),
        "self_attention.dense": (2560, 2560),
        "mlp.dense_h_to_4h": (2560, 10240),
        "mlp.dense_4h_to_h": (10240, 2560),
    }
    for block in range(30):
        for name, (width, out) in layers.items():
            row = rows[f"transformer.h.{block}.{name}"]
            assert (row.class_name, row.original_class) == (kind, "Linear")
            assert row.shape == [out, width]
            assert row.detail == f"in_features={width}, out_features={out}, bias=True"
    assert "transformer.h.30" not in rows
    linear = [row for row in record.modules if row.class_name == kind and row.path != "lm_head"]
    assert len(linear) == 120
    head = rows["lm_head"]
    assert (head.class_name, head.shape) == ("Linear", [46145, 2560])
    assert (head.tied_to, head.bytes) == ("transformer.word_embeddings.weight", 0)
    # By hand: embedding, 30 blocks of 12 d^2 weights, their biases, norms; float16.
    d = 2560
    plain = 46145 * d + 2 * d + 2 * d + 30 * (4 * d + 13 * d - 4 * d)
    blocks = 12 * d * d
    if bits == 16:
        assert record.total_bytes == 2 * (plain + 30 * blocks)
    if bits == 8:
        assert record.total_bytes == 2 * plain + 30 * (blocks + 4 * 9 * d)
    if bits == 4:
        codes, offsets, scales = 4 * (64 + 1024), 4 * 4, blocks // 64
        nested = 4 * sum(-(-(n // 64) // 256) for n in (3 * d * d, d * d, 4 * d * d, 4 * d * d))
        packed = blocks // 2
        assert record.total_bytes == 2 * plain + 30 * (packed + scales + nested + offsets + codes)


def test_one_weight_of_4096_by_4096():
    """The worked example: 33.55, 16.79, 9.44 and 8.66 MB."""
    from torch import nn

    source = open_source(nn.Sequential(nn.Linear(4096, 4096, bias=False, device="meta")))
    skip = {"llm_int8_skip_modules": []}
    plain = {**skip, "bnb_4bit_use_double_quant": False}
    sizes = [
        precision_record(open_source(source.module.bfloat16()), 16).total_bytes,
        precision_record(source, 8, skip).total_bytes,
        precision_record(source, 4, plain).total_bytes,
        precision_record(source, 4, skip).total_bytes,
    ]
    assert [f"{size / 1e6:.2f}" for size in sizes] == ["33.55", "16.79", "9.44", "8.66"]


def test_70b_in_seconds_on_one_core():
    """The benchmark's own bounds: 10 s, 2 GB of the whole process, one thread."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "inspect_sizes.py"), "--repeat", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "16 bit 141,107,413,504" in done.stdout
    assert float(re.search(r"seconds: ([0-9.]+)", done.stdout)[1]) < 10
    # Nothing that libraries want to say reaches the terminal.
    assert done.stderr == ""

"""FSDP2 with a packed base whose products are float8: the training of one process."""

from __future__ import annotations

import json

import pytest
from runs import distance, last_weights
from several import written

pytestmark = pytest.mark.timeout(400)

COUNTED = """
from pathlib import Path

import glasstune.fast.fp8_packed as packed

real, seen = packed.weight_scales, []


def counted(*given):
    seen.append(None)
    Path(FILE).write_text(str(len(seen)))
    return real(*given)


packed.weight_scales = counted
"""
"""What a rank runs before: counts how often weights are looked through for their largest."""


@pytest.mark.slow(reason="three processes of two cores")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_sharded_packed_base_with_float8_products(
    tiny_llama, qa_file, tmp_path, several, bits
) -> None:
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        config = written(
            tiny_llama, qa_file, output,
            model={"bits": bits, "dtype": "bfloat16"},
            training={
                "max_steps": 5, "eval_steps": 5, "compute": "fp8", "fp8_keep": [],
                "distributed": {"strategy": "fsdp2"},
            },
        )  # fmt: skip
        files = [tmp_path / f"{ranks}.{rank}.txt" for rank in range(ranks)]
        patches = {
            rank: COUNTED.replace("FILE", repr(str(file))) for rank, file in enumerate(files)
        }
        ended = several.run(["train", str(config)], ranks, patches=patches, timeout=150)
        assert ended.codes == [0] * ranks, ended.log
        record = json.loads((output / "run.json").read_text())
        modules = record["speed"]["modules"]
        reasons = {module["reason"] for module in modules}
        assert all("expanded to float8" in reason for reason in reasons)
        groups = {tuple(module["group"]) for module in modules}
        assert [int(file.read_text()) for file in files] == [len(groups)] * ranks  # once each
    assert distance(last_weights(tmp_path / "2"), last_weights(tmp_path / "1")) <= 0.01

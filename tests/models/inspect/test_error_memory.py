"""Peak memory of the error measurement, in a process of its own, against the checkpoint's size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny_model, tiny_config

CHILD = """
import json, sys
from pathlib import Path
from glasstune.models.inspect.error import quantization_error
from glasstune.models.inspect.source import open_source

def leaves(hidden, wide, layers):
    attention = [(f"self_attn.{name}_proj", [hidden, hidden]) for name in "qkvo"]
    mlp = [("mlp.gate_proj", [wide, hidden]), ("mlp.up_proj", [wide, hidden]),
           ("mlp.down_proj", [hidden, wide])]
    return [(f"model.layers.{i}.{name}", shape) for i in range(layers)
            for name, shape in attention + mlp]

def memory(field):
    # Not ru_maxrss: a child begins with its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

tiny, folder, hidden, wide, layers = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
quantization_error(open_source(tiny), leaves(64, 128, 1))  # whatever is imported late
before = memory("VmRSS")
report = quantization_error(open_source(folder), leaves(hidden, wide, layers))
print(json.dumps({"growth": memory("VmHWM") - before, "layers": len(report.layers),
                  "nf4": report.mean["nf4"], "codes": [f.code for f in report.findings]}))
"""


def save_large(folder: Path, hidden: int, wide: int, layers: int) -> int:
    """Writes a random bfloat16 Llama, a shard a layer, with an index; returns its bytes."""
    config = tiny_config(
        "llama", hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(folder)
    attention = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    mlp = {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden)}
    shapes = {**attention, **mlp, "mlp.down_proj": (hidden, wide)}
    owner = {}
    for layer in range(layers):
        name = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        shard = {
            f"model.layers.{layer}.{key}.weight": torch.randn(shape).bfloat16()
            for key, shape in shapes.items()
        }
        save_file(shard, folder / name, metadata={"format": "pt"})
        owner.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(tmp_path: Path, hidden: int, wide: int, layers: int) -> tuple[int, int]:
    """Returns the checkpoint's bytes and by how many the process grew."""
    tiny = save_tiny_model(
        tmp_path / "tiny", num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8
    )
    total = save_large(tmp_path / "large", hidden, wide, layers)
    sizes = [str(size) for size in (hidden, wide, layers)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tiny), str(tmp_path / "large"), *sizes],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["layers"] == 7 * layers
    assert result["codes"] == ["weights_read"]
    assert 0.09 < result["nf4"] < 0.1  # normal weights in blocks of 64
    return total, result["growth"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_that_of_a_few_rows(tmp_path: Path) -> None:
    total, growth = measure(tmp_path, hidden=1024, wide=16384, layers=1)
    assert total > 105e6
    assert growth < 45e6


@pytest.mark.slow(reason="writes and quantises 700 MB")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    total, growth = measure(tmp_path, hidden=2048, wide=16384, layers=3)
    assert total > 700e6
    assert growth < 60e6

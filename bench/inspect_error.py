"""Seconds, rate and peak memory of `inspect --error`.

    python bench/inspect_error.py                     # Llama-3-8B's shapes, 9 of its 32 layers
    python bench/inspect_error.py --layers 32         # all of it: 14 GB on the disk
    python bench/inspect_error.py --model FOLDER_OR_GGUF

The made checkpoint is random bfloat16; its layers hold the same values under different names and
in files of their own, which neither the time nor the memory depends on. It goes to a temporary
folder (TMPDIR). Memory is the growth of the process over what it was before, imports left out;
pages that the system keeps of the files read are not counted, as they are not the process's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "tests" / "support" / "configs"
SHOWN = 5


def make_checkpoint(folder: Path, layers: int) -> None:
    """Writes the linear layers of Llama-3-8B, one shard a layer."""
    import torch

    from glasstune.core.tensors import save_tensors

    config = json.loads((CONFIGS / "llama-3-8b.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    torch.manual_seed(0)
    weights = {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}
    owner = {}
    for layer in range(layers):
        shard = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        named = {f"model.layers.{layer}.{name}.weight": value for name, value in weights.items()}
        save_tensors(named, folder / shard)
        owner.update(dict.fromkeys(named, shard))
    index = {"metadata": {}, "weight_map": owner}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def leaves_of(source: Any) -> list[tuple[str, list[int]]]:
    from glasstune.models.inspect.precision import precision_record

    record = precision_record(source, 4)
    return [
        (row.path, row.shape)
        for row in record.modules
        if row.shape is not None and row.class_name != row.original_class
    ]


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(target: str) -> None:
    import torch
    import transformers

    from glasstune.models.inspect.error import quantization_error
    from glasstune.models.inspect.source import open_source

    warm = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64)})
    quantization_error(open_source(warm), [("a", [64, 64])])
    source = open_source(target)
    leaves = leaves_of(source)
    if source.kind == "gguf":  # so that its expansion is not measured
        quantization_error(source, leaves[:1])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    report = quantization_error(source, leaves)
    seconds, growth = time.perf_counter() - start, memory("VmHWM") - before
    weights = sum(shape[0] * shape[1] for _, shape in leaves)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", end=", ")
    print(f"{torch.get_num_threads()} threads")
    print(f"{len(report.layers)} of {len(leaves)} layers, {weights:,} weights", end=", ")
    print(f"{2 * weights / 1e9:.2f} GB at 16 bit")
    print(f"{seconds:.1f} s, {2 * weights / seconds / 1e9:.3f} GB/s, peak +{growth / 1e6:.0f} MB")
    print("mean:", ", ".join(f"{key} {value:.3%}" for key, value in report.mean.items()))
    for layer in report.layers[:SHOWN]:
        errors = ", ".join(f"{key} {value:.3%}" for key, value in layer.errors.items())
        print(f"{layer.path} {layer.shape}: {errors}; worst row {layer.worst_row['nf4']:.1%}")
    for finding in report.findings:
        print(f"{finding.severity} {finding.code}: {finding.message}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--model", help="a folder or a GGUF file instead of the made checkpoint")
    arguments = parser.parse_args()
    if arguments.model:
        measure(arguments.model)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.layers)
        measure(folder)


if __name__ == "__main__":
    main()

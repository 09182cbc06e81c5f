"""Peak memory of a merge whose shards are far smaller than the model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from merging import save_peft
from safetensors.torch import save_file

# 404 MB of bfloat16 in shards of 17 MB at most; the largest weight is 11.5 MB.
LAYERS, WIDTH, INNER = 24, 1024, 1408

_MERGE = """
    import json, sys
    def peak():  # VmHWM: ru_maxrss would start with what the parent held
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    from glasstune.export import prompts
    prompts.GENERIC = prompts.GENERIC[:2]
    from glasstune.export import certificate
    certificate.GREEDY_TOKENS = 1
    from glasstune.workflows.merge import merge
    import glasstune.export.run, peft, transformers, bitsandbytes, torch
    torch.set_num_threads(1)
    from glasstune.models.resolve import resolve_model
    from glasstune.models.empty import empty_model
    resolved = resolve_model(sys.argv[2])
    empty_model(resolved.config)
    before = peak()
    record = merge(sys.argv[1], sys.argv[3], base=sys.argv[2])
    after = peak()
    print(json.dumps({"before": before, "after": after, "passed": record.passed,
                      "said": record.peak_memory_bytes, "bytes": record.weights["bytes"]}))
"""


@pytest.mark.slow(reason="writes and merges a model of 0.4 GB in a process of its own: 15 to 30 s")
def test_memory_is_a_layer_not_the_model(tmp_path):
    base = tmp_path / "base"
    _write_base(base)
    model = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    assert largest * 20 < model
    adapter = _adapter(tmp_path / "adapter")
    said = json.loads(_run(_MERGE, str(adapter), str(base), str(tmp_path / "out")))
    assert said["passed"]
    extra = said["after"] - said["before"]
    # A layer is 34 MB in float32; its 16-bit tensors, the adapter, activations and what the
    # allocator keeps come on top. Anything that held the model would be above 400 MB.
    assert extra < model / 2, f"{extra / 1e6:.0f} MB for shards of {largest / 1e6:.0f} MB"
    assert said["after"] - 1e6 <= said["said"] * 1.1
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == LAYERS + 1
    assert max(file.stat().st_size for file in shards) <= largest + 4096


def _write_base(folder):
    """A Llama of random bfloat16 weights, one shard a layer."""
    folder.mkdir()
    config = _config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    one = torch.randn(INNER * WIDTH).mul_(0.03).bfloat16()  # the same numbers serve every layer

    def weight(rows, columns):
        return one[: rows * columns].view(rows, columns).clone()

    ends = {"model.embed_tokens": 1024, "lm_head": 1024}
    parts = [{f"{name}.weight": weight(rows, WIDTH) for name, rows in ends.items()}]
    parts[0]["model.norm.weight"] = torch.ones(WIDTH).bfloat16()
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        part = {f"{name}self_attn.{key}_proj.weight": weight(WIDTH, WIDTH) for key in "qkvo"}
        part |= {f"{name}mlp.{key}_proj.weight": weight(INNER, WIDTH) for key in ("gate", "up")}
        part[f"{name}mlp.down_proj.weight"] = weight(WIDTH, INNER)
        for norm in ("input", "post_attention"):
            part[f"{name}{norm}_layernorm.weight"] = torch.ones(WIDTH).bfloat16()
        parts.append(part)
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def _config():
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=WIDTH, intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=16,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip


def _adapter(folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(), dtype=torch.bfloat16)
        wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, value in list(wrapped.named_parameters()):
        if "lora_" in name:
            real = torch.nn.Parameter(torch.randn(value.shape) * 0.01)
            owner, _, key = name.rpartition(".")
            wrapped.get_submodule(owner).register_parameter(key, real)
    return save_peft(wrapped, folder)


def _run(code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *words],
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

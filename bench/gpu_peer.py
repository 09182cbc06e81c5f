"""The same training step as `gpu_step.py`, by other stacks: transformers + PEFT, Liger, Unsloth.

    python bench/gpu_step.py --model llama8b --save /tmp/llama8b
    python bench/gpu_peer.py --impl unsloth --bits 4 --recompute 0 --folder /tmp/llama8b

Each stack does what its own documentation tells a user to do: its loader, its preparation of a
quantised base, its loss. Weights are those of `gpu_step.py`, written by `--save`; tokens, rank and
optimiser are the same. The last line printed is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", UNSLOTH_DISABLE_STATISTICS="1"
)  # before any of them is imported

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOOM = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def build_plain(args: argparse.Namespace, targets: list[str]) -> Any:
    """Returns the model of transformers + PEFT, with Liger's kernels where asked."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if args.impl == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    quantization = None
    if args.bits == 4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    elif args.bits == 8:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.folder, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    again = {"use_reentrant": False}
    if args.bits < 16:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=bool(args.recompute),
            gradient_checkpointing_kwargs=again,
        )
    elif args.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=again)
        model.enable_input_require_grads()
    model.config.use_cache = False
    options = LoraConfig(
        task_type="CAUSAL_LM", r=args.rank, lora_alpha=32, lora_dropout=0.0, target_modules=targets
    )
    return get_peft_model(model, options)


def build_unsloth(args: argparse.Namespace, targets: list[str]) -> Any:
    """Returns Unsloth's model; `unsloth` was imported before torch, as it asks for."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        args.folder, max_seq_length=args.seq, dtype=torch.bfloat16, local_files_only=True,
        load_in_4bit=args.bits == 4, load_in_8bit=args.bits == 8,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=32, lora_dropout=0.0, target_modules=targets, bias="none",
        use_gradient_checkpointing="unsloth" if args.recompute else False, random_state=0,
    )  # fmt: skip
    FastLanguageModel.for_training(model)
    return model


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds, warms up, times; returns the result."""
    if args.impl == "unsloth":
        import unsloth  # noqa: F401  (patches what is imported after it)
    import torch
    from transformers import AutoConfig

    bloom = AutoConfig.from_pretrained(args.folder).model_type == "bloom"
    torch.manual_seed(0)
    build = build_unsloth if args.impl == "unsloth" else build_plain
    model = build(args, BLOOM if bloom else LLAMA).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    generator = torch.Generator(device="cuda").manual_seed(1)
    size = (args.batch, args.seq)
    ids = torch.randint(0, model.config.vocab_size, size, device="cuda", generator=generator)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    losses, times = [], []
    for index in range(args.steps + 4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end.record()
        torch.cuda.synchronize()
        if index < 3:
            losses.append(round(float(loss), 4))
        if index >= 4:
            times.append(begin.elapsed_time(end))
    median = statistics.median(times)
    return {
        "way": args.impl, "model": args.model, "bits": args.bits, "seq": args.seq,
        "batch": args.batch, "recompute": bool(args.recompute), "rank": args.rank,
        "ms": round(median, 1), "ms_min": round(min(times), 1),
        "tokens_per_second": round(args.batch * args.seq / median * 1e3),
        "peak_bytes": torch.cuda.max_memory_allocated(), "base_bytes": base, "losses": losses,
        "modules": {}, "card": torch.cuda.get_device_name(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--impl", choices=("hf", "liger", "unsloth"), required=True)
    parser.add_argument("--folder", required=True, help="written by gpu_step.py --save")
    parser.add_argument("--model", default="llama8b", help="name in the result")
    parser.add_argument("--bits", type=int, choices=(16, 8, 4), default=16)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--recompute", type=int, choices=(0, 1), default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args(argv)
    print("RESULT " + json.dumps(measure(args)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

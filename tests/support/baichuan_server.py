"""A process without Glasstune: the checkpoint's own code, sentencepiece, plain PEFT and Trainer.

It stands for the published script and for a server. Run it as a program:

- `tune BASE ROWS OUT`: adds the script's LoRA, trains it with the script's rule and `Trainer`, and
  writes `OUT/first` and `OUT/old` (PEFT's format, before and after) and `OUT/said.json`.
- `logits FOLDER OUT`: loads a folder as it is and writes the logits of `prompts()`.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

USER, ASSISTANT, END, LENGTH = 195, 196, 2, 64


def prompts() -> torch.Tensor:
    """Ids of three rows, int64 [3, 24]."""
    return torch.arange(72).mul(7919).remainder(640).view(3, 24)


def load(folder: Path) -> Any:
    """Loads a folder by the code files in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    assert "glasstune" not in sys.modules
    assert type(model).__module__.startswith("transformers_modules.")
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompts()).logits.contiguous()


def rows_of(base: Path, rows: Path) -> list[dict[str, list[int]]]:
    """Ids and labels by the published rule, cut and padded to `LENGTH`."""
    words = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    found = []
    for row in json.loads(rows.read_text(encoding="utf-8")):
        ids: list[int] = []
        labels: list[int] = []
        for turn in row["conversations"]:
            value = words.encode(turn["value"])
            if turn["from"] == "human":
                ids += [USER, *value]
                labels += [END, *[-100] * len(value)]
            else:
                ids += [ASSISTANT, *value]
                labels += [-100, *value]
        ids, labels = [*ids, END][:LENGTH], [*labels, END][:LENGTH]
        room = LENGTH - len(ids)
        found.append({"input_ids": ids + [0] * room, "labels": labels + [-100] * room})
    return found


def tune(base: Path, rows: Path, out: Path) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(5)
    model = load(base)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, target_modules=["W_pack"], inference_mode=False, r=1,
        lora_alpha=32, lora_dropout=0.0,
    )  # fmt: skip
    model.enable_input_require_grads()
    model = get_peft_model(model, config)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        model.print_trainable_parameters()
    model.save_pretrained(out / "first")
    data = rows_of(base, rows)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), num_train_epochs=3, per_device_train_batch_size=len(data),
        learning_rate=2e-3, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.98,
        adam_epsilon=1e-8, max_grad_norm=1.0, weight_decay=0.5, report_to="none", use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    model.eval()
    model.save_pretrained(out / "old")
    save_file({"logits": logits_of(model)}, out / "old.safetensors")
    record = {"line": said.getvalue(), "losses": losses}
    (out / "said.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    first, *places = sys.argv[1:]
    if first == "tune":
        tune(*map(Path, places))
    else:
        save_file({"logits": logits_of(load(Path(places[0])))}, places[1])

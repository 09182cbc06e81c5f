"""Baichuan2's road: the published script's run as a config, its old adapters, what servers get.

The truth is a process without Glasstune (`baichuan_server.py`): the checkpoint's own code,
sentencepiece, plain PEFT and `Trainer`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from baichuan import save_baichuan
from baichuan_server import ASSISTANT, LENGTH, USER, prompts, rows_of
from peft import get_peft_model_state_dict
from runs import adapter_weights, events
from safetensors.torch import load_file
from transformers import AutoTokenizer

import glasstune as gt
from glasstune.adapters.inject import load_adapter_for_inference
from glasstune.cli.main import run
from glasstune.core.config_load import load_config
from glasstune.core.errors import InputError
from glasstune.workflows.open_model import open_model

SUPPORT = Path(__file__).parents[1] / "support"
CONFIG = Path(__file__).parents[2] / "configs" / "baichuan2-lora.yaml"
CODE = ("configuration_baichuan.py", "modeling_baichuan.py")
ROWS = [
    {
        "id": str(number),
        "conversations": [
            {"from": "human", "value": f"请问 {number} 加 {number % 7} 等于多少？\n谢谢"},
            {"from": "gpt", "value": f"  等于 {number + number % 7}。" * (1 + number % 4)},
            *(
                [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "是的。"}]
                if number % 3 == 0
                else []
            ),
        ],
    }
    for number in range(8)
]


@dataclass
class Old:
    """What people bring: a checkpoint with its code, rows, an adapter of the script's."""

    base: Path
    rows: Path
    folder: Path
    line: str
    losses: list[float]
    logits: torch.Tensor


def outside(*words: str | Path, cache: Path) -> None:
    """Runs the process without Glasstune."""
    command = [sys.executable, str(SUPPORT / "baichuan_server.py"), *map(str, words)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Old:
    folder = tmp_path_factory.mktemp("baichuan2")
    base = save_baichuan(folder / "Baichuan2", dtype="float32")
    for name in CODE:
        shutil.copy(SUPPORT / "baichuan_code" / name, base / name)
    settings = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # no chat checkpoint's
    (base / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    outside("tune", base, rows, folder, cache=folder / "modules")
    said = json.loads((folder / "said.json").read_text())
    logits = load_file(folder / "old.safetensors")["logits"]
    return Old(base, rows, folder, said["line"], said["losses"], logits)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=prompts()).logits
    return logits


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_the_script_from_python(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    """The script's own lines on what `load_model` gives; PEFT's line is that of plain PEFT."""
    model, _ = gt.load_model(str(old.base), dtype="float32")
    ids = prompts()
    assert not model.get_input_embeddings()(ids).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad
    model = gt.add_adapter(
        model, task_type="CAUSAL_LM", target_modules=["W_pack"], inference_mode=False, r=1,
        lora_alpha=32, lora_dropout=0.1,
    )  # fmt: skip
    capsys.readouterr()
    model.print_trainable_parameters()
    assert capsys.readouterr().out == old.line
    assert old.line.startswith("trainable params: 512 || all params: ")
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (1, 32, 0.1)
    assert get_peft_model_state_dict(model).keys() == adapter_weights(old.folder / "old").keys()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    ups = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(ups) == 2
    assert all(grad is not None and bool(grad.any()) for grad in ups)


def test_the_line_of_the_published_7b_shape(tmp_path: Path) -> None:
    content = json.loads(
        (save_baichuan(tmp_path / "m", weights="none") / "config.json").read_text()
    )
    content |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                "num_attention_heads": 32, "vocab_size": 125696}  # fmt: skip
    (tmp_path / "m" / "config.json").write_text(json.dumps(content))
    seen = gt.inspect_model(str(tmp_path / "m"), bits=4, target_modules=["W_pack"], r=1).to_dict()
    packed, out, inner = 4096 * 3 * 4096, 4096 * 4096, 3 * 4096 * 11008
    base = 2 * 125696 * 4096 + 32 * (packed + out + inner + 2 * 4096) + 4096
    assert seen["trainable_parameters"] == 32 * (4096 + 3 * 4096)
    assert seen["all_parameters"] == base + seen["trainable_parameters"] == 7_506_497_536


def test_old_adapters_say_the_same(old: Old) -> None:
    model, _ = gt.load_model(str(old.base), dtype="float32")
    plain = logits_of(model)
    tuned = logits_of(load_adapter_for_inference(model, old.folder / "old"))
    # Float32 products of two implementations; the adapter itself moves logits by far more.
    assert float((tuned - old.logits).abs().max()) < 2e-4
    assert float((tuned - plain).abs().max()) > 0.1


def command(old: Old, *more: str) -> str:
    return (
        f"deepspeed --num_gpus 1 fine-tune.py --report_to none --data_path {old.rows} "
        f"--model_name_or_path {old.base} --model_max_length {LENGTH} --num_train_epochs 3 "
        "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --save_strategy epoch "
        "--learning_rate 2e-3 --lr_scheduler_type constant --adam_beta1 0.9 --adam_beta2 0.98 "
        "--adam_epsilon 1e-8 --max_grad_norm 1.0 --weight_decay 0.5 --warmup_ratio 0.0 "
        f"--logging_steps 1 --use_lora True {' '.join(more)}"
    )


def test_a_translated_command_makes_trainers_updates(old: Old, tmp_path: Path) -> None:
    """`init --from` of the command, then `train`: losses and weights are those of the script.

    Both start from one adapter and see all rows in each update, so that neither order nor chance
    is in it; dropout is off for the same reason.
    """
    file = tmp_path / "config.yaml"
    text = command(old, f"--output_dir {tmp_path / 'run'}", "--gradient_checkpointing True")
    assert run(["init", "--from", text, "-o", str(file)]) == 0
    words = [
        "train", str(file), f"adapter.path={old.folder / 'first'}", "adapter.lora_dropout=0",
    ]  # fmt: skip
    assert run(words) == 0
    losses = [row["loss"] for row in events(tmp_path / "run", "train")]
    assert losses == pytest.approx(old.losses, rel=1e-5)
    ours = adapter_weights(tmp_path / "run" / "adapter")
    first, theirs = (adapter_weights(old.folder / name) for name in ("first", "old"))
    assert ours.keys() == theirs.keys()
    moved = {name: (value - first[name]).norm() for name, value in theirs.items()}
    # Adam divides by the gradient's own size, so float32's rounding stays relative.
    for name, value in ours.items():
        assert float((value - theirs[name]).norm()) < 1e-3 * float(moved[name]), name
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-1", "step-2", "step-3"]  # save_strategy epoch, all kept


def test_old_adapters_go_on(old: Old, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    run(["init", "--from", command(old, f"--output_dir {tmp_path / 'run'}"), "-o", str(file)])
    more = ["training.max_steps=1", "training.save_strategy=steps"]
    words = [f"adapter.path={old.folder / 'old'}", "adapter.lora_dropout=0.0"]
    assert run(["train", str(file), *words, *more]) == 0
    (event,) = events(tmp_path / "run", "train")
    # The first loss is the old adapter's, by the rule's own rows and the old logits' model.
    model, _ = gt.load_model(str(old.base), dtype="float32")
    tuned = load_adapter_for_inference(model, old.folder / "old")
    batch = {key: torch.tensor([row[key] for row in rows_of(old.base, old.rows)])
             for key in ("input_ids", "labels")}  # fmt: skip
    with torch.no_grad():
        logits = tuned(input_ids=batch["input_ids"]).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert event["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert event["loss"] < old.losses[-1]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (1, ["W_pack"])
    with pytest.raises(InputError, match="lora_dropout"):
        gt.train(str(file), [words[0], f"training.output_dir={tmp_path / 'other'}"])


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_old_adapters_merge_and_a_server_loads_the_folder_unchanged(
    old: Old, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    certificate = gt.merge(old.folder / "old", merged, dtype="float32").to_dict()
    assert certificate["passed"] is True
    source = torch.load(old.base / "pytorch_model.bin", weights_only=True)
    written = load_file(merged / "model.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in written.items()} == {
        name: (value.dtype, value.shape) for name, value in source.items()
    }
    changed = {name for name in source if not torch.equal(source[name], written[name])}
    assert changed == {f"model.layers.{layer}.self_attn.W_pack.weight" for layer in (0, 1)}
    for file in old.base.iterdir():
        if file.suffix == ".bin" or file.name == "config.json":
            continue
        assert digest(merged / file.name) == digest(file), file.name
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (old.base, merged)
    )
    assert after == before | {"torch_dtype": "float32"}
    assert after["model_type"] == "baichuan"
    outside("logits", merged, tmp_path / "served.safetensors", cache=tmp_path / "modules")
    served = load_file(tmp_path / "served.safetensors")["logits"]
    assert float((served - old.logits).abs().max()) < 2e-4


def as_in_2023(old: Old, folder: Path) -> Path:
    """The adapter as the script left it in 2023: a .bin file, few options, the tokenizer beside.

    PEFT 0.4 and transformers 4.29 wrote these; the base is named by its id, and `save_model` put
    the tokenizer's own files there, its class named as code of the hub.
    """
    folder.mkdir()
    torch.save(adapter_weights(old.folder / "old"), folder / "adapter_model.bin")
    options = {
        "auto_mapping": None, "base_model_name_or_path": "baichuan-inc/Baichuan2-7B-Base",
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 32, "lora_dropout": 0.1, "modules_to_save": None, "peft_type": "LORA", "r": 1,
        "revision": None, "target_modules": ["W_pack"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(options))
    for name in ("tokenizer.model", "special_tokens_map.json"):
        shutil.copy(old.base / name, folder / name)
    saved = json.loads((old.base / "tokenizer_config.json").read_text())
    place = "baichuan-inc/Baichuan2-7B-Base--tokenization_baichuan.BaichuanTokenizer"
    saved["auto_map"] = {"AutoTokenizer": [place, None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved))
    (folder / "training_args.bin").write_bytes(b"not read")
    return folder


def test_an_adapter_of_2023_is_used_as_it_is(
    old: Old, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = as_in_2023(old, tmp_path / "output")
    words = ["merge", str(adapter), "--base", str(old.base), "--output", str(tmp_path / "m"),
             "--dtype", "float32"]  # fmt: skip
    assert asked(capsys, *words)["passed"] is True
    model, _ = gt.load_model(str(tmp_path / "m"), dtype="float32")
    assert float((logits_of(model) - old.logits).abs().max()) < 2e-4
    assert digest(tmp_path / "m" / "tokenizer_config.json") == digest(
        old.base / "tokenizer_config.json"
    )
    file = tmp_path / "config.yaml"
    run(["init", "--from", command(old, f"--output_dir {tmp_path / 'run'}"), "-o", str(file)])
    more = [f"adapter.path={adapter}", "training.max_steps=1", "training.save_strategy=steps"]
    assert run(["train", str(file), *more]) == 0
    content = json.loads((adapter / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(old.base)
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    # It was trained by the script's rule, so it is asked by it.
    opened = open_model(str(adapter), dtype="float32")
    ids = opened.tokenizer("你好", add_special_tokens=False)["input_ids"]
    question = [{"role": "user", "content": "你好"}]
    assert opened.template.render_prompt(question) == [USER, *ids, ASSISTANT]
    answers = asked(capsys, "generate", str(adapter), "--prompt", "你好", "--max-new-tokens", "2")
    assert len(answers["answers"]) == 1


def test_a_chat_checkpoint_is_asked_by_its_rule(tmp_path: Path) -> None:
    base = save_baichuan(tmp_path / "m")
    opened = open_model(str(base))
    question = [{"role": "user", "content": "a"}]
    assert opened.template.render_prompt(question)[0] == USER
    file = base / "generation_config.json"
    content = json.loads(file.read_text()) | {"user_token_id": 197, "assistant_token_id": 198}
    file.write_text(json.dumps(content))
    ids = open_model(str(base)).template.render_prompt(question)
    assert (ids[0], ids[-1]) == (197, 198)
    del content["user_token_id"]
    file.write_text(json.dumps(content))
    assert open_model(str(base)).template.kind == "none"  # a base model goes on with a text


def test_a_tokenizer_with_new_tokens_goes_with_the_merged_model(old: Old, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(old.folder / "old", adapter)
    _, tokenizer = gt.load_model(str(old.base), dtype="float32")
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(adapter)
    gt.merge(adapter, tmp_path / "merged", dtype="float32", certificate=False)
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged("a<|new|>")["input_ids"][-1] == 640


@pytest.fixture(scope="module", params=["rope-16", "rope-8", "rope-4", "alibi-16"])
def tuned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, Path, list[str], dict[str, Any]]:
    """The published config on a tiny bfloat16 Baichuan2 (as 7B, as 13B), at one precision."""
    folder = tmp_path_factory.mktemp("published")
    kind, bits = request.param.split("-")
    base = save_baichuan(folder / "Baichuan2", kind)
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS, ensure_ascii=False), encoding="utf-8")
    words = [
        str(CONFIG), f"model.path={base}", f"model.bits={bits}",
        f"data.sources.0.path={rows}", f"training.output_dir={folder / 'run'}",
        "training.train_batch_size=4", "training.num_train_epochs=2", "data.validation_split=0.2",
    ]  # fmt: skip
    record = folder / "train.json"
    assert run(["train", *words, "--json", str(record)]) == 0
    return int(bits), folder, words, json.loads(record.read_text())


def width(folder: Path) -> int:
    content = json.loads((folder / "Baichuan2" / "config.json").read_text())
    return int(content["hidden_size"])


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Runs a command and returns its record."""
    capsys.readouterr()
    assert run([*words, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


KINDS = {16: "Linear", 8: "Int8Linear", 4: "Linear4bit"}
"""Classes of a `W_pack`; the head stays Linear."""


def test_the_published_config_trains_at_each_precision(tuned: Any) -> None:
    bits, folder, _, record = tuned
    assert (record["ok"], record["stopped_by"], record["updates"]) == (True, "done", 4)
    assert "added_tokens_used" not in {found["code"] for found in record["findings"]}
    resolved = load_config(folder / "run" / "config.yaml").config
    assert (resolved.model.bits, resolved.model.trust_remote_code) == (bits, False)
    weights = adapter_weights(folder / "run" / "adapter")
    size = width(folder)
    assert (
        sorted(value.shape for value in weights.values()) == [(1, size)] * 2 + [(3 * size, 1)] * 2
    )
    assert all(".self_attn.W_pack.lora_" in name for name in weights)
    saved = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["lora_dropout"]) == (1, 32, 0.1)
    steps = [row["learning_rate"] for row in events(folder / "run", "train")]
    assert steps == [2e-5] * 4


def test_it_is_inspected_planned_and_audited(
    tuned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bits, folder, words, _ = tuned
    seen = asked(capsys, "inspect", str(folder / "run"), "--bits", str(bits))
    assert seen["trainable_parameters"] == 2 * 4 * width(folder)
    rows = {row["path"]: row for row in seen["precisions"][str(bits)]["modules"]}
    packed = rows["model.layers.0.self_attn.W_pack"]
    assert packed["lora"] is not None
    assert packed["class"] == KINDS[bits]
    assert rows["lm_head"]["class"] == "Linear"
    planned = asked(capsys, "plan", *words)
    assert planned["parts"]["adapters"] == 2 * 4 * width(folder) * 4
    audited = asked(capsys, "audit", *words, "--steps", "1")
    status = {entry["name"]: entry["status"] for entry in audited["parameters"]}
    assert sum("lora_B" in name and value == "ok" for name, value in status.items()) == 2
    assert {v for name, v in status.items() if "lora_" not in name} == {"frozen"}
    assert not [found for found in audited["findings"] if found["severity"] == "error"]


def test_it_merges_with_a_certificate_and_answers(
    tuned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, folder, _, _ = tuned
    merged = tmp_path / "merged"
    certificate = asked(capsys, "merge", str(folder / "run"), "--output", str(merged))
    assert certificate["passed"] is True
    for name in ("tokenizer.model", "tokenizer_config.json", *CODE):
        assert digest(merged / name) == digest(folder / "Baichuan2" / name)
    written = load_file(merged / "model.safetensors")
    assert written["lm_head.weight"].dtype == torch.bfloat16
    source = torch.load(folder / "Baichuan2" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"])  # not the scaled one
    rows = str(folder / "rows.json")
    losses = [
        asked(capsys, "evaluate", target, "--data", rows)["eval_loss"]
        for target in (str(folder / "run"), str(merged))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
    opened = open_model(str(merged))
    ids = opened.tokenizer("你好", add_special_tokens=False)["input_ids"]
    asked_of = [{"role": "user", "content": "你好"}]
    assert opened.template.render_prompt(asked_of) == [USER, *ids, ASSISTANT]
    words = ["generate", str(merged), "--prompt", "你好", "--max-new-tokens", "3"]
    assert len(asked(capsys, *words)["answers"]) == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
    assert run(["chat", str(folder / "run"), "--max-new-tokens", "3"]) == 0

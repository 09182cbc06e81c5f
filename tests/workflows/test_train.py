"""The training road on a tiny model: against plain PEFT, for any split, with every term."""

from __future__ import annotations

import json

import pytest
import torch
from runs import QuietProgress, adapter_weights, distance, events, last_weights, tiny_run
from tiny import save_tiny_model

from glasstune.core.choices import Choices
from glasstune.core.errors import InputError, RunError
from glasstune.workflows.train import train


@pytest.fixture(scope="module")
def finished(tiny_llama, qa_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    record = train(tiny_run(tiny_llama, qa_file, output), progress=QuietProgress())
    return output, record


def test_held_out_loss_falls_and_the_record_says_so(finished) -> None:
    output, record = finished
    assert record.ok
    assert record.stopped_by == "done"
    assert record.eval_loss_after < record.eval_loss_before - 0.5
    assert record.updates == events(output, "train")[-1]["step"]
    assert len(events(output, "eval")) >= 6  # at the start and at least five times
    row = events(output, "train")[0]
    for key in (
        "step", "epoch", "loss", "losses", "learning_rate", "grad_norm", "tokens",
        "trained_tokens", "tokens_per_second", "step_seconds", "peak_memory_bytes", "attempt",
    ):  # fmt: skip
        assert key in row
    assert record.trained_tokens == sum(row["trained_tokens"] for row in events(output, "train"))


def test_every_automatic_choice_has_a_reason(finished) -> None:
    output, _ = finished
    run = json.loads((output / "run.json").read_text())
    assert {"versions", "device", "choices", "adapter_checkpoint"} <= set(run)
    assert all(choice["reason"] for choice in run["choices"])
    names = {choice["name"] for choice in run["choices"]}
    assert {"training.per_device_train_batch_size", "training.recompute", "model.device"} <= names


def test_the_adapter_opens_in_plain_peft_with_the_same_logits(finished, tiny_llama) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output, _ = finished
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, output / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    ids = torch.tensor([tokenizer("What is 3 plus 3?")["input_ids"]])
    tuned = plain(ids).logits
    with plain.disable_adapter():
        assert not torch.allclose(tuned, plain(ids).logits)
    # The truth by hand: base weight + scale * B @ A for every adapted layer.
    weights = adapter_weights(output / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for key, a in weights.items():
        if ".lora_A." in key:
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = weights[key.replace("lora_A", "lora_B")]
            with torch.no_grad():
                merged.get_submodule(path).weight += (8 / 4) * b @ a
    torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-4)


def one_update(tiny_llama, qa_file, output, **sections):
    """Prepares a run and computes its first update's gradients; returns (run parts, gradients)."""
    from glasstune.training.batching import updates
    from glasstune.training.step import compute_update
    from glasstune.workflows.prepare_run import prepare
    from glasstune.workflows.train import _Session

    config = tiny_run(tiny_llama, qa_file, output, **sections)
    choices, progress = Choices(), QuietProgress()
    output.mkdir(parents=True)
    prepared = prepare(config, choices, progress)
    run, _ = _Session(config, output, choices, prepared, progress, []).open(None)
    run.adapted.model.train()
    update = next(updates(run.schedule, run.train, 3, 0, 0, 0, run.pad_id))
    result = compute_update(run.adapted, run.terms, update.micro_batches, 1, update.epoch)
    grads = {name: value.grad.clone() for name, value in run.parameters.items()}
    return run, update, result, grads


def test_g04_gradients_equal_plain_peft_on_separate_documents(
    tiny_llama, qa_file, tmp_path
) -> None:
    """The packed, chunked update against transformers + PEFT, one document a forward, fp32."""
    from torch.nn.functional import cross_entropy

    run, update, result, grads = one_update(tiny_llama, qa_file, tmp_path / "run")
    model = run.adapted.model
    model.zero_grad()
    documents = [doc for batch in update.micro_batches for doc in batch.documents]
    count = sum(doc.trained_tokens for doc in documents)
    assert result.trained_tokens == count
    total = 0.0
    for doc in documents:
        ids = torch.tensor(doc.ids.tolist(), device=model.device)[None]
        logits = model(input_ids=ids).logits[0, :-1]
        labels = torch.tensor(doc.labels.tolist(), device=model.device)[1:]
        loss = cross_entropy(logits, labels, reduction="sum") / count
        loss.backward()
        total += loss.item()
    assert result.loss == pytest.approx(total, rel=1e-5)
    for name, value in run.parameters.items():
        torch.testing.assert_close(grads[name], value.grad, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_g04_any_split_gives_the_same_update(tiny_llama, qa_file, tmp_path, dropout, quiet) -> None:
    """4 rows as 1x4, 2x2 and 4x1, short last update included: the same weights after 3 epochs."""
    results = []
    for micro in (4, 2, 1):
        output = tmp_path / f"micro-{micro}"
        config = tiny_run(
            tiny_llama, qa_file, output,
            adapter={"lora_dropout": dropout},
            training={"per_device_train_batch_size": micro, "learning_rate": 1e-3},
        )  # fmt: skip
        train(config, progress=quiet)
        results.append(last_weights(output))
    assert distance(results[1], results[0]) < 2e-5
    assert distance(results[2], results[0]) < 2e-5


def test_g04_the_base_models_own_dropout_does_not_depend_on_the_split(qa_file, tmp_path) -> None:
    """GPT-2 drops embeddings and residuals by default; each row has masks of its own."""
    model = save_tiny_model(tmp_path / "gpt2", "gpt2", attn_pdrop=0.0)
    grads = [
        one_update(
            model, qa_file, tmp_path / str(micro),
            adapter={"lora_dropout": 0.2}, training={"per_device_train_batch_size": micro},
        )[3]
        for micro in (4, 2, 1)
    ]  # fmt: skip
    assert distance(grads[1], grads[0]) < 1e-5
    assert distance(grads[2], grads[0]) < 1e-5


def test_dropout_that_depends_on_the_split_is_said(qa_file, tmp_path, quiet) -> None:
    model = save_tiny_model(tmp_path / "gpt2", "gpt2", attn_pdrop=0.1)
    record = train(
        tiny_run(model, qa_file, tmp_path / "run", training={"max_steps": 2}), progress=quiet
    )
    assert "dropout_per_micro_batch" in {finding.code for finding in record.findings}


def test_recompute_gives_the_same_bits(tiny_llama, qa_file, tmp_path) -> None:
    """Non-reentrant recomputation with dropout: equal gradients (G01)."""
    options = {"adapter": {"lora_dropout": 0.3}}
    _, _, _, plain = one_update(
        tiny_llama, qa_file, tmp_path / "a", training={"recompute": "none"}, **options
    )
    _, _, _, again = one_update(
        tiny_llama, qa_file, tmp_path / "b", training={"recompute": "full"}, **options
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def write_loss(folder, body: str):
    path = folder / "my_loss.py"
    path.write_text("import torch\n\n" + body)
    return f"{path}:loss"


def test_terms_against_full_logits(tiny_llama, qa_file, tmp_path) -> None:
    """next_token + z_loss + kl_to_base + a user's term, from plain full logits in fp32."""
    function = write_loss(
        tmp_path,
        "def loss(batch):\n"
        "    def part(logits, chunk):\n"
        "        return logits.float().log_softmax(-1).square().mean(-1).sum()\n"
        "    return batch.sum_over_chunks(part), len(batch)\n",
    )
    losses = [
        {"name": "next_token"},
        {"name": "z_loss", "weight": 0.1},
        {"name": "kl_to_base", "weight": 0.5},
        {"name": "mine", "weight": 0.01, "function": function},
    ]
    run, update, result, grads = one_update(
        tiny_llama, qa_file, tmp_path / "run",
        losses=losses, adapter={"init_lora_weights": False},
        training={"per_device_train_batch_size": 2},
    )  # fmt: skip
    model = run.adapted.model
    model.zero_grad()
    sums = dict.fromkeys(("next_token", "z_loss", "kl_to_base", "mine"), 0.0)
    count = result.trained_tokens
    for doc in (doc for batch in update.micro_batches for doc in batch.documents):
        ids = torch.tensor(doc.ids.tolist(), device=model.device)[None]
        labels = torch.tensor(doc.labels.tolist(), device=model.device)[1:]
        keep = labels != -100
        logits = model(input_ids=ids).logits[0, :-1][keep]
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids).logits[0, :-1][keep]
        logp, logq = logits.log_softmax(-1), base.log_softmax(-1)
        values = {
            "next_token": -logp.gather(-1, labels[keep][:, None]).sum(),
            "z_loss": logits.logsumexp(-1).square().sum(),
            "kl_to_base": torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="sum"),
            "mine": logp.square().mean(-1).sum(),
        }
        weights = {"next_token": 1.0, "z_loss": 0.1, "kl_to_base": 0.5, "mine": 0.01}
        sum(weights[name] * value / count for name, value in values.items()).backward()
        for name, value in values.items():
            sums[name] += value.item() / count
    assert sums["kl_to_base"] > 0.01
    for name, value in sums.items():
        assert result.losses[name] == pytest.approx(value, rel=1e-4), name
    for name, value in run.parameters.items():
        torch.testing.assert_close(grads[name], value.grad, rtol=5e-4, atol=1e-5)


def test_kl_to_base_is_zero_at_the_start(tiny_llama, qa_file, tmp_path) -> None:
    _, _, result, _ = one_update(
        tiny_llama, qa_file, tmp_path / "run",
        losses=[{"name": "next_token"}, {"name": "kl_to_base", "weight": 1.0}],
        adapter={"lora_dropout": 0.3},
    )  # fmt: skip
    assert result.losses["kl_to_base"] == pytest.approx(0.0, abs=1e-7)


def test_kl_to_base_is_zero_with_the_base_models_own_dropout(qa_file, tmp_path) -> None:
    """Both sides draw the same masks: GPT-2 drops in attention and residuals, the adapter too."""
    model = save_tiny_model(tmp_path / "gpt2", "gpt2", attn_pdrop=0.2, resid_pdrop=0.2)
    run, update, result, _ = one_update(
        model, qa_file, tmp_path / "run",
        losses=[{"name": "next_token"}, {"name": "kl_to_base", "weight": 1.0}],
        adapter={"lora_dropout": 0.3},
    )  # fmt: skip
    assert result.losses["kl_to_base"] == pytest.approx(0.0, abs=1e-7)
    batch = update.micro_batches[0]
    dropped = run.adapted.trained_hidden(batch, 0)
    run.adapted.model.eval()
    assert not torch.allclose(dropped, run.adapted.trained_hidden(batch, 0))  # it does drop


def test_a_users_function_reads_columns_of_the_row(tiny_llama, qa_file, tmp_path, quiet) -> None:
    """Per-row weights from the data: the loss equals the hand-weighted sum."""
    rows = [{**row, "score": 1.0 + n % 3} for n, row in enumerate(json.loads(qa_file.read_text()))]
    data = tmp_path / "scored.json"
    data.write_text(json.dumps(rows))
    function = write_loss(
        tmp_path,
        "def loss(batch):\n"
        "    score = torch.tensor(batch.columns['score'], device=batch.labels.device)\n"
        "    score = score[batch.documents]\n"
        "    logp = batch.logits().float().log_softmax(-1)\n"
        "    nll = -logp.gather(-1, batch.labels[:, None]).squeeze(-1)\n"
        "    return (nll * score).sum(), score.sum()\n",
    )
    losses = [{"name": "next_token", "weight": 0.0}, {"name": "mine", "function": function}]
    run, update, result, _ = one_update(
        tiny_llama, data, tmp_path / "run", losses=losses,
        training={"per_device_train_batch_size": 1},
    )  # fmt: skip
    total = count = 0.0
    for doc in (doc for batch in update.micro_batches for doc in batch.documents):
        device = run.adapted.device
        ids = torch.tensor(doc.ids.tolist(), device=device)[None]
        labels = torch.tensor(doc.labels.tolist(), device=device)[1:]
        with torch.no_grad():
            logits = run.adapted.model(input_ids=ids).logits
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], labels, reduction="sum")
        total += doc.columns["score"] * nll.item()
        count += doc.columns["score"] * doc.trained_tokens
    assert result.losses["mine"] == pytest.approx(total / count, rel=1e-5)


def test_d10_an_update_with_no_trained_token_is_no_update(
    tiny_llama, qa_file, tmp_path, quiet
) -> None:
    """Source b weighs nothing; its updates are skipped, counted and logged nowhere."""
    rows = json.loads(qa_file.read_text())
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    sources = [
        {"path": str(tmp_path / "a.json"), "name": "a"},
        {"path": str(tmp_path / "b.json"), "name": "b", "loss_weight": 0.0},
    ]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        data={"sources": sources, "packing": False, "validation_split": 0.0},
        training={"train_batch_size": 1, "num_train_epochs": 1},
    )  # fmt: skip
    record = train(config, progress=quiet)
    assert record.updates == 20
    assert sum("no trained token" in line for line in quiet.lines) == 40
    rows = events(tmp_path / "run", "train")
    assert len(rows) == 20
    assert all(row["losses"]["next_token"] for row in rows)


def test_weights_move_and_terms_see_their_sources(tiny_llama, qa_file, tmp_path, quiet) -> None:
    sources = [{"path": str(qa_file), "name": "a"}, {"path": str(qa_file), "name": "b"}]
    losses = [
        {"name": "next_token"},
        {"name": "z_loss", "weight": {"from": 0.0, "to": 0.2, "steps": 4}, "sources": ["b"]},
    ]
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", losses=losses, data={"sources": sources},
        training={"max_steps": 5},
    )  # fmt: skip
    train(config, progress=quiet)
    for row in events(tmp_path / "run", "train"):
        weight = min(1, (row["step"] - 1) / 4) * 0.2
        expected = row["losses"]["next_token"] + weight * row["losses"]["z_loss"]
        assert row["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("losses", "code"),
    [
        ([{"name": "next_tokn"}], "unknown_loss"),
        ([{"name": "next_token"}, {"name": "next_token"}], "duplicate_loss"),
        ([{"name": "next_token", "sources": ["nope"]}], "unknown_source"),
        ([{"name": "mine", "function": "no_such_file.py:f"}], "loss_file_missing"),
    ],
)
def test_wrong_terms_are_named_before_the_model_loads(
    tiny_llama, qa_file, tmp_path, losses, code, quiet
) -> None:
    with pytest.raises(InputError) as caught:
        train(tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses), progress=quiet)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("def loss(batch):\n    raise KeyError('score')\n", "loss_function_raised"),
        ("def loss(batch):\n    return batch.hidden.sum()\n", "loss_function_result"),
        ("def loss(batch):\n    return batch.hidden.sum(0), 1\n", "loss_not_scalar"),
    ],
)
def test_a_wrong_user_function_is_named(tiny_llama, qa_file, tmp_path, body, code, quiet) -> None:
    losses = [{"name": "mine", "function": write_loss(tmp_path, body)}]
    with pytest.raises(RunError) as caught:
        train(tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses), progress=quiet)
    assert caught.value.code == code
    assert "mine" in str(caught.value)


def test_p02_a_non_finite_loss_stops_and_names_step_and_row(
    tiny_llama, qa_file, tmp_path, quiet
) -> None:
    """Only documents that hold the digit pattern of row 17 go bad; the message names that row."""
    body = (
        "def loss(batch):\n"
        "    total = batch.hidden.float().square().mean()\n"
        "    bad = (batch.labels.bincount(minlength=512)[SEVEN] > 0)\n"
        "    return total * torch.where(bad, float('nan'), 1.0), 1\n"
    )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = json.loads(qa_file.read_text())[:8]
    rows[5]["output"] = "It is Z."
    (z_id,) = set(tokenizer("It is Z.")["input_ids"]) - {
        i for row in rows if row is not rows[5] for i in tokenizer(row["output"])["input_ids"]
    }
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows, indent=1))
    losses = [{"name": "mine", "function": write_loss(tmp_path, body.replace("SEVEN", str(z_id)))}]
    config = tiny_run(
        tiny_llama, data, tmp_path / "run", losses=losses,
        data={"validation_split": 0.0}, audit={"first_step_gate": "off"},
    )  # fmt: skip
    with pytest.raises(RunError) as caught:
        train(config, progress=quiet)
    assert caught.value.code == "non_finite_loss"
    assert "step 1" in caught.value.message
    assert caught.value.message.count("rows.json") == 1
    assert all(row["loss"] is not None for row in events(tmp_path / "run", "train"))


def test_the_gate_stops_a_run_that_trains_nothing(tiny_llama, qa_file, tmp_path, quiet) -> None:
    body = "def loss(batch):\n    return (batch.hidden * 0).sum(), len(batch)\n"
    losses = [{"name": "mine", "function": write_loss(tmp_path, body)}]
    with pytest.raises(RunError) as caught:
        train(tiny_run(tiny_llama, qa_file, tmp_path / "run", losses=losses), progress=quiet)
    assert caught.value.code == "first_step_gate"
    assert "lora_B" in caught.value.message


def test_g07_held_out_loss_does_not_depend_on_the_batch(tiny_llama, qa_file, tmp_path, quiet):
    values = []
    for micro in (1, 2, 4):
        output = tmp_path / str(micro)
        config = tiny_run(
            tiny_llama, qa_file, output, data={"packing": False},
            training={"per_device_train_batch_size": micro, "max_steps": 1},
        )  # fmt: skip
        train(config, progress=quiet)
        values.append(events(output, "eval")[0]["eval_loss"])
    assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert values[2] == pytest.approx(values[0], rel=1e-6)


def test_packed_equals_unpacked_held_out_loss(tiny_llama, qa_file, tmp_path, quiet) -> None:
    values = []
    for packing in (True, False):
        output = tmp_path / str(packing)
        config = tiny_run(
            tiny_llama, qa_file, output, data={"packing": packing}, training={"max_steps": 1}
        )
        train(config, progress=quiet)
        values.append(events(output, "eval")[0]["eval_loss"])
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_early_stopping(tiny_llama, qa_file, tmp_path, quiet) -> None:
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run",
        training={
            "learning_rate": 0.03, "lr_scheduler_type": "constant", "eval_steps": 2,
            "early_stopping_patience": 2, "num_train_epochs": 60,
        },
    )  # fmt: skip
    record = train(config, progress=quiet)
    assert record.stopped_by == "early_stopping"
    losses = [row["eval_loss"] for row in events(tmp_path / "run", "eval")]
    best = min(losses[1:])
    assert losses[1:].index(best) == len(losses) - 1 - 3  # two evaluations after the best
    assert record.eval_loss_after == pytest.approx(best)
    assert record.best_step == 2 * (losses[1:].index(best) + 1)
    assert (tmp_path / "run" / "checkpoints" / f"step-{record.best_step}").is_dir()


def test_p03_small_updates_are_not_lost(tiny_llama, qa_file, tmp_path, quiet) -> None:
    """bf16 base, rate 2.5e-5: every entry of the fp32 masters moves."""
    config = tiny_run(
        tiny_llama, qa_file, tmp_path / "run", model={"dtype": "bfloat16"},
        training={"learning_rate": 2.5e-5, "max_steps": 20},
    )  # fmt: skip
    record = train(config, progress=quiet)
    weights = last_weights(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in weights.values())
    b = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name])
    assert (b != 0).float().mean() > 0.99
    assert record.updates == 20


def test_dry_run_reads_no_weights(tiny_llama, qa_file, tmp_path, quiet, monkeypatch) -> None:
    import glasstune.models.load

    monkeypatch.setattr(glasstune.models.load, "load_base", None)
    record = train(tiny_run(tiny_llama, qa_file, tmp_path / "run"), dry_run=True, progress=quiet)
    assert record.updates > 0
    assert record.data.kept > 0
    assert not (tmp_path / "run").exists()

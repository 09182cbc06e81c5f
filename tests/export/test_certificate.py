"""The certificate's numbers against forwards of whole models by transformers and PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from battery import real_load
from merging import adapted, load_plain, method_options, save_peft
from runs import tiny_run
from tiny import save_tiny_model

import glasstune
from glasstune.core.errors import RunError
from glasstune.export.distance import Distance
from glasstune.export.prompts import GENERIC, GENERIC_TOKENS
from glasstune.workflows import merge as workflow
from glasstune.workflows.merge import merge


def _kl(reference, other):
    """Mean and largest KL by token, in float64, by another formula than the code's."""
    p, q = reference.double(), other.double()
    p_sum, q_sum = p.logsumexp(1), q.logsumexp(1)
    share = (p - p_sum.unsqueeze(1)).exp()
    kl = (share * (p - q)).sum(1) - p_sum + q_sum
    return float(kl.mean()), float(kl.max())


def _rows(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"][:GENERIC_TOKENS] for text in GENERIC]


def _logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0].float() for row in rows])


def _continue(model, rows, count):
    made = []
    for row in rows:
        row = list(row)
        with torch.no_grad():
            for _ in range(count):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        made.append(row)
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("certificate") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    wrapped = adapted(base, method_options("llama", "lora"), scale=0.2)
    return save_peft(wrapped, base.parent / "adapter")


@pytest.fixture(scope="module")
def tuned(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(base), adapter).eval()


def test_every_number_is_that_of_whole_models(base, adapter, tuned, tmp_path):
    record = merge(adapter, tmp_path / "out", base=str(base), max_kl=1.0)
    rows = _continue(tuned, _rows(base), 8)
    merged = load_plain(tmp_path / "out")  # float32 arithmetic on the bfloat16 weights
    truth, ours = _logits(tuned, rows), _logits(merged, rows)
    mean, worst = _kl(truth, ours)
    assert record.merge_kl_mean == pytest.approx(mean, rel=1e-3)
    assert record.merge_kl_max == pytest.approx(worst, rel=1e-2)
    largest = float((truth - ours).abs().max())
    assert record.merge_max_logit_difference == pytest.approx(largest, rel=1e-3)
    agree = float((truth.argmax(1) == ours.argmax(1)).double().mean())
    assert record.token_agreement == pytest.approx(agree, abs=2 / len(truth))
    half = load_plain(tmp_path / "out", dtype=torch.bfloat16)
    assert record.rounding_kl_mean == pytest.approx(_kl(ours, _logits(half, rows))[0], rel=0.2)
    assert record.prompts["tokens"] == sum(map(len, rows))
    theirs = _continue(merged, _rows(base), 8)
    alike = sum(one == other for one, other in zip(rows, theirs, strict=True)) / len(rows)
    assert record.greedy_agreement == pytest.approx(alike, abs=1e-9)
    assert record.base_kl_mean is None
    assert record.passed
    assert record.merge_kl_mean > 1e-9, "bfloat16 must show"


def test_float32_leaves_next_to_nothing(base, adapter, tmp_path):
    record = merge(adapter, tmp_path / "out", base=str(base), dtype="float32")
    assert record.merge_kl_mean < 1e-9
    assert record.rounding_kl_mean is None
    assert record.token_agreement == 1.0
    assert record.greedy_agreement == 1.0


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run on a 4-bit base with held-out rows."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"instruction": f"Say {n}", "output": f"Yes, {n * 7}."} for n in range(80)]
    (folder / "qa.json").write_text(json.dumps(rows))
    config = tiny_run(
        base, folder / "qa.json", folder / "run",
        model={"bits": 4, "dtype": "float32"}, training={"num_train_epochs": 1},
    )  # fmt: skip
    glasstune.train(config, progress=_Quiet())
    return folder / "run"


class _Quiet:
    def start(self, *a): ...
    def advance(self, *a, **k): ...
    def finish(self, *a): ...
    def say(self, text): ...


@pytest.mark.parametrize("onto", ["original", "training"])
def test_the_base_of_training_is_reported_and_never_gates(run, base, onto, tmp_path):
    from peft import PeftModel

    record = merge(run, tmp_path / "out", dtype="float32", onto=onto)
    assert record.passed
    assert record.merge_kl_mean < 1e-9
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four = real_load(base, 4, options, torch.float32)
    for module in four.modules():  # see fault E02
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    trained = PeftModel.from_pretrained(four, run / "adapter").eval()
    original = PeftModel.from_pretrained(load_plain(base), run / "adapter").eval()
    rows = _held_out(run) + _continue(trained if onto == "training" else original, _rows(base), 8)
    mean, _ = _kl(_logits(trained, rows), _logits(original, rows))
    assert record.base_kl_mean == pytest.approx(mean, rel=2e-2)
    assert record.base_kl_mean > 1e-4, "4 bit must show"
    assert record.prompts["held_out"] == len(_held_out(run)) > 0
    target = trained if onto == "training" else original
    merged = _logits(load_plain(tmp_path / "out"), rows)
    assert float((merged - _logits(target, rows)).abs().max()) < 2e-4
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in content


def _held_out(run):
    """The run's own validation rows, prepared once more from its config."""
    from glasstune.core.choices import Choices
    from glasstune.core.config_load import load_config
    from glasstune.core.facts import ModelFacts
    from glasstune.data.prepare import prepare_data
    from glasstune.data.tokenizer import load_tokenizer

    config = load_config(run / "config.yaml").config
    data = prepare_data(
        config.data, load_tokenizer(str(run / "adapter")),
        ModelFacts("llama", 512, 512, True, ""), seed=config.training.seed, choices=Choices(),
    )  # fmt: skip
    return [document.ids.tolist()[:128] for document in list(data.validation.documents)[:8]]


def _forget_the_scale(monkeypatch):
    from glasstune.adapters.changes import LowRank

    right = LowRank.apply
    monkeypatch.setattr(
        LowRank, "apply", lambda self, w: right(type(self)(self.up, self.down, 1.0), w)
    )


def test_a_merge_that_is_not_the_tuned_model_is_refused(base, adapter, tmp_path, monkeypatch):
    """X05 once more: the scale left out while merging is seen, and nothing is put in place."""
    _forget_the_scale(monkeypatch)
    output = tmp_path / "out"
    with pytest.raises(RunError, match="merge_kl_mean is") as caught:
        merge(adapter, output, base=str(base))
    assert caught.value.code == "certificate_failed"
    assert not output.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out.certificate.json"]
    record = json.loads((tmp_path / "out.certificate.json").read_text())
    assert record["passed"] is False
    assert record["merge_kl_mean"] > record["max_kl"]
    monkeypatch.undo()
    assert merge(adapter, output, base=str(base)).passed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_swapped_tensor_on_the_disk_is_seen(base, adapter, tmp_path, monkeypatch):
    """The merged model is read back: what is wrong in the file alone is refused too."""
    from glasstune.core.tensor_writer import TensorWriter

    right = TensorWriter.write

    def wrong(self, name, tensor):
        other = "k_proj" if "v_proj" in name else "v_proj"
        if "v_proj" in name or "k_proj" in name:
            name = name.replace("v_proj" if other == "k_proj" else "k_proj", other)
        right(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", wrong)
    with pytest.raises(RunError, match="not the tuned one"):
        merge(adapter, tmp_path / "out", base=str(base))


def test_no_limit_passes_a_nan(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Distance, "mean", property(lambda self: float("nan")))
    with pytest.raises(RunError, match="nan"):
        merge(adapter, tmp_path / "out", base=str(base), max_kl=1e9)


def test_distance_of_hand_worked_logits():
    distance = Distance()
    distance.add(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0986122886681098, 0.0]]))
    # P = (1/2, 1/2), Q = (3/4, 1/4): KL = ln(2/3)/2 + ln(2)/2 = ln(4/3)/2.
    assert distance.mean == pytest.approx(0.14384103622589045, rel=1e-6)
    assert distance.agree == [True]
    assert distance.logit_difference == pytest.approx(1.0986123, rel=1e-6)


def test_distance_of_infinite_and_broken_logits():
    ruled_out = torch.tensor([[0.0, 1.0, -torch.inf]])
    distance = Distance()
    distance.add(ruled_out, ruled_out.clone())
    assert distance.mean == 0.0
    assert distance.logit_difference == 0.0
    distance.add(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, torch.nan, 2.0]]))
    distance.add(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.5]]))
    assert distance.mean != distance.mean
    assert distance.worst != distance.worst
    assert distance.logit_difference != distance.logit_difference
    with pytest.raises(ValueError, match="logits"):
        distance.add(torch.zeros(1, 3), torch.zeros(1, 4))


def test_greedy_agreement_of_hand_made_tokens():
    """Rows of 3 (held out), 5 and 6 tokens, the last 2 of each continued row appended."""
    from glasstune.export.certificate import _greedy_agreement

    right = [True] * 14
    assert _greedy_agreement(Distance(agree=right), [3, 5, 6], 1, 2) == 1.0
    # Tokens 6 and 7 are position 3 and 4 of the second row; what chose its last two tokens are
    # positions 2 and 3. A miss at position 4 chose nothing, one at 2 or 3 another answer.
    for missed, share in ((7, 1.0), (6, 0.5), (5, 0.5), (4, 1.0), (2, 1.0), (13, 1.0), (12, 0.5)):
        agree = [index != missed for index in range(14)]
        assert _greedy_agreement(Distance(agree=agree), [3, 5, 6], 1, 2) == share, missed


def test_without_a_tokenizer_random_ids_stand_in_and_it_is_said(base, adapter, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink(missing_ok=True)
    record = merge(adapter, tmp_path / "out", base=str(tmp_path / "bare"))
    codes = {finding.code for finding in record.findings}
    assert codes & {"no_tokenizer", "tokenizer_misfits"}
    assert record.prompts["generic"] == len(GENERIC)
    assert workflow.GGUF_KINDS == ("f16", "q8_0")

"""Evaluation against each document alone, for any batch size, packed and padded."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from glasstune.core.batch import IGNORED, Document, MicroBatch
from glasstune.data.loader import evaluation_batches
from glasstune.data.packing import PackedSet
from glasstune.generation import EvalSums, evaluate_rows
from glasstune.generation.evaluate import evaluation_mode
from glasstune.kernels.linear_cross_entropy import token_losses
from glasstune.models.families.install import install_packing
from glasstune.models.head import split_head

VOCABULARY = 50


def tiny(kind: str = "llama") -> Any:
    torch.manual_seed(1)
    if kind == "bloom":
        return BloomForCausalLM(
            BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
                        initializer_range=0.5, hidden_dropout=0.3)
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
                    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=64, initializer_range=0.5, attention_dropout=0.3)
    )  # fmt: skip


def documents() -> list[Document]:
    """Unequal lengths; labels that are masked, other than the ids, or absent altogether."""
    random = np.random.default_rng(0)
    made = []
    for index, length in enumerate((3, 17, 5, 9, 30, 2, 12)):
        ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 3] = IGNORED
        labels[-1] = 7
        if index == 3:
            labels[:] = IGNORED
        made.append(Document(ids, labels, source=index % 3 if index != 6 else 0))
    return made


@torch.no_grad()
def truth(model: Any, docs: list[Document]) -> EvalSums:
    model.eval()
    sums = EvalSums()
    for doc in docs:
        logits = model(torch.tensor(doc.ids.astype(np.int64))[None], use_cache=False).logits[0]
        for position in range(len(doc) - 1):
            target = int(doc.labels[position + 1])
            if target == IGNORED:
                continue
            row = logits[position].double()
            sums.nll += float(torch.logsumexp(row, 0) - row[target])
            sums.correct += int(row.argmax()) == target
            sums.tokens += 1
    return sums


def measure(model: Any, batches: Any) -> EvalSums:
    return evaluate_rows(
        model, batches, split=split_head(model), token_losses=token_losses,
        vocabulary=VOCABULARY, device=torch.device("cpu"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("packed", [True, False])
def test_g07_one_number_whatever_the_batch_size(kind: str, packed: bool) -> None:
    model = tiny(kind)
    docs = documents()
    want = truth(model, docs)
    install_packing(model)
    model.train()  # dropout must not reach the measurement
    data = PackedSet.build(docs, max_length=32, packed=packed, seed=0)
    losses = set()
    for size in (1, 2, 5, 100):
        got = measure(model, evaluation_batches(data, size, 0))
        assert got.tokens == want.tokens == data.trained_tokens
        assert got.correct == want.correct
        assert got.nll == pytest.approx(want.nll, rel=2e-6)
        losses.add(f"{got.loss:.5f}")
    assert len(losses) == 1
    assert model.training
    mean_of_means = [measure(model, [b]).loss for b in evaluation_batches(data, 2, 0)]
    assert abs(np.nanmean(mean_of_means) - want.loss) > 1e-2, "rows whose means would differ"


def test_by_source_adds_up() -> None:
    model, docs = tiny(), documents()
    data = PackedSet.build(docs, max_length=32, packed=False, seed=0)
    got = measure(model, evaluation_batches(data, 3, 0))
    for source, part in got.by_source.items():
        alone = truth(model, [doc for doc in docs if doc.source == source])
        assert (part.tokens, part.correct) == (alone.tokens, alone.correct)
        assert part.nll == pytest.approx(alone.nll, rel=2e-6)
    assert sum(part.tokens for part in got.by_source.values()) == got.tokens
    record = got.to_record(["a", "b", "c"])
    assert set(record.by_source) == {"a", "b", "c"}
    assert record.perplexity == pytest.approx(math.exp(record.eval_loss))
    assert record.token_accuracy == got.correct / got.tokens


def test_d10_rows_without_a_label_add_nothing() -> None:
    model = tiny()
    masked = Document(np.arange(5, dtype=np.int32), np.full(5, IGNORED, dtype=np.int32))
    data = PackedSet.build([masked, masked], max_length=32, packed=False, seed=0)
    got = measure(model, evaluation_batches(data, 2, 0))
    assert (got.tokens, got.nll) == (0, 0.0)
    assert math.isnan(got.loss)


def test_memory_is_that_of_one_batch_and_a_chunk_of_logits() -> None:
    model, docs = tiny(), documents()
    data = PackedSet.build(docs * 20, max_length=32, packed=True, seed=0)
    alive: list[weakref.ref[MicroBatch]] = []
    most = 0

    class Batch(MicroBatch):
        """A batch that can be watched; slots would forbid it."""

    def watched() -> Iterator[MicroBatch]:
        nonlocal most
        for batch in evaluation_batches(data, 2, 0):
            made = Batch(**{name: getattr(batch, name) for name in MicroBatch.__slots__})
            alive.append(weakref.ref(made))
            del batch
            yield made
            del made
            most = max(most, sum(ref() is not None for ref in alive))

    widest = 0

    def counted(hidden: Tensor, head: Any, targets: Tensor, vocabulary: int) -> Any:
        def watch(part: Tensor) -> Tensor:
            nonlocal widest
            widest = max(widest, part.shape[0])
            return head(part)  # type: ignore[no-any-return]

        nll, correct = [], []
        for start in range(0, len(targets), 4):
            found = token_losses(hidden[start : start + 4], watch, targets[start : start + 4], 50)
            nll.append(found[0])
            correct.append(found[1])
        return torch.cat(nll), torch.cat(correct)

    got = evaluate_rows(
        model, watched(), split=split_head(model), token_losses=counted, vocabulary=VOCABULARY,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert got.tokens == data.trained_tokens
    assert len(alive) > 20
    assert most <= 1
    assert widest == 4, "the head only ever sees what the loss asks of it"


def test_a_model_without_a_proven_split_gives_the_same_number() -> None:
    model, docs = tiny(), documents()
    data = PackedSet.build(docs, max_length=32, packed=False, seed=0)
    split = split_head(model)
    want = measure(model, evaluation_batches(data, 3, 0))
    split.proven = False
    got = evaluate_rows(
        model, evaluation_batches(data, 3, 0), split=split, token_losses=token_losses,
        vocabulary=VOCABULARY, device=torch.device("cpu"),
    )  # fmt: skip
    assert got.nll == pytest.approx(want.nll, rel=1e-6)


def test_mode_of_every_module_is_put_back_after_an_error() -> None:
    model = tiny()
    model.train()
    model.model.layers[0].eval()

    def fail() -> None:
        with evaluation_mode(model):
            assert not model.training
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training

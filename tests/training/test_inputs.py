"""One shape for all forwards of a compiled run: padding is never trained, seen or counted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config

from glasstune.core.batch import IGNORED, Document, MicroBatch
from glasstune.data.packing import PackedSet
from glasstune.models.families.install import install_packing, packing_kwargs
from glasstune.training.inputs import FixedShape, Inputs, inputs_of


def packs(lengths: list[list[int]], max_length: int = 64, packed: bool = True) -> PackedSet:
    """Rows of documents of given lengths, with ids of their own."""
    documents, rows, count = [], [], 0
    for row in lengths:
        members = []
        for length in row:
            ids = (np.arange(length, dtype=np.int32) * 7 + 11 * count) % 500
            labels = ids.copy()
            labels[: length // 3] = IGNORED
            documents.append(Document(ids, labels))
            members.append(count)
            count += 1
        rows.append(np.array(members, dtype=np.int32))
    return PackedSet(tuple(documents), tuple(rows), packed, max_length)


def test_shapes_of_a_run() -> None:
    data = packs([[20, 19], [30], [8, 8]])
    shape = FixedShape.of_run(8, 3, (data, None))
    assert shape == FixedShape(rows=(2, 3), length=40, longest=64)
    sizes = {rows: shape.of(data.micro_batch(range(rows), 0, 0)) for rows in (1, 2, 3)}
    assert sizes == {1: (2, 40), 2: (2, 40), 3: (3, 40)}
    assert FixedShape.of_run(4, 4, (data, data)).rows == (4,)
    assert FixedShape.of_run(2, 4, (data,)).rows == (2,)
    longer = packs([[44]]).micro_batch([0], 0, 0)  # not among the packs that were looked at
    assert shape.of(longer) == (2, 64)
    assert FixedShape.of_run(4, 2, (None,)) is None


def test_rows_that_are_not_packed_get_few_lengths() -> None:
    data = packs([[4], [130], [199], [65], [64]], max_length=200, packed=False)
    shape = FixedShape.of_run(8, 3, (data, None))
    assert shape == FixedShape(rows=(2, 3), length=200, longest=200, multiple=64)
    lengths = [shape.of(data.micro_batch([row], 0, 0)) for row in range(5)]
    assert lengths == [(2, 64), (2, 192), (2, 200), (2, 128), (2, 64)]
    batch = data.micro_batch([0, 3], 0, 9)
    given = inputs_of(batch, shape)
    assert given.input_ids.shape == (2, 128)
    assert given.attention_mask.sum(1).tolist() == [4, 65]


def test_what_is_padded() -> None:
    batch = packs([[20, 19], [30]]).micro_batch([0, 1], 0, 9)
    assert batch.input_ids.shape == (2, 40)
    given = inputs_of(batch, FixedShape((3,), 48, 64))
    assert given.input_ids.shape == (3, 48)
    assert np.array_equal(given.input_ids[:2, :40], batch.input_ids)
    assert given.bounds == ((0, 20, 39, 40, 48), (0, 30, 40, 48), (0, 48))
    for row, bounds in enumerate(given.bounds):  # positions restart where a document does
        for start, end in pairwise(bounds):
            assert given.position_ids[row, start:end].tolist() == list(range(end - start))
    flat = np.full((3, 48), IGNORED)
    flat[:2, :40] = batch.targets
    assert np.array_equal(np.flatnonzero(flat.reshape(-1) != IGNORED), given.trained)
    assert int(given.attention_mask.sum()) == batch.tokens
    assert inputs_of(batch).input_ids is batch.input_ids


def trained_hidden(model: Any, batch: MicroBatch, given: Inputs) -> torch.Tensor:
    extra = packing_kwargs(model, given.bounds, "cpu")
    hidden = model.model(
        input_ids=torch.from_numpy(given.input_ids),
        position_ids=torch.from_numpy(given.position_ids), use_cache=False, **extra,
    ).last_hidden_state  # fmt: skip
    return hidden.flatten(0, 1)[torch.from_numpy(given.trained)]


@pytest.mark.parametrize("compiled", [True, False])
def test_padding_changes_no_hidden_state(compiled) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config()).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(4)
    how = install_packing(model, compiled=compiled)
    assert ("one document at a time" in how) is not compiled  # whose calls differ by the bounds
    batch = packs([[20, 19], [30]]).micro_batch([0, 1], 0, 9)
    with torch.no_grad():
        right = trained_hidden(model, batch, inputs_of(batch))
        got = trained_hidden(model, batch, inputs_of(batch, FixedShape((3,), 48, 64)))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)

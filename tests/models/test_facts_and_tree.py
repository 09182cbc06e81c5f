"""Facts of models, and the tree as text."""

from __future__ import annotations

import pytest
import torch
from families import family_config, family_model

from glasstune.adapters.inject import add_adapter
from glasstune.models.facts import model_facts
from glasstune.models.int8 import convert_to_int8
from glasstune.models.tree import tree_text


@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", 128), ("gpt2", 128), ("opt", 128), ("bloom", None), ("mpt", 128)],
)
def test_d12_the_longest_row_is_a_fact(family, positions):
    facts = model_facts(family_config(family))
    assert facts.max_positions == positions
    assert facts.family == family
    assert facts.vocabulary_rows == 96


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_d12_learned_positions_end_where_the_fact_says(family):
    model = family_model(family)
    limit = model_facts(model).max_positions
    model(input_ids=torch.ones(1, limit, dtype=torch.long))
    with pytest.raises(IndexError):
        model(input_ids=torch.ones(1, limit + 1, dtype=torch.long))


def test_the_embeddings_real_rows_count():
    model = family_model("llama")
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model_facts(model).vocabulary_rows == 101


def test_equal_blocks_fold_and_adapters_take_one_line():
    text = tree_text(family_model("llama"))
    assert "(0-1): 2 x LlamaDecoderLayer(" in text
    assert "(q_proj): Linear(in_features=32, out_features=32, bias=False)" in text
    assert text.count("(q_proj)") == 1
    model = family_model("llama")
    convert_to_int8(model, None)
    adapted = add_adapter(model, r=4, target_modules=["q_proj"], layers_to_transform=[1])
    text = tree_text(adapted)
    assert "Int8Linear(in_features=32, out_features=32, bias=False, int8 rows) + LoRA(r=4)" in text
    assert text.count("(q_proj)") == 2  # the two blocks are no longer equal
    assert "(lm_head): Linear(" in text

"""The split before the head: chunked logits are the model's own."""

from __future__ import annotations

import pytest
import torch
from families import SPECS, family_model
from torch import nn

from glasstune.adapters.inject import add_adapter
from glasstune.models.head import split_head

IDS = torch.arange(3, 21).reshape(2, 9)


def chunked(split, model) -> torch.Tensor:
    """Logits of rows 0, 3, 6, ... of all positions, through the head five at a time."""
    hidden = split.hidden(model, input_ids=IDS).flatten(0, 1)[::3]
    return torch.cat([split.logits(part) for part in hidden.split(5)])


@pytest.mark.parametrize("family", sorted(SPECS))
def test_chunked_logits_equal_the_models(family):
    model = family_model(family)
    if family == "gemma2":
        model.config.final_logit_softcapping = 3.0  # well inside the logits' range
    split = split_head(model)
    assert split.proven, split.reason
    whole = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[::3]
    torch.testing.assert_close(chunked(split, model), whole, rtol=1e-5, atol=1e-5)


def test_which_heads_are_bare():
    bare = {family for family in SPECS if split_head(family_model(family)).bare}
    behind_the_head = {"baichuan", "cohere", "cohere2", "granite", "gemma2"}
    with_bias = {"gptj", "phi"}
    assert bare == set(SPECS) - behind_the_head - with_bias


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
    ],
    ids=["lora", "saved", "tokens"],
)
def test_an_adapted_head_is_called_as_a_module(options):
    model = family_model("llama", tie_word_embeddings="trainable_token_indices" in options)
    before = split_head(model)
    assert before.bare
    adapted = add_adapter(model, r=2, **options)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    split = split_head(adapted)
    assert split.proven
    assert not split.bare
    assert not before.bare  # modules are looked up anew
    whole = adapted(input_ids=IDS, use_cache=False).logits.flatten(0, 1)[::3]
    torch.testing.assert_close(chunked(split, adapted), whole, rtol=1e-5, atol=1e-5)


def test_an_unknown_step_behind_the_head_is_seen():
    model = family_model("llama")
    plain = type(model).forward

    def forward(*args, **kwargs):
        out = plain(model, *args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    model.forward = forward
    split = split_head(model)
    assert not split.proven
    assert "differs" in split.reason
    whole = split.full_logits(model, input_ids=IDS)
    assert torch.equal(whole, model(input_ids=IDS, use_cache=False).logits)


def test_splitting_leaves_training_mode_alone():
    model = family_model("gpt2").train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert split_head(model).proven  # dropout is off while it looks
    assert [module.training for module in model.modules()] == modes


def test_a_model_without_a_head_is_said():
    model = family_model("llama")
    model.get_output_embeddings = lambda: None
    split = split_head(model)
    assert not split.proven
    assert "output embeddings" in split.reason
    assert isinstance(model, nn.Module)

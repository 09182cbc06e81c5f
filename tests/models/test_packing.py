"""Documents of one row do not see each other: every family of the table."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from families import ALIBI, SPECS, family_model
from tiny import save_tiny_model
from torch import Tensor

from glasstune.core.choices import Choices
from glasstune.core.config import ModelConfig
from glasstune.core.errors import InputError
from glasstune.models.facts import model_facts
from glasstune.models.families import documents
from glasstune.models.families.install import install_packing, packing_kwargs, padded_kwargs
from glasstune.models.families.table import FAMILIES, Family
from glasstune.models.load import load_base
from glasstune.models.resolve import resolve_model

LENGTH = 22
LENGTHS = ((7, 9, 4), (11, 3))


def make_documents(seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 96, (n,), generator=generator) for n in row] for row in LENGTHS]


def pack(rows: list[list[Tensor]]) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """Ids, positions and bounds as data makes them: padding is one last segment."""
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    positions = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    bounds = []
    for index, row in enumerate(rows):
        ends = [0]
        for document in row:
            start, end = ends[-1], ends[-1] + len(document)
            ids[index, start:end] = document
            positions[index, start:end] = torch.arange(len(document))
            ends.append(end)
        if ends[-1] < LENGTH:
            positions[index, ends[-1] :] = torch.arange(LENGTH - ends[-1])
            ends.append(LENGTH)
        bounds.append(tuple(ends))
    return ids, positions, tuple(bounds)


def packed_logits(model: Any, rows: list[list[Tensor]]) -> list[list[Tensor]]:
    ids, positions, bounds = pack(rows)
    extra = {"attention_mask": None, **packing_kwargs(model, bounds, "cpu")}
    out = model(input_ids=ids, position_ids=positions, use_cache=False, **extra).logits
    return [
        [out[index, start:end] for start, end in itertools.pairwise(ends)][: len(row)]
        for index, (row, ends) in enumerate(zip(rows, bounds, strict=True))
    ]


def alone_logits(model: Any, rows: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[model(input_ids=d[None], use_cache=False).logits[0] for d in row] for row in rows]


def worst(one: list[list[Tensor]], other: list[list[Tensor]], first: int = 0) -> float:
    return max(
        float((a - b).abs().max())
        for row, row2 in zip(one, other, strict=True)
        for a, b in zip(row[first:], row2[first:], strict=True)
    )


@pytest.mark.parametrize("family", [*sorted(FAMILIES), ALIBI])
def test_g05_packed_logits_equal_separate_logits(family):
    model = family_model(family)
    rows = make_documents(1)
    alone = alone_logits(model, rows)
    install_packing(model)
    packed = packed_logits(model, rows)
    assert worst(packed, alone) <= 3e-6 * max(1.0, float(alone[0][0].abs().max()))

    # Changing the first document of each row leaves the others as they were, to the bit.
    changed = [[new[0], *row[1:]] for new, row in zip(make_documents(2), rows, strict=True)]
    after = packed_logits(model, changed)
    assert worst(after, packed, first=1) == 0.0
    assert float((after[0][0] - packed[0][0]).abs().max()) > 0.1

    # Unpacked calls are what they were.
    assert worst(alone_logits(model, rows), alone) <= 3e-6 * float(alone[0][0].abs().max())


def test_every_spec_but_the_refused_ones_is_in_the_table():
    assert set(SPECS) - set(FAMILIES) == {"mpt", "gpt_oss"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2"])
def test_the_leak_is_real_without_packing(family):
    """The test above can fail: one row without bounds and restarts does leak."""
    model = family_model(family)
    rows = make_documents(1)
    changed = [[new[0], *row[1:]] for new, row in zip(make_documents(2), rows, strict=True)]

    def joined(documents_: list[list[Tensor]]) -> Tensor:
        return model(input_ids=torch.cat(documents_[0])[None], use_cache=False).logits[0, 7:16]

    assert float((joined(rows) - joined(changed)).abs().max()) > 0.1


def test_e01_bloom_packs_with_alibi_and_masks_as_before():
    model = family_model("bloom")
    ids = make_documents(3)[0][1][None].repeat(2, 1)
    masks = [torch.ones(2, 9, dtype=torch.long) for _ in range(2)]
    masks[0][0, :3] = 0  # left padding
    masks[1][1, 6:] = 0  # right padding
    before = [model(input_ids=ids, attention_mask=mask).logits for mask in masks]
    told = model.generate(ids, max_new_tokens=5, do_sample=False)
    install_packing(model)
    after = [model(input_ids=ids, attention_mask=mask).logits for mask in masks]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), told)


def test_e01_alibi_restarts_with_each_document():
    """In bf16 a bias of distant positions would round; restarting gives the separate numbers."""
    model = family_model("bloom").bfloat16()
    rows = make_documents(4)
    alone = alone_logits(model, rows)
    install_packing(model)
    assert worst(packed_logits(model, rows), alone) <= 0.07  # two bf16 roundings of 5


def test_restarting_positions_without_bounds_are_refused():
    model = family_model("llama")
    install_packing(model)
    ids, positions, _ = pack(make_documents(1))
    with pytest.raises(ValueError, match="document_bounds"):
        model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)


@pytest.mark.parametrize("family", [*sorted(SPECS), ALIBI])
def test_rows_padded_at_their_end_need_no_mask(family):
    model = family_model(family)
    rows = make_documents(5)
    longest = [row[0] for row in rows] + [rows[0][1]]
    ids = torch.zeros(3, 16, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, document in enumerate(longest):
        ids[index, : len(document)] = document
        mask[index, : len(document)] = 1
    given = padded_kwargs(model, mask)
    assert given == {"attention_mask": None}
    out = model(input_ids=ids, use_cache=False, **given).logits
    for index, document in enumerate(longest):
        alone = model(input_ids=document[None], use_cache=False).logits[0]
        torch.testing.assert_close(out[index, : len(document)], alone, rtol=1e-4, atol=1e-5)


def test_code_of_a_checkpoint_is_told_where_padding_is():
    model = family_model("llama")
    kind = type("RemoteConfig", (type(model.config),), {"__module__": "somewhere.else"})
    model.config.__class__ = kind
    mask = torch.ones(1, 3, dtype=torch.long)
    assert padded_kwargs(model, mask)["attention_mask"] is mask


def test_padded_batches_and_generation_are_untouched():
    model = family_model("llama")
    ids = make_documents(3)[0][1][None].repeat(2, 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    told = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    install_packing(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, told)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mistral", "falcon", ALIBI])
def test_g01_recomputed_layers_give_the_same_gradients(family):
    """Bounds are still there when non-reentrant checkpointing runs a layer again."""

    def gradients(recompute: bool) -> list[Tensor]:
        model = family_model(family)
        install_packing(model)
        if recompute:
            name = "activation_checkpointing_enable"  # since transformers 5.20
            enable = getattr(model, name, None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name or "ln" in name)
        logits = packed_logits(model, make_documents(1))
        sum(x.square().sum() for row in logits for x in row).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == len(recomputed) > 2
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mpt", "gpt_oss"])
def test_a_family_without_proof_is_refused_by_name(family):
    model = family_model(family)
    facts = model_facts(model)
    assert not facts.can_pack
    assert family in facts.pack_reason
    with pytest.raises(InputError, match=family):
        install_packing(model)


def test_falcon_with_alibi_is_not_taken_for_the_proven_one():
    assert not model_facts(family_model("falcon", alibi=True)).can_pack
    assert model_facts(family_model("falcon")).can_pack


def test_soft_caps_are_refused_by_the_document_attention():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="softcap"):
        documents.documents_attention(
            torch.nn.Module(), q, q, q, None, softcap=30.0, document_bounds=((0, 4),)
        )


def test_an_attention_chosen_by_name_stays_and_packs_by_mask():
    model = family_model("llama")
    model.set_attn_implementation("eager")
    rows = make_documents(1)
    alone = alone_logits(model, rows)
    assert "mask" in install_packing(model)
    assert model.config._attn_implementation == "eager"
    assert worst(packed_logits(model, rows), alone) <= 2e-5


def test_a_leak_of_another_version_is_seen_at_once(monkeypatch):
    monkeypatch.setitem(FAMILIES, "gpt_oss", Family("mask", attention="eager"))
    with pytest.raises(InputError, match="sees the one before it") as caught:
        install_packing(family_model("gpt_oss"))
    assert "data.packing=false" in caught.value.fix


def test_llm_int8_packs_and_says_what_it_cannot_keep_apart(tmp_path):
    """Its outlier columns come from all tokens of a batch: a limit of LLM.int8, not of packing."""
    folder = save_tiny_model(tmp_path / "llama")
    config = ModelConfig(path=str(folder), bits=8, int8_compute="llm_int8", device="cpu")
    model = load_base(config, resolve_model(str(folder)), choices=Choices())
    assert "outlier columns over the whole batch" in install_packing(model)
    own = ModelConfig(path=str(folder), bits=8, device="cpu")
    model = load_base(own, resolve_model(str(folder)), choices=Choices())
    assert "outlier" not in install_packing(model)
    rows = make_documents(1)
    changed = [[new[0], *row[1:]] for new, row in zip(make_documents(2), rows, strict=True)]
    packed, after = packed_logits(model, rows), packed_logits(model, changed)
    assert worst(after, packed, first=1) == 0.0

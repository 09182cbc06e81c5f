"""Packed rows by flex_attention: every family, on a GPU or by the same code on a CPU.

On a CPU torch computes `flex_attention` whole and in plain operations: slow, but the blocks, the
masks, the score changes and the gradients are those of the GPU's kernel, whose own arithmetic these
tests judge on a GPU and `bench/gpu_attention.py` more widely.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import QUIET_COMPILER
from families import ALIBI, family_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs

from glasstune.core.errors import InputError
from glasstune.kernels.document_attention.flex import flex_document_attention
from glasstune.models.families import bloom_flex, flex, install
from glasstune.models.families.install import (
    install_attention,
    install_packing,
    packing_kwargs,
    uninstall_attention,
)
from glasstune.models.families.table import FAMILIES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
pytestmark = [
    *QUIET_COMPILER,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # of dynamo's own look
    *([pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)] if CUDA else []),
]
LENGTH = 150  # one block and a part of one
LENGTHS = ((70, 50), (131, 19))
# Heads of 16, the narrowest; GPT-2 has attention dropout by default.
OPTIONS: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "max_position_embeddings": 256}
OWN = {
    "gpt2": {**OPTIONS, "n_embd": 64, "n_positions": 256, "attn_pdrop": 0.0},
    "gptj": {**OPTIONS, "n_embd": 64, "n_positions": 256},
    "opt": {**OPTIONS, "word_embed_proj_dim": 64},
}
USERS = [name for name, family in sorted(FAMILIES.items()) if family.packing != "blocks"] + [ALIBI]
SLOW = pytest.mark.slow(reason="the compiler takes 2 s a case")
# One of each kind: plain, one window, windows by layer, soft cap, learned positions, ALiBi.
FAST = {"llama", "mistral", "gemma3_text", "gemma2", "gpt2", "bloom", ALIBI}
Rows = list[list[Tensor]]


@pytest.fixture(autouse=True)
def _cpu_counts_as_gpu(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(flex, "why_not", lambda config, device: None)
        # Only its check refuses gradients on a CPU; the plain operations below it have them.
        monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)


def make(family: str, **overrides: Any) -> Any:
    """A model whose norms, embeddings and first layer are trained."""
    model = family_model(family, **{**OWN.get(family, OPTIONS), **overrides}).to(DEVICE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "ln" in name or "embed" in name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def make_documents(seed: int, lengths: Any = LENGTHS) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(3, 96, (n,), generator=generator) for n in row] for row in lengths]


def pack(rows: Rows, length: int = LENGTH) -> tuple[Tensor, Tensor, tuple[tuple[int, ...], ...]]:
    """Ids, positions and bounds as data makes them: padding is one last segment."""
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    bounds = []
    for index, row in enumerate(rows):
        ends = [0, *itertools.accumulate(map(len, row))]
        ids[index, : ends[-1]] = torch.cat(row)
        ends += [length] * (ends[-1] < length)
        for start, end in itertools.pairwise(ends):
            positions[index, start:end] = torch.arange(end - start)
        bounds.append(tuple(ends))
    return ids.to(DEVICE), positions.to(DEVICE), tuple(bounds)


def packed_logits(model: Any, rows: Rows, length: int = LENGTH) -> list[Tensor]:
    ids, positions, bounds = pack(rows, length)
    extra = packing_kwargs(model, bounds, DEVICE)
    out = model(input_ids=ids, position_ids=positions, use_cache=False, **extra).logits
    return [
        out[index, start:end]
        for index, (row, ends) in enumerate(zip(rows, bounds, strict=True))
        for start, end in itertools.islice(itertools.pairwise(ends), len(row))
    ]


def alone_logits(model: Any, rows: Rows) -> list[Tensor]:
    return [
        model(input_ids=document[None].to(DEVICE), use_cache=False).logits[0]
        for row in rows
        for document in row
    ]


def gradients(model: Any, logits: list[Tensor]) -> list[Tensor]:
    """Of a loss that weighs every logit differently."""
    weights = [torch.linspace(-1, 1, x.numel(), device=DEVICE).view_as(x) for x in logits]
    loss = sum((x * weight).sum() for x, weight in zip(logits, weights, strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained))


def assert_close(found: list[Tensor], right: list[Tensor], far: float) -> None:
    for one, other in zip(found, right, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=far, atol=far * size)


@pytest.mark.parametrize(
    "family", [name if name in FAST else pytest.param(name, marks=SLOW) for name in USERS]
)
def test_packed_equals_separate_forward_and_backward(family):
    model = make(family)
    rows = make_documents(1)
    alone = alone_logits(model, rows)
    wanted = gradients(model, alone)
    words = install_packing(model)
    if family == "gptj" and "glasstune" not in model.config._attn_implementation:
        pytest.skip("transformers before 5.20 does not let GPT-J's attention be set")
    assert "flex_attention" in words
    packed = packed_logits(model, rows)
    assert_close(packed, alone, 2e-5)
    assert_close(gradients(model, packed), wanted, 1e-4)

    # Changing the first document of each row leaves the others as they were, to the bit.
    changed = [[new[0], *row[1:]] for new, row in zip(make_documents(2), rows, strict=True)]
    with torch.no_grad():
        before, after = packed_logits(model, rows), packed_logits(model, changed)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[3], before[3])
    assert float((after[0] - before[0]).abs().max()) > 0.1

    # Calls that are not packed are what they were.
    assert_close(alone_logits(model, rows), alone, 2e-5)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma2",
        "bloom",
        ALIBI,
        *(pytest.param(x, marks=SLOW) for x in ("gpt2", "mistral")),
    ],
)
def test_recomputed_layers_give_the_same_gradients(family):
    model = make(family)
    install_packing(model)
    rows = make_documents(1)
    right = gradients(model, packed_logits(model, rows))
    enable = getattr(model, "activation_checkpointing_enable", None)  # since transformers 5.20
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    model.train()
    runs = []
    layer: Any = next(x for x in model.modules() if type(x).__name__.endswith("Attention"))
    layer.register_forward_hook(lambda *_: runs.append(1))
    assert_close(gradients(model, packed_logits(model, rows)), right, 1e-5)
    assert len(runs) == 2


def compile_layers(model: Any) -> Any:
    """Compiles each layer as `speed_up` does; one graph must serve all of a kind."""
    counter = CompileCounterWithBackend("inductor" if CUDA else "eager")
    layers = next(x for x in model.modules() if isinstance(x, nn.ModuleList))
    for layer in layers:
        layer.compile(backend=counter, dynamic=False, fullgraph=True)
    return counter


OTHERS = [((70, 50), (131, 19)), ((1,), (150,)), ((20, 20, 20, 90), (3, 4, 5)), ((149, 1), (75,))]


@pytest.mark.parametrize(
    "family",
    [
        "gemma3_text",
        "bloom",
        ALIBI,
        *(pytest.param(x, marks=SLOW) for x in ("llama", "gemma2", "gpt2")),
    ],
)
def test_other_documents_compile_nothing_again(family):
    torch._dynamo.reset()
    model, plain = make(family), make(family)
    install_packing(model)
    counter = compile_layers(model)
    seen = []
    for seed, lengths in enumerate(OTHERS):
        rows = make_documents(seed, lengths)
        packed = packed_logits(model, rows)
        found = gradients(model, packed)
        alone = alone_logits(plain, rows)
        assert_close(packed, alone, 2e-5)
        assert_close(found, gradients(plain, alone), 1e-4)
        seen.append(counter.frame_count)
    torch._dynamo.reset()
    assert seen[0] > 0
    assert seen == [seen[0]] * len(OTHERS)


def used(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> int:
    """Counts the calls of flex_attention."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return flex_document_attention(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(flex, "flex_document_attention", counted)
        patch.setattr(bloom_flex, "flex_document_attention", counted)
        call()
    return len(calls)


# Layers that call flex_attention of the model's two, in rows of one document.
@pytest.mark.parametrize(
    ("family", "calls"),
    [
        ("llama", 0),
        ("mistral", 2),
        ("bloom", 2),
        (ALIBI, 2),
        pytest.param("gpt2", 0, marks=SLOW),
        pytest.param("qwen2", 1, marks=SLOW),
        pytest.param("gemma2", 2, marks=SLOW),
    ],
)
@torch.no_grad()
def test_rows_of_one_document_need_no_mask(monkeypatch, family, calls):
    model = make(family)
    rows = make_documents(1, ((LENGTH,), (LENGTH,)))
    alone = alone_logits(model, rows)
    install_packing(model)
    assert used(monkeypatch, lambda: assert_close(packed_logits(model, rows), alone, 2e-5)) == calls
    packed = make_documents(1)
    assert used(monkeypatch, lambda: packed_logits(model, packed)) == 2


@torch.no_grad()
def test_a_window_wider_than_the_row_is_none(monkeypatch):
    model = make("mistral", sliding_window=LENGTH)
    install_packing(model)
    rows = make_documents(1, ((LENGTH,),))
    assert used(monkeypatch, lambda: packed_logits(model, rows)) == 0


@torch.no_grad()
def test_nothing_on_the_device_is_looked_at(monkeypatch):
    """transformers would compare positions there; with four axes the mask passes as it is."""
    from transformers import masking_utils

    def looked(*_: Any) -> None:
        pytest.fail("positions are compared on the device")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    for family in ("llama", "gemma3_text", "opt"):
        model = make(family)
        install_packing(model)
        packed_logits(model, make_documents(1))


@torch.no_grad()
def test_restarting_positions_without_blocks_are_refused():
    model = make("llama")
    install_packing(model)
    ids, positions, _ = pack(make_documents(1))
    with pytest.raises(ValueError, match="document_blocks"):
        model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", ALIBI])
@torch.no_grad()
def test_generation_is_untouched(family):
    model = make(family)
    ids = make_documents(3)[0][0][None, :9].repeat(2, 1).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    told = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    install_packing(model)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, told)


def test_a_leak_is_seen_on_the_real_path(monkeypatch):
    monkeypatch.setattr(flex, "document_numbers", lambda bounds, device: torch.zeros(
        len(bounds), bounds[0][-1], dtype=torch.int32, device=device))  # fmt: skip
    for family in ("llama", "bloom", ALIBI):
        with pytest.raises(InputError, match="sees the one before it"):
            install_packing(make(family))


# ALiBi, whose attention is replaced for rows that are not packed too.
def alibi_calls(model: Any, masks: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of real tokens under each mask, and their gradients."""
    ids = torch.stack([row[0] for row in make_documents(5, ((140,), (140,)))]).to(DEVICE)
    logits = []
    for mask in masks:
        given = None if mask is None else mask.to(DEVICE)
        out = model(input_ids=ids, attention_mask=given, use_cache=False).logits
        logits.append(out if given is None else out[given.bool()])
    return logits, gradients(model, logits)


@pytest.mark.parametrize("family", ["bloom", ALIBI])
def test_alibi_unpacked_equals_the_plain_attention(monkeypatch, family):
    masks = [None, torch.ones(2, 140), torch.ones(2, 140)]
    masks[1][0, :37] = 0  # left padding
    masks[2][1, 133:] = 0  # right padding
    model = make(family)
    logits, wanted = alibi_calls(model, masks)
    words = install_attention(model)
    assert words is not None
    assert "ALiBi" in words
    found: list[Any] = []
    assert used(monkeypatch, lambda: found.extend(alibi_calls(model, masks))) == 6
    assert_close(found[0], logits, 2e-5)
    assert_close(found[1], wanted, 1e-4)
    uninstall_attention(model)
    assert used(monkeypatch, lambda: found.extend(alibi_calls(model, masks))) == 0
    assert all(torch.equal(a, b) for a, b in zip(found[2], logits, strict=True))
    assert install_attention(make("llama")) is None


def test_bloom_gives_attentions_when_asked():
    model = make("bloom")
    install_attention(model)
    ids = make_documents(5)[0][0][None].to(DEVICE)
    out = model(input_ids=ids, output_attentions=True, use_cache=False)
    assert out.attentions[0].shape == (1, 4, 70, 70)


@torch.no_grad()
def test_bloom_in_bf16_is_nearer_to_the_truth():
    model = make("bloom")
    rows = make_documents(4, ((LENGTH,),))
    truth = alone_logits(model, rows)[0]
    model.bfloat16()
    before = alone_logits(model, rows)[0].float()
    install_attention(model)
    after = alone_logits(model, rows)[0].float()
    assert float((after - truth).norm()) <= float((before - truth).norm())


# Which way is taken, from the config alone: what a GPU would hear.
def config_of(**options: Any) -> Any:
    from families import family_config

    return family_config("llama", **{**OPTIONS, **options})


@pytest.fixture
def a_gpu(monkeypatch):
    import torch.utils._triton as triton

    monkeypatch.undo()  # of `why_not` above
    monkeypatch.setattr(triton, "has_triton", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return torch.device("cuda")


def test_what_flex_attention_cannot_do_is_said(monkeypatch, a_gpu):
    assert flex.why_not(config_of(), a_gpu) is None
    assert "width 8" in str(flex.why_not(config_of(head_dim=8), a_gpu))
    assert "width 512" in str(flex.why_not(config_of(head_dim=512), a_gpu))
    assert "attention_dropout is 0.1" in str(flex.why_not(config_of(attention_dropout=0.1), a_gpu))
    assert "cpu" in str(flex.why_not(config_of(), torch.device("cpu")))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "C compiler" in str(flex.why_not(config_of(), a_gpu))
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "Triton" in str(flex.why_not(config_of(), a_gpu))


def test_widths_and_dropouts_are_read_from_every_family(a_gpu):
    from families import family_config

    for family in USERS:
        config = family_config(family, **OWN.get(family, OPTIONS))
        assert flex.why_not(config, a_gpu) is None, family
    gpt2 = family_config("gpt2", **{**OWN["gpt2"], "attn_pdrop": 0.1})
    assert "attn_pdrop is 0.1" in str(flex.why_not(gpt2, a_gpu))


@torch.no_grad()
def test_another_way_is_said_with_its_reason(monkeypatch):
    monkeypatch.setattr(flex, "why_not", lambda config, device: "heads are odd")
    monkeypatch.setattr(install, "_on_cpu", lambda model: False)
    rows = make_documents(1)
    for family in ("llama", "gemma2", "bloom"):
        model = make(family)
        alone = alone_logits(model, rows)
        assert "heads are odd" in install_packing(model)
        assert_close(packed_logits(model, rows), alone, 2e-5)
    model = make("llama")
    model.set_attn_implementation("eager")
    assert "eager, by name" in install_packing(model)


def test_layers_that_ask_for_more_are_refused():
    blocks = flex.packed_blocks(((0, 20, 50),), DEVICE, window=7)
    q, k, v = torch.randn(3, 1, 2, 50, 16, device=DEVICE).unbind()
    layer = nn.Module()
    for asked, says in (
        ({"dropout": 0.1}, "no dropout"),
        ({"s_aux": q}, "s_aux"),
        ({"sliding_window": 9}, "window of 9"),
    ):
        with pytest.raises(ValueError, match=says):
            flex.flex_attention_forward(layer, q, k, v, None, document_blocks=blocks, **asked)
    with pytest.raises(ValueError, match="soft cap of 5"):
        flex.flex_attention_forward(layer, q, k, v, None, softcap=5.0, document_blocks=(None, None))


@pytest.mark.parametrize(
    ("family", "recompute"),
    [
        ("gemma2", True),
        *(
            pytest.param(family, recompute, marks=SLOW)
            for family in ("llama", "bloom", "qwen2", "gemma2")
            for recompute in (False, True)
            if (family, recompute) != ("gemma2", True)
        ),
    ],
)
def test_sped_up_and_packed(family, recompute):
    """All together: groups, compiled blocks, recomputation, and other documents each time."""
    from speeding import adapted

    from glasstune.fast.speed_up import speed_up

    torch._dynamo.reset()
    base = family_model(family, **{**OWN.get(family, OPTIONS)}).to(DEVICE)
    install_packing(base)
    model = adapted(base)
    right = [gradients(model, packed_logits(model, make_documents(n, OTHERS[n]))) for n in range(4)]
    counter = CompileCounterWithBackend("inductor" if CUDA else "aot_eager")
    if recompute:
        enable = getattr(base, "activation_checkpointing_enable", None)
        (enable or base.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    speed_up(model, compile=True, compile_options={"backend": counter, "dynamic": False})
    model.train()
    seen = []
    for n in range(4):
        found = gradients(model, packed_logits(model, make_documents(n, OTHERS[n])))
        assert_close(found, right[n], 1e-3)
        seen.append(counter.frame_count)
    torch._dynamo.reset()
    assert seen == [seen[0]] * 4
    assert seen[0] >= 1

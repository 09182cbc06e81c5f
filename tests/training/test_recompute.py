"""Recomputation by number: the same bits, less memory layer by layer, and who chose the number."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor, nn

from glasstune.adapters.inject import add_adapter
from glasstune.core.choices import Choices
from glasstune.core.config import TrainingConfig
from glasstune.core.errors import InputError
from glasstune.core.recompute import Recompute
from glasstune.training.dropout import RowDropout, RowSeeds, seed_dropout
from glasstune.training.offload import Offload, Waiting
from glasstune.training.recompute import (
    LayerBytes,
    apply_recompute,
    choose_recompute,
    decoder_layers,
    layer_bytes,
    resolve_recompute,
)

LAYERS = 4
IDS = torch.arange(3, 3 + 48).view(3, 16)


def adapted(family: str = "llama", share: float = 0.25, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    name = "n_layer" if family in ("bloom", "gpt2") else "num_hidden_layers"
    base = AutoModelForCausalLM.from_config(tiny_config(family, **{name: LAYERS, **options}))
    base.requires_grad_(False)
    model = add_adapter(base, r=4, lora_dropout=share)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "lora_B" in key:
                value.normal_(0, 0.1)
    rows = RowSeeds()
    rows.place(1, 0, 5, len(IDS), "cpu")
    seed_dropout(model, rows)
    return model.train()


def loss(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(4)  # gpt2 drops attention weights inside a function
    loss(model).backward()
    return [value.grad.clone() for value in model.parameters() if value.requires_grad]


def saved_bytes(model: Any) -> int:
    """Memory that the graph of a forward holds beside the weights."""
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    held: dict[int, int] = {}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # its address must not be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss(model)
    del total
    return sum(held.values())


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
def test_the_same_bits_with_any_number_of_layers(family) -> None:
    """Dropout of 0.25 is on: a mask of its own in the recomputation would show."""
    model = adapted(family)
    apply_recompute(model, Recompute(0))
    right = gradients(model)
    assert any(isinstance(part, RowDropout) for part in model.modules())
    for chosen in (Recompute(1), Recompute(3), Recompute(LAYERS), Recompute(2, offload=True)):
        apply_recompute(model, chosen)
        assert all(map(torch.equal, gradients(model), right)), chosen
    # The masks do matter: other rows, other gradients.
    next(p for p in model.modules() if isinstance(p, RowDropout)).rows.place(1, 0, 9, 3, "cpu")
    assert not all(map(torch.equal, gradients(model), right))


def test_each_recomputed_layer_saves_its_memory() -> None:
    model = adapted()
    held = []
    for count in range(LAYERS + 1):
        apply_recompute(model, Recompute(count))
        held.append(saved_bytes(model))
    falls = [before - after for before, after in pairwise(held)]
    assert min(falls) > 0.15 * held[0]  # each of 4 layers; the rest is the head's
    # What is left of a layer is its input: [3, 16, 64] of float32.
    assert held[-1] < 0.25 * held[0]
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True] * LAYERS
    apply_recompute(model, Recompute(1))
    flags = [layer.gradient_checkpointing for layer in decoder_layers(model)]
    assert flags == [True, False, False, False]  # the first ones
    assert saved_bytes(model) == held[1]


def test_offloaded_inputs_leave_the_graph_and_come_back() -> None:
    """On a CPU a copy stands for the host: the graph holds no tensor of a layer's input."""
    model = adapted()
    store = apply_recompute(model, Recompute(3, offload=True))
    assert store is not None
    order: list[int] = []
    taken: list[int] = []
    real = Waiting.__init__, Waiting.take

    def init(self: Waiting, *args: Any) -> None:
        real[0](self, *args)
        order.append(id(self))

    def take(self: Waiting) -> Tensor:
        taken.append(id(self))
        previous = self.previous and self.previous()
        back = real[1](self)
        if previous:
            assert previous.back is not None  # on its way before it is needed
        return back

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Waiting, "__init__", init)
        patch.setattr(Waiting, "take", take)
        gradients(model)
    assert taken == order[::-1]
    assert len(order) == 3
    assert store.bytes == 3 * IDS.numel() * 64 * 4


def test_two_backwards_of_an_offloaded_graph() -> None:
    store = Offload(torch.device("cpu"))
    x = torch.randn(5, 7, requires_grad=True)
    layer = nn.Linear(7, 7)
    out = store.checkpoint(lambda x: torch.tanh(layer(x)), x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x)[0], first)
    right = torch.autograd.grad(torch.tanh(layer(x)).sum(), x)[0]
    assert torch.equal(first, right)


@pytest.mark.parametrize(
    ("free", "layers"),
    # 40 kept whole; each recomputed layer gives 9 back; the last one is made again at once.
    [(40, 0), (39, 1), (31, 1), (30, 2), (22, 2), (21, 3), (13, 3), (12, 4), (0, 4)],
)
def test_the_smallest_number_that_fits(free, layers) -> None:
    assert choose_recompute(LayerBytes(kept=10, input=1, layers=4), free) == Recompute(layers)


def test_bytes_of_a_layer_by_hand() -> None:
    """Llama-3-8B's shape, 8,192 tokens in bf16: 6 x 4096 + 2 x 1024 + 4 x 14336 vectors."""
    config = tiny_config(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=32,
    )  # fmt: skip
    found = layer_bytes(config, 4, 2048, compiled=True, itemsize=2)
    assert found.kept == 8192 * 2 * 83968
    assert found.input == 8192 * 2 * 4096
    assert found.layers == 32


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_estimate_holds_what_a_forward_keeps(share) -> None:
    """Never less than eager keeps, nor half as much again."""
    model = adapted(hidden_size=128, intermediate_size=448, share=share)
    apply_recompute(model, Recompute(0))
    whole = saved_bytes(model)
    apply_recompute(model, Recompute(LAYERS))
    options = {"compiled": False, "itemsize": 4, "dropout": share > 0}
    found = layer_bytes(model.config, *IDS.shape, **options)
    layer = (whole - saved_bytes(model)) / LAYERS + found.input
    assert layer < found.kept < 1.5 * layer


def resolved(model: Any, choices: Choices, **training: Any) -> tuple[Recompute, TrainingConfig]:
    config = TrainingConfig(**training)
    return resolve_recompute(model, config, 3, 16, choices), config


def test_a_limit_between_gives_a_number_between(monkeypatch) -> None:
    from glasstune.training import recompute

    model, choices = adapted(), Choices()
    needs = layer_bytes(model.config, 3, 16, compiled=False, itemsize=4, dropout=True)
    monkeypatch.setattr(recompute, "_room", lambda *_: needs.total(2))
    chosen, config = resolved(model, choices)
    assert chosen == Recompute(2)
    assert config.recompute == "auto"  # the answer is no word of the config
    assert choices.get("training.recompute").value == "2 of 4 layers"
    assert choices.get("recompute_layers").value == 2
    assert "KiB" in choices.get("training.recompute").reason


@pytest.mark.parametrize(
    ("asked", "layers", "written"), [("none", 0, "none"), ("full", 4, "full"), ("auto", 0, "none")]
)
def test_words_of_the_config(asked, layers, written) -> None:
    choices = Choices()
    chosen, config = resolved(adapted(), choices, recompute=asked)
    assert chosen == Recompute(layers)
    assert config.recompute == written
    assert choices.get("recompute_layers").value == layers


def test_offload_on_a_cpu_is_said_to_be_full() -> None:
    choices = Choices()
    chosen, config = resolved(adapted(), choices, recompute="offload")
    assert chosen == Recompute(LAYERS)
    assert config.recompute == "full"
    assert "host memory as it is" in choices.get("training.recompute").reason


class Old(nn.Module):
    """A family with one switch for all layers, as old code of a hub has it."""

    def __init__(self, switch: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.config = tiny_config()
        if switch:
            self.gradient_checkpointing = False


def test_old_families_do_all_or_nothing() -> None:
    model = Old(True)
    apply_recompute(model, Recompute(2))
    assert model.gradient_checkpointing is True
    apply_recompute(model, Recompute(0))
    assert model.gradient_checkpointing is False
    for wrong, chosen in ((model, Recompute(1)), (Old(False), Recompute(2))):
        with pytest.raises(InputError) as caught:
            apply_recompute(wrong, chosen)
        assert caught.value.code == "recompute_impossible"
    apply_recompute(Old(False), Recompute(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offload_on_a_gpu() -> None:
    model = adapted().cuda()
    ids = IDS.cuda()
    for part in model.modules():
        if isinstance(part, RowDropout):
            part.rows.place(1, 0, 5, len(IDS), "cuda")
    found = []
    for chosen in (Recompute(0), Recompute(LAYERS), Recompute(LAYERS, offload=True)):
        apply_recompute(model, chosen)
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append([value.grad.clone() for value in model.parameters() if value.requires_grad])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))

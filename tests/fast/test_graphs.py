"""A replayed forward and backward against the same calls made one kernel at a time; needs CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("default"),  # Triton's own
]


def model_and_run() -> tuple[Any, list[Any], Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from glasstune.adapters.inject import add_adapter
    from glasstune.fast.speed_up import speed_up
    from glasstune.models.families.install import install_packing, packing_kwargs

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).requires_grad_(False)
    install_packing(model, compiled=True)
    model = add_adapter(model, r=8, lora_alpha=16).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    speed_up(model, compile=True, compile_options={"dynamic": False})
    extra = packing_kwargs(model, ((0, 128), (0, 128)), "cuda")

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return model.get_base_model().model(input_ids=ids, use_cache=False, **extra)[0]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, trained, run


def batch(seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randint(0, 300, (2, 128), device="cuda", generator=generator)


def step(run: Any, trained: list[Any], seeds: tuple[int, ...]) -> list[torch.Tensor]:
    for parameter in trained:
        parameter.grad = None
    outs = []
    for seed in seeds:
        out = run(batch(seed))
        out.float().square().mean().backward()
        outs.append(out.detach().clone())
    return [*outs, *(parameter.grad.clone() for parameter in trained)]


def test_a_replay_gives_the_same_bits_and_sees_new_weights() -> None:
    from glasstune.fast.graphs import GraphedForward

    _, trained, run = model_and_run()
    step(run, trained, (7,))
    graphed = GraphedForward(run, [batch(0)], trained)
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for seeds in ((1,), (2, 3)):  # two micro-batches add their gradients
        wanted, got = step(run, trained, seeds), step(graphed, trained, seeds)
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        optimizer.step()
    assert not torch.equal(step(graphed, trained, (1,))[0], wanted[0])


def test_a_broken_copy_of_gradients_is_seen() -> None:
    from glasstune.fast.graphs import GraphedForward

    _, trained, run = model_and_run()
    step(run, trained, (7,))
    graphed = GraphedForward(run, [batch(0)], trained)
    wanted, kept = step(run, trained, (2, 3)), step(graphed, trained, (2,))
    graphed(batch(3)).float().square().mean().backward()
    assert torch.equal(trained[0].grad, wanted[2])
    graphed(batch(5)).float().square().mean().backward()
    assert not torch.equal(trained[0].grad, wanted[2])
    assert len(kept) == len(trained) + 1


def test_another_shape_is_refused() -> None:
    from glasstune.fast.graphs import GraphedForward

    _, trained, run = model_and_run()
    step(run, trained, (7,))
    graphed = GraphedForward(run, [batch(0)], trained)
    assert graphed.fits([batch(1)])
    assert not graphed.fits([batch(1)[:, :64]])
    with pytest.raises(ValueError, match="another shape"):
        graphed(batch(1)[:1])


def test_a_forward_has_one_backward() -> None:
    from glasstune.fast.graphs import GraphedForward

    _, trained, run = model_and_run()
    step(run, trained, (7,))
    graphed = GraphedForward(run, [batch(0)], trained)
    loss = graphed(batch(1)).float().square().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="activations are gone"):
        loss.backward()
    early = graphed(batch(1)).float().square().mean()
    graphed(batch(2))
    with pytest.raises(RuntimeError, match="activations are gone"):
        early.backward()

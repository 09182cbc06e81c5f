"""PEFT's switches and changed values are seen at each call; what cannot be grouped says so."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from families import family_model
from speeding import IDS, adapted, fill, furthest, gradients, tiny
from torch import nn

from glasstune.adapters.base import base_only
from glasstune.adapters.state import adapter_state, restore_state
from glasstune.fast.speed_up import plain, slow_down, speed_up


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def agrees(model: Any) -> bool:
    """Whether the sped-up model computes what PEFT computes, and its gradients."""
    fast, grads = logits(model), gradients(model)
    with plain(model):
        right, right_grads = logits(model), gradients(model)
    return bool((fast - right).abs().max() < 2e-4) and furthest(grads, right_grads) < 2e-5


def ways(model: Any, report: Any) -> set[str]:
    logits(model)
    return {group.way for group in report.groups}


def step(model: Any) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()


def through_data(model: Any) -> None:
    """As DeepSpeed and optimisers with kernels of their own do: no version tells of it."""
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(parameter.grad, alpha=-0.5)


def load(model: Any) -> None:
    state = {k: v + 0.05 if "lora_" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def load_base(model: Any) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


def load_assign(model: Any) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True)


def restore(model: Any) -> None:
    restore_state(model, {k: v + 0.05 for k, v in adapter_state(model).items()})


def in_place(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)


def new_memory(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data * 1.5


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)


CHANGES = [
    step, through_data, load, load_base, load_assign, restore, in_place, new_memory, rescale,
]  # fmt: skip


# Those that load a base's state dict are for plain weights: a packed one holds other tensors.
UNPACKED = (load, load_base, load_assign)


@pytest.mark.parametrize(
    ("change", "bits"),
    [(c, bits) for c in CHANGES for bits in (32, 4, 8) if bits == 32 or c not in UNPACKED],
)
def test_changed_values_are_seen(change, bits) -> None:
    model = tiny("llama", bits)
    report = speed_up(model)
    before = logits(model)
    change(model)
    after = logits(model)  # first without gradients: nothing else has looked
    with plain(model):
        right = logits(model)
    assert (before - right).abs().max() > 0.01, "the change is too small to see"
    assert (after - right).abs().max() < 2e-4
    assert {group.way for group in report.groups} == {"wide"}


def test_8_bit_adamw_is_seen() -> None:
    """bitsandbytes writes through a pointer."""
    from glasstune.models.quantization import adam_8bit

    model = tiny("llama")
    speed_up(model)
    before = logits(model)
    optimizer = adam_8bit(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    after = logits(model)
    with plain(model):
        right = logits(model)
    assert (before - right).abs().max() > 0.01
    assert (after - right).abs().max() < 2e-4


def test_several_steps_train_as_peft_does() -> None:
    models = [tiny("qwen2"), tiny("qwen2")]
    speed_up(models[0])
    losses: list[list[float]] = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        curve = []
        for _ in range(6):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_base_only_and_disable_adapter() -> None:
    model = tiny("llama")
    base = family_model("llama", hidden_size=64, head_dim=16)
    report = speed_up(model)
    logits(model)
    with base_only(model):
        assert torch.equal(logits(model), logits(base))
        assert {group.way for group in report.groups} == {"plain"}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert agrees(model)
    assert ways(model, report) == {"wide"}


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge(safe) -> None:
    model = tiny("llama")
    with torch.no_grad():
        weight = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    right = logits(model)
    report = speed_up(model)
    logits(model)
    model.merge_adapter(safe_merge=safe)
    assert (logits(model) - right).abs().max() < 2e-4
    assert {group.way for group in report.groups} == {"plain"}
    model.unmerge_adapter()
    assert (logits(model) - right).abs().max() < 2e-4
    assert ways(model, report) == {"wide"}
    assert agrees(model)
    report.undo()
    now = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    # PEFT adds and takes away the same product: float32 rounds both times.
    assert torch.allclose(now, weight, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning")
@pytest.mark.filterwarnings("ignore:Unmerge lora module to 4-bit:UserWarning")
def test_merge_and_unmerge_at_4_bit() -> None:
    model = tiny("llama", 4)
    report = speed_up(model)
    assert ways(model, report) == {"wide"}
    model.merge_adapter()
    merged = logits(model)
    assert {group.way for group in report.groups} == {"plain"}
    with plain(model):
        assert torch.equal(merged, logits(model))
    model.unmerge_adapter()  # the weights are others now: packed a second time
    fast = logits(model)
    assert {group.way for group in report.groups} == {"wide"}
    with plain(model):
        assert (fast - logits(model)).abs().max() < 2e-4


def test_merged_model_saved_and_read_back(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    right = logits(model)
    speed_up(model)
    logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits(read) - right).abs().max() < 2e-4


def test_unloaded_model_saved_and_read_back(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("gpt2")
    speed_up(model)
    with model.disable_adapter():
        right = logits(model)
    logits(model)
    base = model.unload()
    base.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits(read) - right).abs().max() < 1e-5


def test_a_state_dict_is_contiguous_and_the_next_call_fast() -> None:
    model = tiny("llama")
    report = speed_up(model)
    right = logits(model)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    weights = model.state_dict()
    assert all(value.is_contiguous() for value in weights.values())
    loss.backward()  # the graph made before keeps its M
    assert torch.equal(logits(model), right)
    assert {group.way for group in report.groups} == {"wide"}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.data_ptr() == report.groups[0].wide.data_ptr()


def test_the_adapter_saved_and_read_back(tmp_path) -> None:
    from peft import PeftModel

    model = tiny("llama")
    speed_up(model)
    right = logits(model)
    model.save_pretrained(tmp_path)
    base = family_model("llama", hidden_size=64, head_dim=16)
    assert (logits(PeftModel.from_pretrained(base, tmp_path).eval()) - right).abs().max() < 2e-4


def second(model: Any, name: str, **options: Any) -> None:
    from peft import LoraConfig

    model.add_adapter(name, LoraConfig(task_type="CAUSAL_LM", **options))
    fill(model, seed=5)


def test_another_adapter_with_another_rank() -> None:
    model = tiny("llama", target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    report = speed_up(model)
    assert agrees(model)
    first = logits(model)
    options = {"r": 11, "lora_alpha": 5, "use_rslora": True}
    second(model, "other", target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], **options)
    model.set_adapter("other")
    assert agrees(model)
    assert (logits(model) - first).abs().max() > 0.01
    assert ways(model, report) == {"wide"}
    model.set_adapter("default")
    assert agrees(model)
    model.base_model.set_adapter(["default", "other"])
    assert agrees(model)
    assert ways(model, report) == {"grouped", "plain"}  # down_proj is alone: nothing to share
    assert "several active adapters" in report.groups[0].reason
    model.set_adapter("default")
    model.delete_adapter("other")
    assert agrees(model)
    assert ways(model, report) == {"wide"}


def test_an_adapter_on_some_members_only() -> None:
    model = tiny("llama")
    report = speed_up(model)
    second(model, "part", r=3, target_modules=["q_proj", "up_proj"])
    model.set_adapter("part")
    assert agrees(model)
    assert "no active adapter" in report.groups[0].reason


def test_mixed_ranks_scales_and_partial_targets() -> None:
    model = tiny(
        "llama", r=3, target_modules=["q_proj", "v_proj", "up_proj", "o_proj"],
        rank_pattern={"v_proj": 7}, alpha_pattern={"q_proj": 32}, use_rslora=True,
    )  # fmt: skip
    report = speed_up(model)
    assert agrees(model)
    assert [group.paths[0].rsplit(".", 1)[-1] for group in report.groups[:3]] == [
        "q_proj", "o_proj", "up_proj",
    ]  # fmt: skip
    assert report.groups[0].layout.ranks == (3, 7)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_dropout(bits) -> None:
    """In training the base's product is shared; the masks are PEFT's own, in its order."""
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    model = tiny("llama", bits, dtype, lora_dropout=0.3)
    report = speed_up(model)
    assert {module.way for module in report.record.modules} == {"grouped", "plain"}
    reason = report.record.modules[0].reason
    assert reason.startswith("dropout 0.3 in training (wide in evaluation)")
    model.train()
    autocast = bits != 32
    torch.manual_seed(7)
    fast = gradients(model, autocast)
    assert {group.way for group in report.groups} == {"grouped", "plain"}
    with plain(model):
        torch.manual_seed(7)
        right = gradients(model, autocast)
        torch.manual_seed(8)
        other = gradients(model, autocast)
    assert furthest(fast, right) < (1e-5 if bits == 32 else 0.1)
    assert furthest(fast, other) > 0.3
    model.eval()
    assert ways(model, report) == {"wide"}


def test_an_evaluation_between_forward_and_backward() -> None:
    """A changed adapter is written into M while a grouped backward waits."""
    model = tiny("llama", lora_dropout=0.3)
    speed_up(model)
    logits(model)
    in_place(model)
    model.train()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    model.eval()
    logits(model)
    loss.backward()


VARIANTS = [
    ({"use_dora": True}, "a variant of LoRA: Dora"),
    ({"bias": "all"}, "the base's own bias is trained"),
    ({"bias": "lora_only"}, "the base's own bias is trained"),
    (
        {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
        "a bias of the adapter is trained",
    ),
    ({"modules_to_save": ["lm_head"]}, "a whole copy of the module is trained"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "lora.layer.Embedding"),
    ({"target_modules": ["q_proj", "lm_head"]}, "also that of another module (tied)"),
    ({"trainable_token_indices": [1, 2]}, "a whole copy of the module"),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("options", "reason"), VARIANTS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_grouped_says_why(options, reason) -> None:
    torch.manual_seed(0)
    model = adapted(family_model("qwen2", tie_word_embeddings="lm_head" in str(options)), **options)
    right = logits(model), gradients(model)
    report = speed_up(model)
    assert any(reason in module.reason for module in report.record.modules), str(report)
    assert {module.path for module in report.record.modules} == {
        path for path, _ in model.named_modules() if _adapted(model, path)
    }
    assert (logits(model) - right[0]).abs().max() < 2e-4
    assert furthest(gradients(model), right[1]) < 2e-5


def _adapted(model: Any, path: str) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    module = model.get_submodule(path)
    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def test_llm_int8_stays_as_it_is() -> None:
    import bitsandbytes as bnb

    base = family_model("llama").to(torch.float16)
    for path, layer in list(base.named_modules()):
        if type(layer) is nn.Linear and "lm_head" not in path:
            packed = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, False, has_fp16_weights=False, threshold=6.0
            )
            packed.weight = bnb.nn.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
            base.set_submodule(path, packed.to("cpu"))
    base.is_loaded_in_8bit = True
    model = adapted(base)
    report = speed_up(model)
    assert {module.way for module in report.record.modules} == {"plain"}
    assert "LLM.int8" in report.record.modules[0].reason


def test_hooks_inside_a_layer_still_run() -> None:
    model = tiny("llama")
    report = speed_up(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    seen: list[str] = []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("layer")),
        layer.base_layer.register_forward_hook(lambda *_: seen.append("base")),
    ]
    assert agrees(model)
    assert seen.count("base") == 4
    assert seen.count("layer") == 4
    assert report.groups[0].reason == "a hook on its base layer"
    for handle in handles:
        handle.remove()
    handle = layer.lora_A["default"].register_forward_hook(lambda *_: seen.append("A"))
    assert agrees(model)
    assert seen.count("A") == 4
    assert report.groups[0].way == "grouped"
    handle.remove()
    assert ways(model, report) == {"wide"}


def test_mixed_batches_of_adapters() -> None:
    model = tiny("llama")
    second(model, "other", r=3)
    names = ["default", "other"]
    with torch.no_grad():
        right = model(input_ids=IDS, use_cache=False, adapter_names=names).logits
        speed_up(model)
        got = model(input_ids=IDS, use_cache=False, adapter_names=names).logits
    assert torch.equal(got, right)


def test_copies_and_pickles_are_plain() -> None:
    model = tiny("llama")
    speed_up(model)
    right = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert (logits(other) - right).abs().max() < 2e-4
        in_place(other)
        assert (logits(other) - right).abs().max() > 0.01
        assert torch.equal(logits(model), right)
        speed_up(other)
        assert agrees(other)


def test_casts_and_moves() -> None:
    model = tiny("llama")
    report = speed_up(model)
    logits(model)
    model.double()
    assert agrees(model)
    assert ways(model, report) == {"wide"}
    assert report.groups[0].wide.dtype == torch.float64


def test_undo_puts_everything_back() -> None:
    model = tiny("gpt2")
    keys = [(name, value.shape, value.stride()) for name, value in model.state_dict().items()]
    forwards = [module for module in model.modules() if "forward" in module.__dict__]
    right = logits(model)
    report = speed_up(model)
    assert (logits(model) - right).abs().max() < 2e-4
    assert [name for name, _, _ in keys] == list(model.state_dict())
    slow_down(model)
    assert keys == [(name, v.shape, v.stride()) for name, v in model.state_dict().items()]
    assert forwards == [module for module in model.modules() if "forward" in module.__dict__]
    assert torch.equal(logits(model), right)
    report.undo()  # a second time does nothing
    slow_down(model)
    again = speed_up(model)
    once_more = speed_up(model)  # undoes the one before
    assert agrees(model)
    assert again.groups[0].wide is None
    once_more.undo()
    assert torch.equal(logits(model), right)


def test_a_model_is_freed() -> None:
    import gc
    import weakref

    model = tiny("llama")
    report = speed_up(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert report.record.modules

"""Names: a checkpoint's own keys go through transformers' mapping and come back as they were."""

from __future__ import annotations

import pytest
import torch
from battery import ARCHITECTURES, KEPT_FLOAT, battery_config, save_battery_model
from merging import adapted, load_plain, logits_of, method_options, save_peft, stored
from safetensors.torch import load_file

from glasstune.core.errors import InputError
from glasstune.models.conversion import KeyMap
from glasstune.models.empty import empty_model
from glasstune.models.reader import WeightReader
from glasstune.models.streaming import StreamedModel, module_paths
from glasstune.workflows.merge import merge


@pytest.mark.parametrize("name", sorted([*ARCHITECTURES, "glm4_moe"]))
def test_every_weight_is_the_one_that_transformers_loads(name, tmp_path):
    folder = save_battery_model(name, tmp_path)
    real = load_plain(folder)
    reader = WeightReader(folder, empty_model(battery_config(name)))
    theirs = real.state_dict()
    ours = reader.fetch(list(theirs))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", sorted([*ARCHITECTURES, *KEPT_FLOAT]))
def test_every_group_comes_back_bit_for_bit(name, tmp_path):
    folder = save_battery_model(name, tmp_path)
    file = stored(folder)
    mapped = KeyMap(
        empty_model(battery_config(name)), {key: tuple(v.shape) for key, v in file.items()}
    )
    seen = []
    for group in mapped.groups:
        back = mapped.backward(group, mapped.forward(group, file.__getitem__))
        for key, value in back.items():
            assert torch.equal(value, file[key]), key
        seen += back
    assert sorted(seen) == sorted(file)


@pytest.mark.parametrize("name", sorted([*ARCHITECTURES, "glm4_moe"]))
def test_a_streamed_forward_is_the_whole_one(name, tmp_path):
    folder = save_battery_model(name, tmp_path)
    rows = [[5, 6, 7, 8, 9], [11, 12, 13], [3] * 12]
    model = empty_model(battery_config(name))
    streamed = StreamedModel(model, module_paths(model), WeightReader(folder, model).fetch)
    found = torch.cat(list(streamed.logits(streamed.hidden(rows))))
    truth = logits_of(load_plain(folder), rows)
    assert float((found - truth).abs().max()) <= 2e-6 * max(1.0, float(truth.abs().max()))
    assert all(value.is_meta for value in model.parameters()), "every layer is emptied again"
    streamed.close()


def test_no_more_than_one_layer_is_in_memory(tmp_path):
    folder = save_battery_model("llama", tmp_path)
    model = empty_model(battery_config("llama"))
    held: list[int] = []

    def look(_: int) -> None:
        held.append(sum(p.numel() for p in model.parameters() if not p.is_meta))

    reader = WeightReader(folder, model)
    streamed = StreamedModel(model, module_paths(model), reader.fetch, on_read=look)
    streamed.hidden([[5, 6, 7]])
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    embedding = model.model.embed_tokens.weight.numel()
    assert len(held) == 2 + len(sizes)  # embedding, layers, last norm
    assert sorted(held) == sorted([embedding, *sizes, model.model.norm.weight.numel()])
    streamed.close()


def test_a_mixture_keeps_its_checkpoints_names_and_each_expert_its_own_change(tmp_path):
    base = save_battery_model("mixtral", tmp_path)
    wrapped = adapted(base, method_options("mixtral", "experts"), scale=0.4)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    merge(adapter, tmp_path / "out", base=str(base), dtype="float32", certificate=False)
    before, after = stored(base), stored(tmp_path / "out")
    assert sorted(after) == sorted(before)
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in after
    # By hand, from the adapter's file: expert e takes rank rows e of A, and of B every third
    # column from e on; gate (w1) is the upper half of the fused weight, up (w3) the lower.
    file = stored(adapter)
    prefix = "base_model.model.model.layers.1.mlp.experts."
    half = before["model.layers.1.block_sparse_moe.experts.0.w1.weight"].shape[0]
    wide = "base_layer." if file[f"{prefix}base_layer.lora_B.weight"].shape[0] == 2 * half else ""
    down_A = file[f"{prefix}{wide}lora_A.weight"].double()
    up_B = file[f"{prefix}{wide}lora_B.weight"].double()
    for expert in range(3):
        a = down_A.reshape(3, 3, -1)[expert]
        b = up_B.reshape(up_B.shape[0], 3, 3)[:, :, expert]
        moved = 7 / 3 * b @ a
        for name, part in (("w1", moved[:half]), ("w3", moved[half:])):
            key = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
            found = after[key].double() - before[key].double()
            # Of float32 weights, whose own rounding stands in the difference.
            assert torch.allclose(found, part, atol=1e-6), key
            assert float(part.abs().max()) > 0.01


def test_experts_of_one_weight_in_many_shards(tmp_path):
    whole = save_battery_model("mixtral", tmp_path)
    base = tmp_path / "shards"
    load_plain(whole).save_pretrained(base, max_shard_size="40KB")
    places: dict[str, set[str]] = {}
    for file in base.glob("*.safetensors"):
        for key in load_file(file):
            places.setdefault(key.split(".experts.")[0], set()).add(file.name)
    assert any(len(files) > 1 for key, files in places.items() if "moe" in key)
    wrapped = adapted(base, method_options("mixtral", "experts"), scale=0.4)
    adapter = save_peft(wrapped, tmp_path / "adapter")
    assert merge(adapter, tmp_path / "out", base=str(base), dtype="float32").passed
    for file in base.glob("*.safetensors"):
        assert set(load_file(tmp_path / "out" / file.name)) == set(load_file(file))
    apart = (logits_of(load_plain(tmp_path / "out")) - logits_of(wrapped)).abs().max()
    assert float(apart) < 1e-5


def test_a_reverse_operation_that_mixes_experts_up_is_refused(tmp_path, monkeypatch):
    from transformers.core_model_loading import SplitModulelist

    base = save_battery_model("mixtral", tmp_path)
    adapter = save_peft(adapted(base, method_options("mixtral", "experts")), tmp_path / "adapter")
    right = SplitModulelist.convert

    def turned(self, *args, **kwargs):
        made = right(self, *args, **kwargs)
        return dict(zip(made, reversed(made.values()), strict=True))

    monkeypatch.setattr(SplitModulelist, "convert", turned)
    with pytest.raises(InputError, match="comes back with other values") as caught:
        merge(adapter, tmp_path / "out", base=str(base))
    assert caught.value.code == "no_way_back"
    assert not (tmp_path / "out").exists()


def test_kept_float32_weights_stay_so(tmp_path):
    base = save_battery_model("glm4_moe", tmp_path)
    options = {"r": 3, "target_modules": ["q_proj"]}
    adapter = save_peft(adapted(base, options), tmp_path / "adapter")
    merge(adapter, tmp_path / "out", base=str(base))
    # Which ones differs between releases of transformers: a real load tells.
    real = load_plain(base, dtype=torch.bfloat16).state_dict()
    kept = {name for name, value in real.items() if value.dtype == torch.float32}
    assert kept
    found = stored(tmp_path / "out")
    assert {key for key, value in found.items() if value.dtype == torch.float32} == kept


def test_a_base_with_a_missing_or_doubled_tensor_is_refused(tmp_path):
    from safetensors.torch import save_file

    base = save_battery_model("gpt2", tmp_path)
    adapter = save_peft(adapted(base, {"r": 3, "target_modules": ["c_attn"]}), tmp_path / "adapter")
    file = stored(base)
    lacks = {key: value for key, value in file.items() if "h.1.mlp.c_fc.weight" not in key}
    save_file(lacks, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"no value for 1 weights.*h\.1\.mlp\.c_fc"):
        merge(adapter, tmp_path / "out", base=str(base))
    twice = {
        **file,
        "h.0.ln_1.weight": torch.ones(36),
        "transformer.h.0.ln_1.weight": torch.ones(36),
    }
    save_file(twice, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="two tensors for"):
        merge(adapter, tmp_path / "out", base=str(base))

"""Weight files against safetensors' own reader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from glasstune.core.tensor_writer import TensorWriter
from glasstune.core.tensors import stored_tensors, tensor_metadata
from glasstune.export.shards import ShardWriter, Slot, shard_names

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(4).bfloat16(),
    "c": torch.tensor(3.5).half(),
    "d": torch.arange(7),
    "e": torch.randn(2, 3, 4).transpose(0, 2),
    "f": torch.empty(0, 3),
}


def _layout(names):
    return {
        name: (tuple(TENSORS[name].shape), str(TENSORS[name].dtype).removeprefix("torch."))
        for name in names
    }


@pytest.mark.parametrize("order", ["abcdef", "fedcba", "cafebd"])
def test_any_order_reads_back(tmp_path, order):
    writer = TensorWriter(tmp_path / "x.safetensors", _layout("abcdef"), {"format": "pt", "k": "v"})
    for name in order:
        writer.write(name, TENSORS[name])
    writer.close()
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name], value)
    assert tensor_metadata(tmp_path / "x.safetensors") == {"format": "pt", "k": "v"}
    assert list(stored_tensors(tmp_path / "x.safetensors")) == list(TENSORS)


def test_what_was_not_planned_is_refused(tmp_path):
    writer = TensorWriter(tmp_path / "x.safetensors", _layout("ab"))
    with pytest.raises(ValueError, match="planned as"):
        writer.write("a", torch.randn(5, 3))
    with pytest.raises(ValueError, match="planned as"):
        writer.write("a", torch.randn(3, 5).half())
    writer.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="twice"):
        writer.write("a", TENSORS["a"])
    assert writer.left == {"b"}
    writer.close(sync=False)


def test_shards_have_an_index_and_none_may_lack_a_tensor(tmp_path):
    slots = {
        name: Slot(shape, dtype, int(name in "def"))
        for name, (shape, dtype) in _layout("abcdef").items()
    }
    writer = ShardWriter(tmp_path, slots)
    for name in "abcde":
        writer.write(name, TENSORS[name])
    with pytest.raises(RuntimeError, match="not written"):
        writer.finish()
    writer.write("f", TENSORS["f"])
    writer.finish()
    assert shard_names(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(load_file(tmp_path / shard_names(2)[0])) == set("abc")
    assert set(load_file(tmp_path / shard_names(2)[1])) == set("def")
    import json

    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["f"] == shard_names(2)[1]
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())


def test_a_failed_write_leaves_no_open_file(tmp_path):
    slots = {name: Slot(shape, dtype, 0) for name, (shape, dtype) in _layout("ab").items()}
    writer = ShardWriter(tmp_path, slots)
    writer.abandon()
    writer.abandon()
    assert shard_names(1) == ["model.safetensors"]
